// fold:       F_l = s B G_l^T                          B [N, r_out], G_l [r_in, r_out], F_l [N, r_in]
// fold_grad:  dB += s sum_l Q_l G_l,  dG_l = s Q_l^T B   Q_l [N, r_in] float32, dB [N, r_out],
//                                                      dG_l [r_in, r_out]
//
// A few hundred kilobytes a layer and N r^2 multiply-adds, so plain float32 fused multiply-adds on tiles of
// 32 x 16: the result is cast once, and sums keep float32 operands where the adapter has them.
//
// Grid     fold       x: tiles of N, y: tiles of r_in, z: layers
//          fold_grad  one launch for both: first the tiles of dB (all layers, l = 0 .. L - 1 in one sum),
//                     then, for each layer, tile of G and split of N, a block of dG
// Bytes    fold: B r_in / 16 times a layer, F out; fold_grad: Q r_out / 16 times for each of the two, B
//          r_in / 32 times a layer.  What is read again comes from L2.
#pragma once
#include "../tile/load.cuh"
#include "../tile/reduce.cuh"
#include "traits.h"

namespace lotr::kernels {

struct FoldTraits {
  static constexpr int THREADS = 128, ROWS = FOLD_ROWS, COLS = FOLD_COLS, STEP = 32;
  static constexpr int BLOCKS = 4;  // an SM, at least: left alone, ptxas aims at 12 on sm_120, and spills
  static constexpr int PER_THREAD = ROWS * COLS / THREADS;  // rows of one column
  struct Smem {
    float a[STEP][ROWS + 1], b[STEP][COLS + 1];
    int last;
  };
};

// d[i] += sum over k < K of a(row, k) b(k, col) for this thread's column and rows; out-of-range operands read
// as zero. ROW_FASTEST: neighbours of a in memory are rows, else k.
template <bool ROW_FASTEST, class A, class B>
LOTR_DEVICE void small_product(float (&d)[FoldTraits::PER_THREAD], FoldTraits::Smem& sm, int64_t K, A a,
                               B b) {
  using T = FoldTraits;
  const int t = threadIdx.x, col = t % T::COLS, row0 = t / T::COLS;
  for (int64_t k0 = 0; k0 < K; k0 += T::STEP) {
    for (int i = t; i < T::STEP * T::ROWS; i += T::THREADS) {
      const int row = ROW_FASTEST ? i % T::ROWS : i / T::STEP, k = ROW_FASTEST ? i / T::ROWS : i % T::STEP;
      ptx::store_shared(&sm.a[k][row], k0 + k < K ? a(row, k0 + k) : 0.f);
    }
    for (int i = t; i < T::STEP * T::COLS; i += T::THREADS) {
      const int k = i / T::COLS, c = i % T::COLS;
      ptx::store_shared(&sm.b[k][c], k0 + k < K ? b(k0 + k, c) : 0.f);
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < T::STEP; ++k) {
      const float right = ptx::load_shared(&sm.b[k][col]);
#pragma unroll
      for (int i = 0; i < T::PER_THREAD; ++i)
        d[i] = fmaf(ptx::load_shared(&sm.a[k][row0 + i * (T::THREADS / T::COLS)]), right, d[i]);
    }
    __syncthreads();
  }
}

// Calls f(i, row, col) for the outputs of this thread.
template <class F>
LOTR_DEVICE void each_output(F f) {
  using T = FoldTraits;
#pragma unroll
  for (int i = 0; i < T::PER_THREAD; ++i)
    f(i, int(threadIdx.x) / T::COLS + i * (T::THREADS / T::COLS), int(threadIdx.x) % T::COLS);
}

LOTR_DEVICE float read_float(const Matrix& m, DType type, int64_t offset, int64_t row, int64_t col) {
  const int64_t i = offset + row * m.row + col * m.col;
  if (type == DType::bfloat16) return ptx::to_float(ptx::load(static_cast<const __nv_bfloat16*>(m.data) + i));
  if (type == DType::float16) return ptx::to_float(ptx::load(static_cast<const __half*>(m.data) + i));
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

static __global__ void __launch_bounds__(FoldTraits::THREADS, FoldTraits::BLOCKS) fold(const FoldParams p) {
  auto& sm = ptx::shared_storage<FoldTraits::Smem>();
  const int64_t n0 = int64_t(blockIdx.x) * FoldTraits::ROWS;
  const int i0 = blockIdx.y * FoldTraits::COLS;
  const int64_t layer = blockIdx.z;

  float d[FoldTraits::PER_THREAD] = {};
  small_product<false>(
      d, sm, p.r_out,
      [&](int row, int64_t k) { return n0 + row < p.N ? read_float(p.B, p.B_type, 0, n0 + row, k) : 0.f; },
      [&](int64_t k, int c) {
        return i0 + c < p.r_in ? read_float(p.cores, p.core_type, layer * p.core_stride, i0 + c, k) : 0.f;
      });
  each_output([&](int i, int row, int c) {
    if (n0 + row < p.N && i0 + c < p.r_in)
      write_float(p.F, p.F_type, layer * p.F_layer + (n0 + row) * p.F_row + i0 + c, d[i] * p.scale);
  });
}

static __global__ void __launch_bounds__(FoldTraits::THREADS, FoldTraits::BLOCKS)
    fold_grad(const FoldGradParams p) {
  constexpr int ROWS = FoldTraits::ROWS, COLS = FoldTraits::COLS;
  auto& sm = ptx::shared_storage<FoldTraits::Smem>();
  const int tiles_out = (p.r_out + COLS - 1) / COLS, tiles_in = (p.r_in + ROWS - 1) / ROWS;
  const int64_t dB_blocks = p.dB ? (p.N + ROWS - 1) / ROWS * tiles_out : 0;
  const auto Q = [&](int64_t l, int64_t n, int i) {
    return read_float(p.Q, DType::float32, l * p.Q_stride, n, i);
  };
  float d[FoldTraits::PER_THREAD] = {};

  if (blockIdx.x < dB_blocks) {
    const int64_t n0 = blockIdx.x / tiles_out * int64_t(ROWS);
    const int j0 = blockIdx.x % tiles_out * COLS;
    for (int l = 0; l < p.L; ++l) {
      small_product<false>(
          d, sm, p.r_in, [&](int row, int64_t k) { return n0 + row < p.N ? Q(l, n0 + row, int(k)) : 0.f; },
          [&](int64_t k, int c) {
            return j0 + c < p.r_out ? read_float(p.cores, p.core_type, l * p.core_stride, k, j0 + c) : 0.f;
          });
    }
    each_output([&](int i, int row, int c) {
      if (n0 + row < p.N && j0 + c < p.r_out) {
        float* out = p.dB + (n0 + row) * p.dB_row + (j0 + c) * p.dB_col;
        ptx::store(out, ptx::load(out) + d[i] * p.scale);
      }
    });
  } else {
    // in 32 bits: a 64-bit division is a call of some hundred instructions
    const unsigned tiles = unsigned(tiles_in * tiles_out), splits = unsigned(p.splits);
    const unsigned block = blockIdx.x - unsigned(dB_blocks),
                   group = block / splits;  // group = (layer, tile of G)
    const int split = int(block % splits), core_tile = int(group % tiles);
    const int64_t layer = group / tiles;
    const int i0 = core_tile / tiles_out * ROWS, j0 = core_tile % tiles_out * COLS;
    const int64_t n0 = split * p.n_per_split, left = p.N - n0,
                  rows = left < p.n_per_split ? left : p.n_per_split;
    small_product<true>(
        d, sm, rows, [&](int row, int64_t k) { return i0 + row < p.r_in ? Q(layer, n0 + k, i0 + row) : 0.f; },
        [&](int64_t k, int c) {
          return j0 + c < p.r_out ? read_float(p.B, p.B_type, 0, n0 + k, j0 + c) : 0.f;
        });
    bool finish = true;
    if (p.splits > 1) {
      float* mine = p.sum.partial + int64_t(group) * p.splits * (ROWS * COLS) + threadIdx.x;
      each_output(
          [&](int i, int, int) { ptx::store(mine + split * ROWS * COLS + i * FoldTraits::THREADS, d[i]); });
      finish = tile::arrive_last(p.sum.arrived + group, p.splits, sm.last);
      if (finish) {
        constexpr int AHEAD = tile::IN_FLIGHT / FoldTraits::PER_THREAD;  // splits whose loads are in flight
        each_output([&](int i, int, int) { d[i] = 0.f; });
#pragma unroll 1
        for (int s = 0; s < p.splits; s += AHEAD) {
          float in[AHEAD][FoldTraits::PER_THREAD];
#pragma unroll
          for (int a = 0; a < AHEAD; ++a) {  // the last split again where there are no more
            const int split = s + a < p.splits ? s + a : p.splits - 1;
            each_output([&](int i, int, int) {
              in[a][i] = ptx::load_cg(mine + split * ROWS * COLS + i * FoldTraits::THREADS);
            });
          }
#pragma unroll
          for (int a = 0; a < AHEAD; ++a)
            if (s + a < p.splits) each_output([&](int i, int, int) { d[i] += in[a][i]; });
        }
      }
    }
    if (finish)
      each_output([&](int i, int row, int c) {
        if (i0 + row < p.r_in && j0 + c < p.r_out)
          ptx::store(p.dcores + (layer * p.r_in + i0 + row) * p.r_out + j0 + c, d[i] * p.scale);
      });
  }
}

}  // namespace lotr::kernels
