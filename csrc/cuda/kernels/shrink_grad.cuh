// shrink_grad:  k = g F,  Q (+)= g^T u          g [M, N], F [N, r], u [M, r], k [M, r], Q [N, r] float32
//
// Grid     x: pieces of N (up to SUBS tiles of COLS columns), y: pieces of M.
//          A block reads its rectangle of g once, tile by tile, and uses each tile from both sides: its rows
//          for k, its columns for Q.  F's rows stay in shared memory, Q's sums in registers; k's are written
//          after each row tile.
// Bytes    g once; with s_M x s_N blocks, F s_M times, u s_N times, and as partial sums, written and read,
//          8 R (s_N M + s_M N); without those of Q where the s_M blocks of a column are a cluster.  plan.h
//          balances s_M N against s_N M.
// Sums     float32; in the block's order, then over the blocks in order (tile/reduce.cuh), Q's in a cluster
//          by all its blocks, each a share of the tile, from shared memory; without clusters, where the whole
//          grid runs at the same time, by all blocks of a column, each a share, from L2.
//
// Each row tile of k has its own counter, and the s_N blocks that share the rows start at different row
// tiles, so that each of them is the last to reach some: the sums of k are spread over the blocks.  Which row
// tiles it has to sum a block learns during the walk; half of its warps sum them after the last tile, while
// the others sum Q.
//
// Timeline (tile t = row tile m, column tile n; L copies in flight, P both products; a barrier at |):
//   g  stage t % STAGES   L L L P |
//   u  slot  m % STAGES   L L L P P P P |
//   k                     . . . + + + w | c     w: partial sum to memory, c: one thread counts the block in
// u is copied with the first column tile of its row tile and stays for the others; F's rows come with the
// first stage and stay to the end.
#pragma once
#include "rectangle.cuh"

namespace lotr::kernels {

template <class P, int R_>
struct ShrinkGradTraits {
  using Policy = P;
  using T = typename P::T;
  static constexpr int R = R_, THREADS = 256, ROWS = SHRINK_GRAD_ROWS, COLS = shrink_grad_cols(sizeof(T));
  static constexpr int SUBS = shrink_grad_subs(sizeof(T), R), BLOCKS = blocks_together(R);

