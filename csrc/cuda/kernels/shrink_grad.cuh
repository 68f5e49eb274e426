// shrink_grad:  du = g F,  Q (+)= g^T u     g [M, N], F [N, r], u [M, r_u], du [M, r],
//                                           Q [N, r_u] float32
//               h = scale * du core         core [r, r_core], h [M, r_core]; optional, for few
//                                           tokens, by sum_parts
//
// Grid     x: pieces of N (up to SUBS tiles of COLS columns), y: pieces of M. A block reads its
//          rectangle of g once, tile by tile, and uses each tile twice: its rows for du, its
//          columns for Q. The rows of F stay in shared memory, the sums of Q in registers; the
//          sums of du are written after each row tile.
// Bytes    g once. With s_M x s_N blocks: F s_M times, u s_N times, and as parts, written here and
//          read by sum_parts, 8 r (s_N M + s_M N). plan.h balances s_M N against s_N M.
// Sums     float32; in the block's order, then over the blocks in order (sum_parts.cuh)
//
// Timeline (tile t = row tile m, column tile n; L copies in flight, P both products, a barrier at
// |, w: the sums of a row tile to memory):
//
//   g  stage t % STAGES   L L L P |
//   u  slot  m % STAGES   L L L P P P P |
//   du                    . . . + + + w
//
// u is copied with the first column tile of its row tile and stays for the others. The rows of F
// arrive with the first stage and stay to the end.
#pragma once
#include "rectangle.cuh"

namespace lotr::kernels {

template <class P, int R_>
struct ShrinkGradTraits {
  using Policy = P;
  using T = typename P::T;
  static constexpr int R = R_, THREADS = 256;
  static constexpr int ROWS = SHRINK_GRAD_ROWS, COLS = shrink_grad_cols(sizeof(T));
  static constexpr int SUBS = shrink_grad_subs(sizeof(T), R);
  static constexpr int NJ = R / 16;  // fragments of du that a warp has: 16 rows, half of the rank

  struct Stage {
    tile::Shared<T, ROWS, COLS> g;
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

// Stores a warp's sums of du at [row, rank] of the row tile that starts at m0: rounded, or as a
// part.
template <class Traits>
LOTR_DEVICE void store_du(const ShrinkGradParams& p, const float (&du)[1][Traits::NJ][4],
                          int64_t m0, int row, int rank) {
#pragma unroll
  for (int j = 0; j < Traits::NJ; ++j) {
    if (m0 + row >= p.M || rank + 8 * j >= p.r) continue;
    if (p.du_parts) {
      float* const part = p.du_parts + int64_t(blockIdx.x) * p.M * p.du_parts_row;
      const tile::SumTiles to{{part, p.du_parts_row, 1, false}, p.M, int(p.du_parts_row)};
      to.store(m0 + row, rank + 8 * j, du[0][j]);
    } else {
      tile::store_rounded<typename Traits::T>(p.du, m0 + row, p.M, rank + 8 * j, p.r, du[0][j]);
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, 1) shrink_grad(const ShrinkGradParams p) {
  using P = typename Traits::Policy;
  using Stage = typename Traits::Stage;
  using Sums = ColumnSums<Traits>;
  using Right = typename Sums::template Right<decltype(Stage::u)>;
  constexpr int THREADS = Traits::THREADS, STAGES = Traits::STAGES;
  constexpr int ROWS = Traits::ROWS, COLS = Traits::COLS;
  constexpr bool KEEP = Right::REGISTERS <= 16;  // u in registers
  auto& sm = ptx::shared_storage<typename Traits::Smem>();
  const Walk<STAGES> walk(p.m_pieces, int(blockIdx.y), p.n_pieces, int(blockIdx.x));
  ptx::griddepcontrol_wait();
  const tile::Loader<THREADS, typename Traits::Factor> load_F(p.F, p.N, p.r);
  const tile::Loader<THREADS, decltype(Stage::g)> load_g(p.g, p.M, p.N);
  const tile::Loader<THREADS, decltype(Stage::u)> load_u(p.u, p.M, p.r_u);

  typename Walk<STAGES>::Place ahead, now;
  const auto fetch = [&] {
    if (walk.holds(ahead)) {
      const int row = walk.row(ahead);
      load_g(sm.stage[ahead.stage].g, row, walk.col(ahead));
      if (ahead.n == 0) load_u(sm.stage[ahead.slot].u, row, 0);
      walk.advance(ahead);
    }
    ptx::cp_async_commit();
  };
  for (int n = 0; n < walk.n_tiles; ++n) load_F(sm.F[n], walk.n_begin + n, 0);
  for (int i = 0; i < STAGES - 1; ++i) fetch();

  const int du_row = ptx::held(int(threadIdx.x) / 32 % 4 * 16);
  const int du_rank = int(threadIdx.x) / 128 * (Traits::R / 2);
  Sums Q_sums;
#pragma unroll 1
  for (; walk.holds(now); ++now.m) {  // not advance(): the sums of Q need a constant n
    float du[1][Traits::NJ][4] = {};
    [[maybe_unused]] Right right;
#pragma unroll
    for (int n = 0; n < Traits::SUBS; ++n) {
      if (n > 0 && n == walk.n_tiles) break;  // n_tiles is at least 1
      ptx::cp_async_wait<STAGES - 2>();
      __syncthreads();
      auto& g = sm.stage[now.stage].g;
      auto& u = sm.stage[now.slot].u;
      if constexpr (KEEP)
        if (n == 0) right.template load<tile::Order::across_k>(u, Q_sums.j0());
      tile::warp_product<P, COLS, tile::Order::along_k, tile::Order::across_k>(du, g, du_row, 0,
                                                                               sm.F[n], du_rank);
      fetch();  // here, where no fragments of the products occupy registers
      if constexpr (KEEP)
        Q_sums.add_right(n, g, right);
      else
        Q_sums.add(n, g, u);
      now.stage = tile::stage_after<STAGES>(now.stage);
    }
    store_du<Traits>(p, du, int64_t(walk.row(now)) * ROWS, du_row, du_rank);
    now.slot = tile::stage_after<STAGES>(now.slot);
  }
  FloatSum Q = p.Q;
  Q.data += blockIdx.y * p.Q_part + int64_t(walk.n_begin) * COLS * Q.row;
  Q_sums.store({Q, columns_of<COLS>(walk, p.N), p.Q_cols}, 1.f);
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace lotr::kernels
