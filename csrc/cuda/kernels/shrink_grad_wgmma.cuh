// shrink_grad for sm_90a, ranks to 64, bf16 or fp16:  k = g F,  Q (+)= g^T u  as in shrink_grad.cuh, from one
// read of g, by wgmma.  mma.sync loads the fragments of g, F and u again for each warp, which costs more of a
// multiprocessor's time than g takes to arrive; here F and u come once for 64 rows, g once a product.
//
// Grid     x: pieces of N, up to SUBS tiles of COLS columns, up to eight neighbours a cluster;
//          y: pieces of M.
//          A block's F [COLS SUBS, R] stays in shared memory, its Q^T in registers.
// Threads  two warpgroups multiply; of a third one thread fetches by bulk copies, which fill with zeros what
//          lies beyond a matrix, and three warps sum k.
// k        [64 rows, R] of a warpgroup for each row tile: g and F from shared memory, F in rows of R ranks.
// Q^T      [64, 64 columns] of a warpgroup and column tile, zero beyond the rank: u^T as the first operand,
//          in registers, loaded once for each row tile; g once more from shared memory, transposed by its
//          descriptor.
// Bytes    g once; F once for each piece of M, u once for each of N.  Partial sums of k stay in the shared
//          memory of the cluster; where N has several clusters, 8 M R for each of them.  Of Q 8 N R for each
//          piece of M.
// Sums     k's during the walk: each block sums its share of a row tile's rows over the blocks of its
//          cluster, in their order, while the next row tile is multiplied (up to rank 32, where there is room
//          for the sums of two row tiles, also while the one after it is); of several clusters the last to
//          arrive adds their sums, in their order.  Q's after it: of the blocks that share columns, which lie
//          in different clusters, each adds a share, where the whole grid runs at the same time, else the
//          last to arrive all; in the order of the blocks.
//
// Timeline of a block, column tiles a to d of two stages each (L copies in flight or landed, P products, .
// the last product may still run, s k's sums stored, + added over the cluster):
//   stages 0, 1   L P . L L P . L
//   stages 2, 3   L L P . L L P .
//   stages 4, 5   . L L P . L L P
//   k                     s + + s
#pragma once
#include "../ptx/pipeline.cuh"
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
  static constexpr int WARPS = 4 * GROUPS, THREADS = 128 * (GROUPS + 1), SUM_WARPS = 3;
  static constexpr int FETCH_REGISTERS = 56, MULTIPLY_REGISTERS = 224;
  static constexpr int STAGES = SHRINK_GRAD_WGMMA_STAGES, SLOTS = 2;
  static constexpr int SLICE = SHRINK_GRAD_WGMMA_SLICE, SLICES = ROWS / SLICE;
  // Of k: where there is room for two, a row tile's products need not wait for the sums of the one before,
  // which take a fence of the whole GPU and two passes from block to block.
  static constexpr int K_SLOTS = R <= 32 ? 2 : 1;

  struct Stage {  // of a column tile, what one warpgroup makes Q's sums of
    T g[ROWS][PANEL];
  };
  struct alignas(1024) Smem {
    T F[SUBS][COLS][R];       // zero beyond the rank; a row is as long as its swizzle
    T u[SLOTS][ROWS][PANEL];  // zero beyond the rank
    Stage stage[STAGES];
    float k[K_SLOTS * SLICES][R / 8 * tile::FRAGMENT];  // a row tile in each slot, by slices and fragments
    ptx::Pipeline<STAGES> ring;
    uint64_t stored[SLOTS], full_k[K_SLOTS], empty_k[K_SLOTS];
    int last_k, last_Q;
  };
  static_assert(OWN_COLS == PANEL && STAGES % GROUPS == 0, "a column tile's stages lie side by side");
  static_assert(STAGES <= 2 * GROUPS * SLOTS, "u is read before its slot's next row tile has a stage");
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
  static constexpr int SLICE = Traits::SLICE, SLICES = Traits::SLICES, SUM_WARPS = Traits::SUM_WARPS;
  static constexpr int K_SLOTS = Traits::K_SLOTS;
  using MultiplyBarrier = tile::Named<1, 32 * Traits::WARPS>;
  using SumBarrier = tile::Named<2, 32 * SUM_WARPS>;
  static constexpr int SUM_LOADS = 4;               // in flight: few registers
  static constexpr int K_FLOATS = SLICE * R;        // of a partial sum of k
  static constexpr int Q_FLOATS = SUBS * COLS * R;  // of Q

 public:
  LOTR_DEVICE ShrinkGradWgmma(Smem& s, const ShrinkGradParams& p)
      : s_(s),
        p_(p),
        m_begin_(tile::begin_of(p.m_pieces, int(blockIdx.y))),
        m_tiles_(tile::count_of(p.m_pieces, int(blockIdx.y))),
        n_begin_(tile::begin_of(p.n_pieces, int(blockIdx.x))),
        n_tiles_(tile::count_of(p.n_pieces, int(blockIdx.x))),
        group_(int(threadIdx.x) / 128),
        warp_(int(threadIdx.x) % 128 / 32) {}

  // One thread, before the barrier that opens the kernel.
  LOTR_DEVICE void prepare() {
    s_.ring.init(Traits::WARPS);
    for (uint64_t& stored : s_.stored) ptx::mbarrier_init(&stored, Traits::WARPS);
    for (uint64_t& full : s_.full_k) ptx::mbarrier_init(&full, unsigned(p_.cluster));
    for (uint64_t& empty : s_.empty_k) ptx::mbarrier_init(&empty, unsigned(SUM_WARPS * p_.cluster));
    ptx::fence_mbarrier_init();
  }

  // ---- the thread that fetches ----

  LOTR_DEVICE void fetch(const ptx::TensorMap& g, const ptx::TensorMap& F, const ptx::TensorMap& u) {
    Place at;
    for (int i = 0; i < m_tiles_; ++i) {
      const int row = (m_begin_ + i) * ROWS;
      for (int n = 0; n < n_tiles_; ++n) {
#pragma unroll
        for (int half = 0; half < GROUPS; ++half) {
          const int col = (n_begin_ + n) * COLS + half * OWN_COLS;
          const bool with_F = i == 0 && half == 0, with_u = n == 0 && half == 0;
          s_.ring.wait_empty(at);
          if (with_u) ptx::mbarrier_wait(&s_.stored[i % SLOTS], (i / SLOTS & 1) ^ 1);
          uint64_t* full = s_.ring.expect(at, uint32_t(sizeof(typename Traits::Stage)) +
                                                  with_F * uint32_t(sizeof(Smem::F[0])) +
                                                  with_u * uint32_t(sizeof(Smem::u[0])));
          if (with_u) ptx::tma_load_2d(s_.u[i % SLOTS], &u, 0, row, full);
          if (with_F) ptx::tma_load_2d(s_.F[n], &F, 0, col, full);
          ptx::tma_load_2d(s_.stage[at.stage].g, &g, col, row, full);
          at.advance();
        }
      }
    }
    ptx::griddepcontrol_launch_dependents();
  }

  // ---- the warpgroups that multiply ----

  LOTR_DEVICE void multiply() {
    constexpr bool LAST = true;
    float Q[SUBS][OWN_COLS / 2] = {};
    Place at;
#pragma unroll 1
    for (int i = 0; i < m_tiles_ - 1; ++i) row_tile<!LAST>(Q, i, at);
    row_tile<LAST>(Q, m_tiles_ - 1, at);
    ptx::griddepcontrol_launch_dependents();
    sum_Q();
  }

  // ---- the warps that sum k ----

  LOTR_DEVICE void sum_k() {
    const int lane = int(threadIdx.x) % 32, blocks = p_.cluster;
    const int share = SLICES / blocks, first = int(ptx::cluster_rank()) * share;
#pragma unroll 1
    for (uint32_t i = 0; i < uint32_t(m_tiles_); ++i) {
      if (warp_ == 1) {
        ptx::mbarrier_wait(&s_.stored[i % SLOTS], i / SLOTS & 1);
        if (lane < blocks) ptx::mbarrier_arrive_cluster(&s_.full_k[i % K_SLOTS], uint32_t(lane));
      }
      ptx::mbarrier_wait_cluster(&s_.full_k[i % K_SLOTS], i / K_SLOTS & 1);
      const uint32_t begin = i * SLICES + first;
#pragma unroll 1
      for (uint32_t slice = begin; slice < begin + share; ++slice) sum_slice(slice);
      __syncwarp();
      if (lane < blocks) ptx::mbarrier_give_back(&s_.empty_k[i % K_SLOTS], uint32_t(lane));
    }
    ptx::griddepcontrol_launch_dependents();
    // The block stays until all of its cluster have read its sums, of the last row tile in each slot.
#pragma unroll 1
    for (uint32_t i = m_tiles_ < K_SLOTS ? 0 : m_tiles_ - K_SLOTS; i < uint32_t(m_tiles_); ++i)
      ptx::mbarrier_wait(&s_.empty_k[i % K_SLOTS], i / K_SLOTS & 1);
  }

 private:
  using Place = typename ptx::Pipeline<STAGES>::Place;

  // The products of row tile i of the block.  Of the LAST one the sums of each column tile go to memory at
  // once, while the next one's copies arrive.
  template <bool LAST>
  LOTR_DEVICE void row_tile(float (&Q)[SUBS][OWN_COLS / 2], int i, Place& at) {
    float k[R / 2];
    uint32_t u[ROWS / 16][4];
    int last = 0;
#pragma unroll
    for (int n = 0; n < SUBS; ++n) {
      if (n > 0 && n == n_tiles_) break;
      const int first = at.stage;
      s_.ring.wait_full(at);
      if (n == 0) load_u(u, i % SLOTS);
      s_.ring.wait_full(at, 1);
      ptx::wgmma_fence();
      add_k(k, s_.stage[first], s_.F[n][0], n > 0);
      add_k(k, s_.stage[first + 1], s_.F[n][OWN_COLS], true);
      const auto& own = s_.stage[first + group_];
#pragma unroll
      for (int c = 0; c < ROWS / 16; ++c)
        ptx::wgmma<T, OWN_COLS, ptx::Major::mn>(Q[n], u[c], ptx::swizzled_descriptor_mn(own.g[16 * c], 0),
                                                true);
      ptx::wgmma_commit();
      if constexpr (LAST) {
        ptx::wgmma_wait<0>();
        ptx::wgmma_landed(k);
        ptx::wgmma_landed(Q[n]);
      } else if (n > 0) {
        ptx::wgmma_wait<1>();
      }
      if (LAST || n > 0) s_.ring.template release<GROUPS>(LAST ? first : last);
      if constexpr (LAST) store_Q(Q[n], n);
      last = first;
      at.advance(GROUPS);
    }
    if constexpr (!LAST) {
      ptx::wgmma_wait<0>();
      ptx::wgmma_landed(k);
#pragma unroll
      for (int n = 0; n < SUBS; ++n) ptx::wgmma_landed(Q[n]);
      s_.ring.template release<GROUPS>(last);
    }
    ptx::mbarrier_wait(&s_.empty_k[i % K_SLOTS], (i / K_SLOTS & 1) ^ 1);
    put_k(k, i % K_SLOTS);
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&s_.stored[i % SLOTS]);
  }

  LOTR_DEVICE int ranks() const { return (p_.r + 7) / 8; }          // fragments of k along the rank
  LOTR_DEVICE int rank_blocks() const { return (p_.r + 15) / 16; }  // of Q^T
  LOTR_DEVICE int64_t cols() const {                                // that the strip has
    const int64_t owned = int64_t(n_tiles_) * COLS, left = p_.N - int64_t(n_begin_) * COLS;
    return left < owned ? left : owned;
  }
  LOTR_DEVICE float* k_partial(int slice, int cluster) const {
    return p_.sum_k.partial + (int64_t(slice) * p_.n_splits + cluster) * K_FLOATS;
  }
  LOTR_DEVICE float* Q_partial(int m_block) const {
    return p_.sum_Q.partial + (int64_t(blockIdx.x) * p_.m_splits + m_block) * Q_FLOATS;
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
  LOTR_DEVICE void add_k(float (&k)[R / 2], const typename Traits::Stage& stage, const T (&F)[R],
                         bool accumulate) {
#pragma unroll
    for (int c = 0; c < OWN_COLS; c += 16)
      ptx::wgmma<T, R, ptx::Major::mn>(k, ptx::swizzled_descriptor(&stage.g[OWN_ROWS * group_][c]),
                                       ptx::swizzled_descriptor_mn<R>(F + c * R, 0), accumulate || c > 0);
  }

  // To shared memory, for the cluster: a warp's rows are a slice.
  LOTR_DEVICE void put_k(const float (&k)[R / 2], int slot) {
    float* to = s_.k[slot * SLICES + 4 * group_ + warp_];
#pragma unroll
    for (int j = 0; j < R / 8; ++j)
      if (8 * j < p_.r)
        tile::put_partial(to + j * tile::FRAGMENT, {k[4 * j], k[4 * j + 1], k[4 * j + 2], k[4 * j + 3]});
  }

  // A slice of the block's row tiles, of which each block of the cluster has its sums at the same place.
  LOTR_DEVICE void sum_slice(uint32_t of_block) {
    const float* own = s_.k[of_block % (K_SLOTS * SLICES)];
    const int slice = m_begin_ * SLICES + int(of_block);
    const int64_t m0 = int64_t(slice) * SLICE;
    if (m0 >= p_.M) return;
    const auto store = [&](int fragment, const float (&v)[4]) {
      tile::store_rounded<T>(p_.k, m0, p_.M, 8 * fragment, p_.r, v);
    };
    if (p_.n_splits == 1)
      return tile::sum_of_cluster<SUM_WARPS, SUM_LOADS>(own, p_.cluster, 0, ranks(), store);
    float* mine = k_partial(slice, int(blockIdx.x) / p_.cluster);
    tile::sum_of_cluster<SUM_WARPS, SUM_LOADS>(
        own, p_.cluster, 0, ranks(),
        [&](int fragment, const float (&v)[4]) { tile::store_partial(mine + fragment * tile::FRAGMENT, v); });
    if (tile::arrive_last<SumBarrier>(p_.sum_k.arrived + slice, p_.n_splits, s_.last_k))
      tile::sum_together<SUM_WARPS, 1, K_FLOATS, SUM_LOADS>(k_partial(slice, 0), p_.n_splits, ranks(), store);
  }

  // To the partial sums of the strip: fragments of 16 ranks x 8 columns, by columns.
  LOTR_DEVICE void store_Q(const float (&Q)[OWN_COLS / 2], int n) {
    if (16 * warp_ >= p_.r) return;
    float* mine = Q_partial(int(blockIdx.y)) + warp_ * tile::FRAGMENT;
#pragma unroll
    for (int j = 0; j < OWN_COLS / 8; ++j) {
      const int column = n * COLS / 8 + group_ * OWN_COLS / 8 + j;
      if (8 * column >= cols()) continue;
      tile::store_partial(mine + column * rank_blocks() * tile::FRAGMENT,
                          {Q[4 * j], Q[4 * j + 1], Q[4 * j + 2], Q[4 * j + 3]});
    }
  }

  // This block's share of the strip, or all of it.
  LOTR_DEVICE void sum_Q() {
    const int splits = p_.m_splits, own = int(blockIdx.y);
    if (!tile::arrive_last<MultiplyBarrier>(p_.sum_Q.arrived + blockIdx.x, splits, s_.last_Q, p_.together))
      return;
    const tile::Floats strip{p_.Q + int64_t(n_begin_) * COLS * p_.Q_row, p_.Q_col, p_.Q_row, p_.r,
                             int(cols())};
    const int total = int((cols() + 7) / 8) * rank_blocks();
    tile::sum_share<Traits::WARPS, Q_FLOATS>(
        Q_partial(0), splits, own, p_.together, total, [&](int fragment, const float (&v)[4]) {
          const int column = fragment / rank_blocks(), rank = fragment % rank_blocks();
          strip.add(16 * rank, 8 * column, v, 1.f, p_.accumulate != 0);
        });
  }

  Smem& s_;
  const ShrinkGradParams& p_;
  const int m_begin_, m_tiles_, n_begin_, n_tiles_;
  const int group_, warp_;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, 1)
    shrink_grad_wgmma(const __grid_constant__ ptx::TensorMap g, const __grid_constant__ ptx::TensorMap F,
                      const __grid_constant__ ptx::TensorMap u, const __grid_constant__ ShrinkGradParams p) {
  ShrinkGradWgmma<Traits> block(ptx::shared_storage<typename Traits::Smem>(), p);
  if (threadIdx.x == 0) block.prepare();
  if (threadIdx.x == 32 * Traits::WARPS)
    ptx::prefetch_tensor_map(&g), ptx::prefetch_tensor_map(&F), ptx::prefetch_tensor_map(&u);
  ptx::cluster_sync_relaxed();
  ptx::griddepcontrol_wait();
  if (threadIdx.x < 32 * Traits::WARPS) {
    ptx::registers_more<Traits::MULTIPLY_REGISTERS>();
    block.multiply();
  } else {
    ptx::registers_fewer<Traits::FETCH_REGISTERS>();
    if (threadIdx.x >= 32 * (Traits::WARPS + 1))
      block.sum_k();
    else if (threadIdx.x == 32 * Traits::WARPS)
      block.fetch(g, F, u);
  }
}

}  // namespace lotr::kernels
