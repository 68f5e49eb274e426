// factor_grad:  D += drop(x)^T v          x [M, K], v [M, r], D [K, r] float32;   dA += x^T k, Q = g^T u
//
// Grid     x: blocks of k_per_block columns of x (up to SUBS tiles of 64), y: splits of M.
//          A block walks its rectangle of x row tile by row tile, its sums stay in registers.
// Bytes    x once; v once for each block of columns; D in and out; with s splits, 4 K R written and read
//          s times.  plan.h balances the number of column blocks against s.
// Sums     float32; over m in the block's order, then over the splits in order (tile/reduce.cuh).
//
// Timeline (tile t = row tile m, column tile n; L copies in flight, P product; a barrier at |):
//   x  stage t % STAGES   L L L P |
//   v  slot  m % STAGES   L L L P P P P |
// v is copied with the first column tile of its row tile, into slot m % STAGES, and stays for all column
// tiles.  A copy is issued STAGES - 1 tiles ahead, hence at most STAGES - 1 row tiles ahead: the slot's last
// reader is done.
#pragma once
#include "rectangle.cuh"

namespace lotr::kernels {

template <class P, int R_>
struct FactorGradTraits {
  using Policy = P;
  using T = typename P::T;
  static constexpr int R = R_, THREADS = 256;
  static constexpr int ROWS = factor_grad_rows(sizeof(T), R), COLS = 64;
  static constexpr int SUBS = factor_grad_subs(R);

  struct Stage {
    tile::Shared<T, ROWS, COLS> x;
    tile::Shared<T, ROWS, R> v;
  };
  static constexpr int STAGES = stages_that_fit(sizeof(Stage), 0, 6);
  struct Smem {
    Stage stage[STAGES];
    int last;
  };
  static_assert(STAGES >= 2 && sizeof(Smem) <= SHARED_BYTES);
};

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, 1) factor_grad(const FactorGradParams p) {
  constexpr int THREADS = Traits::THREADS, STAGES = Traits::STAGES;
  auto& sm = ptx::shared_storage<typename Traits::Smem>();
  const int64_t k_begin = int64_t(blockIdx.x) * p.k_per_block, m_begin = int64_t(blockIdx.y) * p.m_per_block;
  const int64_t k_end = k_begin + p.k_per_block < p.K ? k_begin + p.k_per_block : p.K;
  const int64_t m_end = m_begin + p.m_per_block < p.M ? m_begin + p.m_per_block : p.M;
  const Walk walk(m_begin, m_end, Traits::ROWS, k_begin, k_end, Traits::COLS);
  const uint64_t seed = p.dropout.seed ? uint64_t(ptx::load(p.dropout.seed)) : 0;

  Walk::Place ahead, here;
  auto fetch = [&] {
    if (walk.holds(ahead)) {
      const int64_t m = walk.row(ahead);
      tile::load<THREADS>(sm.stage[ahead.tile % STAGES].x, p.x, m, m_end, walk.col(ahead), k_end);
      if (ahead.n == 0) tile::load<THREADS>(sm.stage[ahead.m % STAGES].v, p.v, m, m_end, 0, p.r);
      walk.advance(ahead);
    }
    ptx::cp_async_commit();
  };

  ColumnSums<Traits> sums;
  for (int i = 0; i < STAGES - 1; ++i) fetch();
  for (; walk.holds(here); walk.advance(here)) {
    auto& x = sm.stage[here.tile % STAGES].x;
    ptx::cp_async_wait<STAGES - 2>();
    if (p.dropout.seed) tile::drop<THREADS>(x, p.dropout, seed, walk.row(here), walk.col(here), p.K);
    __syncthreads();
    fetch();
    sums.add(here.n, x, sm.stage[here.m % STAGES].v);
  }
  const bool last =
      sums.reduce(p.sum, int(blockIdx.x), int(blockIdx.y), p.splits, k_begin, k_end, p.r, sm.last);
  if (last) sums.store(p.D, p.D_row, p.D_col, k_begin, k_end, p.r, p.dropout.scale, p.accumulate != 0);
}

}  // namespace lotr::kernels
