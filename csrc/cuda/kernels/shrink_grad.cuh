// shrink_grad:  k = g F,  Q (+)= g^T u          g [M, N], F [N, r], u [M, r], k [M, r], Q [N, r] float32
//
// Grid     x: pieces of N (up to SUBS tiles of COLS columns), y: pieces of M.
//          A block reads its rectangle of g once, tile by tile, and uses each tile from both sides: its rows
//          for k, its columns for Q.  F's rows stay in shared memory, Q's sums in registers; k's are written
//          after each row tile.
// Threads  eight warps multiply, four sum over the blocks meanwhile.
// Bytes    g once; with s_M x s_N blocks, F s_M times, u s_N times, and as partial sums, written and read,
//          8 R (s_N M + s_M N); without those of Q where the s_M blocks of a column are a cluster.
//          plan/shrink_grad.h balances s_M N against s_N M.
// Sums     float32; in the block's order, then over the blocks in order (tile/reduce.cuh).  k's during the
//          walk: the last of the s_N blocks to reach a row tile adds all of them.  Q's at its end: a column
//          tile is sent with the last row tile and summed while the next one is multiplied, by all s_M
//          blocks, each a share, where the whole grid runs at the same time, so too k of the last row tile;
//          else by the last block to arrive.  In a cluster after the products, from shared memory, by all its
//          blocks.
//
// Timeline (tile t = row tile m, column tile n; L copies in flight, P both products; a barrier at |, that of
// a row tile's first with the warps that sum):
//   g  stage t % STAGES   L L L P |
//   u  slot  m % STAGES   L L L P P P P |
//   k                     . . . + + + w | s     w: partial sum to memory, s: counted in and maybe summed
//   Q of the last row tile      w s             of each column tile, with a barrier that only s waits at
// u is copied with the first column tile of its row tile and stays for the others; F's rows come with the
// first stage and stay to the end.
#pragma once
#include "rectangle.cuh"

namespace lotr::kernels {

template <class P, int R_>
struct ShrinkGradTraits {
  using Policy = P;
  using T = typename P::T;
  static constexpr int R = R_, MULTIPLY = 256, SUM = 128, THREADS = MULTIPLY + SUM;
  static constexpr int ROWS = SHRINK_GRAD_ROWS, COLS = shrink_grad_cols(sizeof(T));
  static constexpr int SUBS = shrink_grad_subs(sizeof(T), R);

  struct Stage {
    tile::Shared<T, ROWS, COLS> g;
    tile::Shared<T, ROWS, R> u;
  };
  using Factor = tile::Shared<T, COLS, R>;
  static constexpr bool CLUSTERS = ptx::CLUSTERS && shrink_grad_in_cluster(R);
  static constexpr int STAGES = stages_that_fit(sizeof(Stage), SUBS * sizeof(Factor), 4);
  struct Smem {
    Factor F[SUBS];
    union {
      Stage stage[STAGES];
      float Q[SUBS * COLS * R];  // after the last tile, for the cluster or this block alone
    };
    int last_of_sum, last_of_multiply;
  };
  static_assert(STAGES >= 2 && sizeof(Smem) <= SHARED_BYTES);
};

template <class Traits>
class ShrinkGrad {
  using P = typename Traits::Policy;
  using T = typename Traits::T;
  using Smem = typename Traits::Smem;
  using Stage = typename Traits::Stage;
  using Rectangle = Walk<Traits::STAGES>;
  static constexpr int MULTIPLY = Traits::MULTIPLY, SUM = Traits::SUM, THREADS = Traits::THREADS;
  static constexpr int STAGES = Traits::STAGES;
  static constexpr int R = Traits::R, ROWS = Traits::ROWS, COLS = Traits::COLS;
  static constexpr int K_FLOATS = ROWS * R;                   // of a partial sum of k
  static constexpr int NJ = R / 16;                           // fragments of k that a warp has
  static constexpr int Q_FLOATS = ColumnSums<Traits>::BLOCK;  // of Q
  // Barriers; with the warps that sum: of a row tile, and of the last one's column tiles from OF_LAST on.
  static constexpr int OF_TILE = 1, OF_SUM = 2, OF_ROW = 3, OF_LAST = 4;

 public:
  LOTR_DEVICE ShrinkGrad(Smem& s, const ShrinkGradParams& p)
      : s_(s),
        p_(p),
        walk_(p.m_pieces, int(blockIdx.y), p.n_pieces, int(blockIdx.x)),
        cluster_(Traits::CLUSTERS && p.cluster),
        sends_(p.m_splits > 1 && !cluster_),
        together_(ptx::TOGETHER && p.together) {}

  // ---- the warps that multiply ----

