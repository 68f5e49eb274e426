// y [M, N] = x [M, K] W [K, N] + u [M, 16] F [N, 16]^T in bf16, by clusters of two blocks on Hopper: two
// warpgroups multiply 64 x 128 each, a third fetches.  W is read as it lies (MN-major), each block fetching
// half of its tile for both; u is an operand in registers; one group of products stays in flight.
#pragma once
#include "cuda/ptx/sm90.cuh"

namespace pair {
using namespace lotr;
using bf16 = __nv_bfloat16;

enum Bug : int {
  none,
  wrong_panel,            // the next 64 columns of W are looked for in the wrong place
  wrong_major,            // W's tile is taken for K-major
  registers_changed,      // u's registers are reused while the product that reads them runs
  read_in_flight,         // accumulators are read with a group in flight
  released_early,         // a stage is given back while the latest group still reads it
  own_stage_only,         // a stage is given back to the own producer alone
  cta_wait,               // the producer does not wait with acquire.cluster
  few_bytes,              // expect_tx counts only the own half of W's tile
  no_last_cluster_sync,   // a block exits while the other still writes to it
  exit_in_flight,         // a block exits with a copy on its way
  multicast_outside,      // to a block that the cluster has not
  registers_kept,         // the fetching warpgroup gives none back
  registers_of_one_warp,  // one warp of it does
  registers_wrong_way,    // setmaxnreg.dec to more than there are
  fence_too_early,        // the last barrier that other blocks arrive at is initialised after it
  divergent_at_the_end,   // a warp comes to the cluster's barrier while one of its lanes still fetches
};

constexpr int BM = 128, BN = 128, BK = 64, R = 16, STAGES = 3, THREADS = 384, PANELS = BN / 64;

struct alignas(1024) Smem {
  struct {
    bf16 x[BM][BK];
    bf16 w[PANELS][BK][64];  // or F's tile, [BN][64]
  } stage[STAGES];
  uint64_t full[STAGES], empty[STAGES];
};

struct Params {
  bf16* y;            // [M, N]
  const uint32_t* u;  // [M, R] in pairs
  int M, N, K;
  int bug;
};

LOTR_DEVICE void produce(Smem& s, const ptx::TensorMap& X, const ptx::TensorMap& W, const ptx::TensorMap& F,
                         const Params& p) {
  const int rank = int(ptx::cluster_rank()), m0 = int(blockIdx.x) * BM, n0 = int(blockIdx.y) * BN,
            steps = (p.K + BK - 1) / BK;
  const uint16_t both = p.bug == multicast_outside ? 7 : 3;
  for (int i = 0; i <= steps; ++i) {
    auto& stage = s.stage[i % STAGES];
    uint64_t* full = &s.full[i % STAGES];
    const uint32_t parity = (i / STAGES & 1) ^ 1;
    if (p.bug == cta_wait)
      ptx::mbarrier_wait(&s.empty[i % STAGES], parity);
    else
      ptx::mbarrier_wait_cluster(&s.empty[i % STAGES], parity);
    const uint32_t w = p.bug == few_bytes ? sizeof stage.w / 2 : sizeof stage.w;
    if (i == steps) {  // F, half of its rows by each block
      ptx::mbarrier_arrive_expect_tx(full, w);
      ptx::tma_load_2d_multicast(stage.w[rank], &F, 0, n0 + 64 * rank, full, both);
    } else {
      ptx::mbarrier_arrive_expect_tx(full, sizeof stage.x + w);
      ptx::tma_load_2d(stage.x, &X, i * BK, m0, full);
      ptx::tma_load_2d_multicast(stage.w[rank], &W, n0 + 64 * rank, i * BK, full, both);
    }
  }
  if (p.bug == exit_in_flight)
    ptx::tma_load_2d(s.stage[(steps + 1) % STAGES].x, &X, 0, m0, &s.full[(steps + 1) % STAGES]);
}

LOTR_DEVICE void release(Smem& s, int stage, const Params& p) {
  __syncwarp();
  const unsigned lane = threadIdx.x % 32;
  if (lane < 2)
    ptx::mbarrier_arrive_cluster(&s.empty[stage], p.bug == own_stage_only ? ptx::cluster_rank() : lane);
}

LOTR_DEVICE void consume(Smem& s, const Params& p) {
  const int group = threadIdx.x / 128, t = threadIdx.x % 128, m0 = int(blockIdx.x) * BM,
            n0 = int(blockIdx.y) * BN;
  const int row = m0 + 64 * group + t / 32 * 16 + t % 32 / 4, col = t % 4 * 2, steps = (p.K + BK - 1) / BK;
  float d[BN / 2];
  for (int i = 0; i < steps; ++i) {
    auto& stage = s.stage[i % STAGES];
    ptx::mbarrier_wait_cluster(&s.full[i % STAGES], i / STAGES & 1);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < BK; k += 16) {
      const uint64_t x = ptx::swizzled_descriptor(&stage.x[64 * group][k]);
      if (p.bug == wrong_major)
        ptx::wgmma<bf16, BN>(d, x, ptx::swizzled_descriptor(&stage.w[0][0][k]), i + k > 0);
      else
        ptx::wgmma<bf16, BN, ptx::Major::mn>(
            d, x,
            ptx::swizzled_descriptor_mn(&stage.w[0][k], p.bug == wrong_panel ? 1024 : sizeof stage.w[0]),
            i + k > 0);
    }
    ptx::wgmma_commit();
    if (p.bug == released_early) release(s, i % STAGES, p);
    ptx::wgmma_wait<1>();
    if (i > 0 && p.bug != released_early) release(s, (i - 1) % STAGES, p);
  }
  uint32_t u[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = row + i % 2 * 8;
    u[i] = m < p.M ? ptx::load_nc(p.u + m * (R / 2) + (col + i / 2 * 8) / 2) : 0u;
  }
  ptx::mbarrier_wait_cluster(&s.full[steps % STAGES], steps / STAGES & 1);
  ptx::wgmma_fence();
  ptx::wgmma<bf16, BN>(d, u, ptx::swizzled_descriptor(s.stage[steps % STAGES].w), true);
  ptx::wgmma_commit();
  if (p.bug == registers_changed) u[0] = 0;
  if (p.bug == read_in_flight)
    ptx::wgmma_wait<1>();
  else
    ptx::wgmma_wait<0>();
  ptx::wgmma_landed(d);
  for (int i = steps - 1; i <= steps; ++i) release(s, i % STAGES, p);
#pragma unroll
  for (int j = 0; j < BN / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = row + 8 * h, n = n0 + 8 * j + col;
      if (m < p.M && n < p.N)
        ptx::store(reinterpret_cast<__nv_bfloat162*>(p.y + m * p.N + n),
                   __floats2bfloat162_rn(d[4 * j + 2 * h], d[4 * j + 2 * h + 1]));
    }
  ptx::wgmma_wait<0>();
}

