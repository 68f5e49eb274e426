// Blocks that run at the same time hand rows to each other: part [m] = the squares of x [m, 64], by a maker;
// twice [m] = 2 part [m] and y [m] = the sums of twice [m], by two more blocks.  All three draw tickets from
// a counter, makers first; flags hold the number of the launch, so that nothing is cleared between launches.
#pragma once
#include "cuda/ptx/sm80.cuh"
#include "wait_relaxed.cuh"
#include "warp_sum.cuh"

namespace handoff {
using namespace lotr;

enum Bug : int {
  none,
  no_release,           // a maker never sets its flag
  relaxed_wait,         // the flag is read without acquire
  release_first,        // the flag is set before the other threads have stored
  no_barrier,           // between the thread that waited and those that read
  users_first,          // whoever waits draws its ticket before the one it waits for
  no_epoch,             // flags of the launch before count
  last_maker_releases,  // for all, with no more than a relaxed counter between them
  flag_overwritten,     // two makers release one word, the second has not acquired the first
};

constexpr int ROWS = 4, COLS = 64;  // a thread for each column

struct Params {
  const float* x;       // [ROWS, COLS]
  float *part, *twice;  // [ROWS, COLS]
  float* y;             // [ROWS]
  int32_t* sync;        // [4 + 2 ROWS]: tickets drawn, launches, blocks done, makers done, flags
  int bug;
};

struct Smem {
  int ticket;
  float sum[COLS / 32];
};

// The thread that signals row m of its stage.
LOTR_DEVICE void signal(const Params& p, int32_t* flags, int m, int epoch) {
  if (p.bug == no_release) return;
  if (p.bug == last_maker_releases) {
    if (ptx::atomic_add(p.sync + 3, 1) == ROWS - 1)
      for (int i = 0; i < ROWS; ++i) ptx::store_release(flags + i, epoch);
  } else if (p.bug == flag_overwritten && m % 2) {
    wait_relaxed(flags + m - 1, epoch);
    ptx::store_release(flags + m - 1, epoch + 100);
  } else {
    ptx::store_release(flags + m, epoch);
  }
}

LOTR_DEVICE void wait(const Params& p, const int32_t* flags, int m, int epoch) {
  if (p.bug == relaxed_wait)
    wait_relaxed(flags + m, epoch);
  else if (p.bug == flag_overwritten)
    ptx::wait_equal(flags + m / 2 * 2, epoch + 100);
  else
    ptx::wait_equal(flags + m, epoch);
}

__global__ void __launch_bounds__(COLS) kernel(const Params p) {
  Smem& s = ptx::shared_storage<Smem>();
  const int t = threadIdx.x, epoch = p.bug == no_epoch ? 1 : ptx::load(p.sync + 1) + 1;
  int32_t *made = p.sync + 4, *doubled = made + ROWS;
  __syncthreads();
  for (;;) {
    if (t == 0) s.ticket = ptx::atomic_add(p.sync, 1);
    __syncthreads();
    int ticket = s.ticket;
    __syncthreads();
    if (ticket >= 3 * ROWS) break;
    if (p.bug == users_first) ticket = 3 * ROWS - 1 - ticket;
    const int m = ticket % ROWS;
    if (ticket < ROWS) {
      if (t == 0 && p.bug == release_first) signal(p, made, m, epoch);
      const float x = ptx::load_nc(p.x + m * COLS + t);
      ptx::store(p.part + m * COLS + t, x * x);
      __syncthreads();
      if (t == 0 && p.bug != release_first) signal(p, made, m, epoch);
    } else if (ticket < 2 * ROWS) {
      if (t == 0) wait(p, made, m, epoch);
      if (p.bug != no_barrier) __syncthreads();
      ptx::store(p.twice + m * COLS + t, 2 * ptx::load_cg(p.part + m * COLS + t));
      __syncthreads();
      if (t == 0) ptx::store_release(doubled + m, epoch);
    } else {
      if (t == 0) ptx::wait_equal(doubled + m, epoch);
      __syncthreads();
      // part comes from a block that this one has not waited for: handed on by the one in between
      const float v = ptx::load_cg(p.twice + m * COLS + t) - ptx::load_cg(p.part + m * COLS + t);
      const float sum = warp_sum(v);
      if (t % 32 == 0) ptx::store_shared(&s.sum[t / 32], sum);
      __syncthreads();
      if (t == 0) ptx::store(p.y + m, 2 * (ptx::load_shared(&s.sum[0]) + ptx::load_shared(&s.sum[1])));
    }
  }
  if (t == 0 && ptx::atomic_add_acq_rel(p.sync + 2, 1) == int(gridDim.x) - 1) {  // nobody will draw again
    for (int i : {0, 2, 3}) ptx::store(p.sync + i, 0);
    ptx::store(p.sync + 1, epoch);
  }
}

inline void run(const Params& p, int blocks, ptx::stream_t stream = nullptr) {
  ptx::launch({dim3(unsigned(blocks)), dim3(COLS), sizeof(Smem), stream, dim3(1, 1, 1), "handoff"}, kernel,
              p);
}

}  // namespace handoff
