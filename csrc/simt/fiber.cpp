// Implements fiber.h. AddressSanitizer must be told of every switch, before and after it: announce
// and arrived, which do nothing in other builds.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if LOTR_SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

// A fiber's frames must be on its stack. (A module that is loaded into Python gets this from
// ASAN_OPTIONS.)
extern "C" const char* __asan_default_options() {
  return "detect_stack_use_after_return=0:detect_leaks=0";
}
#endif

namespace lotr::simt {
namespace {

constexpr size_t PAGE = 4096;

#if LOTR_SIMT_ASAN
Fiber* previous = nullptr;  // the fiber before the latest switch
// The bounds of the process's stack, set at the first switch.
const void* process_stack = nullptr;
size_t process_stack_bytes = 0;

// is_last: `from` will not run again.
void announce(Fiber& from, Fiber& to, bool is_last) {
  previous = &from;
  const void* bottom = to.stack ? to.stack : process_stack;
  const size_t bytes = to.stack ? to.stack_bytes : process_stack_bytes;
  __sanitizer_start_switch_fiber(is_last ? nullptr : &from.fake_stack, bottom, bytes);
}
// self: the fiber that runs again, or null for one that starts.
void arrived(Fiber* self) {
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(self ? self->fake_stack : nullptr, &bottom, &bytes);
  if (previous && !previous->stack) {
    process_stack = bottom;
    process_stack_bytes = bytes;
  }
}
#else
void announce(Fiber&, Fiber&, bool) {}
void arrived(Fiber*) {}
#endif

}  // namespace

#if !LOTR_SIMT_UCONTEXT
extern "C" void lotr_simt_switch(void** save, void* load);
asm(R"(
.text
.type lotr_simt_switch,@function
.hidden lotr_simt_switch
.globl lotr_simt_switch
lotr_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lotr_simt_switch,.-lotr_simt_switch
)");
#endif

void fiber_prepare(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  fiber.stack = stack;
  fiber.stack_bytes = bytes;
  fiber.fake_stack = nullptr;
#if LOTR_SIMT_ASAN
  // The outermost functions of this stack's last thread never returned, so their frames are still
  // poisoned.
  const size_t outer = bytes < 4 * PAGE ? bytes : 4 * PAGE;
  __asan_unpoison_memory_region(stack + bytes - outer, outer);
#endif
#if LOTR_SIMT_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  // Six saved registers, the return address, and one word that aligns the stack as after a call.
  void** top = reinterpret_cast<void**>(stack + bytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  fiber.stack_pointer = top - 8;
#endif
}

void fiber_entered() {
  arrived(nullptr);
}

void fiber_switch(Fiber& from, Fiber& to) {
  announce(from, to, /*is_last=*/false);
#if LOTR_SIMT_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  lotr_simt_switch(&from.stack_pointer, to.stack_pointer);
#endif
  arrived(&from);
}

void fiber_leave(Fiber& from, Fiber& to) {
  announce(from, to, /*is_last=*/true);
#if LOTR_SIMT_UCONTEXT
  setcontext(&to.context);
#else
  lotr_simt_switch(&from.stack_pointer, to.stack_pointer);
#endif
  std::abort();
}

FiberStacks::~FiberStacks() {
  if (base_) munmap(base_, count_ * stride_);
}

void FiberStacks::reserve(size_t count, size_t bytes) {
  if (count <= count_ && bytes == bytes_) return;
  if (base_) munmap(base_, count_ * stride_);
  bytes_ = bytes;
  stride_ = bytes + PAGE;
  count_ = count;
  void* p = mmap(nullptr, count_ * stride_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    base_ = nullptr;
    count_ = 0;
    throw std::runtime_error("no memory for the stacks of " + std::to_string(count) + " threads");
  }
  base_ = static_cast<char*>(p);
  // A process may have 65,530 mappings and each guard page makes two, so with many stacks only some
  // get one.
  const size_t step = 1 + count_ / 16384;
  for (size_t i = 0; i < count_; i += step) mprotect(base_ + i * stride_, PAGE, PROT_NONE);
#if LOTR_SIMT_ASAN
  forget_frames();
#endif
}

void FiberStacks::forget_frames() {
#if LOTR_SIMT_ASAN
  for (size_t i = 0; i < count_; ++i) __asan_unpoison_memory_region(stack(i), bytes_);
#endif
}

}  // namespace lotr::simt
