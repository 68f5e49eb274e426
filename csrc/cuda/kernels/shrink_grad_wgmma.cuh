// shrink_grad for sm_90a, ranks to 64, bf16 or fp16:  k = g F,  Q (+)= g^T u  as in shrink_grad.cuh, from one
// read of g, by wgmma.  mma.sync loads the fragments of g, F and u again for each warp, which costs more of a
// multiprocessor's time than g takes to arrive; here F and u come once for 64 rows, g once a product.
//
// Grid     x: the blocks of a cluster, pieces of M (1, 2, 4 or 8); y: pieces of N, up to SUBS tiles of COLS
//          columns.  A block's F [COLS SUBS, R] stays in shared memory, its Q^T in registers.
// Threads  two warpgroups multiply; one thread of a third fetches by bulk copies, which fill with zeros what
//          lies beyond a matrix, and counts in what was stored.
// k        [64 rows, R] of a warpgroup for each row tile: g and F from shared memory, of F's rows of 64 ranks
//          the first R.
// Q^T      [64, 128 columns] of a warpgroup and column tile, zero beyond the rank: u^T as the first operand,
//          in registers, loaded once for each row tile; g once more from shared memory, transposed by its
//          descriptor.
// Bytes    as in shrink_grad.cuh, but with strips of up to 512 columns: half the partial sums of k.
// Sums     k's as there: partial sums of the blocks that share rows, added by the last to arrive, in their
//          order; two counters a row tile, one a warpgroup's rows.  Q's within the cluster: each block stores
//          its own, and after the cluster's barrier adds its share of the strip over all of them, in their
//          order.  Blocks of a cluster run at the same time, so this waits for none that may not have begun.
//
// Timeline of a block, column tiles a and b of two stages each (L copies in flight or landed, P products, .
// the last product may still run, s partial sums of k stored, c these are counted in, two row tiles later):
//   stage 0   L P . L L L P . L
//   stage 1   L P . L L L P . L
//   stage 2   L L L P . L L L P
//   stage 3   L L L P . L L L P
//   k                   s     c
#pragma once
#include "../ptx/sm90.cuh"
#include "../tile/pieces.cuh"
#include "../tile/reduce.cuh"
#include "../tile/store.cuh"
#include "traits.h"

namespace lotr::kernels {

template <class T_, int R_>
struct ShrinkGradWgmmaTraits {
  using T = T_;
  static constexpr int R = R_, ROWS = SHRINK_GRAD_WGMMA_ROWS, COLS = SHRINK_GRAD_WGMMA_COLS;
  static constexpr int SUBS = SHRINK_GRAD_WGMMA_SUBS, PANEL = 64;  // columns of a swizzled row of 128 bytes
  static constexpr int GROUPS = 2, OWN_ROWS = ROWS / GROUPS, OWN_COLS = COLS / GROUPS;
  static constexpr int WARPS = 4 * GROUPS, THREADS = 128 * (GROUPS + 1);
  static constexpr int FETCH_REGISTERS = 40, MULTIPLY_REGISTERS = 232;
  static constexpr int STAGES = SHRINK_GRAD_WGMMA_STAGES, SLOTS = 2;

