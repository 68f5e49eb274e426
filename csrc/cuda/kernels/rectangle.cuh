// What the kernels that walk a rectangle of the large matrix share: the order of the tiles, and sums down its
// columns.
#pragma once
#include "../tile/load.cuh"
#include "../tile/mma.cuh"
#include "../tile/pieces.cuh"
#include "../tile/reduce.cuh"
#include "../tile/store.cuh"
#include "traits.h"

namespace lotr::kernels {

// Row tile by row tile, and in each of them column tile by column tile.
template <int STAGES>
struct Walk {
  struct Place {
    int m = 0, n = 0;         // of rows, of columns
    int stage = 0, slot = 0;  // of its tile, of what goes with its row tile
  };
  int m_begin, n_begin, m_tiles, n_tiles;

  LOTR_DEVICE Walk(const Pieces& m, int m_block, const Pieces& n, int n_block)
      : m_begin(tile::begin_of(m, m_block)),
        n_begin(tile::begin_of(n, n_block)),
        m_tiles(tile::count_of(m, m_block)),
        n_tiles(tile::count_of(n, n_block)) {}
  LOTR_DEVICE bool holds(const Place& p) const { return p.m < m_tiles; }
  // tiles of the whole matrix
  LOTR_DEVICE int row(const Place& p) const { return m_begin + p.m; }
  LOTR_DEVICE int col(const Place& p) const { return n_begin + p.n; }
  LOTR_DEVICE void advance(Place& p) const {
    p.stage = tile::stage_after<STAGES>(p.stage);
    if (++p.n == n_tiles) p.n = 0, ++p.m, p.slot = tile::stage_after<STAGES>(p.slot);
  }
};

// sum[n] [COLS, R] += x^T v for column tile n of the rectangle, in registers.  A warp owns 16 MI columns, and
// the whole rank where its sums are few, so that no two warps read the same part of x; of a narrow tile a
// part of the rows, too, whose sums are added at the end.
template <class Traits>
struct ColumnSums {
  using P = typename Traits::Policy;
  static constexpr int R = Traits::R, SUBS = Traits::SUBS, COLS = Traits::COLS;
  static constexpr int WARP_RANKS = sums_warps_along_rank(R, COLS);
  static constexpr int WARP_ROWS = sums_warps_along_rows(R, COLS);
  static constexpr int WARP_COLS = 8 / (WARP_RANKS * WARP_ROWS);
  static constexpr int MI = COLS / (16 * WARP_COLS), NJ = R / (8 * WARP_RANKS);
  static constexpr int BLOCK = SUBS * COLS * R;  // floats of a block's partial sum
  static_assert(MI >= 1 && NJ >= 1);

  float d[SUBS][MI][NJ][4] = {};

  static LOTR_DEVICE int warp() { return int(threadIdx.x) / 32; }
  static LOTR_DEVICE int i0() { return warp() % WARP_COLS * 16; }
  static LOTR_DEVICE int j0() { return warp() / WARP_COLS % WARP_RANKS * (8 * NJ); }
  // f(sums of column tile n).  Registers need a constant index, so there is one copy of f for each tile where
  // the compiler does not know n.
  template <class F>
  LOTR_DEVICE void at(int n, F f) {
#pragma unroll
    for (int s = 0; s < SUBS; ++s)
      if (s == n) f(d[s]);
  }
  static LOTR_DEVICE int part() { return WARP_ROWS > 1 ? warp() / (8 / WARP_ROWS) : 0; }  // of the rows

  template <class X, class V>
  LOTR_DEVICE void add(int n, X& x, V& v) {
    constexpr int ROWS = X::ROWS / WARP_ROWS;
    at(n, [&](auto& sum) {
      tile::warp_product<P, ROWS, tile::Order::across_k, tile::Order::across_k>(
          sum, tile::rows_from<ROWS>(x, part() * ROWS), i0(), 16 * WARP_COLS,
          tile::rows_from<ROWS>(v, part() * ROWS), j0());
    });
  }

  // The same with a warp's part of v in registers, for all column tiles.
  template <class V>
  using Right = tile::Right<P, V::ROWS / WARP_ROWS, NJ>;
  template <class X, class V>
  LOTR_DEVICE void add_right(int n, X& x, const V& v) {
    static_assert(WARP_ROWS == 1);
    at(n, [&](auto& sum) { tile::warp_product<tile::Order::across_k>(sum, x, i0(), 16 * WARP_COLS, v); });
  }