  LOTR_DEVICE void multiply() {
    const tile::Loader<MULTIPLY, typename Traits::Factor> load_F(p_.F, p_.N, p_.r);
    const tile::Loader<MULTIPLY, decltype(Stage::g)> load_g(p_.g, p_.M, p_.N);
    const tile::Loader<MULTIPLY, decltype(Stage::u)> load_u(p_.u, p_.M, p_.r);
    typename Rectangle::Place ahead, here;
    const auto fetch = [&] {
      if (walk_.holds(ahead)) {
        const int row = walk_.row(ahead);
        load_g(s_.stage[ahead.stage].g, row, walk_.col(ahead));
        if (ahead.n == 0) load_u(s_.stage[ahead.slot].u, row, 0);
        walk_.advance(ahead);
      }
      ptx::cp_async_commit();
    };
    for (int n = 0; n < walk_.n_tiles; ++n) load_F(s_.F[n], walk_.n_begin + n, 0);
    for (int i = 0; i < STAGES - 1; ++i) fetch();

    constexpr bool LAST = true;
    ColumnSums<Traits> Q;
#pragma unroll 1
    while (here.m < walk_.m_tiles - 1) row_tile<!LAST>(Q, here, fetch);
    row_tile<LAST>(Q, here, fetch);
    ptx::griddepcontrol_launch_dependents();
    finish_Q(Q);
  }

  // ---- the warps that sum ----

  LOTR_DEVICE void sum() {
    ptx::barrier_sync(OF_ROW, THREADS);  // the first tile has come, nothing is stored yet
#pragma unroll 1
    for (int i = 0; i < walk_.m_tiles; ++i) {
      const bool last = i == walk_.m_tiles - 1;
      if (last)
        sum_sent_Q();
      else
        ptx::barrier_sync(OF_ROW, THREADS);
      sum_k(walk_.m_begin + i, last && together_);
    }
    if (cluster_) ptx::cluster_sync();
  }

 private:
  // The products of a row tile.  Of the LAST one the sums of each column tile of Q go to memory at once.
  template <bool LAST, class Fetch>
  LOTR_DEVICE void row_tile(ColumnSums<Traits>& Q, typename Rectangle::Place& here, Fetch& fetch) {
    using Right = typename ColumnSums<Traits>::template Right<decltype(Stage::u)>;
    constexpr bool KEEP = Right::REGISTERS <= 16;  // u in registers
    [[maybe_unused]] Right right;
    float k[1][NJ][4] = {};
#pragma unroll
    for (int n = 0; n < Traits::SUBS; ++n) {
      if (n > 0 && n == walk_.n_tiles) break;
      ptx::cp_async_wait<STAGES - 2>();
      if (n == 0)
        ptx::barrier_sync(OF_ROW, THREADS);
      else
        ptx::barrier_sync(OF_TILE, MULTIPLY);
      auto& g = s_.stage[here.stage].g;
      auto& u = s_.stage[here.slot].u;
      if constexpr (KEEP)
        if (n == 0) right.template load<tile::Order::across_k>(u, Q.j0());
      tile::warp_product<P, COLS, tile::Order::along_k, tile::Order::across_k>(k, g, k_row(), 0, s_.F[n],
                                                                               k_rank());
      fetch();  // between the products: their fragments need its registers no more, or not yet
      if constexpr (KEEP)
        Q.add_right(n, g, right);
      else
        Q.add(n, g, u);
      if (LAST && sends_) Q.store_partials_of(n, Q_partial(int(blockIdx.y)), cols(), p_.r);
      if (LAST && n < walk_.n_tiles - 1) ptx::barrier_arrive(OF_LAST + n, THREADS);
      here.stage = tile::stage_after<STAGES>(here.stage);
    }
    store_k(k, walk_.row(here));
    if (LAST) ptx::barrier_arrive(OF_LAST + walk_.n_tiles - 1, THREADS);
    here.slot = tile::stage_after<STAGES>(here.slot);
    ++here.m;
  }

  // This warp's part of a row tile of k.
  LOTR_DEVICE int k_row() const { return k_row_; }
  static LOTR_DEVICE int k_rank() { return int(threadIdx.x) / 128 * (R / 2); }
  LOTR_DEVICE int ranks() const { return (p_.r + 7) / 8; }  // fragments along the rank
  LOTR_DEVICE int64_t cols() const {                        // of the rectangle
    const int64_t owned = int64_t(walk_.n_tiles) * COLS, left = p_.N - int64_t(walk_.n_begin) * COLS;
    return left < owned ? left : owned;
  }
  LOTR_DEVICE float* k_partials(int m) const {
    return p_.sum_k.partial + int64_t(m) * p_.n_splits * K_FLOATS;
  }
  LOTR_DEVICE float* Q_partial(int m_block) const {
    return p_.sum_Q.partial + (int64_t(blockIdx.x) * p_.m_splits + m_block) * Q_FLOATS;
  }

