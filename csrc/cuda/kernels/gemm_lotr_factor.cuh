// Q = g^T u in the backward pass of gemm_lotr.cuh, from the scouts' own read of g (the kernel's x), for ranks
// up to 16: a scout makes k = g F from a stage of g, and from the same stage Q^T = u^T g, whose second
// operand is the stage read MN-major.  u, of the forward pass, is the first operand, in registers for a whole
// band.
//
// Sums   Over the band in the accumulators; over the bands of a ticket in memory, where a scout's next band
//        goes on with what its last one left; over the tickets in their order, as pieces of work behind all
//        tiles'.  No atomics: the same bits every time, for the same number of scouts.
// Bytes  8 r K a ticket and block of its cluster for partial sums, against 2 M K for one more read of g.
#pragma once
#include "../tile/reduce.cuh"
#include "../tile/store.cuh"
#include "gemm_lotr_rows.cuh"

namespace lotr::kernels {

// The sums that a warpgroup makes, of every other stage: 64 ranks, those from R on zero, by the stage's 64
// columns of g.
template <class Traits>
class FactorSums {
  using T = typename Traits::T;
  static constexpr int FRAGMENTS = Traits::BK / 8;  // of 16 ranks x 8 columns, for each 16 ranks

 public:
  // For the band that starts at row m0; `fresh`: the first of its ticket.  slot: the ticket and block.
  LOTR_DEVICE FactorSums(const GemmLotrParams& p, int m0, int slot, bool fresh)
      : p_(p), warp_(threadIdx.x % 128 / 32), fresh_(fresh), slot_(slot) {
    // u^T from rows of u: of four tiles of 8 rows by 8 ranks a lane of each quad loads a row each.
    const int row = m0 + int(threadIdx.x % 32) / 4, tile = int(threadIdx.x % 4);
#pragma unroll
    for (int c = 0; c < Traits::BM / 16; ++c)
      load_ranks(u_[c], row + 16 * c + tile / 2 * 8, 16 * warp_ + tile % 2 * 8);
#pragma unroll
    for (int c = 0; c < Traits::BM / 16; ++c) {
      transpose_quad(u_[c]);  // the lane's two columns of each tile
#pragma unroll
      for (uint32_t& word : u_[c]) word = ptx::movmatrix_trans(word);
    }
  }

  // Before the fence: the sums so far of k-step `step`.
  LOTR_DEVICE void load(int step) {
    if (!fresh_ && owner(step)) {
#pragma unroll
      for (int j = 0; j < FRAGMENTS; ++j) {
        const float4 v = ptx::load(reinterpret_cast<const float4*>(fragment(step, j)) + threadIdx.x % 32);
        sum_[4 * j] = v.x, sum_[4 * j + 1] = v.y, sum_[4 * j + 2] = v.z, sum_[4 * j + 3] = v.w;
      }
    }
    ptx::wgmma_landed(sum_);  // in their registers before the fence
  }

  LOTR_DEVICE void multiply(const T (&g)[Traits::BM][Traits::BK]) {
#pragma unroll
    for (int c = 0; c < Traits::BM / 16; ++c)
      ptx::wgmma<T, Traits::BK, ptx::Major::mn>(sum_, u_[c], ptx::swizzled_descriptor_mn(&g[16 * c][0], 0),
                                                c > 0 || !fresh_);
  }

  // After the wait.
  LOTR_DEVICE void store(int step) {
    ptx::wgmma_landed(sum_);
    if (!owner(step)) return;
#pragma unroll
    for (int j = 0; j < FRAGMENTS; ++j)
      tile::store_partial(fragment(step, j),
                          {sum_[4 * j], sum_[4 * j + 1], sum_[4 * j + 2], sum_[4 * j + 3]});
  }

 private:
  LOTR_DEVICE bool owner(int step) const { return 16 * warp_ < Traits::R && step * Traits::BK < p_.K; }
  // Eight ranks of row m of u, zero beyond r; 16 bytes a load where the row has them all, and aligned.
  LOTR_DEVICE void load_ranks(uint32_t (&word)[4], int m, int rank) const {
    const auto* u = static_cast<const uint16_t*>(p_.Q.u) + int64_t(m) * p_.Q.u_row + rank;
#pragma unroll
    for (uint32_t& w : word) w = 0;
    if (m >= p_.M || rank >= p_.r) return;
    if (p_.Q.u_vector && rank + 8 <= p_.r) {
      const uint4 v = ptx::load_nc(reinterpret_cast<const uint4*>(u));
      word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (rank + e < p_.r) word[e / 2] |= uint32_t(ptx::load_nc(u + e)) << 16 * (e % 2);
    }
  }
  LOTR_DEVICE float* fragment(int step, int j) const {
    return p_.Q.sums<Traits>(step, slot_, p_.tickets) + (FRAGMENTS * warp_ + j) * tile::FRAGMENT;
  }

  float sum_[Traits::BK / 2] = {};
  const GemmLotrParams& p_;
  const int warp_;
  const bool fresh_;
  const int slot_;
  uint32_t u_[Traits::BM / 16][4];
};

// A piece of work behind the tiles: Q's 64 rows of k-step `step` from the sums of all slots, by both
// warpgroups.
template <class Traits>
LOTR_DEVICE void sum_factor(const GemmLotrParams& p, int step, uint32_t epoch) {
  // each flag says that a warpgroup's sums of that band are there too
  const int flags = Traits::GROUPS * Traits::CLUSTER * p.tickets.bands;
  for (int i = threadIdx.x % 128; i < flags; i += 128)
    ptx::wait_equal(p.sync + GEMM_LOTR_FLAGS + i, int32_t(epoch));
  ptx::barrier_sync(1 + threadIdx.x / 128, 128);
  if (step * Traits::BK >= p.K) return;
  constexpr int FLOATS = Traits::BK * Traits::R, COLUMNS = Traits::BK / 8;  // COLUMNS: of fragments
  const tile::Floats Q{p.Q.data, p.Q.col, p.Q.row, p.r, int(p.K)};
  tile::sum_partials<Traits::WARPS, FLOATS>(
      p.Q.sums<Traits>(step, 0, p.tickets), Traits::CLUSTER * p.tickets.scouts, FLOATS / tile::FRAGMENT,
      [&](int fragment, const float (&v)[4]) {
        Q.add(fragment / COLUMNS * 16, step * Traits::BK + fragment % COLUMNS * 8, v, 1.f, p.Q.accumulate);
      });
}

}  // namespace lotr::kernels
