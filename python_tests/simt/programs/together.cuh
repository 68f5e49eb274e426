// y [COLS] = the sums over the blocks of the squares of x [blocks, COLS]: a cooperative launch, whose blocks
// store their squares, wait for one another at a counter that the last of them brings back to zero, and sum a
// share of the columns each.  As the kernels do by csrc/cuda/tile/reduce.cuh.
#pragma once
#include "cuda/ptx/sm80.cuh"
#include "wait_relaxed.cuh"

namespace together {
using namespace lotr;

enum Bug : int {
  none,
  not_cooperative,     // the blocks run one after another
  no_fence,            // the squares are not published
  arrives_too_early,   // before the block's other threads have stored
  no_wait,             // for those that come later
  relaxed_wait,        // the counter is read without acquire
  no_barrier,          // between the thread that waited and those that read
  waits_first,         // before it has counted itself in: the counter is still zero
  counter_stays,       // at the number of blocks, in the next launch too
  shares_of_too_many,  // the last columns belong to nobody
};

constexpr int COLS = 64;  // a thread for each

struct Params {
  const float* x;    // [blocks, COLS]
  float* part;       // [blocks, COLS]
  float* y;          // [COLS]
  int32_t* arrived;  // [1], zero at the first launch
  int bug;
};

LOTR_DEVICE void arrive_and_wait(const Params& p, int blocks) {
  if (p.bug == waits_first) ptx::wait_equal(p.arrived, 0);
  if (p.bug != no_fence) ptx::fence_device();
  if (p.bug == counter_stays)
    ptx::atomic_add(p.arrived, 1);
  else
    ptx::atomic_wrap(p.arrived, blocks - 1);
  if (p.bug == relaxed_wait)
    wait_relaxed(p.arrived, 0);
  else if (p.bug == counter_stays)
    ptx::wait_equal(p.arrived, blocks);
  else if (p.bug != no_wait && p.bug != waits_first)
    ptx::wait_equal(p.arrived, 0);
}

__global__ void __launch_bounds__(COLS) kernel(const Params p) {
  const int t = threadIdx.x, block = blockIdx.x, blocks = gridDim.x;
  if (t == 0 && p.bug == arrives_too_early) arrive_and_wait(p, blocks);
  const float x = ptx::load_nc(p.x + block * COLS + t);
  ptx::store(p.part + block * COLS + t, x * x);
  __syncthreads();
  if (t == 0 && p.bug != arrives_too_early) arrive_and_wait(p, blocks);
  if (p.bug != no_barrier) __syncthreads();
  const int shares = blocks + (p.bug == shares_of_too_many);
  if (t < COLS * block / shares || t >= COLS * (block + 1) / shares) return;
  float sum = 0;
  for (int i = 0; i < blocks; ++i) sum += ptx::load_cg(p.part + i * COLS + t);
  ptx::store(p.y + t, sum);
}

inline void run(const Params& p, int blocks, ptx::stream_t stream = nullptr) {
  ptx::launch({dim3(unsigned(blocks)), dim3(COLS), 0, stream, dim3(1, 1, 1), "together", false,
               p.bug != not_cooperative},
              kernel, p);
}

}  // namespace together
