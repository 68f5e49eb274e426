// C [M, N] = A [M, K] B [N, K]^T in bf16 as Hopper does it: a producer warp issues bulk copies, a warpgroup
// multiplies, mbarriers hand three stages of 64 x 64 tiles to and fro.  And `ring`: blocks of a cluster read
// each other's memory.
#pragma once
#include "cuda/ptx/sm90.cuh"

namespace gemm90 {
using namespace lotr;
using bf16 = __nv_bfloat16;

enum Bug : int {
  none,
  wrong_parity,     // the consumers wait for the phase before
  no_empty_wait,    // the producer overwrites stages in use
  few_bytes,        // expect_tx announces only A's tile
  released_early,   // a stage is given back before the product has read it
  no_wgmma_wait,    // accumulators read while the product runs
  no_wgmma_fence,   // before the products of a stage
  uninitialised,    // an mbarrier without init
  misaligned_tile,  // a swizzled tile off its 1024 bytes
  extra_arrival,    // more than the barrier was set up for
  no_cluster_sync,  // between a store and the neighbour's read
  relaxed_sync,     // there, which orders mbarriers alone
  no_init_fence,    // after the inits
};

constexpr int BM = 64, BN = 64, BK = 64, STAGES = 3, THREADS = 128 + 32;

struct alignas(1024) Smem {
  bf16 a[STAGES][BM][BK];
  bf16 b[STAGES][BN][BK];
  uint64_t full[STAGES], empty[STAGES];
};

struct Params {
  bf16* C;  // [M, N]
  int M, N, K;
  int bug;
};

LOTR_DEVICE void produce(Smem& s, const ptx::TensorMap& A, const ptx::TensorMap& B, const Params& p, int m0,
                         int n0) {
  for (int i = 0; i < (p.K + BK - 1) / BK; ++i) {
    const int stage = i % STAGES, parity = i / STAGES & 1;
    if (p.bug != no_empty_wait) ptx::mbarrier_wait(&s.empty[stage], parity ^ 1);
    const uint32_t bytes = sizeof s.a[stage] + (p.bug == few_bytes ? 0 : sizeof s.b[stage]);
    ptx::mbarrier_arrive_expect_tx(&s.full[stage], bytes);
    ptx::tma_load_2d(p.bug == misaligned_tile ? &s.a[stage][1] : s.a[stage], &A, i * BK, m0, &s.full[stage]);
    ptx::tma_load_2d(s.b[stage], &B, i * BK, n0, &s.full[stage]);
  }
}

LOTR_DEVICE void release(Smem& s, int stage, const Params& p) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&s.empty[stage]);
  if (threadIdx.x == 0 && p.bug == extra_arrival) ptx::mbarrier_arrive(&s.empty[stage]);
}

LOTR_DEVICE void consume(Smem& s, const Params& p, int m0, int n0) {
  float acc[32];
  for (float& v : acc) v = 0;
  for (int i = 0; i < (p.K + BK - 1) / BK; ++i) {
    const int stage = i % STAGES, parity = i / STAGES & 1;
    ptx::mbarrier_wait(&s.full[stage], p.bug == wrong_parity ? parity ^ 1 : parity);
    if (p.bug != no_wgmma_fence) ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < BK; k += 16)
      ptx::wgmma<bf16, 64>(acc, ptx::swizzled_descriptor(&s.a[stage][0][k]),
                           ptx::swizzled_descriptor(&s.b[stage][0][k]), i + k > 0);
    ptx::wgmma_commit();
    if (p.bug == released_early) release(s, stage, p);
    if (p.bug != no_wgmma_wait) ptx::wgmma_wait<0>();
    if (p.bug != released_early) release(s, stage, p);
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < BN / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = m0 + warp * 16 + lane / 4 + h * 8, n = n0 + j * 8 + lane % 4 * 2;
      if (m < p.M && n < p.N)
        ptx::store(reinterpret_cast<__nv_bfloat162*>(p.C + size_t(m) * p.N + n),
                   __floats2bfloat162_rn(acc[j * 4 + 2 * h], acc[j * 4 + 2 * h + 1]));
    }
  if (p.bug == no_wgmma_wait) ptx::wgmma_wait<0>();
}

__global__ void __launch_bounds__(THREADS)
    kernel(const __grid_constant__ ptx::TensorMap A, const __grid_constant__ ptx::TensorMap B, Params p) {
  Smem& s = ptx::shared_storage<Smem>();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      if (p.bug != uninitialised || stage != 1) ptx::mbarrier_init(&s.full[stage], 1);
      ptx::mbarrier_init(&s.empty[stage], 4);
    }
    if (p.bug != no_init_fence) ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
  if (threadIdx.x < 128)
    consume(s, p, m0, n0);
  else if (threadIdx.x == 128)
    produce(s, A, B, p, m0, n0);
}

struct RingSmem {
  int x[32];
};

// out[b][t] = the value of thread t in b's neighbour of a cluster of two
__global__ void __launch_bounds__(32) ring(int* out, int bug) {
  RingSmem& s = ptx::shared_storage<RingSmem>();
  const int t = threadIdx.x;
  ptx::store_shared(&s.x[t], int(blockIdx.x) * 100 + t);
  if (bug == relaxed_sync)
    ptx::cluster_sync_relaxed();
  else if (bug != no_cluster_sync)
    ptx::cluster_sync();
  out[blockIdx.x * 32 + t] = *ptx::cluster_map(&s.x[t], ptx::cluster_rank() ^ 1);
  ptx::cluster_sync();
}

inline void run(const bf16* A, const bf16* B, const Params& p, ptx::stream_t stream = nullptr) {
  const ptx::TensorMap a = ptx::tensor_map_2d(A, p.M, p.K, p.K, BM),
                       b = ptx::tensor_map_2d(B, p.N, p.K, p.K, BN);
  const dim3 grid((p.N + BN - 1) / BN, (p.M + BM - 1) / BM);
  ptx::launch({grid, dim3(THREADS), sizeof(Smem), stream, dim3(1, 1, 1), "gemm_sm90"}, kernel, a, b, p);
}

inline void run_ring(int* out, int bug, ptx::stream_t stream = nullptr) {
  ptx::launch({dim3(4), dim3(32), sizeof(RingSmem), stream, dim3(2, 1, 1), "ring"}, ring, out, bug);
}

}  // namespace gemm90