  struct Stage {
    tile::Shared<T, ROWS, COLS> g;
    tile::Shared<T, ROWS, R> u;
  };
  using Factor = tile::Shared<T, COLS, R>;
  using Output = tile::Shared<T, ROWS, R>;
  static constexpr bool CLUSTERS = ptx::CLUSTERS && shrink_grad_in_cluster(R);
  static constexpr int STAGES =
      stages_that_fit(sizeof(Stage), SUBS * sizeof(Factor), 4, shared_budget(BLOCKS));
  struct Smem {
    Factor F[SUBS];
    union {
      Stage stage[STAGES];
      struct {
        Output k;
        float Q[shrink_grad_in_cluster(R) ? SUBS * COLS * R : 4];
      } end;  // after the last tile
    };
    uint32_t sum_k[SHRINK_GRAD_MOST_TILES / 32];  // a bit for each row tile that this block has to sum
    int sum_Q;
  };
  static_assert(STAGES >= 2 && sizeof(Smem) <= shared_budget(BLOCKS));
};

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, Traits::BLOCKS) shrink_grad(const ShrinkGradParams p) {
  using P = typename Traits::Policy;
  using Stage = typename Traits::Stage;
  constexpr int THREADS = Traits::THREADS, STAGES = Traits::STAGES, R = Traits::R, ROWS = Traits::ROWS;
  constexpr int COLS = Traits::COLS, NJ = R / 16;
  constexpr int TILE = ROWS * R;  // floats of a row tile of k
  auto& sm = ptx::shared_storage<typename Traits::Smem>();
  const int warp = threadIdx.x / 32, i0 = warp % 4 * 16, j0 = warp / 4 * (R / 2);
  const int n_block = int(blockIdx.x), m_block = int(blockIdx.y);
  // 32 bits are enough: the planner gives a block at most SHRINK_GRAD_MOST_TILES row tiles
  const int start =
      int(unsigned(tile::count_of(p.m_pieces, m_block)) * unsigned(n_block) / unsigned(p.n_splits));
  const Walk<STAGES> walk(p.m_pieces, m_block, p.n_pieces, n_block, start);
  const int64_t n_begin = int64_t(walk.n_begin) * COLS;
  const tile::Loader<THREADS, decltype(Stage::g)> load_g(p.g, p.M, p.N);
  const tile::Loader<THREADS, decltype(Stage::u)> load_u(p.u, p.M, p.r);

  typename Walk<STAGES>::Place ahead, here;
  auto fetch = [&] {
    if (walk.holds(ahead)) {
      const int row = walk.row(ahead);
      load_g(sm.stage[ahead.stage].g, row, walk.col(ahead));
      if (ahead.n == 0) load_u(sm.stage[ahead.slot].u, row, 0);
      walk.advance(ahead);
    }
    ptx::cp_async_commit();
  };

  float k[1][NJ][4] = {};
  const int ranks = (p.r + 7) / 8;  // fragments along the rank
  const auto k_partials = [&](int m) { return p.sum_k.partial + int64_t(m) * p.n_splits * TILE; };

  // Thread 0: the answer to the latest count is looked at with the next one, when it has long arrived.
  int counted = -1, before = 0;
  const auto note = [&] {
    const int m = counted - walk.m_begin;
    if (counted >= 0 && before == p.n_splits - 1)
      ptx::store_shared(&sm.sum_k[m / 32], ptx::load_shared(&sm.sum_k[m / 32]) | 1u << m % 32);
  };
  const auto count_in = [&](int m) {
    before = tile::arrive(p.sum_k.arrived + m, p.n_splits);
    counted = m;
  };
  if (threadIdx.x == 0)
    for (uint32_t& word : sm.sum_k) ptx::store_shared(&word, 0u);

  const tile::Loader<THREADS, typename Traits::Factor> load_F(p.F, p.N, p.r);
  ptx::griddepcontrol_wait();
  for (int n = 0; n < walk.n_tiles; ++n) load_F(sm.F[n], walk.n_begin + n, 0);
  ColumnSums<Traits> Q;
  int stored = -1;  // the row tile of k that is in memory and not counted yet
  for (int i = 0; i < STAGES - 1; ++i) fetch();
  for (; walk.holds(here); walk.advance(here)) {
    auto& g = sm.stage[here.stage].g;
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();
    fetch();
    tile::warp_product<P, COLS, false, true>(k, g, i0, 0, sm.F[here.n], j0);
    Q.add(here.n, g, sm.stage[here.slot].u);
    if (threadIdx.x == 0 && stored >= 0) {
      note();
      count_in(stored);
    }
    stored = -1;
    if (here.n == walk.n_tiles - 1) {
      stored = walk.row(here);
      float* to = k_partials(stored) + int64_t(n_block) * TILE;
#pragma unroll
      for (int j = 0; j < NJ; ++j)
        if (int64_t(stored) * ROWS + i0 < p.M && j0 + 8 * j < p.r)
          tile::store_partial(to + (i0 / 16 * ranks + j0 / 8 + j) * tile::FRAGMENT, k[0][j]);
#pragma unroll
      for (int j = 0; j < NJ; ++j) k[0][j][0] = k[0][j][1] = k[0][j][2] = k[0][j][3] = 0.f;
    }
  }
  ptx::griddepcontrol_launch_dependents();

  const int64_t owned = int64_t(walk.n_tiles) * COLS;
  const int64_t cols = p.N - n_begin < owned ? p.N - n_begin : owned;
  const bool cluster = Traits::CLUSTERS && p.cluster, alone = p.m_splits == 1 || cluster;
  const bool together = ptx::TOGETHER && p.together && !alone;
  if (!alone) Q.store_partials(p.sum_Q, n_block, m_block, p.m_splits, cols, p.r);
  __syncthreads();  // the last stage is read, the last sums of k and those of Q are stored
  if (cluster) Q.put_partials(sm.end.Q, cols, p.r);
  if (threadIdx.x == 0) {
    note();
    count_in(stored);
    int last = 1;
    if (!alone)
      last = ptx::atomic_wrap(p.sum_Q.arrived + n_block, p.m_splits - 1) == p.m_splits - 1 || together;
    note();
    ptx::store_shared(&sm.sum_Q, last);
    if (together) ptx::wait_equal(p.sum_Q.arrived + n_block, 0);  // as in arrive_last
    ptx::fence_device();
  }
  if (cluster)
    ptx::cluster_sync();
  else
    __syncthreads();

  // Half of the warps sum k, and meanwhile the others Q where each block has a share of it; else all sum Q.
  constexpr int HALF = THREADS / 64;
  if (ptx::load_shared(&sm.sum_Q) && (warp < HALF || !(cluster || together))) {
    const tile::Floats strip{p.Q + n_begin * p.Q_row, p.Q_row, p.Q_col, cols, p.r};
    const auto store = [&](const float (&v)[4], int col, int rank) {
      strip.add(col, rank, v, 1.f, p.accumulate != 0);
    };
    if (cluster)
      Q.template each_sum_of_cluster<HALF>(sm.end.Q, m_block, p.m_splits, cols, p.r, store);
    else if (p.m_splits > 1)
      Q.template each_sum<HALF>(p.sum_Q, n_block, m_block, p.m_splits, together, cols, p.r, store);
    else
      Q.each(cols, p.r, store);
  }
  for (int i = 0; i < walk.m_tiles && warp >= HALF; ++i) {
    if (!(ptx::load_shared(&sm.sum_k[i / 32]) >> i % 32 & 1)) continue;
    const int64_t m0 = int64_t(walk.m_begin + i) * ROWS;
    const int rows = p.M - m0 < ROWS ? int(p.M - m0) : ROWS;
    tile::sum_partials<HALF, TILE>(k_partials(walk.m_begin + i), p.n_splits, (rows + 15) / 16 * ranks,
                                   [&](int fragment, const float (&v)[4]) {
                                     tile::put(sm.end.k, fragment / ranks * 16, fragment % ranks * 8, v, 1.f);
                                   });
    ptx::barrier_sync(1, THREADS / 2);
    tile::store<THREADS / 2>(p.k, sm.end.k, m0, p.M, 0, p.r);
    ptx::barrier_sync(1, THREADS / 2);
  }
  if (cluster) ptx::cluster_sync();  // nobody leaves while others read its sums
}

}  // namespace lotr::kernels
