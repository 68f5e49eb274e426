// What the kernels that walk a rectangle of the large matrix share: the order of the tiles, and sums down its
// columns.
#pragma once
#include "../tile/load.cuh"
#include "../tile/mma.cuh"
#include "../tile/reduce.cuh"
#include "../tile/store.cuh"
#include "traits.h"

namespace lotr::kernels {

// Row tile by row tile, and in each of them column tile by column tile.
struct Walk {
  struct Place {
    int tile = 0, m = 0, n = 0;  // in the walk, of rows, of columns
  };
  int64_t row0, col0;
  int rows, cols, m_tiles, n_tiles;  // of a tile; of the rectangle

  LOTR_DEVICE Walk(int64_t row0, int64_t row1, int rows, int64_t col0, int64_t col1, int cols)
      : row0(row0), col0(col0), rows(rows), cols(cols) {
    const bool empty = row1 <= row0 || col1 <= col0;
    m_tiles = empty ? 0 : int((row1 - row0 + rows - 1) / rows);
    n_tiles = empty ? 0 : int((col1 - col0 + cols - 1) / cols);
  }
  LOTR_DEVICE bool holds(const Place& p) const { return p.m < m_tiles; }
  LOTR_DEVICE int64_t row(const Place& p) const { return row0 + int64_t(p.m) * rows; }
  LOTR_DEVICE int64_t col(const Place& p) const { return col0 + int64_t(p.n) * cols; }
  LOTR_DEVICE void advance(Place& p) const {
    ++p.tile;
    if (++p.n == n_tiles) p.n = 0, ++p.m;
  }
};

// sum[n] [64, R] += x^T v for column tile n of the rectangle, in registers: a warp owns 16 columns and half
// the rank.
template <class Traits>
struct ColumnSums {
  using P = typename Traits::Policy;
  static constexpr int R = Traits::R, SUBS = Traits::SUBS, NJ = R / 16;
  static constexpr int64_t BLOCK = int64_t(SUBS) * 64 * R;  // floats of a block's partial sum
  static_assert(Traits::COLS == 64 && Traits::THREADS == 256);

  float d[SUBS][1][NJ][4] = {};

  static LOTR_DEVICE int i0() { return int(threadIdx.x) / 32 % 4 * 16; }
  static LOTR_DEVICE int j0() { return int(threadIdx.x) / 128 * (R / 2); }

  template <class X, class V>
  LOTR_DEVICE void add(int n, X& x, V& v) {
#pragma unroll
    for (int s = 0; s < SUBS; ++s)  // registers want a constant index: one copy of the product for each
      if (s == n) tile::warp_product<P, X::ROWS, true, true>(d[s], x, i0(), 0, v, j0());
  }

  // Calls f(sum of a 16 x 8 tile, its first row, its first rank, its index) for the tiles inside [row0, row1)
  // x r.
  template <class F>
  LOTR_DEVICE void each(int64_t row0, int64_t row1, int r, F f) {
#pragma unroll
    for (int s = 0; s < SUBS; ++s)
#pragma unroll
      for (int j = 0; j < NJ; ++j) {
        const int64_t row = row0 + 64 * s + i0();
        if (row < row1 && j0() + 8 * j < r) f(d[s][0][j], row, j0() + 8 * j, s * NJ + j);
      }
  }

  // Over the splits of the rows, for tile `group`; true where the sum is complete.
  LOTR_DEVICE bool reduce(const Reduction& sum, int group, int split, int splits, int64_t row0, int64_t row1,
                          int r, int& last) {
    if (splits == 1) return true;
    float* mine =
        sum.partial + group * int64_t(splits) * BLOCK + int(threadIdx.x) / 32 * (SUBS * NJ * tile::FRAGMENT);
    each(row0, row1, r, [&](float (&v)[4], int64_t, int, int index) {
      tile::store_partial(mine + split * BLOCK + index * tile::FRAGMENT, v);
    });
    if (!tile::arrive_last(sum.arrived + group, splits, last)) return false;
    each(row0, row1, r, [&](float (&v)[4], int64_t, int, int index) {
      tile::sum_partials(v, mine + index * tile::FRAGMENT, BLOCK, splits);
    });
    return true;
  }

  // to[row][rank] (+)= scale * sum
  LOTR_DEVICE void store(float* to, int64_t row_stride, int64_t col_stride, int64_t row0, int64_t row1, int r,
                         float scale, bool accumulate) {
    each(row0, row1, r, [&](float (&v)[4], int64_t row, int rank, int) {
      tile::store_float(to, row_stride, col_stride, row, row1, rank, r, v, scale, accumulate);
    });
  }
};

}  // namespace lotr::kernels
