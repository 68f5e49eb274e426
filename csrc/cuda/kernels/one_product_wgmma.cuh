// shrink and factor_grad for sm_90a, ranks to 128, bf16 or fp16, without dropout, by wgmma:
//
//   shrink        u = scale * x A      as in shrink.cuh, without a second product
//   factor_grad   D (+)= x^T v         as in factor_grad.cuh
//
// A block computes 64 complete rows of u, or of D, which belong to 64 columns of x.  It walks along K, or
// down M, so there are no partial sums and no reduction over blocks.  Below, `factor` is A or v; a step of
// the walk takes 64 of its rows.
//
// Grid     x: tiles of x across the walk, in whole clusters: a block beyond the matrix multiplies zeros and
//          fetches its share.
// Threads  one warpgroup multiplies; one thread of a fifth warp fetches by bulk copies, which fill with zeros
//          what lies beyond a matrix.  Memory takes longer over a stage than the products do, so one is
//          enough.
// Bytes    x once; the factor once for each cluster: each block fetches a share of its rows for all
//          (multicast), in panels of R ranks, at most 64.  D in and out, loaded behind the first copies.
// Sums     float32, in the order of the walk, in the registers of one warpgroup: the same bits on every run.
//
// Timeline of a block of shrink; factor_grad may take two stages at a time (L copies in flight or landed, P
// products, . these may still run, one group being left in flight; a stage is given back to all blocks of the
// cluster, since each of them writes here):
//   stage 0   L P . L L L P .
//   stage 1   L L P . L L L P
//   stage 2   L L L P . L L L
//   stage 3   L L L L P . L L
#pragma once
#include "../ptx/pipeline.cuh"
#include "../tile/store.cuh"
#include "traits.h"

namespace lotr::kernels {

template <class T_, int R_, bool DOWN_>
struct OneProductTraits {
  using T = T_;
  static constexpr bool DOWN = DOWN_;  // the walk: factor_grad's, down x's rows; else along them
  static constexpr int R = R_, ROWS = ONE_PRODUCT_WGMMA_ROWS, COLS = ONE_PRODUCT_WGMMA_COLS;
  // Of ranks; a row of a panel is as long as its swizzle, since the factor is a MN-major operand.
  static constexpr int PANEL = R < 64 ? R : 64, PANELS = R / PANEL;
  static constexpr int CLUSTER = one_product_wgmma_cluster(R),
                       SHARE = ROWS / CLUSTER;  // rows of the factor that a block fetches
  static constexpr int STAGES = one_product_wgmma_stages(R, DOWN), BLOCKS = one_product_wgmma_blocks(R, DOWN);
  static constexpr int TOGETHER = one_product_wgmma_together(R, DOWN);  // steps
  static constexpr int WARPS = 4, MULTIPLIERS = 32 * WARPS, THREADS = MULTIPLIERS + 32;

  struct Stage {  // a step of the walk
    T x[ROWS][COLS];
    T factor[PANELS][ROWS][PANEL];
  };
  using Output = tile::Shared<T, ROWS, R>;
  struct alignas(1024) Smem {
    union {
      Stage stage[STAGES];
      Output u;  // of shrink, after the last product
    };
    ptx::Pipeline<STAGES> ring;
  };
  static_assert(ROWS == 64 && COLS == 64, "a step is 64 long either way; a row of x is one of 128 bytes");
  static_assert(SHARE % 8 == 0, "whole patterns of the swizzle");
  static_assert(STAGES % TOGETHER == 0, "those of steps that go together lie side by side");
  static_assert(BLOCKS * (sizeof(Smem) + 1024) <= 228 * 1024, "shared memory of a multiprocessor of sm_90");
};

template <class Traits>
class OneProduct {
  using T = typename Traits::T;
  using Smem = typename Traits::Smem;
  static constexpr int R = Traits::R, ROWS = Traits::ROWS, COLS = Traits::COLS, STAGES = Traits::STAGES;
  static constexpr int CLUSTER = Traits::CLUSTER, TOGETHER = Traits::TOGETHER;

 public:
  // length: of the walk, K or M, at least 1; steps beyond it are zeros
  LOTR_DEVICE OneProduct(Smem& s, int64_t length)
      : s_(s), steps_(int((length + TOGETHER * ROWS - 1) / (TOGETHER * ROWS)) * TOGETHER) {}

  static LOTR_DEVICE int first() { return int(blockIdx.x) * ROWS; }  // of the block's rows

  // One thread, before the barrier that opens the kernel.
  LOTR_DEVICE void prepare() {
    s_.ring.init(Traits::WARPS * CLUSTER);
    ptx::fence_mbarrier_init();
  }

  // One thread: x for this block, its share of the factor for all of the cluster.
  LOTR_DEVICE void fetch(const ptx::TensorMap& x, const ptx::TensorMap& factor) {
    const int share = int(ptx::cluster_rank()) * Traits::SHARE;
    Place at;
#pragma unroll 1
    for (int i = 0; i < steps_; ++i, at.advance()) {
      typename Traits::Stage& stage = s_.stage[at.stage];
      s_.ring.wait_empty(at);
      uint64_t* full = s_.ring.expect(at, uint32_t(sizeof(stage)));
      ptx::tma_load_2d(stage.x, &x, Traits::DOWN ? first() : i * COLS, Traits::DOWN ? i * ROWS : first(),
                       full);
#pragma unroll
      for (int panel = 0; panel < Traits::PANELS; ++panel)
        ptx::tma_load_2d_multicast(stage.factor[panel][share], &factor, panel * Traits::PANEL,
                                   i * ROWS + share, full, (1 << CLUSTER) - 1);
    }
    s_.ring.drain(at);
  }

