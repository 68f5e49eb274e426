// shrink:  u = scale * drop(x) A          x [M, K], A [K, r], u [M, r]; also du = g F
//          h = core_scale * u core        core [r, r_core], h [M, r_core]; optional, for few tokens
//
// Grid     x: pieces of M (up to SUBS tiles of ROWS tokens), y: pieces of K. A block walks its
//          rectangle of x by steps of COLS columns, in each of them row tile by row tile; its sums
//          stay in registers. There is one piece of K if the row tiles fill the GPU.
// Bytes    x once; A once for each piece of M. With s pieces of K, 4 M r written s times as parts
//          and read s times by sum_parts. plan.h chooses the pieces.
// Sums     float32; over k in the block's order, then over the pieces of K in order (sum_parts.cuh)
//
// Timeline (tile t = step k, row tile m; L copies in flight, P product; a barrier at |):
//
//   x  stage t % STAGES   L L L P |
//   A  slot  k % STAGES   L L L P P P P |
//
// The barrier shows that all warps have finished tile t - 1, so the copy into its stage may start.
// The rows of A are copied with the first row tile of their step and stay for all of them.
#pragma once
#include "../tile/core.cuh"
#include "../tile/mma.cuh"
#include "../tile/pieces.cuh"
#include "../tile/store.cuh"
#include "traits.h"

namespace lotr::kernels {

template <class P, int R_, int ROWS_>
struct ShrinkTraits {
  using Policy = P;
  using T = typename P::T;
  static constexpr int R = R_, ROWS = ROWS_, THREADS = 256;
  static constexpr int COLS = shrink_cols(sizeof(T), R, ROWS), SUBS = shrink_subs(R, ROWS);
  static constexpr int WARP_RANKS = warps_along_rank(R, ROWS), WARP_ROWS = 8 / WARP_RANKS;
  static constexpr int MI = ROWS / (16 * WARP_ROWS), NJ = R / (8 * WARP_RANKS);
  static constexpr int BLOCKS = blocks_of_one_product(R);

