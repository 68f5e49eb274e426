// shrink for sm_90a, ranks to 128, bf16 or fp16:  u = scale * x A  as in shrink.cuh, without dropout and
// without a second product, by wgmma.  A block owns its rows of u for all of K, so there are no partial sums
// and nobody waits at the end.
//
// Grid     x: row tiles of ROWS tokens, in whole clusters: a block beyond M multiplies zeros and fetches its
//          share.
// Threads  one warpgroup multiplies; one thread of a fifth warp fetches by bulk copies, which fill with zeros
//          what lies beyond a matrix.  Memory takes longer over a stage than the products do, so one is
//          enough.
// Bytes    x once; A once for each cluster: each block fetches a share of its rows for all (multicast).  Of
//          A's rows whole panels of 64 ranks are copied, of which the product takes the first R.
// Sums     float32, over k in order, in the registers of one warpgroup: the same bits on every run.
//
// Timeline of a block (L copies in flight or landed, P products, . these may still run, one group being left
// in flight; a stage is given back to all blocks of the cluster, since each of them writes here):
//   stage 0   L P . L L L P .
//   stage 1   L L P . L L L P
//   stage 2   L L L P . L L L
//   stage 3   L L L L P . L L
#pragma once
#include "../ptx/sm90.cuh"
#include "../tile/store.cuh"
#include "traits.h"

namespace lotr::kernels {

template <class T_, int R_>
struct ShrinkWgmmaTraits {
  using T = T_;
  static constexpr int R = R_, ROWS = SHRINK_WGMMA_ROWS, COLS = SHRINK_WGMMA_COLS;
  static constexpr int PANEL = 64, PANELS = (R + PANEL - 1) / PANEL;  // of ranks, swizzled rows of 128 bytes
  static constexpr int CLUSTER = shrink_wgmma_cluster(R),
                       SHARE = COLS / CLUSTER;  // rows of A that a block fetches
  static constexpr int STAGES = shrink_wgmma_stages(R), BLOCKS = shrink_wgmma_blocks(R);
  static constexpr int WARPS = 4, MULTIPLIERS = 32 * WARPS, THREADS = MULTIPLIERS + 32;

  struct Stage {  // a step along K
    T x[ROWS][COLS];
    T A[PANELS][COLS][PANEL];
  };
  using Output = tile::Shared<T, ROWS, R>;
  struct alignas(1024) Smem {
    union {
      Stage stage[STAGES];
      Output u;  // after the last product
    };
    uint64_t full[STAGES], empty[STAGES];
  };
  static_assert(ROWS == 64 && COLS == PANEL, "a product has 64 rows; a row of x is one of 128 bytes");
  static_assert(SHARE % 8 == 0, "whole patterns of the swizzle");
  static_assert(BLOCKS * (sizeof(Smem) + 1024) <= 228 * 1024, "shared memory of a multiprocessor of sm_90");
};

template <class Traits>
class ShrinkWgmma {
  using T = typename Traits::T;
  using Smem = typename Traits::Smem;
  static constexpr int R = Traits::R, ROWS = Traits::ROWS, COLS = Traits::COLS, STAGES = Traits::STAGES;

 public:
  LOTR_DEVICE ShrinkWgmma(Smem& s, const ShrinkParams& p)
      : s_(s), p_(p), m0_(int(blockIdx.x) * ROWS), steps_(int((p.K + COLS - 1) / COLS)) {}

  // One thread, before the barrier that opens the kernel.
  LOTR_DEVICE void prepare() {
    for (int i = 0; i < STAGES; ++i) {
      ptx::mbarrier_init(&s_.full[i], 1);
      ptx::mbarrier_init(&s_.empty[i], Traits::WARPS * Traits::CLUSTER);
    }
    ptx::fence_mbarrier_init();
  }

  // One thread: x for this block, its share of A for all of the cluster.
  LOTR_DEVICE void fetch(const ptx::TensorMap& x, const ptx::TensorMap& A) {
    const int share = int(ptx::cluster_rank()) * Traits::SHARE;
    Place at;
#pragma unroll 1
    for (int i = 0; i < steps_; ++i, at.advance()) {
      typename Traits::Stage& stage = s_.stage[at.stage];
      uint64_t* full = &s_.full[at.stage];
      ptx::mbarrier_wait(&s_.empty[at.stage], at.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, uint32_t(sizeof(stage)));  // by whomever fetched
      ptx::tma_load_2d(stage.x, &x, i * COLS, m0_, full);
#pragma unroll
      for (int panel = 0; panel < Traits::PANELS; ++panel)
        ptx::tma_load_2d_multicast(stage.A[panel][share], &A, panel * Traits::PANEL, i * COLS + share, full,
                                   (1 << Traits::CLUSTER) - 1);
    }
  }

  // The warpgroup.
  LOTR_DEVICE void multiply() {
    float u[R / 2];
    Place at;
    int last = 0;
#pragma unroll 1
    for (int i = 0; i < steps_; ++i, at.advance()) {
      const auto& stage = s_.stage[at.stage];
      ptx::mbarrier_wait(&s_.full[at.stage], at.parity);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < COLS; k += 16)
        ptx::wgmma<T, R, true>(u, ptx::swizzled_descriptor(&stage.x[0][k]),
                               ptx::swizzled_descriptor_mn(stage.A[0][k], sizeof(stage.A[0])), i + k > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (i > 0) release(last);
      last = at.stage;
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_landed(u);
    ptx::griddepcontrol_launch_dependents();
    store(u);
  }

 private:
  struct Place {
    int stage = 0;
    uint32_t parity = 0;
    LOTR_DEVICE void advance() {
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
  };

  // To the fetching threads of all blocks of the cluster.
  LOTR_DEVICE void release(int stage) {
    __syncwarp();
    const uint32_t lane = threadIdx.x % 32;
    if (lane < Traits::CLUSTER) ptx::mbarrier_give_back(&s_.empty[stage], lane);
  }

  LOTR_DEVICE void store(const float (&u)[R / 2]) {
    ptx::barrier_sync(1,
                      Traits::MULTIPLIERS);  // all warps' products have read the stages: u takes their place
    const float scale = p_.scale * p_.dropout.scale;
#pragma unroll
    for (int j = 0; j < R / 8; ++j)
      tile::put(s_.u, int(threadIdx.x) / 32 * 16, 8 * j, {u[4 * j], u[4 * j + 1], u[4 * j + 2], u[4 * j + 3]},
                scale);
    ptx::barrier_sync(1, Traits::MULTIPLIERS);
    tile::store<Traits::MULTIPLIERS>(p_.u, s_.u, m0_, p_.M, 0, p_.r);
  }

  Smem& s_;
  const ShrinkParams& p_;
  const int m0_, steps_;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, Traits::BLOCKS)
    shrink_wgmma(const __grid_constant__ ptx::TensorMap x, const __grid_constant__ ptx::TensorMap A,
                 const __grid_constant__ ShrinkParams p) {
  ShrinkWgmma<Traits> block(ptx::shared_storage<typename Traits::Smem>(), p);
  if (threadIdx.x == 0) block.prepare();
  ptx::cluster_sync();
  ptx::griddepcontrol_wait();
  if (threadIdx.x < Traits::MULTIPLIERS) {
    block.multiply();
  } else {
    if (threadIdx.x == Traits::MULTIPLIERS) block.fetch(x, A);
    __syncwarp();
  }
  ptx::cluster_sync();  // no block may leave while another still arrives at its mbarriers
}

}  // namespace lotr::kernels
