// factor_grad:  D += drop(x)^T v          x [M, K], v [M, r], D [K, r] float32;   dA += x^T k, Q = g^T u
//
// Grid     x: pieces of K (up to SUBS tiles of COLS columns of x), y: pieces of M.
//          A block walks its rectangle of x row tile by row tile, its sums stay in registers.  At rank 16 the
//          tiles are narrow, so that there is one piece of M where the strips of columns fill the GPU.
// Bytes    x once; v once for each piece of K; D in and out; with s pieces of M that are no cluster, 4 K R
//          written s times and read s times.  plan/factor_grad.h balances the pieces of K against s.
// Sums     float32; over m in the block's order; of narrow tiles, each warp over its part of every tile's
//          rows, then over these warps in order, in shared memory; then over the pieces of M in order
//          (tile/reduce.cuh), where they are a cluster by all its blocks, each a share of the tile, from
//          shared memory; without clusters, where the whole grid runs at the same time, so too, from L2.
//
// Timeline (tile t = row tile m, column tile n; L copies in flight, P product; a barrier at |):
//   x  stage t % STAGES   L L L P |
//   v  slot  m % STAGES   L L L P P P P |
// v is copied with the first column tile of its row tile, into slot m % STAGES, and stays for all column
// tiles.  A copy is issued STAGES - 1 tiles ahead, hence at most STAGES - 1 row tiles ahead: the slot's last
// reader is done.  D is loaded behind the first copies where a block has its part for itself: it comes from
// memory while the products are made.
#pragma once
#include "rectangle.cuh"

namespace lotr::kernels {

template <class P, int R_, int COLS_>
struct FactorGradTraits {
  using Policy = P;
  using T = typename P::T;
  static constexpr int R = R_, THREADS = 256;
  static constexpr int COLS = COLS_, ROWS = factor_grad_rows(sizeof(T), R, COLS);
  static constexpr int WARP_ROWS = sums_warps_along_rows(R, COLS);
  static constexpr int SUBS = factor_grad_subs(R, COLS), BLOCKS = blocks_of_one_product(R);

  struct Stage {
    tile::Shared<T, ROWS, COLS> x;
    tile::Shared<T, ROWS, R> v;
  };
  static constexpr int STAGES = stages_that_fit(sizeof(Stage), 0, 5, shared_budget(BLOCKS));
  static constexpr bool CLUSTERS = ptx::CLUSTERS && factor_grad_in_cluster(R);
  struct Smem {
    union {
      Stage stage[STAGES];
      struct {                                                         // after the last product
        float partial[SUBS * COLS * R];                                // for the cluster or this block alone
        float parts[WARP_ROWS > 1 ? WARP_ROWS * SUBS * COLS * R : 4];  // of the warps along the rows
      };
    };
    int last;
  };
  static_assert(STAGES >= 2 && sizeof(Smem) <= shared_budget(BLOCKS));
};

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, Traits::BLOCKS) factor_grad(const FactorGradParams p) {
  constexpr int THREADS = Traits::THREADS, STAGES = Traits::STAGES, ROWS = Traits::ROWS, COLS = Traits::COLS;
  using Stage = typename Traits::Stage;
  auto& sm = ptx::shared_storage<typename Traits::Smem>();
  const int k_block = int(blockIdx.x), m_block = int(blockIdx.y);
  const Walk<STAGES> walk(p.m_pieces, m_block, p.k_pieces, k_block);
  ptx::griddepcontrol_wait();
  const tile::Loader<THREADS, decltype(Stage::x)> load_x(p.x, p.M, p.K);
  const tile::Loader<THREADS, decltype(Stage::v)> load_v(p.v, p.M, p.r);

  typename Walk<STAGES>::Place ahead;
  auto fetch = [&] {
    if (walk.holds(ahead)) {
      const int row = walk.row(ahead);
      load_x(sm.stage[ahead.stage].x, row, walk.col(ahead));
      if (ahead.n == 0) load_v(sm.stage[ahead.slot].v, row, 0);
      walk.advance(ahead);
    }
    ptx::cp_async_commit();
  };

  const int64_t first = int64_t(walk.n_begin) * COLS, owned = int64_t(walk.n_tiles) * COLS;
  const int64_t cols = p.K - first < owned ? p.K - first : owned;
  const tile::Floats D{p.D + first * p.D_row, p.D_row, p.D_col, cols, p.r};

  using Sums = ColumnSums<Traits>;
  Sums sums;
  // What is added to, where a block has it for itself: it comes while the products are made.
  constexpr bool EARLY = Traits::WARP_ROWS > 1;
  float before[Sums::OWN][4] = {};
  for (int i = 0; i < STAGES - 1; ++i) fetch();
  if (EARLY && p.splits == 1 && p.accumulate)
    Sums::each_own(cols, p.r, [&](int col, int rank, int n) { D.load(before[n], col, rank); });
  tile::with_dropout(p.dropout, [&](auto dropout) {
    typename Walk<STAGES>::Place here;
    for (; walk.holds(here); walk.advance(here)) {
      auto& x = sm.stage[here.stage].x;
      ptx::cp_async_wait<STAGES - 2>();
      if constexpr (decltype(dropout)::value)
        tile::drop<THREADS>(x, p.dropout, int64_t(walk.row(here)) * ROWS, int64_t(walk.col(here)) * COLS,
                            p.K);
      __syncthreads();
      sums.add(here.n, x, sm.stage[here.slot].v);
      fetch();  // its arithmetic while the products end
    }
  });
  ptx::griddepcontrol_launch_dependents();

  const auto store = [&](const float (&v)[4], int col, int rank) {
    D.add(col, rank, v, p.dropout.scale, p.accumulate != 0);
  };
  const bool cluster = Traits::CLUSTERS && p.cluster;
  if (EARLY || p.splits == 1 || cluster)
    __syncthreads();  // the last stage may still be read: the sums take its place
  if (EARLY && p.splits == 1) {
    sums.each_of_block(cols, p.r, sm.parts, [&](const float (&v)[4], int col, int rank, int n) {
      D.store(col, rank, v, p.dropout.scale, before[n]);
    });
  } else if (p.splits == 1 || cluster) {
    sums.put_partials(sm.partial, cols, p.r, sm.parts);
    if (cluster)
      ptx::cluster_sync();
    else
      __syncthreads();
    sums.each_sum_of_cluster(sm.partial, m_block, p.splits, cols, p.r, store);
    if (cluster) ptx::cluster_sync();  // a block stays until the others have read its sums
  } else {
    const bool together = ptx::TOGETHER && p.together;
    sums.store_partials(p.sum, k_block, m_block, p.splits, cols, p.r, sm.parts);
    if (!tile::arrive_last(p.sum.arrived + k_block, p.splits, sm.last, together)) return;
    sums.each_sum(p.sum, k_block, m_block, p.splits, together, cols, p.r, store);
  }
}

}  // namespace lotr::kernels
