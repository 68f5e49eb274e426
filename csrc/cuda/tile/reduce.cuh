// Sums over blocks without float atomics: every block of a group stores its partial sum, the block that
// arrives last adds all of them in the order of their index.  Who is last does not change the result, so the
// same inputs always give the same bits; nobody waits, so nothing depends on which blocks run at the same
// time.
//
// A partial sum is stored as the accumulators lie in registers: 32 lanes x 16 bytes for each 16 x 8 tile, so
// that both the store and the load are whole lines whatever the rank is.
//
// The counter of arrivals goes back to zero with the last of them: nothing has to be cleared between
// launches, replays of a graph included.
#pragma once
#include "../params.h"
#include "../ptx/sm80.cuh"

namespace lotr::tile {

constexpr int FRAGMENT = 32 * 4;  // floats of a 16 x 8 accumulator tile
constexpr int IN_FLIGHT = 16;     // loads of 16 bytes that a thread issues before it adds the first

LOTR_DEVICE void store_partial(float* to, const float (&d)[4]) {
  ptx::store(reinterpret_cast<float4*>(to) + threadIdx.x % 32, float4{d[0], d[1], d[2], d[3]});
}

LOTR_DEVICE void add_partial(float (&d)[4], const float4& v) {
  d[0] += v.x, d[1] += v.y, d[2] += v.z, d[3] += v.w;
}

// v = sum over i < splits of the fragments at from + i * stride.  each(f) calls f(v, index) for the warp's
// fragments, COUNT at most; the index is their place in a partial sum.  Splits outside and fragments inside:
// every element is still added in the order of the splits, but the loads need not wait for one another.
template <int COUNT, class Each>
LOTR_DEVICE void sum_partials(const float* from, int64_t stride, int splits, Each each) {
  constexpr int AHEAD = COUNT >= IN_FLIGHT ? 1 : IN_FLIGHT / COUNT;  // splits at a time
  float4 in[AHEAD][COUNT];
  each([&](float (&v)[4], int) { v[0] = v[1] = v[2] = v[3] = 0.f; });
#pragma unroll 1
  for (int split = 0; split < splits; split += AHEAD) {
#pragma unroll
    for (int a = 0; a < AHEAD; ++a)
      if (split + a < splits)
        each([&](float (&)[4], int index) {
          const float* fragment = from + (split + a) * stride + index * FRAGMENT;
          in[a][index] = ptx::load_cg(reinterpret_cast<const float4*>(fragment) + threadIdx.x % 32);
        });
#pragma unroll
    for (int a = 0; a < AHEAD; ++a)
      if (split + a < splits) each([&](float (&v)[4], int index) { add_partial(v, in[a][index]); });
  }
}

// Counts this block in; true for the last of `count`.  By one thread, after a barrier behind the block's
// stores; whoever reads the others' partial sums needs a fence after it, and a barrier.
LOTR_DEVICE bool arrive(int32_t* arrived, int count) {
  ptx::fence_device();
  return ptx::atomic_wrap(arrived, count - 1) == count - 1;
}

// Called by the whole block after its partial stores.  True in the block that comes last of `count`, which
// then sees the stores of all the others.  `last` is a word of shared memory for the block's use.
LOTR_DEVICE bool arrive_last(int32_t* arrived, int count, int& last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::store_shared(&last, int(arrive(arrived, count)));
    ptx::fence_device();
  }
  __syncthreads();
  return ptx::load_shared(&last) != 0;
}

}  // namespace lotr::tile