  // Stores the sums of row tile m.
  LOTR_DEVICE void store_k(const float (&k)[1][NJ][4], int m) {
    float* to = k_partials(m) + int64_t(blockIdx.x) * K_FLOATS;
#pragma unroll
    for (int j = 0; j < NJ; ++j) {
      if (int64_t(m) * ROWS + k_row() < p_.M && k_rank() + 8 * j < p_.r)
        tile::store_partial(to + (k_row() / 16 * ranks() + k_rank() / 8 + j) * tile::FRAGMENT, k[0][j]);
    }
  }

  // While the last row tile is multiplied: sums the column tiles of Q that it has stored.
  LOTR_DEVICE void sum_sent_Q() {
#pragma unroll 1
    for (int n = 0; n < walk_.n_tiles - 1; ++n) {
      ptx::barrier_sync(OF_LAST + n, THREADS);
      if (sends_) sum_Q<OF_SUM, SUM>(n, s_.last_of_sum);
    }
    ptx::barrier_sync(OF_LAST + walk_.n_tiles - 1, THREADS);
    ptx::griddepcontrol_launch_dependents();
    if (cluster_) ptx::cluster_sync();
  }

  // Counts this block in at row tile m of k.  The last block to arrive sums all of the tile over the blocks
  // of the row; if they run together, each block sums a share.
  LOTR_DEVICE void sum_k(int m, bool together) {
    if (!tile::arrive_last<tile::Named<OF_SUM, SUM>>(p_.sum_k.arrived + m, p_.n_splits, s_.last_of_sum,
                                                     together))
      return;
    const int64_t m0 = int64_t(m) * ROWS;
    const int rows = p_.M - m0 < ROWS ? int(p_.M - m0) : ROWS, total = (rows + 15) / 16 * ranks();
    tile::sum_share<SUM / 32, K_FLOATS>(
        k_partials(m), p_.n_splits, int(blockIdx.x), together, total, [&](int fragment, const float (&v)[4]) {
          const int row = fragment / ranks(), rank = fragment % ranks();
          tile::store_rounded<T>(p_.k, m0 + 16 * row, p_.M, 8 * rank, p_.r, v);
        });
  }

  // The same of column tile n of Q, over the blocks of the column, by THREADS threads.
  template <int BARRIER, int THREADS>
  LOTR_DEVICE void sum_Q(int n, int& last) {
    if (!tile::arrive_last<tile::Named<BARRIER, THREADS>>(p_.sum_Q.arrived + walk_.n_begin + n, p_.m_splits,
                                                          last, together_))
      return;
    const int64_t left = cols() - n * COLS;
    const int total = (int(left < COLS ? left : COLS) + 15) / 16 * ranks();
    const float* from = Q_partial(0) + n * (COLS / 16) * ranks() * tile::FRAGMENT;
    tile::sum_share<THREADS / 32, Q_FLOATS>(
        from, p_.m_splits, int(blockIdx.y), together_, total, [&](int fragment, const float (&v)[4]) {
          store_Q(v, n * COLS + fragment / ranks() * 16, fragment % ranks() * 8);
        });
  }

  LOTR_DEVICE void store_Q(const float (&v)[4], int col, int rank) {
    const int64_t n0 = int64_t(walk_.n_begin) * COLS;
    const tile::Floats strip{p_.Q + n0 * p_.Q_row, p_.Q_row, p_.Q_col, cols(), p_.r};
    strip.add(col, rank, v, 1.f, p_.accumulate != 0);
  }

  // After the products: what is left of Q to sum.
  LOTR_DEVICE void finish_Q(ColumnSums<Traits>& Q) {
    if (sends_) return sum_Q<OF_TILE, MULTIPLY>(walk_.n_tiles - 1, s_.last_of_multiply);
    ptx::barrier_sync(OF_TILE, MULTIPLY);  // the last stage is read: the sums take its place
    Q.put_partials(s_.Q, cols(), p_.r);
    if (cluster_)
      ptx::cluster_sync();
    else
      ptx::barrier_sync(OF_TILE, MULTIPLY);
    Q.each_sum_of_cluster(s_.Q, int(blockIdx.y), p_.m_splits, cols(), p_.r,
                          [&](const float (&v)[4], int col, int rank) { store_Q(v, col, rank); });
    if (cluster_) ptx::cluster_sync();  // a block stays until the others have read its sums
  }

  Smem& s_;
  const ShrinkGradParams& p_;
  const Rectangle walk_;
  const int k_row_ = ptx::held(int(threadIdx.x) / 32 % 4 * 16);
  const bool cluster_, sends_, together_;  // sends: partial sums of Q to memory
};

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, 1) shrink_grad(const ShrinkGradParams p) {
  ShrinkGrad<Traits> block(ptx::shared_storage<typename Traits::Smem>(), p);
  ptx::griddepcontrol_wait();
  if (threadIdx.x < Traits::MULTIPLY)
    block.multiply();
  else
    block.sum();
}

}  // namespace lotr::kernels
