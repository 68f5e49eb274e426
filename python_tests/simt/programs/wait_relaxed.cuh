// A bug for programs whose blocks wait for one another: ptx::wait_equal without acquire.
#pragma once
#include "cuda/ptx/sm80.cuh"

namespace lotr {

LOTR_DEVICE void wait_relaxed(const int32_t* p, int32_t value) {
#ifdef __CUDACC__
  int32_t now;
  do asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(p) : "memory");
  while (now != value);
#else
  simt::wait_equal(p, value, false, simt::Site::here());
#endif
}

}  // namespace lotr
