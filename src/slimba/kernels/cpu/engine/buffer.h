// A growing block of floats on 64-byte boundaries, with huge pages where Linux offers them; never shrinks.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace slimba {

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  // At least `floats` floats. Contents are lost when it grows; std::bad_alloc when there is no memory.
  float* at_least(std::int64_t floats) {
    if (floats > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      const std::size_t align = floats >= (1 << 20) ? std::size_t(1) << 21 : 64;
      const std::size_t bytes = (std::size_t(floats) * 4 + align - 1) / align * align;
      data_ = static_cast<float*>(std::aligned_alloc(align, bytes));
      if (!data_) throw std::bad_alloc();
      size_ = floats;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      if (align > 64) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
    return data_;
  }

  float* data() { return data_; }
  const float* data() const { return data_; }
  std::int64_t size() const { return size_; }

 private:
  float* data_ = nullptr;
  std::int64_t size_ = 0;
};

}  // namespace slimba