__global__ void __launch_bounds__(THREADS, 1)
    kernel(const __grid_constant__ ptx::TensorMap X, const __grid_constant__ ptx::TensorMap W,
           const __grid_constant__ ptx::TensorMap F, const Params p) {
  Smem& s = ptx::shared_storage<Smem>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      ptx::mbarrier_init(&s.full[i], 1);
      if (p.bug == fence_too_early) ptx::fence_mbarrier_init();
      ptx::mbarrier_init(&s.empty[i], 8 * 2);  // the warps that multiply, of both blocks
    }
    if (p.bug != fence_too_early) ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  if (threadIdx.x >= 256) {
    if (p.bug == registers_wrong_way)
      ptx::registers_fewer<232>();
    else if (p.bug == registers_of_one_warp ? threadIdx.x < 288 : p.bug != registers_kept)
      ptx::registers_fewer<40>();
    if (threadIdx.x == 256) produce(s, X, W, F, p);
    if (p.bug != divergent_at_the_end) __syncwarp();
  } else {
    if (p.bug == registers_of_one_warp)
      ptx::registers_more<168>();
    else
      ptx::registers_more<232>();
    consume(s, p);
  }
  if (p.bug != no_last_cluster_sync) ptx::cluster_sync();
}

inline void run(const bf16* x, const bf16* W, const bf16* F, const Params& p,
                ptx::stream_t stream = nullptr) {
  const auto map = [](const bf16* a, int rows, int cols, int box) {
    return ptx::tensor_map_2d(a, uint32_t(rows), uint32_t(cols), uint32_t(cols), uint32_t(box));
  };
  const dim3 grid(unsigned((p.M + 2 * BM - 1) / (2 * BM) * 2), unsigned((p.N + BN - 1) / BN));
  ptx::launch({grid, dim3(THREADS), sizeof(Smem), stream, dim3(2, 1, 1), "pair"}, kernel,
              map(x, p.M, p.K, BM), map(W, p.K, p.N, BK), map(F, p.N, R, 64), p);
}

}  // namespace pair
