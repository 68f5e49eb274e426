// Tiles of 32 x 16 of the small products (fold, row_core and their gradients): plain float32 fused
// multiply-adds. The caller's lambdas read the operands, which may have any type and strides.
#pragma once
#include "../tile/load.cuh"
#include "traits.h"

namespace lotr::kernels {

struct SmallTraits {
  static constexpr int THREADS = 128, ROWS = SMALL_ROWS, COLS = SMALL_COLS, STEP = 32;
  // Blocks per SM, at least. Without it ptxas aims at 12 on sm_120, and spills.
  static constexpr int BLOCKS = 4;
  static constexpr int PER_THREAD = ROWS * COLS / THREADS;  // rows of one column
  struct Smem {
    float a[STEP][ROWS + 1], b[STEP][COLS + 1];
  };
};

// An operand's order in global memory, so that neighboring threads read neighbors in memory.
using tile::Order;

// d[i] += sum over k < K of a(row, k) b(k, col) for this thread's column and rows. Operands past
// the end read as zero.
template <Order OF_A, Order OF_B, class A, class B>
LOTR_DEVICE void small_product(float (&d)[SmallTraits::PER_THREAD], SmallTraits::Smem& sm,
                               int64_t K, A a, B b) {
  using Traits = SmallTraits;
  const int thread = threadIdx.x;
  const int col = thread % Traits::COLS;
  const int row0 = thread / Traits::COLS;
  for (int64_t k0 = 0; k0 < K; k0 += Traits::STEP) {
    for (int i = thread; i < Traits::STEP * Traits::ROWS; i += Traits::THREADS) {
      constexpr bool along = OF_A == Order::along_k;
      const int row = along ? i / Traits::STEP : i % Traits::ROWS;
      const int k = along ? i % Traits::STEP : i / Traits::ROWS;
      ptx::store_shared(&sm.a[k][row], k0 + k < K ? a(row, k0 + k) : 0.f);
    }
    for (int i = thread; i < Traits::STEP * Traits::COLS; i += Traits::THREADS) {
      constexpr bool along = OF_B == Order::along_k;
      const int k = along ? i % Traits::STEP : i / Traits::COLS;
      const int c = along ? i / Traits::STEP : i % Traits::COLS;
      ptx::store_shared(&sm.b[k][c], k0 + k < K ? b(k0 + k, c) : 0.f);
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < Traits::STEP; ++k) {
      const float right = ptx::load_shared(&sm.b[k][col]);
#pragma unroll
      for (int i = 0; i < Traits::PER_THREAD; ++i)
        d[i] = fmaf(ptx::load_shared(&sm.a[k][row0 + i * (Traits::THREADS / Traits::COLS)]), right,
                    d[i]);
    }
    __syncthreads();
  }
}

// Calls f(i, row, col) for the outputs d[i] of this thread.
template <class F>
LOTR_DEVICE void each_output(F f) {
  using Traits = SmallTraits;
#pragma unroll
  for (int i = 0; i < Traits::PER_THREAD; ++i)
    f(i, int(threadIdx.x) / Traits::COLS + i * (Traits::THREADS / Traits::COLS),
      int(threadIdx.x) % Traits::COLS);
}

LOTR_DEVICE float read_float(const Matrix& m, DType type, int64_t row, int64_t col,
                             int64_t offset = 0) {
  const int64_t i = offset + row * m.row + col * m.col;
  if (type == DType::bfloat16)
    return ptx::to_float(ptx::load(static_cast<const __nv_bfloat16*>(m.data) + i));
  if (type == DType::float16)
    return ptx::to_float(ptx::load(static_cast<const __half*>(m.data) + i));
  return ptx::load(static_cast<const float*>(m.data) + i);
}

LOTR_DEVICE void write_float(void* data, DType type, int64_t i, float value) {
  if (type == DType::bfloat16)
    ptx::store(static_cast<__nv_bfloat16*>(data) + i, ptx::from_float<__nv_bfloat16>(value));
  else if (type == DType::float16)
    ptx::store(static_cast<__half*>(data) + i, ptx::from_float<__half>(value));
  else
    ptx::store(static_cast<float*>(data) + i, value);
}

}  // namespace lotr::kernels