  struct Stage {
    tile::Shared<T, ROWS, COLS> x;
    tile::Shared<T, COLS, R> A;
  };
  static constexpr int STAGES = stages_that_fit(sizeof(Stage), 0, 4, shared_budget(BLOCKS));
  union Smem {
    Stage stage[STAGES];
    tile::Shared<T, SUBS * ROWS, R> u;  // after the last product
  };
  static_assert(MI >= 1 && NJ >= 1 && COLS % P::K == 0 && STAGES >= 2 &&
                sizeof(Smem) <= shared_budget(BLOCKS));
};

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, Traits::BLOCKS) shrink(const ShrinkParams p) {
  using P = typename Traits::Policy;
  using Stage = typename Traits::Stage;
  constexpr int THREADS = Traits::THREADS, STAGES = Traits::STAGES;
  constexpr int ROWS = Traits::ROWS, COLS = Traits::COLS;
  constexpr int SUBS = Traits::SUBS, MI = Traits::MI, NJ = Traits::NJ;
  constexpr int WARP_ROWS = Traits::WARP_ROWS, ROW_STEP = 16 * WARP_ROWS;
  auto& sm = ptx::shared_storage<typename Traits::Smem>();
  const int warp = threadIdx.x / 32;
  const int i0 = warp % WARP_ROWS * 16;
  const int j0 = warp / WARP_ROWS * (8 * NJ);
  const int m_block = int(blockIdx.x);
  const int split = int(blockIdx.y);
  const int m_tiles = tile::count_of(p.m_pieces, m_block);
  const int steps = tile::count_of(p.k_pieces, split);
  const int m_begin = ptx::held(tile::begin_of(p.m_pieces, m_block));
  const int k_begin = ptx::held(tile::begin_of(p.k_pieces, split));
  const int64_t m0 = int64_t(m_begin) * ROWS;
  const int64_t height = int64_t(m_tiles) * ROWS;
  const int rows = int(p.M - m0 < height ? p.M - m0 : height);  // of the block, inside the matrix
  ptx::griddepcontrol_wait();
  const tile::Loader<THREADS, decltype(Stage::x)> load_x(p.x, p.M, p.K);
  const tile::Loader<THREADS, decltype(Stage::A)> load_A(p.A, p.K, p.r);

  struct Place {
    int m = 0, step = 0, stage = 0, slot = 0;  // stage of x, slot of A
  };
  const auto advance = [&](Place& place) {
    place.stage = tile::stage_after<STAGES>(place.stage);
    if (++place.m < m_tiles) return;
    place.m = 0;
    ++place.step;
    place.slot = tile::stage_after<STAGES>(place.slot);
  };
  Place ahead;
  const auto fetch = [&] {
    if (ahead.step < steps) {
      load_x(sm.stage[ahead.stage].x, m_begin + ahead.m, k_begin + ahead.step);
      if (ahead.m == 0) load_A(sm.stage[ahead.slot].A, k_begin + ahead.step, 0);
      advance(ahead);
    }
    ptx::cp_async_commit();
  };

  float d[SUBS][MI][NJ][4] = {};
  for (int i = 0; i < STAGES - 1; ++i) fetch();
  tile::with_dropout(p.dropout, [&](auto dropout) {
    // One place for each of the two loops, with and without dropout. If they shared one, the
    // compiler would keep the sums in local memory.
    Place now;
    for (; now.step < steps; advance(now)) {
      auto& x = sm.stage[now.stage].x;
      ptx::cp_async_wait<STAGES - 2>();
      if constexpr (decltype(dropout)::value)
        tile::drop<THREADS>(x, p.dropout, m0 + now.m * ROWS, int64_t(k_begin + now.step) * COLS,
                            p.K);
      __syncthreads();
      fetch();
      // With few tokens, as in decoding, only one warp in four has rows.
      if (now.m * ROWS + i0 < rows) {
        // Registers need a constant index, so there is one copy of the product for each row tile.
#pragma unroll
        for (int s = 0; s < SUBS; ++s)
          if (s == now.m)
            tile::warp_product<P, COLS, tile::Order::along_k, tile::Order::across_k>(
                d[s], x, i0, ROW_STEP, sm.stage[now.slot].A, j0);
      }
    }
  });

  // Calls f(sums, first row in the block, first rank) for each 16 x 8 tile inside the matrix.
  const auto each = [&](auto f) {
#pragma unroll
    for (int s = 0; s < SUBS; ++s)
#pragma unroll
      for (int mi = 0; mi < MI; ++mi)
#pragma unroll
        for (int nj = 0; nj < NJ; ++nj) {
          const int row = s * ROWS + i0 + mi * ROW_STEP;
          const int rank = j0 + 8 * nj;
          if (row < rows && rank < p.r) f(d[s][mi][nj], row, rank);
        }
  };
  if (p.parts) {
    float* const part = p.parts + (split * p.M + m0) * p.parts_row;
    const tile::SumTiles to{{part, p.parts_row, 1, false}, rows, int(p.parts_row)};
    each([&](const float (&v)[4], int row, int rank) { to.store(row, rank, v); });
  } else {
    const float scale = p.scale * p.dropout.scale;
    __syncthreads();  // until here the last stage may be read; u replaces it
    each([&](const float (&v)[4], int row, int rank) { tile::put(sm.u, row, rank, v, scale); });
    __syncthreads();
    tile::store<THREADS>(p.u, sm.u, m0, m0 + rows, 0, p.r);
    if (p.core_product.core.data)
      tile::apply_core<typename Traits::T, THREADS>(
          p.core_product, m0, rows, p.r,
          [&](int row, int i) { return ptx::to_float(ptx::load_shared(sm.u.at(row, i))); });
  }
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace lotr::kernels
