// gemm_lotr:  y = x W^T + bias + u F^T,  u = x A         sm_90a, bf16 or fp16, float32 sums
//             dx = g W + k A^T,          k = g F         the same kernel, with W read MN-major
//                                        Q = g^T u       up to rank 16, by the scouts: gemm_lotr_factor.cuh
//
//   x [M, K], W [N, K] (backward: [K, N]), A^T [r, K], F [N, r], y [M, N], u [M, r] of ranks padded to 8.
//
// Grid     as many clusters of CLUSTER blocks as the GPU holds, each drawing tickets until none is left:
//          first the scouts', which make u for bands of 128 rows, then the tiles' of y, 128 x BN, then the
//          sums of Q.
// Rank     is one more k-step of each tile: u is the first operand, in registers, and F comes through the
//          ring like any other stage.  u is stored once, by its scout, and read once by each tile.
// Bytes    x once for each column of tiles and once by the scouts, mostly from L2; W once for each band, or
//          for two with clusters; y written once and never read; u written once; A^T once for each band.
//
// Timeline of a block: a tile of six k-steps and the rank's, then the next tile.  L a copy, in flight or
// landed; P product; F the rank's, u F^T; . the product may still run, one group being left in flight.
//   stage 0   L P . L L P . L L L L P        each stage has a mbarrier `full`, at which the copies' bytes
//   stage 1   L L P . L L P . L L L L P      count, and a mbarrier `empty`, at which the warps arrive that
//   stage 2   L L L P . L L F L L L L L      have read it
//   stage 3   L L L L P . L L L L P . L
//   u                     a                  a: flag acquired and u loaded, while the last product runs
//   y                         s s            s: stores, while the next tile's copies come
//
// No hang  Scouts wait for no other block; a tile waits for the scout of its band, a sum of Q for all scouts.
//          Running blocks have drawn their tickets before.  A block does its tickets in order.  So the lowest
//          unfinished ticket can always go on, however many blocks the GPU holds at a time.  A test
//          enumerates the tickets.
// Replay   A flag holds the number of the launch that set it (epoch).  Each cluster draws one ticket too
//          many; the one that draws the last resets the counter and stores the epoch.  So nothing is
//          cleared between launches, and one with another M finds only flags of earlier epochs.  Launches
//          on one workspace must follow one another.
// Bits     Each element of u and y is summed by one thread in one order, the same in every block.
#pragma once
#include "gemm_lotr_factor.cuh"

namespace lotr::kernels {

// At the barriers of the slots, through which block 0 hands a number to the others.
template <class Traits>
LOTR_DEVICE void wait(uint64_t* barrier, uint32_t parity LOTR_SITE) {
  if constexpr (Traits::CLUSTER == 1)
    ptx::mbarrier_wait(barrier, parity LOTR_PASS_SITE);
  else
    ptx::mbarrier_wait_cluster(barrier, parity LOTR_PASS_SITE);
}

template <class Traits>
LOTR_DEVICE void arrive(uint64_t* barrier, uint32_t rank LOTR_SITE) {
  if constexpr (Traits::CLUSTER == 1)
    ptx::mbarrier_arrive(barrier LOTR_PASS_SITE);
  else
    ptx::mbarrier_arrive_cluster(barrier, rank LOTR_PASS_SITE);
}

// That what was read here may be overwritten by block `rank`.
template <class Traits>
LOTR_DEVICE void give_back(uint64_t* barrier, uint32_t rank LOTR_SITE) {
  if constexpr (Traits::CLUSTER == 1)
    ptx::mbarrier_arrive(barrier LOTR_PASS_SITE);
  else
    ptx::mbarrier_give_back(barrier, rank LOTR_PASS_SITE);
}

template <class Traits>
LOTR_DEVICE int rank_in_cluster() {
  return Traits::CLUSTER == 1 ? 0 : int(ptx::cluster_rank());
}

// ---- the thread that fetches ----

template <class Traits>
class Producer {
  using T = typename Traits::T;
  using Stage = typename Traits::Stage;

 public:
  LOTR_DEVICE Producer(typename Traits::Smem& s, const ptx::TensorMap& X, const ptx::TensorMap& W,
                       const ptx::TensorMap& A, const ptx::TensorMap& F, const GemmLotrParams& p)
      : s_(s), X_(X), W_(W), A_(A), F_(F), p_(p), rank_(rank_in_cluster<Traits>()) {}

