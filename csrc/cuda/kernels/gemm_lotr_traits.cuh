// What gemm_lotr.cuh is made of: tile sizes and shared memory, parameters, and the order of the tickets.
#pragma once
#include "../ptx/pipeline.cuh"

namespace lotr::kernels {

// Forward: W [N, K], K-major.  Backward: W as it lies once more, but it is the other extent that is summed
// over, so it is read as [K, N], MN-major; no transposed copy.
enum class Direction { forward, backward };

// Columns of a tile of y.  Above rank 64 the accumulators of 256 columns and of u do not fit together.
constexpr int gemm_lotr_columns(int R) {
  return R <= 64 ? 256 : 128;
}

// Ranks at which the backward pass makes Q = g^T u as well.  Above 16 ptxas finds no room for the products'
// registers beside those of a tile; above 32 the partial sums are as many bytes as one more read of g.
constexpr bool gemm_lotr_makes_factor(int R) {
  return R <= 16;
}

template <class T_, int R_, Direction DIRECTION, int CLUSTER_>
struct GemmLotrTraits {
  using T = T_;
  static constexpr int BM = 128, BN = gemm_lotr_columns(R_), BK = 64, R = R_;
  static constexpr bool W_MN_MAJOR = DIRECTION == Direction::backward;
  static constexpr bool FACTOR = gemm_lotr_makes_factor(R) && DIRECTION == Direction::backward;
  // A cluster has neighbouring bands and the same columns: each block fetches a share of W's tile for all.
  static constexpr int CLUSTER = CLUSTER_, SHARE = BN / CLUSTER;
  static constexpr int RANK_STEPS = (R + BK - 1) / BK;  // k-steps of the adapter
  // Warpgroups 0 and 1 multiply 64 rows each, warpgroup 2 fetches.
  static constexpr int GROUPS = 2, WARPS = 4 * GROUPS, THREADS = 128 * (GROUPS + 1);
  static constexpr int SCOUT_STEPS =
      FACTOR ? GROUPS : 1;  // of k, that a scout takes at a time where it makes Q
  static constexpr int FETCH_REGISTERS = 40, MULTIPLY_REGISTERS = 232;

  // A stage of the ring: one k-step of a tile, one of u (x and A^T), or one of the adapter (F in w).
  struct Stage {
    T x[BM][BK];
    T w[BN * BK];  // [BN][BK]; MN-major: [BN / 64][BK][64]
    T a[R][BK];
  };
  static constexpr int STAGES = 4;
  struct alignas(1024) Smem {
    Stage stage[STAGES];
    T bias[2][GROUPS][BN];  // of this tile and of the last, which may still be read
    ptx::Pipeline<STAGES> ring;
    uint64_t slot_full[2], slot_empty[2];
    int32_t slot[2];  // the piece of work to do, -1: none is left
    uint32_t epoch;   // of this launch
  };
  static_assert(CLUSTER == 1 || CLUSTER == 2, "the share of W's tile is whole panels of 64 columns");
  static_assert(R % 16 == 0 && sizeof(Smem) <= 232448, "shared memory of a block of sm_90");
  static_assert(128 * (FETCH_REGISTERS + GROUPS * MULTIPLY_REGISTERS) <= 65536 / THREADS / 8 * 8 * THREADS);
};

// ---- tickets ----

// What a cluster does at a time: u of one band (a scout), one tile of y, or the sums of CLUSTER k-steps of Q,
// of which `band` is then the number.
struct GemmLotrWork {
  static constexpr int SCOUT = -1, SUMS = -2;
  int band, column;  // column of tiles, or SCOUT or SUMS
};

// Tickets are drawn in order from one counter, those of all scouts before the first tile's, those of the sums
// last.  A scouts' ticket is for the bands t, t + scouts, ..; others are for one piece of work.
struct GemmLotrTickets {
  int bands, columns;  // tiles of y, a band being CLUSTER tiles high
  int scouts;          // tickets of the scouts, 1 to bands
  int band_group;      // bands that the tiles walk together, so that they find W's tiles in L2
  int sums;            // tickets of Q's sums

  LOTR_DEVICE int count() const { return scouts + bands * columns + sums; }
  // Pieces of work have numbers: first the scouts', a band each, then the tiles', then the sums'.
  LOTR_DEVICE int first(int ticket) const { return ticket < scouts ? ticket : ticket - scouts + bands; }
  // The next piece of the same ticket, or -1.
  LOTR_DEVICE int after(int piece) const {
    return piece < bands && piece + scouts < bands ? piece + scouts : -1;
  }
  LOTR_DEVICE GemmLotrWork work(int piece) const {
    if (piece < bands) return {piece, GemmLotrWork::SCOUT};
    if (piece >= bands + bands * columns) return {piece - bands - bands * columns, GemmLotrWork::SUMS};
    const int tile = piece - bands, group = tile / (band_group * columns), start = group * band_group;
    const int size = bands - start < band_group ? bands - start : band_group;
    const int i = tile - start * columns;
    return {start + i % size, i / size};
  }
};

// Q = g^T u for the u of the forward pass (gemm_lotr_factor.cuh).
struct GemmLotrFactor {
  const void* u;  // [M, r], or null: not wanted
  int64_t u_row;
  bool u_vector;  // rows of u start at multiples of 16 bytes
  float* data;    // Q [K, r]
  int64_t row, col;
  bool accumulate;  // else Q = instead of Q +=
  float* partial;   // [k-steps, slots, BK * R]: a slot for each block of each scouts' ticket

  template <class Traits>
  LOTR_DEVICE float* sums(int step, int slot, const GemmLotrTickets& tickets) const {
    return partial +
           (int64_t(step) * Traits::CLUSTER * tickets.scouts + slot) * int64_t(Traits::BK * Traits::R);
  }
};

// y = x W^T + bias + u F^T and u = x A.  In the backward pass, in this order: dx, g, W, none, k, A and F.
// r_padded: r up to the next multiple of 8; ranks from r on are stored as zeros.
struct GemmLotrParams {
  void* y;           // [M, N]
  const void* bias;  // [N], or null
  void* u;           // [M, r_padded]
  int32_t* sync;     // tickets drawn, launches so far, then flags: one for each 64 rows
  int M, N, K, r;
  int64_t y_row, u_row;
  bool y_vector;  // rows of y start at multiples of 16 bytes
  GemmLotrTickets tickets;
  GemmLotrFactor Q;  // backward alone
};
constexpr int GEMM_LOTR_FLAGS = 2;  // where they start in sync

}  // namespace lotr::kernels
