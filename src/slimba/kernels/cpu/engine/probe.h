// The memory bandwidth of this machine, as the engine's own threads see it.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "buffer.h"
#include "threads.h"

namespace slimba {

// Seconds of each of `repeats` passes over `bytes` of memory with `threads` threads, each of which reads blocks of 1 MB.
inline std::vector<double> read_seconds(const Kernels& kernels, std::int64_t bytes, int threads, int repeats) {
  ThreadPool pool(threads);
  Buffer memory;
  const std::int64_t block = 1 << 18, blocks = bytes / 4 / block;
  memory.at_least(blocks * block);
  pool.run(blocks, [&](std::int64_t i, int) { std::memset(memory.data() + i * block, 0, std::size_t(block) * 4); });
  std::vector<double> seconds;
  std::vector<float> sums(static_cast<std::size_t>(blocks));
  volatile float sink = 0;
  for (int r = 0; r < repeats; ++r) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(blocks, [&](std::int64_t i, int) {
      sums[std::size_t(i)] = 0;
      kernels.read(memory.data() + i * block, block, &sums[std::size_t(i)]);
    });
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    for (const float s : sums) sink = s;
  }
  (void)sink;
  return seconds;
}

}  // namespace slimba
