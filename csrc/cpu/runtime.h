// What the kernels need from outside, without torch headers: torch's thread pool and memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lotr::cpu {

// Runs body(begin, end, context) over [0, tasks) on torch's threads, at least `grain` tasks per
// thread. With one thread, or inside a body, it runs in the calling thread.
void parallel_for(int64_t tasks, int64_t grain, void (*body)(int64_t, int64_t, void*),
                  void* context);

// Threads of that pool.
int64_t threads();

// Bytes of a core's L2 (CPUs have 256 KiB to 2 MiB), 512 KiB if the system does not report it.
int64_t l2_bytes();

// 64-byte aligned memory of the calling thread, reused from call to call up to a cap. Throws
// std::bad_alloc. If a body of parallel_for throws that, its caller gets a std::runtime_error.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <typename T>
  T* get() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
  size_t bytes_;
};

}  // namespace lotr::cpu
