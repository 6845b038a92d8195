// A small thread pool: each thread has a run of consecutive tasks and helps others when it is done; workers spin for a
// moment after a job, then sleep. No OpenMP.
//
// Which thread runs a task is not fixed, so a task's result must not depend on it. Survives fork(): the child starts
// workers of its own at its first job.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace slimba {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Memory that a thread will read first in the job after the next one: a worker that is done with the next job brings it
  // into its cache while it waits. threads() of them, alive until that job; null: nothing is known.
  struct Span {
    const void* data;
    std::int64_t bytes;
    const void* more;  // in another place, such as a second sign plane
    std::int64_t more_bytes;
  };
  void expect(const Span* spans) { expected_ = spans; }

  // While a wanted one lives, jobs follow each other closely, but their last tasks take long: workers that wait for the
  // next job are slower to sleep.
  class Burst {
   public:
    Burst(ThreadPool& pool, bool wanted) : pool_(pool), by_(wanted) { pool_.bursts_ += by_; }
    ~Burst() { pool_.bursts_ -= by_; }
    Burst(const Burst&) = delete;
    Burst& operator=(const Burst&) = delete;

   private:
    ThreadPool& pool_;
    int by_;
  };

  // Calls f(task, thread) for 0 <= task < tasks and 0 <= thread < threads(). One caller at a time; f must not throw.
  template <class F>
  void run(std::int64_t tasks, F&& f) {
    using Plain = std::remove_reference_t<F>;
    run_raw(
        tasks, [](void* context, std::int64_t task, int thread) { (*static_cast<Plain*>(context))(task, thread); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

 private:
  using Function = void (*)(void* context, std::int64_t task, int thread);
  void run_raw(std::int64_t tasks, Function function, void* context);
  void start();

  struct Shared;
  int threads_;
  const Span* expected_ = nullptr;
  std::atomic<int> bursts_{0};
  Shared* shared_ = nullptr;  // leaked in a forked child: its threads do not exist there
  long owner_pid_ = 0;
};

}  // namespace slimba
