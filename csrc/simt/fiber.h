// A fiber: one GPU thread's stack and saved registers. x86-64 switches in a dozen instructions of
// assembly; other machines, or LOTR_SIMT_UCONTEXT, use ucontext (about fifty times slower).
#pragma once
#include <cstddef>

#if !defined(LOTR_SIMT_UCONTEXT) && !defined(__x86_64__)
#define LOTR_SIMT_UCONTEXT 1
#endif
#ifndef LOTR_SIMT_UCONTEXT
#define LOTR_SIMT_UCONTEXT 0
#endif
#if LOTR_SIMT_UCONTEXT
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#define LOTR_SIMT_ASAN 1
#else
#define LOTR_SIMT_ASAN 0
#endif

namespace lotr::simt {

struct Fiber {
#if LOTR_SIMT_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  char* stack = nullptr;  // lowest address; null for the fiber that the process started with
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// `entry` runs at the first switch to the fiber. It must call fiber_entered() first and never
// return.
void fiber_prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)());
void fiber_entered();
// Suspends `from`, which is running, and resumes `to`.
void fiber_switch(Fiber& from, Fiber& to);
// Resumes `to`; `from` will not run again.
[[noreturn]] void fiber_leave(Fiber& from, Fiber& to);

// Stacks for `count` fibers of the same size, each above an unmapped page. Blocks reuse them.
class FiberStacks {
 public:
  ~FiberStacks();
  void reserve(size_t count, size_t bytes);
  char* stack(size_t i) const { return base_ + i * stride_ + stride_ - bytes_; }
  size_t bytes() const { return bytes_; }
  bool contains(const void* p) const {
    return size_t(static_cast<const char*>(p) - base_) < count_ * stride_;
  }
  // AddressSanitizer: unpoisons the stacks. A launch that failed left functions that never return.
  void forget_frames();

 private:
  char* base_ = nullptr;
  size_t count_ = 0, bytes_ = 0, stride_ = 0;
};

}  // namespace lotr::simt