  struct Stage {  // of a column tile, what one warpgroup makes Q's sums of
    T g[OWN_COLS / PANEL][ROWS][PANEL];
  };
  using Output = tile::Shared<T, OWN_ROWS, R>;
  struct alignas(1024) Smem {
    T F[SUBS][COLS][PANEL], u[SLOTS][ROWS][PANEL];  // zero beyond the rank
    union {
      Stage stage[STAGES];
      Output k;  // after the last tile
    };
    uint64_t full[STAGES], empty[STAGES], stored[SLOTS];
    uint32_t sum_k[SHRINK_GRAD_MOST_TILES / 32];  // bits: the rows of a warpgroup that this block has to sum
  };
  static_assert(STAGES % GROUPS == 0, "a column tile's stages lie side by side");
  static_assert(SUBS * GROUPS <= STAGES, "nobody waits for the stages of the last row tile");
  static_assert(STAGES <= GROUPS * SLOTS, "u is read before its slot's next row tile has a stage");
  static_assert(OWN_ROWS == 64 && R <= PANEL && sizeof(Smem) <= 232448, "shared memory of a block of sm_90");
  static_assert(128 * (FETCH_REGISTERS + GROUPS * MULTIPLY_REGISTERS) <= 65536 / THREADS / 8 * 8 * THREADS);
};

template <class Traits>
class ShrinkGradWgmma {
  using T = typename Traits::T;
  using Smem = typename Traits::Smem;
  static constexpr int R = Traits::R, ROWS = Traits::ROWS, COLS = Traits::COLS, PANEL = Traits::PANEL;
  static constexpr int GROUPS = Traits::GROUPS, OWN_ROWS = Traits::OWN_ROWS, OWN_COLS = Traits::OWN_COLS;
  static constexpr int STAGES = Traits::STAGES, SLOTS = Traits::SLOTS, SUBS = Traits::SUBS;
  static constexpr int K_FLOATS = OWN_ROWS * R;     // of a partial sum of k
  static constexpr int Q_FLOATS = SUBS * COLS * R;  // of Q

 public:
  LOTR_DEVICE ShrinkGradWgmma(Smem& s, const ShrinkGradParams& p)
      : s_(s),
        p_(p),
        m_begin_(tile::begin_of(p.m_pieces, int(blockIdx.x))),
        m_tiles_(tile::count_of(p.m_pieces, int(blockIdx.x))),
        n_begin_(tile::begin_of(p.n_pieces, int(blockIdx.y))),
        n_tiles_(tile::count_of(p.n_pieces, int(blockIdx.y))),
        start_(int(unsigned(m_tiles_) * blockIdx.y / unsigned(p.n_splits))),
        group_(int(threadIdx.x) / 128),
        warp_(int(threadIdx.x) % 128 / 32) {}

  // One thread, before the barrier that opens the kernel.
  LOTR_DEVICE void prepare() {
    for (int i = 0; i < STAGES; ++i) {
      ptx::mbarrier_init(&s_.full[i], 1);
      ptx::mbarrier_init(&s_.empty[i], Traits::WARPS);
    }
    for (uint64_t& stored : s_.stored) ptx::mbarrier_init(&stored, Traits::WARPS);
    ptx::fence_mbarrier_init();
    for (uint32_t& word : s_.sum_k) ptx::store_shared(&word, 0u);
  }

  // ---- the thread that fetches ----

  LOTR_DEVICE void fetch(const ptx::TensorMap& g, const ptx::TensorMap& F, const ptx::TensorMap& u) {
    int stage = 0, before[GROUPS];
    uint32_t parity = 0;
    for (int i = 0; i < m_tiles_; ++i) {
      const int row = row_of(i) * ROWS;
      for (int n = 0; n < n_tiles_; ++n) {
        // before the warpgroups can store another two
        if (n == n_tiles_ - 1 && i >= SLOTS) count_in(i - SLOTS, before);
#pragma unroll
        for (int half = 0; half < GROUPS; ++half) {
          const int at = n * COLS + half * OWN_COLS, col = n_begin_ * COLS + at;
          const bool with_F = i == 0, with_u = n == 0 && half == 0;
          uint64_t* full = &s_.full[stage];
          ptx::mbarrier_wait(&s_.empty[stage], parity ^ 1);
          ptx::mbarrier_arrive_expect_tx(full, uint32_t(sizeof(typename Traits::Stage)) +
                                                   with_F * uint32_t(sizeof(T) * OWN_COLS * PANEL) +
                                                   with_u * uint32_t(sizeof(Smem::u[0])));
          if (with_u) ptx::tma_load_2d(s_.u[i % SLOTS], &u, 0, row, full);
          if (with_F) ptx::tma_load_2d(s_.F[n][half * OWN_COLS], &F, 0, col, full);
#pragma unroll
          for (int panel = 0; panel < OWN_COLS / PANEL; ++panel)
            ptx::tma_load_2d(s_.stage[stage].g[panel], &g, col + panel * PANEL, row, full);
          if (++stage == STAGES) stage = 0, parity ^= 1;
        }
      }
    }
    ptx::griddepcontrol_launch_dependents();
    for (int i = m_tiles_ < SLOTS ? 0 : m_tiles_ - SLOTS; i < m_tiles_; ++i) count_in(i, before);
    note(m_tiles_ - 1, before);
    ptx::fence_device();
  }

