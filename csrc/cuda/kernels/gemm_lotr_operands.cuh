// The factors as gemm_lotr (gemm_lotr.cuh) reads them, in one launch:
//
//   F = s B G^T [N, r_in]    F^T [r_in, N], for the backward pass    A^T [r_in, K]
//   B [N, r_out], G [r_in, r_out], A [K, r_in], each of its own type
//
// Grid     x: tiles of 32 rows of B, then of A; y: tiles of 16 ranks
// Bytes    B r_in / 16 times, A once; F, F^T and A^T once
#pragma once
#include "fold.cuh"
#include "gemm_lotr_operands.h"

namespace lotr::kernels {

static __global__ void __launch_bounds__(FoldTraits::THREADS, FoldTraits::BLOCKS)
    gemm_lotr_operands(const GemmLotrOperands p) {
  using T = FoldTraits;
  auto& sm = ptx::shared_storage<T::Smem>();
  const int64_t tiles = (p.N + T::ROWS - 1) / T::ROWS;
  const bool of_A = blockIdx.x >= tiles;
  const int64_t row0 = (blockIdx.x - (of_A ? tiles : 0)) * T::ROWS, rows = of_A ? p.K : p.N;
  const int i0 = blockIdx.y * T::COLS;
  const auto inside = [&](int row, int c) { return row0 + row < rows && i0 + c < p.r_in; };

  float d[T::PER_THREAD] = {};
  if (of_A) {
    each_output([&](int i, int row, int c) {
      if (inside(row, c)) d[i] = read_float(p.A, p.A_type, 0, row0 + row, i0 + c);
    });
  } else {
    small_product<false>(
        d, sm, p.r_out,
        [&](int row, int64_t k) {
          return row0 + row < p.N ? read_float(p.B, p.B_type, 0, row0 + row, k) : 0.f;
        },
        [&](int64_t k, int c) {
          return i0 + c < p.r_in ? read_float(p.core, p.core_type, 0, i0 + c, k) : 0.f;
        });
    each_output([&](int i, int row, int c) {
      d[i] *= p.scale;
      if (inside(row, c)) write_float(p.F.data, p.type, (row0 + row) * p.F.row + i0 + c, d[i]);
    });
  }
  // through shared memory, so that neighbouring threads write neighbours of a transposed row
  each_output([&](int i, int row, int c) { ptx::store_shared(&sm.a[c][row], d[i]); });
  __syncthreads();
  const MutableMatrix& to = of_A ? p.At : p.Ft;
  for (int i = threadIdx.x; i < T::ROWS * T::COLS; i += T::THREADS) {
    const int row = i % T::ROWS, c = i / T::ROWS;
    if (inside(row, c))
      write_float(to.data, p.type, (i0 + c) * to.row + row0 + row, ptx::load_shared(&sm.a[c][row]));
  }
}

}  // namespace lotr::kernels
