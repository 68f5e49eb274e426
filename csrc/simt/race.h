// The race detector: vector clocks over the kernel's loads and stores, by CUDA's rules.
//
// The kernel's file is compiled with -fsanitize=thread and linked without it, so that the compiler
// calls a __tsan_* hook for every load and store; race_hooks.cpp has the hooks. The executor's
// files are compiled without the flag and report the wrappers' accesses themselves. In other
// builds all of this is empty.
//
// Two accesses are ordered by:
//
//   in a block (or cluster)   program order; block, named and cluster barriers; __syncwarp;
//                             mbarriers, which also order bulk copies into the block.
//                             Not: shuffles, ldmatrix, mma, wgmma.
//   between clusters          nothing: no kernel here passes data from one to another
//   launches                  one after the other
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#ifndef LOTR_SIMT_RACE
#define LOTR_SIMT_RACE 0
#endif

namespace lotr::simt::race {

enum class Use { read, write };

#if LOTR_SIMT_RACE

struct Sync {
  std::vector<uint32_t> clock;  // the latest time of each thread that was released here
};

void begin_launch();
void begin_blocks(uint32_t threads);  // the number of threads that run at the same time
// What a thread does before it releases happens before what another does after it acquires. By the
// thread `first` + i for each bit i of `lanes`.
void release(Sync& sync, uint32_t first, uint32_t lanes = 1);
void acquire(const Sync& sync, uint32_t first, uint32_t lanes = 1);
// By the running thread's wrapper, at its op and site.
void access(const void* p, size_t bytes, Use use);
// By a plain load or store, the instruction at pc.
void access_by_code(uintptr_t p, size_t bytes, Use use, void* pc);
std::string report();  // of the launch so far, empty if clean

// True while instrumented kernel code runs, false inside the executor.
extern bool kernel_code;
struct ExecutorScope {
  ExecutorScope() : before(kernel_code) { kernel_code = false; }
  ~ExecutorScope() { kernel_code = before; }
  bool before;
};
struct KernelScope {
  KernelScope() { kernel_code = true; }
  ~KernelScope() { kernel_code = false; }
};
inline void leave_kernel() {  // a failed thread does not unwind its scopes
  kernel_code = false;
}

#else

struct Sync {};
inline void begin_launch() {}
inline void begin_blocks(uint32_t) {}
inline void release(Sync&, uint32_t, uint32_t = 1) {}
inline void acquire(const Sync&, uint32_t, uint32_t = 1) {}
inline void access(const void*, size_t, Use) {}
inline std::string report() {
  return {};
}
struct ExecutorScope {
  ExecutorScope() {}  // not trivial: no warning about an unused object
};
using KernelScope = ExecutorScope;
inline void leave_kernel() {}

#endif

}  // namespace lotr::simt::race
