// y [M] = the sums of the squares of the rows of x [M, K], a block for each row: plain shared memory,
// shuffles, barriers of the block and named ones, and the bugs that go with them.
#pragma once
#include "cuda/ptx/sm80.cuh"

namespace block {
using namespace lotr;

enum Bug : int {
  none,
  uninitialised,         // shared memory that nothing has written
  no_barrier,            // between the warps' sums and their reader
  no_syncwarp,           // between a lane's store and its neighbour's load
  shared_bounds,         // one element too far
  divergent_shuffle,     // half a warp shuffles, half waits elsewhere
  shuffle_outside_mask,  // reads a lane that its mask leaves out
  early_return,          // before a barrier
  barrier_skipped,       // by one warp
  plain_sum,             // all warps add to one number
  one_output,            // all blocks store to one place
  reads_neighbour,       // what another block of the launch stores
  named_skipped,         // one of the two warps does not come
  named_count,           // they disagree on the number of threads
  too_many_threads,      // a launch that a GPU refuses
  misaligned_load,       // 16 bytes at a 4-byte address
};

constexpr int THREADS = 128, WARPS = THREADS / 32;

struct Smem {
  float exchange[WARPS][32];
  float part[WARPS + 1];
  float half;
};

struct Params {
  float* y;        // [M]
  const float* x;  // [M, K], K a multiple of 4
  int K;
  int bug;
};

// The sum over the warp, after an exchange between neighbours that changes nothing.
LOTR_DEVICE float warp_total(Smem& s, float v, const Params& p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* mine = s.exchange[warp];
  const int at = p.bug == shared_bounds && warp == WARPS - 1 ? lane + int(sizeof(Smem) / 4) : lane;
  ptx::store_shared(mine + at, v);
  if (p.bug != no_syncwarp) __syncwarp();
  v = 0.5f * (v + ptx::load_shared(&mine[lane ^ 1]));
  if (p.bug == divergent_shuffle && lane >= 16) {
    __syncwarp();
    return v;
  }
  if (p.bug == shuffle_outside_mask && lane < 16) return __shfl_xor_sync(0xffffu, v, 16);
  for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
  return v;
}

__global__ void __launch_bounds__(THREADS) kernel(Params p) {
  Smem& s = ptx::shared_storage<Smem>();
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  if (p.bug == early_return && t >= p.K / 4) return;
  if (t == 0) s.half = 0;
  __syncthreads();
  float v = 0;
  for (int k = 4 * t; k < p.K; k += 4 * THREADS) {
    const float* from = p.x + size_t(blockIdx.x) * p.K + k + (p.bug == misaligned_load ? 1 : 0);
    const float4 f = ptx::load(reinterpret_cast<const float4*>(from));
    v += f.x * f.x + f.y * f.y + f.z * f.z + f.w * f.w;
  }
  v = warp_total(s, v, p);
  if (lane == 0) s.part[warp] = v;
  if (lane == 0 && p.bug == plain_sum) s.half += v;
  if (warp < 2 && !(p.bug == named_skipped && warp == 1))  // warps 0 and 1 alone
    ptx::barrier_sync(1, p.bug == named_count && warp == 1 ? THREADS : 64);
  if (t == 0 && p.bug != plain_sum) s.half = s.part[0] + s.part[1];
  if (p.bug != no_barrier && !(p.bug == barrier_skipped && warp == 3)) __syncthreads();
  if (t != 1) return;
  float sum = s.half + s.part[2] + s.part[3];
  if (p.bug == plain_sum) sum = s.half;
  if (p.bug == uninitialised) sum += s.part[WARPS];
  if (p.bug == reads_neighbour && blockIdx.x > 0) sum += 0.f * ptx::load(p.y + blockIdx.x - 1);
  ptx::store(p.y + (p.bug == one_output ? 0 : blockIdx.x), sum);
}

inline void run(const Params& p, int M, ptx::stream_t stream = nullptr) {
  const dim3 threads(p.bug == too_many_threads ? 1056 : THREADS);
  ptx::launch<kernel>({dim3(unsigned(M)), threads, sizeof(Smem), stream, dim3(1, 1, 1), "block"}, p);
}

}  // namespace block
