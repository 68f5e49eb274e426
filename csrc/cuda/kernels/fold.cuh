// fold:       F = s B G^T                     B [N, r_out], G [r_in, r_out], F [N, r_in]
// fold_grad:  dB (+)= s Q G,  dG = s Q^T B    Q [N, r_in] float32, dB [N, r_out], dG [r_in, r_out]
//
// The products are small (N r^2 multiply-adds), so plain float32 fused multiply-adds on tiles of
// 32 x 16 suffice. The result is rounded once, and float32 factors are not rounded at all.
//
// Grid     fold       x: tiles of N, y: tiles of r_in
//          fold_grad  one launch for both: first the tiles of dB; then one block of dG for each
//                     tile of G and split of N
// Bytes    fold       B r_in / 16 times, F out
//          fold_grad  Q r_out / 16 times for each of the two, B r_in / 32 times. With s splits of
//                     N, dG is written s times as parts and read s times by sum_parts.
//          What is read again comes from L2.
#pragma once
#include "small_product.cuh"

namespace lotr::kernels {

static __global__ void __launch_bounds__(SmallTraits::THREADS, SmallTraits::BLOCKS)
    fold(const FoldProblem p) {
  using Traits = SmallTraits;
  auto& sm = ptx::shared_storage<Traits::Smem>();
  const int64_t row0 = blockIdx.x * int64_t(Traits::ROWS);
  const int i0 = blockIdx.y * Traits::COLS;
  float d[Traits::PER_THREAD] = {};
  ptx::griddepcontrol_wait();
  small_product<Order::along_k, Order::along_k>(
      d, sm, p.r_out,
      [&](int row, int64_t k) {
        return row0 + row < p.N ? read_float(p.B, p.B_type, row0 + row, k) : 0.f;
      },
      [&](int64_t k, int c) {
        return i0 + c < p.r_in ? read_float(p.core, p.core_type, i0 + c, k) : 0.f;
      });
  each_output([&](int i, int row, int c) {
    if (row0 + row < p.N && i0 + c < p.r_in)
      write_float(p.F.data, p.F_type, (row0 + row) * p.F.row + (i0 + c) * p.F.col, d[i] * p.scale);
  });
  ptx::griddepcontrol_launch_dependents();
}

static __global__ void __launch_bounds__(SmallTraits::THREADS, SmallTraits::BLOCKS)
    fold_grad(const FoldGradParams p) {
  constexpr int ROWS = SmallTraits::ROWS, COLS = SmallTraits::COLS;
  auto& sm = ptx::shared_storage<SmallTraits::Smem>();
  const int tiles_out = (p.r_out + COLS - 1) / COLS;
  const int64_t dB_blocks = p.dB.data ? (p.N + ROWS - 1) / ROWS * tiles_out : 0;
  const auto Q = [&](int64_t n, int i) { return read_float(p.Q, DType::float32, n, i); };
  float d[SmallTraits::PER_THREAD] = {};
  ptx::griddepcontrol_wait();

  if (blockIdx.x < dB_blocks) {
    const int64_t n0 = blockIdx.x / tiles_out * int64_t(ROWS);
    const int j0 = blockIdx.x % tiles_out * COLS;
    small_product<Order::along_k, Order::across_k>(
        d, sm, p.r_in,
        [&](int row, int64_t k) { return n0 + row < p.N ? Q(n0 + row, int(k)) : 0.f; },
        [&](int64_t k, int c) {
          return j0 + c < p.r_out ? read_float(p.core, p.core_type, k, j0 + c) : 0.f;
        });
    each_output([&](int i, int row, int c) {
      if (n0 + row < p.N && j0 + c < p.r_out) {
        float* out = p.dB.data + (n0 + row) * p.dB.row + (j0 + c) * p.dB.col;
        ptx::store(out, (p.dB.add ? ptx::load(out) : 0.f) + d[i] * p.scale);
      }
    });
  } else {
    // in 32 bits: a 64-bit division is a call of a few hundred instructions
    const unsigned block = blockIdx.x - unsigned(dB_blocks);
    const int split = int(block % unsigned(p.splits));
    const int core_tile = int(block / unsigned(p.splits));
    const int i0 = core_tile / tiles_out * ROWS;
    const int j0 = core_tile % tiles_out * COLS;
    const int64_t n0 = split * p.n_per_split;
    const int64_t rows = p.N - n0 < p.n_per_split ? p.N - n0 : p.n_per_split;
    small_product<Order::across_k, Order::across_k>(
        d, sm, rows,
        [&](int row, int64_t k) { return i0 + row < p.r_in ? Q(n0 + k, i0 + row) : 0.f; },
        [&](int64_t k, int c) {
          return j0 + c < p.r_out ? read_float(p.B, p.B_type, n0 + k, j0 + c) : 0.f;
        });
    each_output([&](int i, int row, int c) {
      if (i0 + row < p.r_in && j0 + c < p.dcore_row)
        ptx::store(p.dcore + split * p.dcore_part + (i0 + row) * p.dcore_row + j0 + c,
                   d[i] * p.scale);
    });
  }
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace lotr::kernels
