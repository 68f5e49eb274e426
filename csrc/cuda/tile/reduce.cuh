// Sums over blocks without float atomics: every block of a group stores its partial sum, the block that
// arrives last adds all of them in the order of their index.  Who is last does not change the result, so the
// same inputs always give the same bits; nobody waits, so nothing depends on which blocks run at the same
// time.
//
// A partial sum is stored as the accumulators lie in registers: 32 lanes x 16 bytes for each 16 x 8 tile, so
// that both the store and the load are whole lines whatever the rank is.
#pragma once
#include "../params.h"
#include "../ptx/sm80.cuh"

namespace lotr::tile {

constexpr int FRAGMENT = 32 * 4;  // floats of a 16 x 8 accumulator tile

LOTR_DEVICE void store_partial(float* to, const float (&d)[4]) {
  ptx::store(reinterpret_cast<float4*>(to) + threadIdx.x % 32, float4{d[0], d[1], d[2], d[3]});
}

// d = sum over i < count of the tiles at from + i * stride
LOTR_DEVICE void sum_partials(float (&d)[4], const float* from, int64_t stride, int count) {
  d[0] = d[1] = d[2] = d[3] = 0.f;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const float4 v = ptx::load_cg(reinterpret_cast<const float4*>(from + i * stride) + threadIdx.x % 32);
    d[0] += v.x, d[1] += v.y, d[2] += v.z, d[3] += v.w;
  }
}

// Called by the whole block after its partial stores.  True in the block that comes last of `count`, which
// then sees the stores of all the others.  `last` is a word of shared memory for the block's use.
LOTR_DEVICE bool arrive_last(int32_t* arrived, int count, int& last) {
  __syncthreads();
  // releases what the block stored before the barrier, acquires what the earlier blocks stored
  if (threadIdx.x == 0) ptx::store_shared(&last, int(ptx::atomic_add_acq_rel(arrived, 1) == count - 1));
  __syncthreads();
  return ptx::load_shared(&last) != 0;
}

}  // namespace lotr::tile
