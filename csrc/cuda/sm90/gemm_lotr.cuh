// gemm_lotr:  y = x W^T + bias + u F^T        sm_90a, bf16 or fp16, float32 sums
//             dx = g W + du A^T               the same kernel; W is read MN-major, so there is no
//                                             transposed copy
//
//   x [M, K], W [N, K] (backward: [K, N]), u [M, r], F [N, r], y [M, N]. In the backward pass read
//   dx, g, W, du and A for y, x, W, u and F. u comes from the shrink kernel, du from shrink_grad.
//
// The rank is one more k-step (two above rank 64): the step loads u and F in place of x and W, and
// multiplies into the same accumulators. The tensor maps fill ranks past r with zeros.
//
// Grid     pairs of blocks: one block per SM, or one pair per tile if there are fewer tiles. Pair c
//          computes tiles c, c + pairs, c + 2 pairs, .. of 256 x 256; each block has 128 of the
//          rows. Each block loads W for half of the columns and writes it to both blocks
//          (multicast). Blocks of different pairs share nothing.
// Block    two warpgroups multiply 64 x 256 each, one thread of a ninth warp loads.
// Bytes    x once for each column of tiles, W once for each band of 256 rows, both mostly from L2;
//          u and F likewise; y is written once and never read.
//
// Timeline of a warpgroup and the stages: a tile of six k-steps and the step of the rank, then the
// next tile. L: copy in flight or landed. P: product. A dot: the product may still run, one group
// stays in flight. R: the product of the rank; the warpgroup waits for it. S: it stores 64 of its
// 256 columns.
//
//   stage 0   L P . L L P . L L L L L L P
//   stage 1   L L P . L L P . L L L L L L
//   stage 2   L L L P . L L R L L L L L L
//   stage 3   L L L L P . L L L L L L P .
//   y                         S S S S
//
// Each stage has two mbarriers: `full` counts the bytes of the copies; the warps of both blocks
// arrive at `empty` when they have read the stage.
//
// Epilogue A warpgroup writes 64 x 64 of y to shared memory. One thread stores it by a bulk copy,
//          while all threads write the next 64 columns to a second buffer. Meanwhile the stages of
//          the next tile are loaded, and the other warpgroup, which may be up to four k-steps
//          behind, multiplies.
// Early    Programmatic dependent launch: the block sets up its barriers while the previous kernel
//          ends. The next kernel may start when the last store of every block is complete.
// Bits     Each element of y is summed by one thread in one order.
#pragma once
#include "../ptx/launch.cuh"
#include "ptx.cuh"

namespace lotr::kernels {

template <class T_, bool BACKWARD_>
struct GemmLotrTraits {
  using T = T_;
  static constexpr bool BACKWARD = BACKWARD_;
  static constexpr int BM = 128, BN = 256, BK = 64;
  static constexpr int PAIR = 2;           // blocks of a cluster
  static constexpr int SHARE = BN / PAIR;  // columns that each block loads for both
  static constexpr int GROUPS = 2, GROUP_ROWS = BM / GROUPS;  // warpgroups, and rows of each
  static constexpr int WARPS = 4 * GROUPS, THREADS = 32 * (WARPS + 1);
  static constexpr int STAGES = 4, PANEL = 64;  // PANEL: columns of y or MN-major W, 128 bytes
  static constexpr int PANEL_BYTES = sizeof(T) * BK * PANEL;  // of MN-major W

