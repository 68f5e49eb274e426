// h = scale * u core for the tokens of a block: a second, small product for few tokens, in the
// launch that computes u.
#pragma once
#include "load.cuh"

namespace lotr::tile {

// The block has `rows` rows from row0 on. u_at(row, rank): an element of its u, rounded to T, the
// type of u.
template <class T, int THREADS, class U>
LOTR_DEVICE void apply_core(const CoreProduct& p, int64_t row0, int rows, int r, U u_at) {
  for (int index = threadIdx.x; index < rows * p.r_core; index += THREADS) {
    const int row = index / p.r_core;
    const int j = index % p.r_core;
    float sum = 0.f;
    for (int i = 0; i < r; ++i)
      sum = fmaf(u_at(row, i), ptx::to_float(read_element<T>(p.core, i, j)), sum);
    ptx::store(static_cast<T*>(p.h.data) + (row0 + row) * p.h.row + j * p.h.col,
               ptx::from_float<T>(sum * p.scale));
  }
}

}  // namespace lotr::tile