  LOTR_DEVICE void run() {
    for (int i = 0, piece = -1;; ++i) {
      piece = rank_ == 0 ? hand_out(i, piece) : take(i);
      if (piece < 0) return;
      const GemmLotrWork work = p_.tickets.work(piece);
      const int m0 = (work.band * Traits::CLUSTER + rank_) * Traits::BM;
      if (work.column == GemmLotrWork::SCOUT)
        fetch_scout(m0);
      else if (work.column != GemmLotrWork::SUMS)
        fetch_tile(m0, work.column * Traits::BN);
    }
  }

 private:
  // Block 0 of the cluster draws, and tells all that multiply and the other producer.
  LOTR_DEVICE int hand_out(int i, int piece) {
    const int slot = i % 2;
    int ticket = -1;
    piece = piece < 0 ? -1 : p_.tickets.after(piece);
    if (piece < 0) {
      ticket = ptx::atomic_add_acq_rel(p_.sync, 1);
      if (ticket < p_.tickets.count()) piece = p_.tickets.first(ticket);
    }
    wait<Traits>(&s_.slot_empty[slot], (i / 2 & 1) ^ 1);
    for (uint32_t to = 0; to < Traits::CLUSTER; ++to) {
      if constexpr (Traits::CLUSTER == 1)
        ptx::store_shared(&s_.slot[slot], piece);
      else
        ptx::store_cluster(&s_.slot[slot], to, piece);
      arrive<Traits>(&s_.slot_full[slot], to);
    }
    // The last cluster has drawn its ticket too many: none will draw again, all have read the epoch.
    if (ticket == p_.tickets.count() + int(gridDim.x) / Traits::CLUSTER - 1) {
      ptx::store(p_.sync, 0);
      ptx::store(p_.sync + 1, int32_t(s_.epoch));
    }
    return piece;
  }

  LOTR_DEVICE int take(int i) {
    const int slot = i % 2;
    wait<Traits>(&s_.slot_full[slot], i / 2 & 1);
    const int piece = ptx::load_shared(&s_.slot[slot]);
    arrive<Traits>(&s_.slot_empty[slot], 0);
    return piece;
  }

  LOTR_DEVICE void fetch_scout(int m0) {
    // in whole turns of the scout's loop: what lies beyond K comes as zeros
    const int turn = p_.Q.u ? Traits::SCOUT_STEPS * Traits::BK : Traits::BK,
              end = (p_.K + turn - 1) / turn * turn;
    for (int k = 0; k < end; k += Traits::BK) {
      uint64_t* full;
      Stage& stage = next(uint32_t(sizeof(Stage::x) + sizeof(Stage::a)), full);
      ptx::tma_load_2d(stage.x, &X_, k, m0, full);
      ptx::tma_load_2d(stage.a, &A_, k, 0, full);
    }
  }

  LOTR_DEVICE void fetch_tile(int m0, int n0) {
    const int share = rank_ * Traits::SHARE;  // the first column of those that this block fetches
    for (int k = 0; k < p_.K; k += Traits::BK) {
      uint64_t* full;
      Stage& stage = next(uint32_t(sizeof(Stage::x) + sizeof(Stage::w)), full);
      ptx::tma_load_2d(stage.x, &X_, k, m0, full);
      if constexpr (Traits::W_MN_MAJOR) {
#pragma unroll
        for (int n = share; n < share + Traits::SHARE; n += 64)
          fetch_for_all(stage.w + n * Traits::BK, W_, n0 + n, k, full);
      } else {
        fetch_for_all(stage.w + share * Traits::BK, W_, k, n0 + share, full);
      }
    }
    for (int step = 0; step < Traits::RANK_STEPS; ++step) {
      uint64_t* full;
      Stage& stage = next(uint32_t(sizeof(Stage::w)), full);
      fetch_for_all(stage.w + share * Traits::BK, F_, step * Traits::BK, n0 + share, full);
    }
  }

  // The next stage, once all that read it have given it back; `bytes` will land there, from all blocks.
  LOTR_DEVICE Stage& next(uint32_t bytes, uint64_t*& full) {
    Stage& stage = s_.stage[at_.stage];
    s_.ring.wait_empty(at_);
    full = s_.ring.expect(at_, bytes);
    at_.advance();
    return stage;
  }

