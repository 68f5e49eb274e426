// Shared by the kernels that walk a rectangle of the large matrix: the order of the tiles, and sums
// down the columns.
#pragma once
#include "../tile/load.cuh"
#include "../tile/mma.cuh"
#include "../tile/pieces.cuh"
#include "../tile/store.cuh"
#include "traits.h"

namespace lotr::kernels {

// Row tile by row tile, and in each of them column tile by column tile.
template <int STAGES>
struct Walk {
  struct Place {
    int m = 0, n = 0;         // the row tile and the column tile
    int stage = 0, slot = 0;  // of the tile, and of the operand that belongs to its row tile
  };
  int m_begin, n_begin, m_tiles, n_tiles;

  LOTR_DEVICE Walk(const Pieces& m, int m_block, const Pieces& n, int n_block)
      : m_begin(tile::begin_of(m, m_block)),
        n_begin(tile::begin_of(n, n_block)),
        m_tiles(tile::count_of(m, m_block)),
        n_tiles(tile::count_of(n, n_block)) {}
  LOTR_DEVICE bool holds(const Place& place) const { return place.m < m_tiles; }
  // the tile's place in the matrix
  LOTR_DEVICE int row(const Place& place) const { return m_begin + place.m; }
  LOTR_DEVICE int col(const Place& place) const { return n_begin + place.n; }
  LOTR_DEVICE void advance(Place& place) const {
    place.stage = tile::stage_after<STAGES>(place.stage);
    if (++place.n < n_tiles) return;
    place.n = 0;
    ++place.m;
    place.slot = tile::stage_after<STAGES>(place.slot);
  }
};

// sum[n] [COLS, R] += x^T v for column tile n of the rectangle, in registers. A warp has 16 MI
// columns, and the full rank if its sums are few, so that no two warps read the same part of x.
template <class Traits>
struct ColumnSums {
  using P = typename Traits::Policy;
  static constexpr int R = Traits::R, SUBS = Traits::SUBS, COLS = Traits::COLS;
  static constexpr int WARP_RANKS = warps_along_rank(R, COLS), WARP_COLS = 8 / WARP_RANKS;
  static constexpr int MI = COLS / (16 * WARP_COLS), NJ = R / (8 * WARP_RANKS);
  static_assert(MI >= 1 && NJ >= 1);

  float d[SUBS][MI][NJ][4] = {};

  static LOTR_DEVICE int i0() { return int(threadIdx.x) / 32 % WARP_COLS * 16; }
  static LOTR_DEVICE int j0() { return int(threadIdx.x) / 32 / WARP_COLS * (8 * NJ); }
  // Calls f with the sums of column tile n. Registers need a constant index, so there is one copy
  // of f for each tile if the compiler cannot deduce n.
  template <class F>
  LOTR_DEVICE void with_sums(int n, F f) {
#pragma unroll
    for (int s = 0; s < SUBS; ++s)
      if (s == n) f(d[s]);
  }

  template <class X, class V>
  LOTR_DEVICE void add(int n, X& x, V& v) {
    with_sums(n, [&](auto& sum) {
      tile::warp_product<P, X::ROWS, tile::Order::across_k, tile::Order::across_k>(
          sum, x, i0(), 16 * WARP_COLS, v, j0());
    });
  }

  // The same with v in registers, for all column tiles.
  template <class V>
  using Right = tile::Right<P, V::ROWS, NJ>;
  template <class X, class V>
  LOTR_DEVICE void add_right(int n, X& x, const V& v) {
    with_sums(n, [&](auto& sum) {
      tile::warp_product<tile::Order::across_k>(sum, x, i0(), 16 * WARP_COLS, v);
    });
  }

  // to (+)= scale * sum. The rows of `to` are the columns of the rectangle.
  LOTR_DEVICE void store(const tile::SumTiles& to, float scale) const {
#pragma unroll
    for (int s = 0; s < SUBS; ++s)
#pragma unroll
      for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int j = 0; j < NJ; ++j) {
          const int col = COLS * s + i0() + 16 * WARP_COLS * i;
          const int rank = j0() + 8 * j;
          if (col < to.rows && rank < to.cols) to.accumulate(col, rank, d[s][i][j], scale);
        }
  }
};

// How many of the matrix's `cols` columns are in a block's rectangle.
template <int COLS, class Rectangle>
LOTR_DEVICE int64_t columns_of(const Rectangle& walk, int64_t cols) {
  const int64_t width = int64_t(walk.n_tiles) * COLS;
  const int64_t left = cols - int64_t(walk.n_begin) * COLS;
  return left < width ? left : width;
}

}  // namespace lotr::kernels