  // ---- the warpgroups that multiply ----

  LOTR_DEVICE void multiply() {
    float Q[SUBS][OWN_COLS / 2] = {};
    Place at;
#pragma unroll 1
    for (int i = 0; i < m_tiles_ - 1; ++i) row_tile<false>(Q, i, at);
    row_tile<true>(Q, m_tiles_ - 1, at);
    ptx::griddepcontrol_launch_dependents();
  }

  // After the cluster's barrier.
  LOTR_DEVICE void sum() {
    sum_Q();
    sum_k();
  }

 private:
  struct Place {
    int stage = 0;
    uint32_t parity = 0;
  };

  // The products of row tile i of the walk.  Of the LAST one the sums of each column tile go to memory at
  // once, while the next one's copies arrive, and nobody waits for its stages.
  template <bool LAST>
  LOTR_DEVICE void row_tile(float (&Q)[SUBS][OWN_COLS / 2], int i, Place& at) {
    float k[R / 2];
    uint32_t u[ROWS / 16][4];
    int last = 0;
#pragma unroll
    for (int n = 0; n < SUBS; ++n) {
      if (n > 0 && n == n_tiles_) break;
      const int first = at.stage, second = at.stage + 1;
      ptx::mbarrier_wait(&s_.full[first], at.parity);
      if (n == 0) load_u(u, i % SLOTS);
      ptx::mbarrier_wait(&s_.full[second], at.parity);
      ptx::wgmma_fence();
      add_k(k, s_.stage[first], s_.F[n][0], n > 0);
      add_k(k, s_.stage[second], s_.F[n][OWN_COLS], true);
      const auto& own = s_.stage[first + group_];
#pragma unroll
      for (int c = 0; c < ROWS / 16; ++c)
        ptx::wgmma<T, OWN_COLS, true>(Q[n], u[c],
                                      ptx::swizzled_descriptor_mn(own.g[0][16 * c], sizeof(own.g[0])), true);
      ptx::wgmma_commit();
      if constexpr (LAST) {
        ptx::wgmma_wait<0>();
        ptx::wgmma_landed(k);
        ptx::wgmma_landed(Q[n]);
        store_Q(Q[n], n);
      } else if (n > 0) {
        ptx::wgmma_wait<1>();
        release(last);
      }
      last = first;
      at.stage += GROUPS;
      if (at.stage == STAGES) at.stage = 0, at.parity ^= 1;
    }
    if constexpr (!LAST) {
      ptx::wgmma_wait<0>();
      ptx::wgmma_landed(k);
#pragma unroll
      for (int n = 0; n < SUBS; ++n) ptx::wgmma_landed(Q[n]);
      release(last);
    }
    store_k(k, row_of(i));
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&s_.stored[i % SLOTS]);
  }