  LOTR_DEVICE void fetch_for_all(T* to, const ptx::TensorMap& map, int col, int row, uint64_t* full) {
    if constexpr (Traits::CLUSTER == 1)
      ptx::tma_load_2d(to, &map, col, row, full);
    else
      ptx::tma_load_2d_multicast(to, &map, col, row, full, (1 << Traits::CLUSTER) - 1);
  }

  typename Traits::Smem& s_;
  const ptx::TensorMap &X_, &W_, &A_, &F_;
  const GemmLotrParams& p_;
  const int rank_;
  typename ptx::Pipeline<Traits::STAGES>::Place at_;
};

// ---- the warpgroups that multiply ----

template <class Traits>
class Multiplier {
  using T = typename Traits::T;

 public:
  LOTR_DEVICE Multiplier(typename Traits::Smem& s, const GemmLotrParams& p)
      : s_(s), p_(p), group_(threadIdx.x / 128) {}

  LOTR_DEVICE void run() {
    const uint32_t epoch = s_.epoch;
    for (int i = 0;; ++i) {
      const int slot = i % 2;
      wait<Traits>(&s_.slot_full[slot], i / 2 & 1);
      // Only lane 0 reads; its number has come when the lanes have it, so it may give the slot back.
      const int piece = ptx::shfl(threadIdx.x % 32 == 0 ? ptx::load_shared(&s_.slot[slot]) : 0, 0);
      if (threadIdx.x % 32 == 0) give_back<Traits>(&s_.slot_empty[slot], 0);
      if (piece < 0) return;
      const GemmLotrWork work = p_.tickets.work(piece);
      const int rank = rank_in_cluster<Traits>(), tile_row = work.band * Traits::CLUSTER + rank;
      if constexpr (Traits::FACTOR) {
        if (work.column == GemmLotrWork::SUMS) {
          sum_factor<Traits>(p_, tile_row, epoch);
          continue;
        }
        if (work.column == GemmLotrWork::SCOUT && p_.Q.u) {
          const int ticket = work.band % p_.tickets.scouts;
          scout_with_factor(tile_row, ticket * Traits::CLUSTER + rank, ticket == work.band, epoch);
          continue;
        }
      }
      if (work.column == GemmLotrWork::SCOUT)
        scout(tile_row, epoch);
      else
        tile(tile_row, work.column * Traits::BN, s_.bias[slot][group_], epoch);
    }
  }

 private:
  LOTR_DEVICE void scout(int tile_row, uint32_t epoch) {
    float u[Traits::R / 2];
    const int last = over_k([&](const auto& stage, uint64_t x, int k, bool accumulate) {
      ptx::wgmma<T, Traits::R>(u, x, ptx::swizzled_descriptor(&stage.a[0][k]), accumulate);
    });
    ptx::wgmma_wait<0>();
    ptx::wgmma_landed(u);
    release(last);
    Rows<Traits>(p_, tile_row).publish(u, epoch);
  }

  // The same sums of u, and with them those of Q.  Two k-steps at a time, of which each warpgroup makes one's
  // sums of Q: so all run the same products without a branch, as wgmma requires.
  LOTR_DEVICE void scout_with_factor(int tile_row, int slot, bool fresh, uint32_t epoch) {
    float u[Traits::R / 2];
    FactorSums<Traits> Q(p_, tile_row * Traits::BM, slot, fresh);
    for (int k = 0; k < p_.K; k += Traits::SCOUT_STEPS * Traits::BK) {
      const int own = k / Traits::BK + group_, first = at_.stage;
      Q.load(own);
      s_.ring.wait_full(at_);
      at_.advance();
      const int second = at_.stage;
      s_.ring.wait_full(at_);
      at_.advance();
      ptx::wgmma_fence();
      add_stage(u, s_.stage[first], k > 0);
      add_stage(u, s_.stage[second], true);
      Q.multiply(s_.stage[group_ ? second : first].x);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      release(first);
      release(second);
      Q.store(own);
    }
    ptx::wgmma_landed(u);
    Rows<Traits>(p_, tile_row).publish(u, epoch);
  }
  LOTR_DEVICE void add_stage(float (&u)[Traits::R / 2], const typename Traits::Stage& stage,
                             bool accumulate) {
#pragma unroll
    for (int k = 0; k < Traits::BK; k += 16)
      ptx::wgmma<T, Traits::R>(u, ptx::swizzled_descriptor(&stage.x[64 * group_][k]),
                               ptx::swizzled_descriptor(&stage.a[0][k]), accumulate || k > 0);
  }

