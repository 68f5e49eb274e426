// sum_parts:  out (+)= scale * sum over s of part s     part [rows, parts_row] float32,
//                                                       out [rows, cols]
//             h = core_scale * out core                 optional, for few tokens
//
// The second launch of a product that is split over blocks. The parts are added in their
// order: the same inputs give the same bits, whichever block of the first launch ended first.
//
// Grid     x: strips of ROWS rows of the first output, then of the second one
// Bytes    the parts once, out once (twice if it is added to); the parts come from L2 if they fit
// Sums     float32, over the parts in their order
#pragma once
#include "../tile/core.cuh"
#include "small_product.cuh"

namespace lotr::kernels {

struct SumPartsTraits {
  static constexpr int THREADS = 128, ROWS = 32, MAX_COLS = 256;
  struct Smem {
    float out[ROWS][MAX_COLS];  // rounded to its type, for the core
  };
};

// Four neighbors of the sum over the parts.
LOTR_DEVICE float4 sum_of_parts(const SumPartsParams& p, int64_t first) {
  const int64_t part = p.rows * p.parts_row;
  float4 sum{0.f, 0.f, 0.f, 0.f};
#pragma unroll 4  // four loads in flight
  for (int s = 0; s < p.splits; ++s) {
    const float4 v = ptx::load(reinterpret_cast<const float4*>(p.parts + s * part + first));
    sum.x += v.x;
    sum.y += v.y;
    sum.z += v.z;
    sum.w += v.w;
  }
  return sum;
}

// T: the kernels' element type, of core and h.
template <class T>
__global__ void __launch_bounds__(SumPartsTraits::THREADS) sum_parts(const SumTwoParams two) {
  constexpr int THREADS = SumPartsTraits::THREADS, ROWS = SumPartsTraits::ROWS;
  const int64_t strips_of_first = (two.first.rows + ROWS - 1) / ROWS;
  const bool is_first = blockIdx.x < strips_of_first;
  const bool launch_has_core = two.core_product.core.data;
  const bool block_has_core = is_first && launch_has_core;
  // A launch without a core has no shared memory.
  auto* const rounded = launch_has_core ? ptx::shared_storage<SumPartsTraits::Smem>().out : nullptr;
  const SumPartsParams& p = is_first ? two.first : two.second;
  const int64_t row0 = (blockIdx.x - (is_first ? 0 : strips_of_first)) * ROWS;
  const int rows = p.rows - row0 < ROWS ? int(p.rows - row0) : ROWS;
  const int chunks = int(p.parts_row) / 4;
  ptx::griddepcontrol_wait();
  for (int i = threadIdx.x; i < rows * chunks; i += THREADS) {
    const int row = i / chunks;
    const int col = i % chunks * 4;
    const float4 sum = sum_of_parts(p, (row0 + row) * p.parts_row + col);
    const float v[4] = {sum.x * p.scale, sum.y * p.scale, sum.z * p.scale, sum.w * p.scale};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (col + e >= p.cols) break;
      const int64_t place = (row0 + row) * p.out.row + (col + e) * p.out.col;
      const float before = p.add ? ptx::load(static_cast<const float*>(p.out.data) + place) : 0.f;
      write_float(p.out.data, p.out_type, place, before + v[e]);
      if (block_has_core)
        ptx::store_shared(&rounded[row][col + e], ptx::to_float(ptx::from_float<T>(v[e])));
    }
  }
  if (block_has_core) {
    __syncthreads();
    tile::apply_core<T, THREADS>(two.core_product, row0, rows, p.cols, [&](int row, int i) {
      return ptx::load_shared(&rounded[row][i]);
    });
  }
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace lotr::kernels