  LOTR_DEVICE int row_of(int i) const {
    const int m = i + start_;
    return m_begin_ + (m < m_tiles_ ? m : m - m_tiles_);
  }
  LOTR_DEVICE int ranks() const { return (p_.r + 7) / 8; }          // fragments of k along the rank
  LOTR_DEVICE int rank_blocks() const { return (p_.r + 15) / 16; }  // of Q^T
  LOTR_DEVICE int64_t cols() const {                                // that the strip has
    const int64_t owned = int64_t(n_tiles_) * COLS, left = p_.N - int64_t(n_begin_) * COLS;
    return left < owned ? left : owned;
  }
  LOTR_DEVICE float* k_partial(int part, int n_block) const {
    return p_.sum_k.partial + (int64_t(part) * p_.n_splits + n_block) * K_FLOATS;
  }
  LOTR_DEVICE float* Q_partial(int m_block) const {
    return p_.sum_Q.partial + (int64_t(blockIdx.y) * p_.m_splits + m_block) * Q_FLOATS;
  }

  // Counts in the partial sums of row tile i of the walk.  The answer to the latest count is looked at with
  // the next one, when it has long arrived.
  LOTR_DEVICE void count_in(int i, int (&before)[GROUPS]) {
    ptx::mbarrier_wait(&s_.stored[i % SLOTS], i / SLOTS & 1);
    if (i > 0) note(i - 1, before);
    ptx::fence_device();
#pragma unroll
    for (int group = 0; group < GROUPS; ++group)
      before[group] = ptx::atomic_wrap(p_.sum_k.arrived + GROUPS * row_of(i) + group, p_.n_splits - 1);
  }
  LOTR_DEVICE void note(int i, const int (&before)[GROUPS]) {
    const int bit = GROUPS * (row_of(i) - m_begin_);
    uint32_t* word = &s_.sum_k[bit / 32];
    uint32_t set = ptx::load_shared(word);
#pragma unroll
    for (int group = 0; group < GROUPS; ++group)
      if (before[group] == p_.n_splits - 1) set |= 1u << (bit + group) % 32;
    ptx::store_shared(word, set);
  }

  // The stages of a column tile, which the products have read; and of the first one of a row tile its slot of
  // u.
  LOTR_DEVICE void release(int first LOTR_SITE) {
    __syncwarp();
    if (threadIdx.x % 32 < GROUPS) ptx::mbarrier_arrive(&s_.empty[first + threadIdx.x % 32] LOTR_PASS_SITE);
  }

  // u^T as the first operand: this warp's 16 ranks of all rows of the tile.
  LOTR_DEVICE void load_u(uint32_t (&u)[ROWS / 16][4], int slot) {
    const int lane = threadIdx.x % 32, chunk = 2 * warp_ + lane / 8 % 2;
#pragma unroll
    for (int c = 0; c < ROWS / 16; ++c) {
      const int row = 16 * c + lane / 16 * 8 + lane % 8;
      ptx::ldmatrix_x4_trans(u[c], &s_.u[slot][row][(chunk ^ row % 8) * 8]);
    }
  }

  // k += this warpgroup's rows of g times as many rows of F
  LOTR_DEVICE void add_k(float (&k)[R / 2], const typename Traits::Stage& stage, const T (&F)[PANEL],
                         bool accumulate) {
#pragma unroll
    for (int c = 0; c < OWN_COLS; c += 16)
      ptx::wgmma<T, R, true>(k, ptx::swizzled_descriptor(&stage.g[c / PANEL][OWN_ROWS * group_][c % PANEL]),
                             ptx::swizzled_descriptor_mn(F + c * PANEL, 0), accumulate || c > 0);
  }

  LOTR_DEVICE void store_k(const float (&k)[R / 2], int row) {
    if (int64_t(row) * ROWS + OWN_ROWS * group_ + 16 * warp_ >= p_.M) return;
    float* to = k_partial(GROUPS * row + group_, int(blockIdx.y)) + warp_ * ranks() * tile::FRAGMENT;
#pragma unroll
    for (int j = 0; j < R / 8; ++j)
      if (8 * j < p_.r)
        tile::store_partial(to + j * tile::FRAGMENT, {k[4 * j], k[4 * j + 1], k[4 * j + 2], k[4 * j + 3]});
  }

