// The pool's workers; see threads.h.
#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(_WIN32)
#include <process.h>
#define getpid _getpid
#else
#include <unistd.h>
#endif

namespace slimba {

namespace {

constexpr auto kSpin = std::chrono::microseconds(60);  // longer than the serial work between two jobs of a token
constexpr auto kBurstSpin = std::chrono::microseconds(1000);  // longer than a job's last task in a prompt

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

// Every thread owns a run of consecutive tasks, so that it reads memory in order and claims without meeting others; a
// thread that is done takes from the others' runs, from the front too.
//
// A job is open while `generation` is odd. A worker says that it is busy and then looks at the generation again: the caller
// closes the job first and waits until nobody is busy second, so no worker can touch a closed job. Who sleeps through a
// job is not waited for. Flags and runs have cache lines of their own: with many threads one counter would be the slowest
// part of a job.
struct ThreadPool::Shared {
  std::mutex mutex;
  std::condition_variable wake;
  int sleepers = 0;
  bool stop = false;
  std::vector<std::thread> workers;

  struct alignas(64) Run {
    std::atomic<std::int64_t> next{0};
    std::int64_t end = 0;
  };
  struct alignas(64) Flag {
    std::atomic<bool> busy{false};
  };
  std::vector<Run> runs;    // one a thread
  std::vector<Flag> flags;  // the same; the caller's is not used

  alignas(64) std::atomic<std::uint64_t> generation{0};
  alignas(64) Function function = nullptr;
  void* context = nullptr;
  const Span* expected = nullptr;

  const std::atomic<int>& bursts;

  Shared(int threads, const std::atomic<int>& bursts)
      : runs(std::size_t(threads)), flags(std::size_t(threads)), bursts(bursts) {}

  void deal(std::int64_t tasks) {
    const std::int64_t n = std::int64_t(runs.size());
    for (std::int64_t i = 0; i < n; ++i) {
      runs[std::size_t(i)].next.store(tasks * i / n, std::memory_order_relaxed);
      runs[std::size_t(i)].end = tasks * (i + 1) / n;
    }
  }

  void claim(int thread) {
    const int n = int(runs.size());
    for (int i = 0; i < n; ++i) {
      Run& run = runs[std::size_t((thread + i) % n)];
      if (i && run.next.load(std::memory_order_relaxed) >= run.end) continue;  // a look costs others less than a claim
      for (std::int64_t task; (task = run.next.fetch_add(1)) < run.end;) function(context, task, thread);
    }
  }

  void work(int thread) {
    std::uint64_t seen = 0;
    while (wait_for_job(seen)) {
      Span span = {nullptr, 0, nullptr, 0};
      std::atomic<bool>& busy = flags[std::size_t(thread)].busy;
      busy.store(true);
      if (generation.load() == seen) {
        claim(thread);
        if (expected) span = expected[thread];
      }
      busy.store(false);
      fetch(span.data, span.bytes, seen);
      fetch(span.more, span.more_bytes, seen);
    }
  }

  // Into the second-level cache, until there is a new job
  void fetch(const void* data, std::int64_t bytes, std::uint64_t seen) const {
    const char* at = static_cast<const char*>(data);
    for (std::int64_t i = 0; i < bytes && generation.load() <= seen + 1; i += 1024)
      for (std::int64_t k = 0; k < 1024; k += 64) __builtin_prefetch(at + i + k, 0, 2);
  }

  // True with the generation of an open job in `seen`, false when the pool stops.
  bool wait_for_job(std::uint64_t& seen) {
    const auto fresh = [&] {
      const std::uint64_t now = generation.load();
      if (now == seen || now % 2 == 0) return false;
      seen = now;
      return true;
    };
    const auto start = std::chrono::steady_clock::now();
    for (auto waited = start - start; waited < kSpin || (waited < kBurstSpin && bursts.load(std::memory_order_relaxed));
         waited = std::chrono::steady_clock::now() - start) {
      for (int i = 0; i < 32; ++i) {
        if (fresh()) return true;
        if (waited < kSpin) relax();
        else std::this_thread::yield();  // a core that others want is theirs
      }
    }
    std::unique_lock<std::mutex> lock(mutex);
    ++sleepers;
    bool got = false;
    wake.wait(lock, [&] { return stop || (got = fresh()); });
    --sleepers;
    return got;
  }
};

ThreadPool::ThreadPool(int threads) : threads_(threads < 1 ? 1 : threads) {}

ThreadPool::~ThreadPool() {
  if (!shared_ || owner_pid_ != long(getpid())) return;
  {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    shared_->stop = true;
  }
  shared_->wake.notify_all();
  for (auto& worker : shared_->workers) worker.join();
  delete shared_;
}

void ThreadPool::start() {
  shared_ = new Shared(threads_, bursts_);
  owner_pid_ = long(getpid());
  for (int i = 1; i < threads_; ++i) shared_->workers.emplace_back([shared = shared_, i] { shared->work(i); });
}

void ThreadPool::run_raw(std::int64_t tasks, Function function, void* context) {
  if (threads_ == 1 || tasks <= 1) {
    for (std::int64_t task = 0; task < tasks; ++task) function(context, task, 0);
    return;
  }
  if (!shared_ || owner_pid_ != long(getpid())) start();
  Shared& s = *shared_;
  s.deal(tasks);
  s.function = function;
  s.context = context;
  s.expected = expected_;
  bool asleep;
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    s.generation.fetch_add(1);
    asleep = s.sleepers > 0;
  }
  if (asleep) s.wake.notify_all();
  s.claim(0);
  s.generation.fetch_add(1);
  int spins = 0;
  for (Shared::Flag& flag : s.flags) {
    for (; flag.busy.load(); ++spins) {
      if (spins < 4096) relax();
      else std::this_thread::yield();
    }
  }
}

}  // namespace slimba