  // The warpgroup: d += the block's 64 rows of sums.  Sums that begin as zeros, and a loop that always runs:
  // where a path to the last wait has no product, or sums that nothing has set, ptxas of CUDA 12.4 lets the
  // products run one after another (C7515).
  LOTR_DEVICE void multiply(float (&d)[R / 2]) {
    Place at;
    int last = 0, i = 0;
#pragma unroll 1
    do {
#pragma unroll
      for (int t = 0; t < TOGETHER; ++t) s_.ring.wait_full(at, t);
      ptx::wgmma_fence();
#pragma unroll
      for (int row = 0; row < TOGETHER * ROWS; row += 16) {
        const auto& stage = s_.stage[at.stage + row / ROWS];
        const int k = row % ROWS;
        const uint64_t x = Traits::DOWN ? ptx::swizzled_descriptor_mn(stage.x[k], 0)
                                        : ptx::swizzled_descriptor(&stage.x[0][k]);
        ptx::wgmma<T, R, ptx::Major::mn, Traits::DOWN ? ptx::Major::mn : ptx::Major::k>(
            d, x, ptx::swizzled_descriptor_mn<Traits::PANEL>(stage.factor[0][k], sizeof(stage.factor[0])),
            true);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (i > 0) s_.ring.template release<TOGETHER, CLUSTER>(last);
      last = at.stage;
      at.advance(TOGETHER);
    } while ((i += TOGETHER) < steps_);
    ptx::wgmma_wait<0>();
    ptx::wgmma_landed(d);
    s_.ring.template release<TOGETHER, CLUSTER>(last);
    ptx::griddepcontrol_launch_dependents();
  }

 private:
  using Place = typename ptx::Pipeline<STAGES>::Place;

  Smem& s_;
  const int steps_;
};

// The whole block: begin() and then end(sums) by the warpgroup, before and after its products.
template <class Traits, class Begin, class End>
LOTR_DEVICE void one_product(typename Traits::Smem& s, const ptx::TensorMap& x, const ptx::TensorMap& factor,
                             int64_t length, Begin begin, End end) {
  OneProduct<Traits> block(s, length);
  if (threadIdx.x == 0) block.prepare();
  if (threadIdx.x == Traits::MULTIPLIERS) ptx::prefetch_tensor_map(&x), ptx::prefetch_tensor_map(&factor);
  ptx::cluster_sync_relaxed();
  ptx::griddepcontrol_wait();
  if (threadIdx.x < Traits::MULTIPLIERS) {
    float d[Traits::R / 2] = {};
    begin();
    block.multiply(d);
    end(d);
  } else if (threadIdx.x == Traits::MULTIPLIERS) {
    block.fetch(x, factor);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, Traits::BLOCKS)
    shrink_wgmma(const __grid_constant__ ptx::TensorMap x, const __grid_constant__ ptx::TensorMap A,
                 const __grid_constant__ ShrinkParams p) {
  auto& s = ptx::shared_storage<typename Traits::Smem>();
  constexpr int R = Traits::R, THREADS = Traits::MULTIPLIERS;
  one_product<Traits>(
      s, x, A, p.K, [] {},
      [&](const float (&d)[R / 2]) {
        ptx::barrier_sync(1, THREADS);  // all warps' products have read the stages: u takes their place
        const float scale = p.scale * p.dropout.scale;
#pragma unroll
        for (int j = 0; j < R / 8; ++j)
          tile::put(s.u, int(threadIdx.x) / 32 * 16, 8 * j,
                    {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]}, scale);
        ptx::barrier_sync(1, THREADS);
        tile::store<THREADS>(p.u, s.u, OneProduct<Traits>::first(), p.M, 0, p.r);
      });
}

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, Traits::BLOCKS)
    factor_grad_wgmma(const __grid_constant__ ptx::TensorMap x, const __grid_constant__ ptx::TensorMap v,
                      const __grid_constant__ FactorGradParams p) {
  constexpr int R = Traits::R;
  const tile::Floats D{p.D, p.D_row, p.D_col, p.K, p.r};
  const int64_t row = OneProduct<Traits>::first() + int(threadIdx.x) / 32 * 16;
  float before[R / 8][4] = {};
  // f(rank, its part of a thread's sums) for the ranks that there are
  const auto each = [&](auto f) {
#pragma unroll
    for (int j = 0; j < R / 8; ++j)
      if (8 * j < p.r) f(8 * j, j);
  };
  one_product<Traits>(
      ptx::shared_storage<typename Traits::Smem>(), x, v, p.M,
      [&] {
        if (p.accumulate) each([&](int rank, int j) { D.load(before[j], row, rank); });
      },
      [&](const float (&d)[R / 2]) {
        each([&](int rank, int j) {
          D.store(row, rank, {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]}, p.dropout.scale,
                  before[j]);
        });
      });
}

}  // namespace lotr::kernels
