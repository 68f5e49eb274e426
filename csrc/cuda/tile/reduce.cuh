// Sums over blocks without float atomics: every block of a group stores its partial sum, the block that
// arrives last adds all of them in the order of their index.  Which block is last does not change the result,
// so the same inputs always give the same bits.  No block waits, so nothing depends on which blocks run at
// the same time.
//
// A partial sum is stored as the accumulators lie in registers: 32 lanes x 16 bytes for each 16 x 8 tile, a
// fragment, so that both the store and the load are whole lines whatever the rank is.  Fragments go by rows,
// then by the rank, as far as the matrix goes; whichever warp made one, any may sum it.
//
// Where the splits of a tile are one cluster of blocks (sm_90 and later) they run at the same time and may
// wait for one another: each puts its partial sum into its own shared memory, and sums a share of the tile
// from all of them, in the same order.  Where there are no clusters and all blocks of the grid run at the
// same time (a cooperative launch), they wait at the counter until it is zero again, and each sums a share of
// the tile from memory: one block alone would get a small part of what L2 delivers.
//
// The counter of arrivals goes back to zero with the last of them: nothing has to be cleared between
// launches, replays of a graph included.
#pragma once
#include "../params.h"
#include "../ptx/cluster.cuh"
#include "../ptx/sm80.cuh"

