// factor_grad:  D (+)= drop(x)^T v       x [M, K], v [M, r], D [K, r] float32
//                                        used for dA += x^T du and Q = g^T u
//
// Grid     x: pieces of K (up to SUBS tiles of COLS columns of x), y: pieces of M. A block walks
//          its rectangle of x row tile by row tile; its sums stay in registers.
// Bytes    x once, in complete 128-byte lines; v once for each piece of K; D in and out. With s
//          pieces of M, 4 K r written s times as parts and read s times by sum_parts. plan.h
//          balances the pieces of K against s.
// Sums     float32; over m in the block's order, then over the pieces of M in order (sum_parts.cuh)
//
// Timeline (tile t = row tile m, column tile n; L copies in flight, P product; a barrier at |):
//
//   x  stage t % STAGES   L L L P |
//   v  slot  m % STAGES   L L L P P P P |
//
// v is copied with the first column tile of its row tile, into slot m % STAGES, and stays for all
// column tiles. A copy is issued STAGES - 1 tiles ahead, hence at most STAGES - 1 row tiles ahead:
// the slot's last reader has finished.
#pragma once
#include "rectangle.cuh"

namespace lotr::kernels {

template <class P, int R_, int COLS_>
struct FactorGradTraits {
  using Policy = P;
  using T = typename P::T;
  static constexpr int R = R_, THREADS = 256;
  static constexpr int COLS = COLS_, ROWS = factor_grad_rows(sizeof(T), R, COLS);
  static constexpr int SUBS = factor_grad_subs(R, COLS), BLOCKS = blocks_of_one_product(R);

  struct Stage {
    tile::Shared<T, ROWS, COLS> x;
    tile::Shared<T, ROWS, R> v;
  };
  static constexpr int STAGES = stages_that_fit(sizeof(Stage), 0, 5, shared_budget(BLOCKS));
  struct Smem {
    Stage stage[STAGES];
  };
  static_assert(STAGES >= 2 && sizeof(Smem) <= shared_budget(BLOCKS));
};

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, Traits::BLOCKS)
    factor_grad(const FactorGradParams p) {
  constexpr int THREADS = Traits::THREADS, STAGES = Traits::STAGES;
  constexpr int ROWS = Traits::ROWS, COLS = Traits::COLS;
  using Stage = typename Traits::Stage;
  auto& sm = ptx::shared_storage<typename Traits::Smem>();
  const int k_block = int(blockIdx.x);
  const int m_block = int(blockIdx.y);
  const Walk<STAGES> walk(p.m_pieces, m_block, p.k_pieces, k_block);
  ptx::griddepcontrol_wait();
  const tile::Loader<THREADS, decltype(Stage::x)> load_x(p.x, p.M, p.K);
  const tile::Loader<THREADS, decltype(Stage::v)> load_v(p.v, p.M, p.r);

  typename Walk<STAGES>::Place ahead;
  const auto fetch = [&] {
    if (walk.holds(ahead)) {
      const int row = walk.row(ahead);
      load_x(sm.stage[ahead.stage].x, row, walk.col(ahead));
      if (ahead.n == 0) load_v(sm.stage[ahead.slot].v, row, 0);
      walk.advance(ahead);
    }
    ptx::cp_async_commit();
  };

  ColumnSums<Traits> sums;
  for (int i = 0; i < STAGES - 1; ++i) fetch();
  tile::with_dropout(p.dropout, [&](auto dropout) {
    typename Walk<STAGES>::Place now;
    for (; walk.holds(now); walk.advance(now)) {
      auto& x = sm.stage[now.stage].x;
      ptx::cp_async_wait<STAGES - 2>();
      if constexpr (decltype(dropout)::value)
        tile::drop<THREADS>(x, p.dropout, int64_t(walk.row(now)) * ROWS,
                            int64_t(walk.col(now)) * COLS, p.K);
      __syncthreads();
      sums.add(now.n, x, sm.stage[now.slot].v);
      fetch();  // its arithmetic overlaps with the end of the products
    }
  });
  FloatSum D = p.D;
  D.data += m_block * p.D_part + int64_t(walk.n_begin) * COLS * D.row;
  sums.store({D, columns_of<COLS>(walk, p.K), p.D_cols}, p.dropout.scale);
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace lotr::kernels
