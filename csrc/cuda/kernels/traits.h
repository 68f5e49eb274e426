// What a rank and an element type imply, for the kernels and for the planner.
#pragma once
#include <cstddef>

namespace lotr::kernels {

// Shared memory of a block: what the smallest of the supported GPUs (sm_86, 89, 120) has, less 1 KB
// that the system reserves; and what leaves room for a second block on an A100 and on all larger
// ones.
constexpr size_t SHARED_BYTES = 99 * 1024, SHARED_BYTES_OF_TWO = 80 * 1024;

// Blocks that a multiprocessor is to hold, by registers and shared memory: two where the sums are
// few, so that one computes while the other waits.  shrink and factor_grad keep one product, which
// leaves room for more.
constexpr int blocks_together(int R) {
  return R <= 32 ? 2 : 1;
}
constexpr int blocks_of_one_product(int R) {
  return R <= 64 ? 2 : 1;
}
constexpr size_t shared_budget(int blocks) {
  return blocks == 2 ? SHARED_BYTES_OF_TWO : SHARED_BYTES;
}
constexpr int stages_that_fit(size_t stage, size_t resident, int at_most,
                              size_t budget = SHARED_BYTES) {
  const int fit = int((budget - 1024 - resident) / stage);
  return fit < at_most ? fit : at_most;
}

// How many of the eight warps of a block lie along the rank, the others along rows (shrink) or
// columns (sums down the columns): one where the tile is long enough for all eight, so that each
// part of x is read once from shared memory, and the rank is short.
constexpr int warps_along_rank(int R, int length) {
  return R <= 32 && length >= 128 ? 1 : 2;
}

// Rows of a tile of 16 KB.
constexpr int rows_of_16_kb(size_t element, int cols) {
  return int(16384 / element) / cols;
}

// Row tiles of shrink: the tall one, of which a block may own several, so that A is read once for
// all of them (32 accumulators a thread where two blocks are to fit, else 64).
constexpr int shrink_tall(int R) {
  return R <= 128 ? 128 : 64;
}
constexpr int shrink_subs(int R, int rows) {
  return rows != shrink_tall(R) ? 1 : R == 16 ? 4 : R == 32 ? 2 : 1;
}
constexpr int SHRINK_LOW = 64;
// Columns of x in a stage of shrink: 16 KB of x at most, and 16 KB of A at most.
constexpr int shrink_cols(size_t element, int R, int rows) {
  const int longest = rows > R ? rows : R;
  const int cols = int(16384 / element) / longest;
  return cols > 128 ? 128 : cols;
}

// Output tiles of fold and fold_grad.
constexpr int FOLD_ROWS = 32, FOLD_COLS = 16;

// Column tiles of factor_grad, whose sums a block keeps in registers: whole 128-byte lines of x;
// wide where two blocks are to fit, so that a warp owns the whole rank or reads each part of v for
// more columns; at ranks 16 and 64 narrow ones, for matrices of few columns.  A block may own
// several: 32 accumulators a thread where two blocks are to fit, else 64.
constexpr int factor_grad_wide(int R) {
  return R == 32 || R == 64 ? 128 : 64;
}
constexpr int factor_grad_narrow(int R) {
  return R == 64 ? 64 : factor_grad_wide(R);
}
constexpr int factor_grad_subs(int R, int cols) {
  return (R <= 64 ? 64 : 128) * 128 / ((R < 32 ? 32 : R) * cols);
}
constexpr int factor_grad_rows(size_t element, int R, int cols) {
  return R == 256 ? 32 : R >= 64 && cols == 64 ? 64 : rows_of_16_kb(element, cols);
}
constexpr int SHRINK_GRAD_ROWS = 64, SHRINK_GRAD_ROW_BYTES = 256;  // of a tile
constexpr int shrink_grad_cols(size_t element) {
  return SHRINK_GRAD_ROW_BYTES / int(element);
}
// In shrink_grad the rows of F that go with them stay in shared memory: 32 KB at most; and their
// sums, 64 a thread at most, in registers.
constexpr int shrink_grad_subs(size_t element, int R) {
  const int fit = int(32768 / (shrink_grad_cols(element) * R * element)), subs = 128 / R;
  return fit < subs ? fit : subs;
}

// Threads of expand_add: a warp keeps its own 16 rows of u, so a large rank leaves room for fewer.
constexpr int expand_threads(size_t element, int R) {
  const size_t row = R * element;
  return row <= 128 ? 256 : row <= 256 ? 128 : 64;
}
// Column tiles of 128 bytes whose rows of F stay in shared memory.
constexpr int expand_subs(size_t element, int R) {
  const size_t warps = size_t(expand_threads(element, R)) / 32, factor = size_t(128) * R,
               stage = warps * (16 * 128 + 16 * R * element), stages = R == 16 ? 3 : 2;
  const int fit = int((shared_budget(blocks_together(R)) - 1024 - stages * stage) / factor);
  return fit < 8 ? fit : 8;
}

}  // namespace lotr::kernels
