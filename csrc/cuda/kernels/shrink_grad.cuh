// shrink_grad:  k = g F,  Q (+)= g^T u          g [M, N], F [N, r], u [M, r], k [M, r], Q [N, r] float32
//
// Grid     x: blocks of n_per_block columns (up to SUBS tiles of 64), y: blocks of m_per_block tokens.
//          A block reads its rectangle of g once, tile by tile, and uses each tile from both sides: its rows
//          for k, its columns for Q.  F's rows stay in shared memory, Q's sums in registers; k's are written
//          after each row tile.
// Bytes    g once; with s_M x s_N blocks, F s_M times, u s_N times, and as partial sums, written and read,
//          8 R (s_N M + s_M N).  plan.h balances s_M N = s_N M.
// Sums     float32; in the block's order, then over the blocks in order (tile/reduce.cuh).
//
// Timeline (tile t = row tile m, column tile n; L copies in flight, P both products; a barrier at |):
//   g  stage t % STAGES   L L L P |
//   u  slot  m % STAGES   L L L P P P P |
//   k                     . . . + + + w     w: partial sum of k to memory; all are added once, after the
//                                           last tile
// u is copied with the first column tile of its row tile and stays for the others; F [n_per_block, r] comes
// with the first stage and stays to the end.
#pragma once
#include "rectangle.cuh"

namespace lotr::kernels {

template <class P, int R_>
struct ShrinkGradTraits {
  using Policy = P;
  using T = typename P::T;
  static constexpr int R = R_, THREADS = 256, ROWS = 64, COLS = 64;
  static constexpr int SUBS = shrink_grad_subs(sizeof(T), R);

  struct Stage {
    tile::Shared<T, ROWS, COLS> g;
    tile::Shared<T, ROWS, R> u;
  };
  using Factor = tile::Shared<T, COLS, R>;
  using Output = tile::Shared<T, ROWS, R>;
  static constexpr int STAGES = stages_that_fit(sizeof(Stage), SUBS * sizeof(Factor), 4);
  struct Smem {
    Factor F[SUBS];
    union {
      Stage stage[STAGES];
      Output k;  // after the last tile
    };
    int last;
  };
  static_assert(STAGES >= 2 && sizeof(Smem) <= SHARED_BYTES);
};

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, 1) shrink_grad(const ShrinkGradParams p) {
  using P = typename Traits::Policy;
  constexpr int THREADS = Traits::THREADS, STAGES = Traits::STAGES, R = Traits::R, ROWS = Traits::ROWS;
  constexpr int NJ = R / 16, WARP = NJ * tile::FRAGMENT;
  constexpr int64_t TILE = int64_t(ROWS) * R;  // floats of a row tile of k
  auto& sm = ptx::shared_storage<typename Traits::Smem>();
  const int warp = threadIdx.x / 32, i0 = warp % 4 * 16, j0 = warp / 4 * (R / 2);
  const int64_t n_begin = int64_t(blockIdx.x) * p.n_per_block, m_begin = int64_t(blockIdx.y) * p.m_per_block;
  const int64_t n_end = n_begin + p.n_per_block < p.N ? n_begin + p.n_per_block : p.N;
  const int64_t m_end = m_begin + p.m_per_block < p.M ? m_begin + p.m_per_block : p.M;
  const Walk walk(m_begin, m_end, ROWS, n_begin, n_end, Traits::COLS);

  Walk::Place ahead, here;
  auto fetch = [&] {
    if (walk.holds(ahead)) {
      const int64_t m = walk.row(ahead);
      tile::load<THREADS>(sm.stage[ahead.tile % STAGES].g, p.g, m, m_end, walk.col(ahead), n_end);
      if (ahead.n == 0) tile::load<THREADS>(sm.stage[ahead.m % STAGES].u, p.u, m, m_end, 0, p.r);
      walk.advance(ahead);
    }
    ptx::cp_async_commit();
  };

  // partial sums of k: [m blocks][n splits][row tiles of a block][warp]
  const int64_t k_block = p.m_per_block / ROWS * TILE;
  float* k_sums = p.sum_k.partial + int64_t(blockIdx.y) * p.n_splits * k_block + warp * WARP;
  const auto k_wanted = [&](int m, int j) {
    return m_begin + int64_t(m) * ROWS + i0 < m_end && j0 + 8 * j < p.r;
  };

  for (int n = 0; n < walk.n_tiles; ++n)
    tile::load<THREADS>(sm.F[n], p.F, n_begin + int64_t(n) * Traits::COLS, n_end, 0, p.r);
  ColumnSums<Traits> Q;
  float k[1][NJ][4] = {};
  for (int i = 0; i < STAGES - 1; ++i) fetch();
  for (; walk.holds(here); walk.advance(here)) {
    auto& g = sm.stage[here.tile % STAGES].g;
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();
    fetch();
    tile::warp_product<P, Traits::COLS, false, true>(k, g, i0, 0, sm.F[here.n], j0);
    Q.add(here.n, g, sm.stage[here.m % STAGES].u);
    if (here.n == walk.n_tiles - 1) {
#pragma unroll
      for (int j = 0; j < NJ; ++j) {
        if (k_wanted(here.m, j))
          tile::store_partial(k_sums + blockIdx.x * k_block + here.m * TILE + j * tile::FRAGMENT, k[0][j]);
        k[0][j][0] = k[0][j][1] = k[0][j][2] = k[0][j][3] = 0.f;
      }
    }
  }

  if (Q.reduce(p.sum_Q, int(blockIdx.x), int(blockIdx.y), p.m_splits, n_begin, n_end, p.r, sm.last))
    Q.store(p.Q, p.Q_row, p.Q_col, n_begin, n_end, p.r, 1.f, p.accumulate != 0);

  if (tile::arrive_last(p.sum_k.arrived + blockIdx.y, p.n_splits, sm.last)) {
    for (int m = 0; m < walk.m_tiles; ++m) {
#pragma unroll
      for (int j = 0; j < NJ; ++j) {
        if (k_wanted(m, j))
          tile::sum_partials(k[0][j], k_sums + m * TILE + j * tile::FRAGMENT, k_block, p.n_splits);
        tile::put(sm.k, i0, j0 + 8 * j, k[0][j], 1.f);
      }
      __syncthreads();
      tile::store<THREADS>(p.k, sm.k, walk.row({0, m, 0}), m_end, 0, p.r);
      __syncthreads();
    }
  }
}

}  // namespace lotr::kernels