  // To the cluster's partial sums: fragments of 16 ranks x 8 columns, by columns.
  LOTR_DEVICE void store_Q(const float (&Q)[OWN_COLS / 2], int n) {
    if (16 * warp_ >= p_.r) return;
    float* mine = Q_partial(int(blockIdx.x)) + warp_ * tile::FRAGMENT;
#pragma unroll
    for (int j = 0; j < OWN_COLS / 8; ++j) {
      const int column = n * COLS / 8 + group_ * OWN_COLS / 8 + j;
      if (8 * column >= cols()) continue;
      tile::store_partial(mine + column * rank_blocks() * tile::FRAGMENT,
                          {Q[4 * j], Q[4 * j + 1], Q[4 * j + 2], Q[4 * j + 3]});
    }
  }

  // This block's share of the strip.
  LOTR_DEVICE void sum_Q() {
    float* strip = p_.Q + int64_t(n_begin_) * COLS * p_.Q_row;
    const int total = int((cols() + 7) / 8) * rank_blocks(), splits = p_.m_splits;
    const int first = total * int(blockIdx.x) / splits, end = total * (int(blockIdx.x) + 1) / splits;
    tile::sum_partials<Traits::WARPS, Q_FLOATS>(
        Q_partial(0) + first * tile::FRAGMENT, splits, end - first, [&](int i, const float (&v)[4]) {
          const int column = (first + i) / rank_blocks(), rank = (first + i) % rank_blocks();
          tile::store_float(strip, p_.Q_col, p_.Q_row, 16 * rank, p_.r, 8 * column, int(cols()), v, 1.f,
                            p_.accumulate != 0);
        });
  }

  LOTR_DEVICE void sum_k() {
    constexpr int THREADS = 32 * Traits::WARPS;
    for (int i = 0; i < GROUPS * m_tiles_; ++i) {
      if (!(ptx::load_shared(&s_.sum_k[i / 32]) >> i % 32 & 1)) continue;
      const int part = GROUPS * m_begin_ + i;
      const int64_t m0 = int64_t(part) * OWN_ROWS, left = p_.M - m0;
      if (left <= 0) continue;
      tile::sum_partials<Traits::WARPS, K_FLOATS>(
          k_partial(part, 0), p_.n_splits, int(left < OWN_ROWS ? (left + 15) / 16 : OWN_ROWS / 16) * ranks(),
          [&](int fragment, const float (&v)[4]) {
            tile::put(s_.k, fragment / ranks() * 16, fragment % ranks() * 8, v, 1.f);
          });
      ptx::barrier_sync(1, THREADS);
      tile::store<THREADS>(p_.k, s_.k, m0, p_.M, 0, p_.r);
      ptx::barrier_sync(1, THREADS);
    }
  }

  Smem& s_;
  const ShrinkGradParams& p_;
  const int m_begin_, m_tiles_, n_begin_, n_tiles_, start_;
  const int group_, warp_;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, 1)
    shrink_grad_wgmma(const __grid_constant__ ptx::TensorMap g, const __grid_constant__ ptx::TensorMap F,
                      const __grid_constant__ ptx::TensorMap u, const __grid_constant__ ShrinkGradParams p) {
  ShrinkGradWgmma<Traits> block(ptx::shared_storage<typename Traits::Smem>(), p);
  if (threadIdx.x == 0) block.prepare();
  __syncthreads();
  ptx::griddepcontrol_wait();
  if (threadIdx.x < 32 * Traits::WARPS) {
    ptx::registers_more<Traits::MULTIPLY_REGISTERS>();
    block.multiply();
    ptx::cluster_sync();
    block.sum();
  } else {
    ptx::registers_fewer<Traits::FETCH_REGISTERS>();
    if (threadIdx.x == 32 * Traits::WARPS) block.fetch(g, F, u);
    __syncwarp();
    ptx::cluster_sync();
  }
}

}  // namespace lotr::kernels
