// y [M] = sums of squares of the rows of x [M, K] plus the number of elements above 1, a block for each row;
// total [1] = the sum of y, by the block that arrives last, in the order of the rows.  Plain shared memory,
// shuffles, named barriers, shared and global atomics, and the bugs that go with them.
#pragma once
#include "cuda/ptx/sm80.cuh"
#include "warp_sum.cuh"

namespace sum {
using namespace lotr;

enum Bug : int {
  none,
  uninitialised_counters,  // shared memory used before it was set
  no_barrier,              // between the warps' sums and their reader
  no_syncwarp,             // between a lane's store and its neighbour's load
  shared_bounds,           // one element too far
  divergent_shuffle,       // half a warp shuffles, half waits elsewhere
  shuffle_outside_mask,    // reads a lane that its mask leaves out
  early_return,            // before a barrier
  barrier_skipped,         // by one warp
  plain_counter,           // no atomic on the blocks' counter
  no_fence_before,         // the partial sum is not published
  no_fence_after,          // the last block may read old sums
  fence_after_barrier,     // the readers fence, but not the thread that took the ticket
  ticket_before_barrier,   // the block arrives before its threads have stored
  store_after_ticket,      // the same, in all blocks but the last
  read_only_partials,      // ld.global.nc of what other blocks store
  no_named_arrive,         // the consumers wait for ever
  named_count,             // producers and consumers disagree on the number
  plain_shared_counter,    // no atomic among the threads
  too_many_threads,        // a launch that a GPU refuses
  misaligned_load,         // 16 bytes at a 4-byte address
};

constexpr int THREADS = 128, WARPS = THREADS / 32;

struct Smem {
  float exchange[WARPS][32];
  float part[WARPS];
  int count[8];
  int last;
};

struct Params {
  float* y;          // [M]
  float* total;      // [1]
  int32_t* arrived;  // [1], zero at launch
  const float* x;    // [M, K], K a multiple of 4
  int M, K;
  int bug;
};

// The sum over the warp, after an exchange between neighbours that changes nothing.
LOTR_DEVICE float warp_total(Smem& s, float v, const Params& p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* mine = s.exchange[warp];
  ptx::store_shared(
      mine + (p.bug == shared_bounds && warp == WARPS - 1 ? lane + int(sizeof(Smem) / 4) : lane), v);
  if (p.bug != no_syncwarp) __syncwarp();
  v = 0.5f * (v + ptx::load_shared(&mine[lane ^ 1]));
  if (p.bug == divergent_shuffle) {
    if (lane >= 16) {
      __syncwarp();
      return v;
    }
  }
  if (p.bug == shuffle_outside_mask && lane < 16) return __shfl_xor_sync(0xffffu, v, 16);
  return warp_sum(v);
}

// True in the block that comes last; all of it then sees what the others stored.
LOTR_DEVICE bool arrive_last(Smem& s, const Params& p) {
  if (threadIdx.x == 0) {
    if (p.bug != no_fence_before) ptx::fence_device();
    int before;
    if (p.bug == plain_counter) {
      before = ptx::load(p.arrived);
      ptx::store(p.arrived, before + 1);
    } else {
      before = ptx::atomic_add(p.arrived, 1);
    }
    if (p.bug != no_fence_after && p.bug != fence_after_barrier) ptx::fence_device();
    s.last = before == p.M - 1;
  }
  __syncthreads();
  if (p.bug == fence_after_barrier) ptx::fence_device();
  return s.last;
}

__global__ void __launch_bounds__(THREADS) kernel(Params p) {
  Smem& s = ptx::shared_storage<Smem>();
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  if (p.bug != uninitialised_counters && t < 8) s.count[t] = 0;
  __syncthreads();
  if (p.bug == early_return && t >= p.K / 4) return;

  float v = 0;
  for (int k = 4 * t; k < p.K; k += 4 * THREADS) {
    const int shift = p.bug == misaligned_load ? 1 : 0;
    const float4 f =
        ptx::load_nc(reinterpret_cast<const float4*>(p.x + size_t(blockIdx.x) * p.K + k + shift));
    for (float e : {f.x, f.y, f.z, f.w}) {
      v += e * e;
      if (e > 1.f && p.bug == plain_shared_counter) s.count[lane & 7] += 1;
      if (e > 1.f && p.bug != plain_shared_counter) ptx::atomic_add(&s.count[lane & 7], 1);
    }
  }
  v = warp_total(s, v, p);
  if (lane == 0) s.part[warp] = v;
  // warps 1 to 3 only announce themselves, warp 0 waits for them
  const int threads = p.bug == named_count && warp == 2 ? THREADS / 2 : THREADS;
  if (warp == 0) {
    if (p.bug != no_barrier) ptx::barrier_sync(1, threads);
  } else if (p.bug != no_barrier && !(p.bug == no_named_arrive && warp == 1)) {
    ptx::barrier_arrive(1, threads);
  }
  const auto store_row = [&] {
    float r = 0;
    int n = 0;
    for (int i = 0; i < WARPS; ++i) r += s.part[i];
    for (int i = 0; i < 8; ++i) n += s.count[i];
    ptx::store(p.y + blockIdx.x, r + float(n));
  };
  // the storing thread is not the one that arrives: the barrier between them counts
  const bool late =
      p.bug == ticket_before_barrier || (p.bug == store_after_ticket && int(blockIdx.x) < p.M - 1);
  if (t == 1 && !late) store_row();
  if (!(p.bug == barrier_skipped && warp == 3)) __syncthreads();
  const bool last = arrive_last(s, p);
  if (t == 1 && late) store_row();
  if (last && t == 2) {
    float sum = 0;
    for (int m = 0; m < p.M; ++m)
      sum += p.bug == read_only_partials ? ptx::load_nc(p.y + m) : ptx::load_cg(p.y + m);
    ptx::store(p.total, sum);
  }
}

inline void run(const Params& p, ptx::stream_t stream = nullptr) {
  const dim3 block(p.bug == too_many_threads ? 1056 : THREADS);
  ptx::launch({dim3(p.M), block, sizeof(Smem), stream, dim3(1, 1, 1), "sum"}, kernel, p);
}

}  // namespace sum
