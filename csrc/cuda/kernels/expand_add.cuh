// expand_add:  y += drop(u F^T)          y [M, N], u [M, r], F [N, r];   also dx += drop(k A^T)
//
// Grid     x: blocks of n_per_block columns (up to SUBS tiles), y: blocks of m_per_block tokens.
//          A block walks its rectangle of y row tile by row tile; F's rows stay in shared memory.
// Bytes    y once in and once out; with s_M x s_N blocks, F s_M times and u s_N times.  plan.h
//          balances them.
// Sums     float32, y added last, rounded once.
//
// Timeline (tile t = row tile m, column tile n; L copies in flight, P product and sum in place,
// S rows to memory):
//   y  stage t % STAGES   L L L P|S |       one barrier before P (copies landed, stage t - 1 is free),
//   u  slot  m % STAGES   L L L P P P P |   one before S (the tile's sums come from all warps)
#pragma once
#include "rectangle.cuh"

namespace lotr::kernels {

template <class P, int R_>
struct ExpandTraits {
  using Policy = P;
  using T = typename P::T;
  static constexpr int R = R_, THREADS = 256, ROWS = expand_rows(R), COLS = 128 / sizeof(T);
  static constexpr int SUBS = expand_subs(sizeof(T), R);
  static constexpr int WARP_ROWS = ROWS / 16, WARP_COLS = THREADS / 32 / WARP_ROWS;
  static constexpr int NJ = COLS / (8 * WARP_COLS);  // of a warp, which owns 16 tokens

  struct Stage {
    tile::Shared<T, ROWS, COLS> y;
    tile::Shared<T, ROWS, R> u;
  };
  using Factor = tile::Shared<T, COLS, R>;
  static constexpr int STAGES = stages_that_fit(sizeof(Stage), SUBS * sizeof(Factor), 4);
  struct Smem {
    Factor F[SUBS];
    Stage stage[STAGES];
  };
  static_assert(STAGES >= 2 && sizeof(Smem) <= SHARED_BYTES);
};

// Adds the lane's two neighbours of an accumulator to y, in shared memory.
template <class T>
LOTR_DEVICE void add_pair(T* y, float a, float b) {
  struct alignas(2 * sizeof(T)) Pair {
    T a, b;
  };
  const Pair v = ptx::load_shared(reinterpret_cast<const Pair*>(y));
  ptx::store_shared2(y, ptx::from_float<T>(ptx::to_float(v.a) + a),
                     ptx::from_float<T>(ptx::to_float(v.b) + b));
}

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, 1) expand_add(const ExpandParams p) {
  using P = typename Traits::Policy;
  constexpr int THREADS = Traits::THREADS, STAGES = Traits::STAGES, NJ = Traits::NJ;
  auto& sm = ptx::shared_storage<typename Traits::Smem>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i0 = warp % Traits::WARP_ROWS * 16;
  const int j0 = warp / Traits::WARP_ROWS * (8 * NJ);
  const int64_t n_begin = int64_t(blockIdx.x) * p.n_per_block, m_begin = int64_t(blockIdx.y) * p.m_per_block;
  const int64_t n_end = n_begin + p.n_per_block < p.N ? n_begin + p.n_per_block : p.N;
  const int64_t m_end = m_begin + p.m_per_block < p.M ? m_begin + p.m_per_block : p.M;
  const Walk walk(m_begin, m_end, Traits::ROWS, n_begin, n_end, Traits::COLS);
  const uint64_t seed = p.dropout.seed ? uint64_t(ptx::load(p.dropout.seed)) : 0;
  const Matrix y_in{p.y.data, p.y.row, p.y.col, p.y.access};

  Walk::Place ahead, here;
  auto fetch = [&] {
    if (walk.holds(ahead)) {
      const int64_t m = walk.row(ahead);
      tile::load<THREADS>(sm.stage[ahead.tile % STAGES].y, y_in, m, m_end, walk.col(ahead), n_end);
      if (ahead.n == 0) tile::load<THREADS>(sm.stage[ahead.m % STAGES].u, p.u, m, m_end, 0, p.r);
      walk.advance(ahead);
    }
    ptx::cp_async_commit();
  };

  for (int n = 0; n < walk.n_tiles; ++n)
    tile::load<THREADS>(sm.F[n], p.F, n_begin + int64_t(n) * Traits::COLS, n_end, 0, p.r);
  for (int i = 0; i < STAGES - 1; ++i) fetch();
  for (; walk.holds(here); walk.advance(here)) {
    auto& y = sm.stage[here.tile % STAGES].y;
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();
    fetch();
    float d[1][NJ][4] = {};
    tile::warp_product<P, Traits::R, false, false>(d, sm.stage[here.m % STAGES].u, i0, 0, sm.F[here.n], j0);
#pragma unroll
    for (int nj = 0; nj < NJ; ++nj)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = i0 + lane / 4 + 8 * h, j = j0 + 8 * nj + lane % 4 * 2;
        float a = d[0][nj][2 * h], b = d[0][nj][2 * h + 1];
        if (p.dropout.seed) {
          const uint64_t first = uint64_t(walk.row(here) + i) * uint64_t(p.N) + uint64_t(walk.col(here) + j);
          const uint32_t keep = tile::philox_keep<2>(seed, first, p.dropout.threshold);
          a = keep & 1 ? a * p.dropout.scale : 0.f;
          b = keep & 2 ? b * p.dropout.scale : 0.f;
        }
        add_pair(y.at(i, j), a, b);
      }
    __syncthreads();
    tile::store<THREADS>(p.y, y, walk.row(here), m_end, walk.col(here), n_end);
  }
}

}  // namespace lotr::kernels