namespace lotr::tile {

constexpr int FRAGMENT = 32 * 4;  // floats of a 16 x 8 accumulator tile
constexpr int IN_FLIGHT = 16;     // loads of 16 bytes that a thread issues before it adds the first

LOTR_DEVICE void store_partial(float* to, const float (&d)[4]) {
  ptx::store(reinterpret_cast<float4*>(to) + threadIdx.x % 32, float4{d[0], d[1], d[2], d[3]});
}

LOTR_DEVICE void put_partial(float* to, const float (&d)[4]) {  // the same in shared memory
  ptx::store_shared(reinterpret_cast<float4*>(to) + threadIdx.x % 32, float4{d[0], d[1], d[2], d[3]});
}

// v += N times four floats, in order.
template <int N>
LOTR_DEVICE void add_in_order(float (&v)[4], const float4 (&in)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[0] += in[i].x, v[1] += in[i].y, v[2] += in[i].z, v[3] += in[i].w;
}

// done(fragment, its sum) for the fragments of a partial sum, of which split i's begins at from + i * STRIDE.
// WARPS warps of the block share them, all or neighbours, FRAGMENTS at a time.  Splits outside and fragments
// inside: every element is added in the order of the splits, but the loads need not wait for one another.
// Splits beyond the last are read as zero, which changes no bit of a sum.
template <int WARPS, int FRAGMENTS, int STRIDE, int LOADS = IN_FLIGHT, class Done>
LOTR_DEVICE void sum_together(const float* from, int splits, int total, Done done) {
  constexpr int AHEAD = LOADS / FRAGMENTS;
#pragma unroll 1
  for (int first = int(threadIdx.x) / 32 % WARPS; first < total; first += WARPS * FRAGMENTS) {
    float v[FRAGMENTS][4] = {};
    const float4* next = reinterpret_cast<const float4*>(from + first * FRAGMENT) + threadIdx.x % 32;
#pragma unroll 1
    for (int left = splits; left > 0; left -= AHEAD, next += AHEAD * int64_t(STRIDE / 4)) {
      float4 in[FRAGMENTS][AHEAD];
#pragma unroll
      for (int i = 0; i < FRAGMENTS; ++i)
#pragma unroll
        for (int a = 0; a < AHEAD; ++a)
          in[i][a] = ptx::load_cg_if(a < left && first + i * WARPS < total,
                                     next + a * (STRIDE / 4) + i * (WARPS * FRAGMENT / 4));
#pragma unroll
      for (int i = 0; i < FRAGMENTS; ++i) add_in_order(v[i], in[i]);
    }
#pragma unroll
    for (int i = 0; i < FRAGMENTS; ++i)
      if (first + i * WARPS < total) done(first + i * WARPS, v[i]);
  }
}

// The same, with as many fragments together as each warp has, four at most.
template <int WARPS, int STRIDE, class Done>
LOTR_DEVICE void sum_partials(const float* from, int splits, int total, Done done) {
  if (total <= WARPS)
    sum_together<WARPS, 1, STRIDE>(from, splits, total, done);
  else if (total <= 2 * WARPS)
    sum_together<WARPS, 2, STRIDE>(from, splits, total, done);
  else
    sum_together<WARPS, 4, STRIDE>(from, splits, total, done);
}

// The same of this block's share, that of split `own`, where the splits run together; of all else.
template <int WARPS, int STRIDE, class Done>
LOTR_DEVICE void sum_share(const float* from, int splits, int own, bool together, int total, Done done) {
  const int first = together ? total * own / splits : 0;
  const int end = together ? total * (own + 1) / splits : total;
  sum_partials<WARPS, STRIDE>(from + first * FRAGMENT, splits, end - first,
                              [&](int i, const float (&v)[4]) { done(first + i, v); });
}

// done(n, fragment, its sum) for the fragments of PARTS warps' sums in shared memory, part i's from i *
// STRIDE on, in their order; behind a barrier.  Fragment WARPS n + w is warp w's.
template <int WARPS, int PARTS, int STRIDE, class Done>
LOTR_DEVICE void sum_of_warps(const float* parts, int total, Done done) {
#pragma unroll
  for (int n = 0; n < (STRIDE / FRAGMENT + WARPS - 1) / WARPS; ++n) {
    const int fragment = WARPS * n + int(threadIdx.x) / 32;
    if (fragment >= total) break;
    const float4* from = reinterpret_cast<const float4*>(parts + fragment * FRAGMENT) + threadIdx.x % 32;
    float4 in[PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) in[part] = ptx::load_shared(from + part * (STRIDE / 4));
    float v[4] = {};
    add_in_order(v, in);
    done(n, fragment, v);
  }
}

// done(fragment, its sum) for the fragments from begin to end of a cluster's blocks, each of which has its
// partial sum at the same place of its shared memory: between two barriers of the cluster.  In the order of
// the blocks, so with the same bits as from memory.
template <int WARPS, int LOADS = ptx::CLUSTERS ? MOST_OF_CLUSTER : 1, class Done>
LOTR_DEVICE void sum_of_cluster(const float* partial, int blocks, int begin, int end, Done done) {
#pragma unroll 1
  for (int i = begin + int(threadIdx.x) / 32 % WARPS; i < end; i += WARPS) {
    const float4* own = reinterpret_cast<const float4*>(partial + i * FRAGMENT) + threadIdx.x % 32;
    float v[4] = {};
#pragma unroll 1
    for (int block = 0; block < blocks; block += LOADS) {
      float4 in[LOADS];
#pragma unroll
      for (int b = 0; b < LOADS; ++b)
        in[b] = ptx::load_cluster_if(block + b < blocks, own, uint32_t(block + b));
      add_in_order(v, in);
    }
    done(i, v);
  }
}

// Counts this block in; the number of those before it, so count - 1 for the last.  By one thread, after a
// barrier behind the block's stores; before the others' partial sums are read, a fence and a barrier must
// follow.
LOTR_DEVICE int arrive(int32_t* arrived, int count) {
  ptx::fence_device();
  return ptx::atomic_wrap(arrived, count - 1);
}

// The barrier of the whole block, and of THREADS threads of it, the first of which has a multiple of THREADS
// as its number.
struct Block {
  static LOTR_DEVICE void sync() { __syncthreads(); }
  static LOTR_DEVICE bool first() { return threadIdx.x == 0; }
};
template <int ID, int THREADS>
struct Named {
  static LOTR_DEVICE void sync() { ptx::barrier_sync(ID, THREADS); }
  static LOTR_DEVICE bool first() { return threadIdx.x % THREADS == 0; }
};

// Called after the partial stores, by the whole block or by warps of it with a barrier of their own.  Returns
// true in the last of `count` blocks to arrive, or in all of them after the last arrival if they run at the
// same time; the stores of all others are then visible.  `last` is a word of shared memory for this function.
template <class Barrier = Block>
LOTR_DEVICE bool arrive_last(int32_t* arrived, int count, int& last, bool together = false) {
  Barrier::sync();
  if (Barrier::first()) {
    ptx::store_shared(&last, int(arrive(arrived, count) == count - 1 || together));
    if (together)
      ptx::wait_equal(arrived, 0);  // this block has counted itself in, the last brings it to zero
    ptx::fence_device();
  }
  Barrier::sync();
  return ptx::load_shared(&last) != 0;
}

}  // namespace lotr::tile