  struct Stage {  // one k-step of a tile, or one of the rank
    T x[BM][BK];  // x, or u
    // W or F, K-major: [BN][BK]. W MN-major: [BN / PANEL][BK][PANEL].
    T w[BN / PANEL * BK * PANEL];
  };
  struct alignas(1024) Smem {
    Stage stage[STAGES];
    T out[GROUPS][2][GROUP_ROWS][PANEL];
    T bias[GROUPS][BN];
    uint64_t full[STAGES], empty[STAGES];
  };
  static_assert(sizeof(Smem) <= 232448, "shared memory of a block of sm_90");
};

// Tiles of the pairs, 256 x 256, in the order in which the pairs take them.
struct GemmLotrTiles {
  // Bands that are walked together. On a GPU with 66 pairs, 8 x 8 tiles read x for 2,048 rows and W
  // for 2,048 columns, the least that a wave can read.
  static constexpr int BANDS_TOGETHER = 8;
  int bands, columns;
  struct Tile {
    int band, column;
  };

  LOTR_DEVICE int count() const { return bands * columns; }
  LOTR_DEVICE Tile operator[](int i) const {
    const int first = i / (BANDS_TOGETHER * columns) * BANDS_TOGETHER;
    const int rest = i - first * columns;
    const int together = bands - first < BANDS_TOGETHER ? bands - first : BANDS_TOGETHER;
    return {first + rest % together, rest / together};
  }
};

struct GemmLotrParams {
  const void* bias;  // [N], or null
  int64_t bias_stride;
  int N, K, r;
  GemmLotrTiles tiles;
};

// A place in the ring of stages. Each thread keeps one; all walk the stages in the same order.
template <int STAGES>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;  // of the stage's phase; it changes with each turn of the ring
  LOTR_DEVICE void advance() {
    if (++stage < STAGES) return;
    stage = 0;
    parity ^= 1;
  }
  LOTR_DEVICE int before() const { return (stage + STAGES - 1) % STAGES; }
};

// Calls f(first row, first column) for each tile of the block.
template <class Traits, class F>
LOTR_DEVICE void each_tile(const GemmLotrParams& p, F f) {
  const int pair = int(blockIdx.x) / Traits::PAIR;
  const int rank = int(blockIdx.x) % Traits::PAIR;  // of the block in its pair
  const int pairs = int(gridDim.x) / Traits::PAIR;
  for (int i = pair; i < p.tiles.count(); i += pairs) {
    const auto tile = p.tiles[i];
    f((tile.band * Traits::PAIR + rank) * Traits::BM, tile.column * Traits::BN);
  }
}

// ---- the thread that loads ----

template <class Traits>
struct Producer {
  using Stage = typename Traits::Stage;
  typename Traits::Smem& s;
  const ptx::TensorMap &X, &W, &U, &F;
  const GemmLotrParams& p;
  RingPlace<Traits::STAGES> place{};

  LOTR_DEVICE void run() {
    // the first column that this block loads for both
    const int share = int(blockIdx.x) % Traits::PAIR * Traits::SHARE;
    each_tile<Traits>(p, [&](int m0, int n0) {
#pragma unroll 1
      for (int k = 0; k < p.K; k += Traits::BK)
        step(X, k, m0, [&](Stage& stage, uint64_t* full) {
          if constexpr (Traits::BACKWARD) {
#pragma unroll
            for (int n = share; n < share + Traits::SHARE; n += Traits::PANEL)
              load_for_both(stage.w + n * Traits::BK, W, n0 + n, k, full);
          } else {
            load_for_both(stage.w + share * Traits::BK, W, k, n0 + share, full);
          }
        });
#pragma unroll 1
      for (int k = 0; k < p.r; k += Traits::BK)
        step(U, k, m0, [&](Stage& stage, uint64_t* full) {
          load_for_both(stage.w + share * Traits::BK, F, k, n0 + share, full);
        });
    });
  }

 private:
  // Fills the next stage when the warps of both blocks have read it.
  template <class LoadW>
  LOTR_DEVICE void step(const ptx::TensorMap& x, int k, int m0, LoadW load_w) {
    Stage& stage = s.stage[place.stage];
    uint64_t* full = &s.full[place.stage];
    ptx::mbarrier_wait(&s.empty[place.stage], place.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, sizeof(Stage));  // half of w comes from the other block
    ptx::tma_load_2d(stage.x, &x, k, m0, full);
    load_w(stage, full);
    place.advance();
  }
  LOTR_DEVICE void load_for_both(typename Traits::T* to, const ptx::TensorMap& map, int col,
                                 int row, uint64_t* full) {
    ptx::tma_load_2d_multicast(to, &map, col, row, full, (1 << Traits::PAIR) - 1);
  }
};

