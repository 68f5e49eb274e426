// scale_backward:  g0 = c g,   dc_n = sum over m of g_mn (y_mn - bias_n) / c_n, 0 where c_n is 0
//                  g, y, g0 [M, N], bias, c, dc [N]: the gradients of y = bias + c z by z and c
//
// Grid     x: tiles of COLS columns (128 bytes), y: blocks along tokens.
//          A thread has one chunk of 16 bytes of a row and goes down the tokens in steps of ROWS; AHEAD rows
//          of g and y are in flight.
// Bytes    g and y once in, g0 once out; with s blocks along tokens, 4 N s bytes of partial sums out and in.
// Sums     float32, in a fixed order: a thread's rows, then the threads of a column, then the blocks.
#pragma once
#include "../tile/load.cuh"
#include "../tile/pieces.cuh"
#include "../tile/reduce.cuh"
#include "traits.h"

namespace lotr::kernels {

template <class T_>
struct ScaleBackwardTraits {
  using T = T_;
  static constexpr int THREADS = 256, COLS = scale_backward_cols(sizeof(T)), CHUNK = 16 / sizeof(T);
  static constexpr int LANES = COLS / CHUNK;  // of a row
  static constexpr int ROWS = SCALE_BACKWARD_ROWS;
  static constexpr int BLOCKS = 3, AHEAD = 2;  // 48 KB of g and y in flight on a multiprocessor
  static_assert(LANES * ROWS == THREADS && COLS <= THREADS);
  struct Smem {
    float sums[ROWS][COLS];
    int last;
  };
};

// The sum of the column over `splits` partial sums, COLS apart, in their order.
template <int COLS>
LOTR_DEVICE float sum_column(const float* partial, int splits) {
  constexpr int LOADS = tile::IN_FLIGHT;
  float sum = 0.f;
#pragma unroll 1
  for (int s = 0; s < splits; s += LOADS) {
    float in[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i)  // the last one again where there are no more
      in[i] = ptx::load_cg(partial + (s + i < splits ? s + i : splits - 1) * COLS);
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      if (s + i < splits) sum += in[i];
  }
  return sum;
}

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, Traits::BLOCKS)
    scale_backward(const ScaleBackwardParams p) {
  using T = typename Traits::T;
  using Chunk = tile::Chunk<T>;
  constexpr int COLS = Traits::COLS, CHUNK = Traits::CHUNK, ROWS = Traits::ROWS, AHEAD = Traits::AHEAD;
  auto& sm = ptx::shared_storage<typename Traits::Smem>();
  const int row_of_thread = int(threadIdx.x) / Traits::LANES,
            col_of_thread = int(threadIdx.x) % Traits::LANES * CHUNK;
  const int64_t tile_col = int64_t(blockIdx.x) * COLS, col = tile_col + col_of_thread;
  const int64_t begin = int64_t(tile::begin_of(p.m_pieces, int(blockIdx.y))) * ROWS,
                rows = int64_t(tile::count_of(p.m_pieces, int(blockIdx.y))) * ROWS;
  const int64_t end = begin + rows < p.M ? begin + rows : p.M;
  const int valid = tile::valid_elements<CHUNK>(0, 1, col, p.N);
  ptx::griddepcontrol_wait();

  float scale[CHUNK], bias[CHUNK], sum[CHUNK];
#pragma unroll
  for (int e = 0; e < CHUNK; ++e) {
    scale[e] = bias[e] = sum[e] = 0.f;
    if (e >= valid) continue;
    scale[e] = ptx::load(p.of_rows.scale + (col + e) * p.of_rows.scale_stride);
    if (p.of_rows.bias)
      bias[e] =
          ptx::to_float(ptx::load(static_cast<const T*>(p.of_rows.bias) + (col + e) * p.of_rows.bias_stride));
  }
  int64_t row = begin + row_of_thread;
  if (valid == CHUNK && p.g.access == Access::vector && p.y.access == Access::vector &&
      p.g0.access == Access::vector) {
    const T* g = static_cast<const T*>(p.g.data) + row * p.g.row + col;
    const T* y = static_cast<const T*>(p.y.data) + row * p.y.row + col;
    T* g0 = static_cast<T*>(p.g0.data) + row * p.g0.row + col;
    const auto walk = [&](auto ahead) {
      constexpr int COUNT = decltype(ahead)::value;
#pragma unroll 1
      for (; row + (COUNT - 1) * ROWS < end; row += COUNT * ROWS) {
        Chunk in[COUNT], out[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          in[i] = ptx::load(reinterpret_cast<const Chunk*>(g + i * ROWS * p.g.row));
          out[i] = ptx::load(reinterpret_cast<const Chunk*>(y + i * ROWS * p.y.row));
        }
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          Chunk scaled;
#pragma unroll
          for (int e = 0; e < CHUNK; e += 2) {
            float g_e, g_f, y_e, y_f;
            ptx::to_floats(in[i].v + e, g_e, g_f);
            ptx::to_floats(out[i].v + e, y_e, y_f);
            sum[e] += g_e * (y_e - bias[e]), sum[e + 1] += g_f * (y_f - bias[e + 1]);
            ptx::from_floats(scaled.v + e, g_e * scale[e], g_f * scale[e + 1]);
          }
          ptx::store(reinterpret_cast<Chunk*>(g0 + i * ROWS * p.g0.row), scaled);
        }
        g += COUNT * ROWS * p.g.row, y += COUNT * ROWS * p.y.row, g0 += COUNT * ROWS * p.g0.row;
      }
    };
    walk(std::integral_constant<int, AHEAD>{});
    walk(std::integral_constant<int, 1>{});
  } else {
#pragma unroll 1
    for (; row < end; row += ROWS) {
      const T* g = static_cast<const T*>(p.g.data) + row * p.g.row + col * p.g.col;
      const T* y = static_cast<const T*>(p.y.data) + row * p.y.row + col * p.y.col;
      T* g0 = static_cast<T*>(p.g0.data) + row * p.g0.row + col * p.g0.col;
#pragma unroll
      for (int e = 0; e < CHUNK; ++e, g += p.g.col, y += p.y.col, g0 += p.g0.col) {
        if (e >= valid) break;
        const float g_e = ptx::to_float(ptx::load(g));
        sum[e] += g_e * (ptx::to_float(ptx::load(y)) - bias[e]);
        ptx::store(g0, ptx::from_float<T>(g_e * scale[e]));
      }
    }
  }
  ptx::griddepcontrol_launch_dependents();

#pragma unroll
  for (int e = 0; e < CHUNK; e += 4)
    ptx::store_shared(reinterpret_cast<float4*>(&sm.sums[row_of_thread][col_of_thread + e]),
                      float4{sum[e], sum[e + 1], sum[e + 2], sum[e + 3]});
  __syncthreads();
  const int own = int(threadIdx.x);  // column of the tile
  float total = 0.f;
  if (own < COLS) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) total += ptx::load_shared(&sm.sums[i][own]);
  }
  if (p.splits > 1) {
    float* partial = p.sum.partial + int64_t(blockIdx.x) * p.splits * COLS + own;
    if (own < COLS) ptx::store(partial + int64_t(blockIdx.y) * COLS, total);
    if (!tile::arrive_last(p.sum.arrived + blockIdx.x, p.splits, sm.last)) return;
    if (own < COLS) total = sum_column<COLS>(partial, p.splits);
  }
  if (own < COLS && tile_col + own < p.N) {
    const float c = ptx::load(p.of_rows.scale + (tile_col + own) * p.of_rows.scale_stride);
    ptx::store(p.dscale + tile_col + own, c == 0.f ? 0.f : total / c);
  }
}

}  // namespace lotr::kernels
