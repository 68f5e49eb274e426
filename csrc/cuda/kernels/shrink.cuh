// shrink:  u = scale * drop(x) A          x [M, K], A [K, r], u [M, r];   also k = g F
//          h = core_scale * u core        core [r, r_core], h [M, r_core]; optional, for few tokens
//
// Grid     x: tiles of ROWS tokens, y: splits of K.  A block reads its rectangle of x once and its rows of A.
// Bytes    x once; A once for each tile of tokens; with s splits, 4 M R written and read s times as partial
//          sums.  plan.h chooses ROWS and s.
// Sums     float32; over k in the block's order, then over the splits in order (tile/reduce.cuh).
//
// Timeline of a block, STAGES = 4 (L copies in flight, P product; one barrier a step, at |):
//   stage 0   L L L P | L L L P |
//   stage 1     L L L | P L L L | P
//   stage 2       L L |   P L L |   P       the barrier of step i says that all warps have done step i - 1,
//   stage 3         L |     P L |     P     so the copy into its stage may start
#pragma once
#include "../tile/load.cuh"
#include "../tile/mma.cuh"
#include "../tile/reduce.cuh"
#include "../tile/store.cuh"
#include "traits.h"

namespace lotr::kernels {

template <class P, int R_, int ROWS_>
struct ShrinkTraits {
  using Policy = P;
  using T = typename P::T;
  static constexpr int R = R_, ROWS = ROWS_, THREADS = 256;
  static constexpr int COLS = shrink_cols(sizeof(T), R, ROWS);
  static constexpr int WARP_ROWS = 4, WARP_RANKS = 2;  // warps along tokens and along the rank
  static constexpr int MI = ROWS / (16 * WARP_ROWS), NJ = R / (8 * WARP_RANKS);

  struct Stage {
    tile::Shared<T, ROWS, COLS> x;
    tile::Shared<T, COLS, R> A;
  };
  using Output = tile::Shared<T, ROWS, R>;
  static constexpr int STAGES = stages_that_fit(sizeof(Stage), 0, 4);
  struct Smem {
    union {
      Stage stage[STAGES];
      Output u;  // after the last product
    };
    int last;
  };
  static_assert(MI >= 1 && NJ >= 1 && STAGES >= 2 && sizeof(Smem) <= SHARED_BYTES);
};

// h = core_scale * u core for the tokens of one tile of u
template <int THREADS, class Tile>
LOTR_DEVICE void apply_core(const ShrinkParams& p, Tile& u, int64_t m0) {
  using T = typename Tile::T;
  const int rows = p.M - m0 < Tile::ROWS ? int(p.M - m0) : Tile::ROWS;
  for (int index = threadIdx.x; index < rows * p.r_core; index += THREADS) {
    const int m = index / p.r_core, j = index % p.r_core;
    float sum = 0.f;
    for (int i = 0; i < p.r; ++i)
      sum = fmaf(ptx::to_float(ptx::load_shared(u.at(m, i))),
                 ptx::to_float(tile::read_element<T>(p.core, i, j)), sum);
    ptx::store(static_cast<T*>(p.h.data) + (m0 + m) * p.h.row + j * p.h.col,
               ptx::from_float<T>(sum * p.core_scale));
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, 1) shrink(const ShrinkParams p) {
  using P = typename Traits::Policy;
  constexpr int THREADS = Traits::THREADS, STAGES = Traits::STAGES, COLS = Traits::COLS;
  auto& sm = ptx::shared_storage<typename Traits::Smem>();
  const int warp = threadIdx.x / 32;
  const int i0 = warp % Traits::WARP_ROWS * 16, j0 = warp / Traits::WARP_ROWS * (8 * Traits::NJ);
  const int64_t m0 = int64_t(blockIdx.x) * Traits::ROWS;
  const int64_t k_begin = int64_t(blockIdx.y) * p.k_per_split;
  const int64_t k_end = k_begin + p.k_per_split < p.K ? k_begin + p.k_per_split : p.K;
  const int steps = k_end > k_begin ? int((k_end - k_begin + COLS - 1) / COLS) : 0;
  const uint64_t seed = p.dropout.seed ? uint64_t(ptx::load(p.dropout.seed)) : 0;

  auto fetch = [&](int step) {
    if (step < steps) {
      auto& stage = sm.stage[step % STAGES];
      const int64_t k = k_begin + int64_t(step) * COLS;
      tile::load<THREADS>(stage.x, p.x, m0, p.M, k, k_end);
      tile::load<THREADS>(stage.A, p.A, k, k_end, 0, p.r);
    }
    ptx::cp_async_commit();
  };

  float d[Traits::MI][Traits::NJ][4] = {};
  const bool any_rows = m0 + i0 < p.M;  // of this warp: a decoding step fills one warp in four
  for (int step = 0; step < STAGES - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    auto& stage = sm.stage[step % STAGES];
    ptx::cp_async_wait<STAGES - 2>();
    if (p.dropout.seed)
      tile::drop<THREADS>(stage.x, p.dropout, seed, m0, k_begin + int64_t(step) * COLS, p.K);
    __syncthreads();
    fetch(step + STAGES - 1);
    if (any_rows)
      tile::warp_product<P, COLS, false, true>(d, stage.x, i0, 16 * Traits::WARP_ROWS, stage.A, j0);
  }

  bool finish = true;
  if (p.splits > 1) {
    constexpr int64_t TILE = int64_t(Traits::ROWS) * Traits::R;
    float* mine = p.sum.partial + int64_t(blockIdx.x) * p.splits * TILE +
                  warp * (Traits::MI * Traits::NJ * tile::FRAGMENT);
    const auto wanted = [&](int mi, int nj) {
      return m0 + i0 + mi * 16 * Traits::WARP_ROWS < p.M && j0 + 8 * nj < p.r;
    };
#pragma unroll
    for (int mi = 0; mi < Traits::MI; ++mi)
#pragma unroll
      for (int nj = 0; nj < Traits::NJ; ++nj)
        if (wanted(mi, nj))
          tile::store_partial(mine + blockIdx.y * TILE + (mi * Traits::NJ + nj) * tile::FRAGMENT, d[mi][nj]);
    finish = tile::arrive_last(p.sum.arrived + blockIdx.x, p.splits, sm.last);
    if (finish) {
#pragma unroll
      for (int mi = 0; mi < Traits::MI; ++mi)
#pragma unroll
        for (int nj = 0; nj < Traits::NJ; ++nj)
          if (wanted(mi, nj))
            tile::sum_partials(d[mi][nj], mine + (mi * Traits::NJ + nj) * tile::FRAGMENT, TILE, p.splits);
    }
  } else {
    __syncthreads();  // the last stage may still be read: u takes its place
  }

  if (finish) {
    const float scale = p.scale * p.dropout.scale;
#pragma unroll
    for (int mi = 0; mi < Traits::MI; ++mi)
#pragma unroll
      for (int nj = 0; nj < Traits::NJ; ++nj)
        tile::put(sm.u, i0 + mi * 16 * Traits::WARP_ROWS, j0 + 8 * nj, d[mi][nj], scale);
    __syncthreads();
    tile::store<THREADS>(p.u, sm.u, m0, p.M, 0, p.r);
    if (p.core.data) apply_core<THREADS>(p, sm.u, m0);
  }
}

}  // namespace lotr::kernels
