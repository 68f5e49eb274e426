// C [M, N] = A [M, K] W [K, N] in bf16, by pairs of blocks on Hopper: a warpgroup multiplies 64 x 256, a warp
// loads.  W is read as it lies (MN-major); each block loads half of its tile for both.  One group of products
// stays in flight; C is stored by bulk copies, 64 columns at a time.
#pragma once
#include "cuda/ptx/launch.cuh"
#include "cuda/sm90/ptx.cuh"

namespace gemm90 {
using namespace lotr;
using bf16 = __nv_bfloat16;

enum Bug : int {
  none,
  wrong_parity,          // the consumers wait for the phase before
  no_empty_wait,         // the producer overwrites stages in use
  few_bytes,             // expect_tx counts only the own half of W's tile
  released_early,        // a stage is given back before the product has read it
  own_stage_only,        // a stage is given back to the own producer alone
  no_wgmma_wait,         // accumulators read while the product runs
  no_wgmma_fence,        // before the products of a stage
  wrong_panel,           // the next 64 columns of W are looked for in the wrong place
  wrong_major,           // W's tile is taken for K-major
  uninitialised,         // an mbarrier without init
  no_init_fence,         // after the inits
  fence_too_early,       // the last barrier at which the other block arrives is initialised after it
  misaligned_tile,       // a swizzled tile off its 1024 bytes
  extra_arrival,         // more than the barrier was set up for
  multicast_outside,     // to a block that the cluster has not
  no_cluster_sync,       // before the first copy to the other block
  no_last_cluster_sync,  // a block exits while the other still writes to it
  divergent_at_the_end,  // a warp comes to the cluster's barrier while one of its lanes still loads
  exit_in_flight,        // a block exits with a copy on its way
  no_proxy_fence,        // between the stores to a tile and the bulk copy that reads it
  no_store_wait,         // before a tile that is being stored is written again
};

constexpr int BM = 64, BN = 256, BK = 64, PANELS = BN / 64, STAGES = 3, THREADS = 128 + 32, READERS = 4 * 2;

struct alignas(1024) Smem {
  struct {
    bf16 a[BM][BK];
    bf16 w[PANELS][BK][64];
  } stage[STAGES];
  bf16 out[64][64];
  uint64_t full[STAGES], empty[STAGES];
};

struct Params {
  int K;
  int bug;
};

LOTR_DEVICE void produce(Smem& s, const ptx::TensorMap& A, const ptx::TensorMap& W, const Params& p) {
  const int rank = int(blockIdx.x) % 2, m0 = int(blockIdx.x) * BM, n0 = int(blockIdx.y) * BN;
  for (int i = 0; i * BK < p.K; ++i) {
    auto& stage = s.stage[i % STAGES];
    uint64_t* full = &s.full[i % STAGES];
    if (p.bug != no_empty_wait) ptx::mbarrier_wait(&s.empty[i % STAGES], (i / STAGES & 1) ^ 1);
    const uint32_t w = p.bug == few_bytes ? sizeof stage.w / 2 : sizeof stage.w;
    ptx::mbarrier_arrive_expect_tx(full, sizeof stage.a + w);
    ptx::tma_load_2d(p.bug == misaligned_tile ? stage.a[1] : stage.a[0], &A, i * BK, m0, full);
    for (int panel = 2 * rank; panel < 2 * rank + 2; ++panel)
      ptx::tma_load_2d_multicast(stage.w[panel], &W, n0 + 64 * panel, i * BK, full,
                                 p.bug == multicast_outside ? 7 : 3);
  }
  if (p.bug == exit_in_flight) ptx::tma_load_2d(s.stage[0].a, &A, 0, m0, &s.full[0]);
}

LOTR_DEVICE void release(Smem& s, int stage, const Params& p) {
  __syncwarp();
  const unsigned lane = threadIdx.x % 32;
  if (lane < 2)
    ptx::mbarrier_arrive_cluster(&s.empty[stage], p.bug == own_stage_only ? blockIdx.x % 2 : lane);
  if (threadIdx.x == 0 && p.bug == extra_arrival) ptx::mbarrier_arrive_cluster(&s.empty[stage], 0);
}

// d's 64 columns from 64 panel on, to shared memory and from there to C.
LOTR_DEVICE void store_panel(Smem& s, const ptx::TensorMap& C, const float (&d)[BN / 2], int panel,
                             const Params& p) {
  const int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4, pair = t % 4 * 2;
  if (t == 0 && p.bug != no_store_wait) ptx::bulk_wait_read<0>();
  ptx::barrier_sync(1, 128);
  for (int j = 0; j < 8; ++j)
    for (int h = 0; h < 2; ++h) {
      const int at = panel * 32 + j * 4 + h * 2, r = row + 8 * h;
      ptx::store_shared(reinterpret_cast<uint32_t*>(&s.out[r][8 * (j ^ r % 8) + pair]),
                        ptx::bit_cast<uint32_t>(__floats2bfloat162_rn(d[at], d[at + 1])));
    }
  if (p.bug != no_proxy_fence) ptx::fence_proxy_async();
  ptx::barrier_sync(1, 128);
  if (t != 0) return;
  ptx::tma_store_2d(&C, int(blockIdx.y) * BN + 64 * panel, int(blockIdx.x) * BM, s.out);
  ptx::bulk_commit();
}

LOTR_DEVICE void consume(Smem& s, const ptx::TensorMap& C, const Params& p) {
  const int steps = (p.K + BK - 1) / BK;
  float d[BN / 2] = {};
  for (int i = 0; i < steps; ++i) {
    auto& stage = s.stage[i % STAGES];
    ptx::mbarrier_wait(&s.full[i % STAGES], (i / STAGES & 1) ^ (p.bug == wrong_parity));
    if (p.bug != no_wgmma_fence) ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < BK; k += 16) {
      const uint64_t a = ptx::swizzled_descriptor(&stage.a[0][k]);
      if (p.bug == wrong_major)
        ptx::wgmma<bf16>(d, a, ptx::swizzled_descriptor(&stage.w[0][0][k]));
      else
        ptx::wgmma<bf16, ptx::Major::mn>(
            d, a,
            ptx::swizzled_descriptor_mn(&stage.w[0][k], p.bug == wrong_panel ? 1024 : sizeof stage.w[0]));
    }
    ptx::wgmma_commit();
    if (p.bug == released_early) release(s, i % STAGES, p);
    ptx::wgmma_wait<1>();
    if (i > 0 && p.bug != released_early) release(s, (i - 1) % STAGES, p);
  }
  if (p.bug != no_wgmma_wait) ptx::wgmma_wait<0>();
  ptx::wgmma_landed(d);
  release(s, (steps - 1) % STAGES, p);
#pragma unroll
  for (int panel = 0; panel < PANELS; ++panel) store_panel(s, C, d, panel, p);
  if (threadIdx.x == 0) ptx::bulk_wait_all();
  ptx::wgmma_wait<0>();
}