// ---- the warpgroups that multiply ----

template <class Traits>
struct Multiplier {
  using T = typename Traits::T;
  using Stage = typename Traits::Stage;
  typename Traits::Smem& s;
  const ptx::TensorMap& Y;
  const GemmLotrParams& p;
  const int group = int(threadIdx.x) / 128, thread = int(threadIdx.x) % 128;
  RingPlace<Traits::STAGES> place{};

  LOTR_DEVICE void run() {
    each_tile<Traits>(p, [&](int m0, int n0) {
      T bias[Traits::BN / 128];
      load_bias(bias, n0);
      // Zeroed here: if the first product did it, ptxas 12 would serialize the products.
      float d[Traits::BN / 2] = {};
#pragma unroll 1
      for (int k = 0; k < p.K; k += Traits::BK) {
        const Stage& stage = next();
        const uint64_t x = ptx::swizzled_descriptor(&stage.x[Traits::GROUP_ROWS * group][0]);
        const uint64_t w = Traits::BACKWARD
                               ? ptx::swizzled_descriptor_mn(stage.w, Traits::PANEL_BYTES)
                               : ptx::swizzled_descriptor(stage.w);
        constexpr auto MAJOR = Traits::BACKWARD ? ptx::Major::mn : ptx::Major::k;
        ptx::wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < Traits::BK; kk += 16)
          ptx::wgmma<T, MAJOR>(
              d, x + ptx::descriptor_step<T>(kk),
              w + ptx::descriptor_step<T>(Traits::BACKWARD ? Traits::PANEL * kk : kk));
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (k > 0) release(place.before());
        place.advance();
      }
#pragma unroll 1
      for (int k = 0; k < p.r; k += Traits::BK) {
        const Stage& stage = next();
        const uint64_t u = ptx::swizzled_descriptor(&stage.x[Traits::GROUP_ROWS * group][0]);
        const uint64_t f = ptx::swizzled_descriptor(stage.w);
        // Each 16 ranks form a group with its fence: ptxas would serialize products that are in a
        // branch without one.
        for (int kk = 0; kk < Traits::BK && k + kk < p.r; kk += 16) {
          ptx::wgmma_fence();
          ptx::wgmma<T>(d, u + ptx::descriptor_step<T>(kk), f + ptx::descriptor_step<T>(kk));
          ptx::wgmma_commit();
          ptx::wgmma_wait<1>();
        }
        release(place.before());
        place.advance();
      }
      ptx::wgmma_wait<0>();
      ptx::wgmma_landed(d);
      release(place.before());
      store(d, bias, m0 + Traits::GROUP_ROWS * group, n0);
    });
    if (thread == 0) ptx::bulk_wait_all();
  }

 private:
  // Waits until the stage of the next step has landed.
  LOTR_DEVICE const Stage& next() {
    ptx::mbarrier_wait(&s.full[place.stage], place.parity);
    return s.stage[place.stage];
  }

  // Called by all lanes of a warp that has read the stage. Tells the producers of both blocks,
  // because both fill it.
  LOTR_DEVICE void release(int stage) {
    __syncwarp();  // all lanes have finished their reads
    const uint32_t lane = threadIdx.x % 32;
    if (lane < Traits::PAIR) ptx::mbarrier_arrive_cluster(&s.empty[stage], lane);
  }

  // The bias of the columns `thread`, `thread` + 128. It arrives while the products run.
  LOTR_DEVICE void load_bias(T (&bias)[Traits::BN / 128], int n0) {
    const auto* from = static_cast<const T*>(p.bias);
#pragma unroll
    for (int i = 0; i < Traits::BN / 128; ++i) {
      const int n = n0 + thread + 128 * i;
      bias[i] = from && n < p.N ? ptx::load(from + n * p.bias_stride) : ptx::from_float<T>(0.f);
    }
  }

  struct alignas(4) Two {  // neighbors, one 32-bit word
    T v[2];
  };
  // d + bias to rows m0 to m0 + 63 of y, PANEL columns at a time. A thread has rows `row` and
  // `row` + 8, and of every 8 columns the two from `pair` on. A panel has the swizzle of its
  // tensor map, so the 8 rows of a warp's store are in different banks.
  LOTR_DEVICE void store(const float (&d)[Traits::BN / 2], const T (&bias)[Traits::BN / 128],
                         int m0, int n0) {
    const int lane = thread % 32;
    const int row = thread / 32 * 16 + lane / 4;
    const int pair = lane % 4 * 2;
    // Read after the next barrier. The reads for the previous tile came before its last barrier.
#pragma unroll
    for (int i = 0; i < Traits::BN / 128; ++i)
      ptx::store_shared(&s.bias[group][thread + 128 * i], bias[i]);
#pragma unroll
    for (int panel = 0; panel < Traits::BN / Traits::PANEL; ++panel) {
      auto& out = s.out[group][panel % 2];
      if (thread == 0) ptx::bulk_wait_read<1>();  // the panel two before has been read from here
      ptx::barrier_sync(1 + group, 128);
#pragma unroll
      for (int j = 0; j < Traits::PANEL / 8; ++j) {
        const int n = panel * Traits::PANEL + 8 * j;
        auto two = ptx::bit_cast<Two>(
            ptx::load_shared(reinterpret_cast<const uint32_t*>(&s.bias[group][n + pair])));
        float b0, b1;
        ptx::to_floats(two.v, b0, b1);
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // row + 8 h
          ptx::from_floats(two.v, d[n / 2 + 2 * h] + b0, d[n / 2 + 2 * h + 1] + b1);
          ptx::store_shared(
              reinterpret_cast<uint32_t*>(&out[row + 8 * h][8 * (j ^ row % 8) + pair]),
              ptx::bit_cast<uint32_t>(two));
        }
      }
      ptx::fence_proxy_async();
      ptx::barrier_sync(1 + group, 128);
      if (thread == 0) {
        ptx::tma_store_2d(&Y, n0 + panel * Traits::PANEL, m0, out);
        ptx::bulk_commit();
      }
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, 1)
    gemm_lotr(const __grid_constant__ ptx::TensorMap X, const __grid_constant__ ptx::TensorMap W,
              const __grid_constant__ ptx::TensorMap U, const __grid_constant__ ptx::TensorMap F,
              const __grid_constant__ ptx::TensorMap Y, const __grid_constant__ GemmLotrParams p) {
  auto& s = ptx::shared_storage<typename Traits::Smem>();
  if (threadIdx.x == 0) {
    for (const auto* map : {&X, &W, &U, &F, &Y}) ptx::prefetch_tensor_map(map);
    for (int i = 0; i < Traits::STAGES; ++i) {
      ptx::mbarrier_init(&s.full[i], 1);
      ptx::mbarrier_init(&s.empty[i], Traits::WARPS * Traits::PAIR);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();  // both blocks have mbarriers
  ptx::griddepcontrol_wait();
  if (threadIdx.x >= 128 * Traits::GROUPS) {
    if (threadIdx.x == 128 * Traits::GROUPS) Producer<Traits>{s, X, W, U, F, p}.run();
    __syncwarp();
  } else {
    Multiplier<Traits>{s, Y, p}.run();
    __syncwarp();
  }
  // No block may exit while the other still arrives at its mbarriers. All stores are complete
  // here.
  ptx::cluster_sync();
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace lotr::kernels