  // Calls f(sum of a 16 x 8 tile, its first column of the rectangle, its first rank) for the tiles inside
  // cols x r of column tile s, or of all.
  template <class F>
  LOTR_DEVICE void each_of(int s, int64_t cols, int r, F f) {
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
      for (int j = 0; j < NJ; ++j) {
        const int col = COLS * s + i0() + 16 * WARP_COLS * i, rank = j0() + 8 * j;
        if (col < cols && rank < r) f(d[s][i][j], col, rank);
      }
  }
  template <class F>
  LOTR_DEVICE void each(int64_t cols, int r, F f) {
#pragma unroll
    for (int s = 0; s < SUBS; ++s) each_of(s, cols, r, f);
  }

  // The same for the sums of all warps.  parts: shared memory that is no longer read, for the sums of warps
  // along the rows; there f's last argument is the number of the warp's fragment.
  template <class F>
  LOTR_DEVICE void each_of_block(int64_t cols, int r, [[maybe_unused]] float* parts, F f) {
    if constexpr (WARP_ROWS == 1) {
      each(cols, r, [&](const float (&v)[4], int col, int rank) { f(v, col, rank, 0); });
    } else {
      const int ranks = (r + 7) / 8, total = int((cols + 15) / 16) * ranks;
      each(cols, r, [&](float (&v)[4], int col, int rank) {
        tile::put_partial(parts + part() * BLOCK + (col / 16 * ranks + rank / 8) * tile::FRAGMENT, v);
      });
      __syncthreads();
      tile::sum_of_warps<8, WARP_ROWS, BLOCK>(parts, total, [&](int n, int fragment, const float (&v)[4]) {
        f(v, fragment / ranks * 16, fragment % ranks * 8, n);
      });
    }
  }
  // f(first column, first rank, number) for the warp's fragments of each_of_block, before their sums are
  // known.
  static constexpr int OWN = WARP_ROWS == 1 ? 1 : (BLOCK / tile::FRAGMENT + 7) / 8;  // fragments of a warp
  template <class F>
  static LOTR_DEVICE void each_own(int64_t cols, int r, F f) {
    const int ranks = (r + 7) / 8, total = int((cols + 15) / 16) * ranks;
#pragma unroll
    for (int n = 0; n < OWN; ++n) {
      const int fragment = 8 * n + warp();
      if (fragment < total) f(fragment / ranks * 16, fragment % ranks * 8, n);
    }
  }

  LOTR_DEVICE void store_partials(const Reduction& sum, int group, int split, int splits, int64_t cols, int r,
                                  float* parts = nullptr) {
    float* mine = sum.partial + (int64_t(group) * splits + split) * BLOCK;
    const int ranks = (r + 7) / 8;
    each_of_block(cols, r, parts, [&](const float (&v)[4], int col, int rank, int) {
      tile::store_partial(mine + (col / 16 * ranks + rank / 8) * tile::FRAGMENT, v);
    });
  }
  // Those of column tile n alone, a constant, where no two warps share it.
  LOTR_DEVICE void store_partials_of(int n, float* mine, int64_t cols, int r) {
    static_assert(WARP_ROWS == 1);
    const int ranks = (r + 7) / 8;
    each_of(n, cols, r, [&](const float (&v)[4], int col, int rank) {
      tile::store_partial(mine + (col / 16 * ranks + rank / 8) * tile::FRAGMENT, v);
    });
  }
  // To shared memory, for sum_of_cluster.
  LOTR_DEVICE void put_partials(float* mine, int64_t cols, int r, float* parts = nullptr) {
    const int ranks = (r + 7) / 8;
    each_of_block(cols, r, parts, [&](const float (&v)[4], int col, int rank, int) {
      tile::put_partial(mine + (col / 16 * ranks + rank / 8) * tile::FRAGMENT, v);
    });
  }
  // As each_sum, for this block's share of the tiles of its cluster.
  template <class F>
  static LOTR_DEVICE void each_sum_of_cluster(const float* partial, int rank, int blocks, int64_t cols, int r,
                                              F f) {
    const int ranks = (r + 7) / 8, total = int((cols + 15) / 16) * ranks;
    tile::sum_of_cluster<8>(
        partial, blocks, total * rank / blocks, total * (rank + 1) / blocks,
        [&](int fragment, const float (&v)[4]) { f(v, fragment / ranks * 16, fragment % ranks * 8); });
  }
  // f(sum over the splits of a 16 x 8 tile, its first column, its first rank), by whichever warp.  `split` is
  // the block's own; the tiles are all, or where the splits run together this one's share.
  template <class F>
  static LOTR_DEVICE void each_sum(const Reduction& sum, int group, int split, int splits, bool together,
                                   int64_t cols, int r, F f) {
    const float* from = sum.partial + int64_t(group) * splits * BLOCK;
    const int ranks = (r + 7) / 8, total = int((cols + 15) / 16) * ranks;
    tile::sum_share<8, BLOCK>(from, splits, split, together, total, [&](int fragment, const float (&v)[4]) {
      f(v, fragment / ranks * 16, fragment % ranks * 8);
    });
  }
};

}  // namespace lotr::kernels
