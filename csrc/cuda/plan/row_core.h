// Rows with a core each, and the gradients of the cores: kernels/row_core.cuh.
#pragma once
#include "machine.h"

namespace lotr::plan {

// Rows of a block of row_core: a tile's, or fewer so that every multiprocessor has a block.
inline int rows_of_block(int64_t rows, int64_t cols, int multiprocessors) {
  int most = kernels::FOLD_ROWS;
  while (most > 1 && ceil_div(rows, most) * cols < 4 * int64_t(multiprocessors)) most /= 2;
  return most;
}

struct RowCoreGrad {
  int64_t core_tiles = 0;
  int splits = 0;
};

// Splits the rows of a core until the tiles fill the GPU, but not below 64 rows per block for a core of
// mean size.
inline RowCoreGrad row_core_grad(int64_t rows, int64_t cores, int64_t r_in, int64_t r_out,
                                 int multiprocessors) {
  const int64_t tiles = cores * ceil_div(r_in, kernels::FOLD_ROWS) * ceil_div(r_out, kernels::FOLD_COLS);
  const int64_t wanted = ceil_div(4 * int64_t(multiprocessors), tiles),
                sensible = std::max<int64_t>(1, rows / cores / 64);
  return {tiles, int(std::min(wanted, sensible))};
}

}  // namespace lotr::plan
