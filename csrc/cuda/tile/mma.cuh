// Matrix products of a warp on shared tiles.
//
// A policy is an element type and a way to multiply. Both policies leave the accumulator of a
// 16 x 8 tile as mma.sync does: lane 4 g + q holds (g, 2q), (g, 2q + 1), (g + 8, 2q),
// (g + 8, 2q + 1). load_a and load_b load the operands' fragments, each in two orders of memory:
//
//   load_a<along_k>: tile [i][k]   load_a<across_k>: tile [k][i]      16 rows i
//   load_b<along_k>: tile [j][k]   load_b<across_k>: tile [k][j]      8 columns j
#pragma once
#include "shared.cuh"

namespace lotr::tile {

// bf16 and fp16: mma.m16n8k16, operands by ldmatrix.
template <class T_>
struct Half {
  using T = T_;
  static constexpr int K = 16, A_REGS = 4, B_REGS = 2;

  template <Order ORDER, class Tile>
  static LOTR_DEVICE void load_a(uint32_t (&f)[4], Tile& t, int i0, int k0) {
    const int lane = threadIdx.x % 32;
    if constexpr (ORDER == Order::across_k)
      ptx::ldmatrix_x4_trans(f, t.chunk(k0 + lane / 16 * 8 + lane % 8, i0 / 8 + lane / 8 % 2));
    else
      ptx::ldmatrix_x4(f, t.chunk(i0 + lane % 16, lane / 16, k0));
  }
  template <Order ORDER, int NJ, class Tile>
  static LOTR_DEVICE void load_b(uint32_t (&f)[NJ][2], Tile& t, int j0, int k0) {
    const int lane = threadIdx.x % 32;
    if constexpr (NJ == 1) {
      if constexpr (ORDER == Order::across_k)
        ptx::ldmatrix_x2_trans(f[0], t.chunk(k0 + lane % 16, j0 / 8));
      else
        ptx::ldmatrix_x2(f[0], t.chunk(j0 + lane % 8, lane / 8 % 2, k0));
    } else {
#pragma unroll
      for (int j = 0; j < NJ; j += 2) {
        uint32_t r[4];
        if constexpr (ORDER == Order::across_k)
          ptx::ldmatrix_x4_trans(r, t.chunk(k0 + lane % 16, j0 / 8 + j + lane / 16));
        else
          ptx::ldmatrix_x4(r, t.chunk(j0 + 8 * j + lane / 16 * 8 + lane % 8, lane / 8 % 2, k0));
        f[j][0] = r[0];
        f[j][1] = r[1];
        f[j + 1][0] = r[2];
        f[j + 1][1] = r[3];
      }
    }
  }
  static LOTR_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16<T>(d, a, b);
  }
};

// float32 without rounding the operands: each lane computes its four sums with fused multiply-adds,
// four k at a time.
struct Exact {
  using T = float;
  static constexpr int K = 4, A_REGS = 8, B_REGS = 8;  // two rows (or columns) x four k

  // f[8 values] = t at two rows (or columns) and four k
  template <Order ORDER, class Tile>
  static LOTR_DEVICE void load_pair(uint32_t* f, Tile& t, int i, int step, int k0) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (ORDER == Order::across_k) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          f[4 * h + k] = ptx::as_bits(ptx::load_shared(t.at(k0 + k, i + h * step)));
      } else {
        const uint4 v =
            ptx::load_shared(reinterpret_cast<const uint4*>(t.chunk(i + h * step, 0, k0)));
        f[4 * h] = v.x;
        f[4 * h + 1] = v.y;
        f[4 * h + 2] = v.z;
        f[4 * h + 3] = v.w;
      }
    }
  }
  template <Order ORDER, class Tile>
  static LOTR_DEVICE void load_a(uint32_t (&f)[8], Tile& t, int i0, int k0) {
    load_pair<ORDER>(f, t, i0 + int(threadIdx.x) % 32 / 4, 8, k0);
  }
  template <Order ORDER, int NJ, class Tile>
  static LOTR_DEVICE void load_b(uint32_t (&f)[NJ][8], Tile& t, int j0, int k0) {
#pragma unroll
    for (int j = 0; j < NJ; ++j)
      load_pair<ORDER>(f[j], t, j0 + 8 * j + int(threadIdx.x) % 4 * 2, 1, k0);
  }
  static LOTR_DEVICE void mma(float (&d)[4], const uint32_t (&a)[8], const uint32_t (&b)[8]) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        d[e] = fmaf(ptx::as_float(a[e / 2 * 4 + k]), ptx::as_float(b[e % 2 * 4 + k]), d[e]);
  }
};

// d[mi][nj] += A[i0 + i_step * mi ..][k] B[k][j0 + 8 * nj ..], 16 x 8 sums over k < K_TOTAL.
//
// The columns are processed in groups of at most 32 registers of fragments. The loop over k is
// unrolled for the half types; for float32 (P::K = 4) UNROLL is 1.
template <class P, int K_TOTAL, Order OF_A, Order OF_B, int MI, int NJ, class TileA, class TileB>
LOTR_DEVICE void warp_product(float (&d)[MI][NJ][4], TileA& A, int i0, int i_step, TileB& B,
                              int j0) {
  constexpr int GROUP = NJ * P::B_REGS > 32 ? 32 / P::B_REGS : NJ;
  [[maybe_unused]] constexpr int UNROLL = P::K == 16 ? K_TOTAL / 16 : 1;
#pragma unroll UNROLL
  for (int k = 0; k < K_TOTAL; k += P::K) {
#pragma unroll
    for (int group = 0; group < NJ; group += GROUP) {
      uint32_t b[GROUP][P::B_REGS];
      P::template load_b<OF_B, GROUP>(b, B, j0 + 8 * group, k);
#pragma unroll
      for (int mi = 0; mi < MI; ++mi) {
        uint32_t a[P::A_REGS];
        P::template load_a<OF_A>(a, A, i0 + mi * i_step, k);
#pragma unroll
        for (int nj = 0; nj < GROUP; ++nj) P::mma(d[mi][group + nj], a, b[nj]);
      }
    }
  }
}

// The fragments of a right operand [K_TOTAL, 8 NJ], loaded once and kept in registers for several
// products.
template <class P, int K_TOTAL, int NJ>
struct Right {
  static constexpr int STEPS = K_TOTAL / P::K, REGISTERS = STEPS * NJ * P::B_REGS;
  uint32_t b[STEPS][NJ][P::B_REGS];

  template <Order ORDER, class Tile>
  LOTR_DEVICE void load(Tile& B, int j0) {
#pragma unroll
    for (int k = 0; k < STEPS; ++k) P::template load_b<ORDER, NJ>(b[k], B, j0, k * P::K);
  }
};

// The same product with a right operand in registers.
template <Order OF_A, class P, int K_TOTAL, int MI, int NJ, class TileA>
LOTR_DEVICE void warp_product(float (&d)[MI][NJ][4], TileA& A, int i0, int i_step,
                              const Right<P, K_TOTAL, NJ>& B) {
#pragma unroll
  for (int k = 0; k < B.STEPS; ++k)
#pragma unroll
    for (int mi = 0; mi < MI; ++mi) {
      uint32_t a[P::A_REGS];
      P::template load_a<OF_A>(a, A, i0 + mi * i_step, k * P::K);
#pragma unroll
      for (int nj = 0; nj < NJ; ++nj) P::mma(d[mi][nj], a, B.b[k][nj]);
    }
}

}  // namespace lotr::tile