__global__ void __launch_bounds__(THREADS, 1)
    kernel(const __grid_constant__ ptx::TensorMap A, const __grid_constant__ ptx::TensorMap W,
           const __grid_constant__ ptx::TensorMap C, const Params p) {
  Smem& s = ptx::shared_storage<Smem>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      if (p.bug != uninitialised || i != 1) ptx::mbarrier_init(&s.full[i], 1);
      if (p.bug == fence_too_early) ptx::fence_mbarrier_init();
      ptx::mbarrier_init(&s.empty[i], READERS);
    }
    if (p.bug != fence_too_early && p.bug != no_init_fence) ptx::fence_mbarrier_init();
  }
  if (p.bug == no_cluster_sync)
    __syncthreads();
  else
    ptx::cluster_sync();
  if (threadIdx.x < 128)
    consume(s, C, p);
  else if (threadIdx.x == 128)
    produce(s, A, W, p);
  if (p.bug != divergent_at_the_end) __syncwarp();
  if (p.bug != no_last_cluster_sync) ptx::cluster_sync();
}

inline void run(bf16* C, const bf16* A, const bf16* W, int M, int N, const Params& p,
                ptx::stream_t stream = nullptr) {
  const auto map = [](const bf16* a, int rows, int cols) {
    return ptx::tensor_map_2d(a, uint32_t(rows), uint32_t(cols), uint32_t(cols), 64);
  };
  const dim3 grid(unsigned((M + 2 * BM - 1) / (2 * BM) * 2), unsigned((N + BN - 1) / BN));
  ptx::launch<kernel>({grid, dim3(THREADS), sizeof(Smem), stream, dim3(2, 1, 1), "gemm_sm90"}, map(A, M, p.K),
                      map(W, p.K, N), map(C, M, N), p);
}

}  // namespace gemm90