  LOTR_DEVICE void tile(int tile_row, int n0, T* bias, uint32_t epoch) {
    load_bias<Traits>(bias, n0, p_);
    float d[Traits::BN / 2];
    int last = over_k([&](const auto& stage, uint64_t x, int k, bool accumulate) {
      if constexpr (Traits::W_MN_MAJOR)
        ptx::wgmma<T, Traits::BN, ptx::Major::mn>(
            d, x, ptx::swizzled_descriptor_mn(stage.w + k * 64, Traits::BK * 64 * sizeof(T)), accumulate);
      else
        ptx::wgmma<T, Traits::BN>(d, x, ptx::swizzled_descriptor(stage.w + k), accumulate);
    });
    Rows<Traits> u(p_, tile_row);
    u.acquire(epoch);  // while the last products run
#pragma unroll
    for (int step = 0; step < Traits::RANK_STEPS; ++step) {
      s_.ring.wait_full(at_);
      ptx::wgmma_fence();
#pragma unroll
      for (int c = 4 * step; c < Traits::R / 16 && c < 4 * step + 4; ++c)
        ptx::wgmma<T, Traits::BN>(d, u.operand[c],
                                  ptx::swizzled_descriptor(s_.stage[at_.stage].w + 16 * (c % 4)), true);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      release(last);
      last = at_.stage;
      at_.advance();
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_landed(d);
    release(last);
    ptx::barrier_sync(1 + group_, 128);  // all of bias is there
    store_tile<Traits>(d, bias, tile_row * Traits::BM, n0, p_);
  }

  // product(stage, x's descriptor, k in the stage, accumulate) over all of K, one group of products in
  // flight. The last step's are still in flight at the end; returns their stage, which is not yet given back.
  template <class F>
  LOTR_DEVICE int over_k(F product) {
    int before = 0;
    for (int k = 0; k < p_.K; k += Traits::BK) {
      const auto& stage = s_.stage[at_.stage];
      s_.ring.wait_full(at_);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < Traits::BK; kk += 16)
        product(stage, ptx::swizzled_descriptor(&stage.x[64 * group_][kk]), kk, k + kk > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (k > 0) release(before);
      before = at_.stage;
      at_.advance();
    }
    return before;
  }

  // To the producers of all blocks of the cluster, for each of them writes here.
  LOTR_DEVICE void release(int stage LOTR_SITE) {
    s_.ring.template release<1, Traits::CLUSTER>(stage LOTR_PASS_SITE);
  }

  typename Traits::Smem& s_;
  const GemmLotrParams& p_;
  const int group_;
  typename ptx::Pipeline<Traits::STAGES>::Place at_;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, 1)
    gemm_lotr(const __grid_constant__ ptx::TensorMap X, const __grid_constant__ ptx::TensorMap W,
              const __grid_constant__ ptx::TensorMap A, const __grid_constant__ ptx::TensorMap F,
              const __grid_constant__ GemmLotrParams p) {
  auto& s = ptx::shared_storage<typename Traits::Smem>();
  if (threadIdx.x == 0) {
    s.ring.init(Traits::WARPS * Traits::CLUSTER);
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(&s.slot_full[i], 1);
      ptx::mbarrier_init(&s.slot_empty[i], Traits::WARPS * Traits::CLUSTER + Traits::CLUSTER - 1);
    }
    const uint32_t epoch = uint32_t(ptx::load(p.sync + 1)) + 1;  // before this cluster's first ticket
    s.epoch = epoch ? epoch : 1;                                 // 0 is what a flag holds that was never set
    ptx::fence_mbarrier_init();
  }
  if constexpr (Traits::CLUSTER == 1)
    __syncthreads();
  else
    ptx::cluster_sync();
  if (threadIdx.x >= 128 * Traits::GROUPS) {
    ptx::registers_fewer<Traits::FETCH_REGISTERS>();
    if (threadIdx.x == 128 * Traits::GROUPS) Producer<Traits>(s, X, W, A, F, p).run();
    __syncwarp();
  } else {
    ptx::registers_more<Traits::MULTIPLY_REGISTERS>();
    Multiplier<Traits>(s, p).run();
  }
  // no block may leave while another still arrives at its mbarriers
  if constexpr (Traits::CLUSTER > 1) ptx::cluster_sync();
}

}  // namespace lotr::kernels
