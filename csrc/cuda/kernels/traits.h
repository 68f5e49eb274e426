// Constants that follow from a rank and an element type, for the kernels and for the planner.
//
// In every kernel:
//
//   R            the rank that the kernel is compiled for; ranks past r are zeros
//   ROWS, COLS   of a tile of the large matrix
//   SUBS         the most tiles of one block, for which it keeps a factor or sums: `subs` below
//   STAGES       tiles in shared memory, of which all but one are in flight
//   MI, NJ       a warp's accumulators of one tile: MI x NJ products of 16 x 8
#pragma once
#include <cstddef>

namespace lotr::kernels {

// Bytes of shared memory per block. The smallest supported GPUs (sm_86, 89, 120) have 100 KB per
// SM, of which the system reserves 1 KB. With 80 KB a second block fits on an A100 (164 KB) and on
// all larger GPUs.
constexpr size_t SHARED_BYTES = 99 * 1024, SHARED_BYTES_OF_TWO = 80 * 1024;

// Resident blocks per SM, by registers and shared memory: two if the sums are few, so that one
// block computes while the other waits. With the sums of only one product (shrink, factor_grad),
// two fit up to rank 64. expand_add has registers for two up to rank 64, too.
constexpr int blocks_together(int R) {
  return R <= 32 ? 2 : 1;
}
constexpr int blocks_of_one_product(int R) {
  return R <= 64 ? 2 : 1;
}
constexpr size_t shared_budget(int blocks) {
  return blocks == 2 ? SHARED_BYTES_OF_TWO : SHARED_BYTES;
}
// 1 KB stays free: the bias of expand_add takes up to that.
constexpr int stages_that_fit(size_t stage, size_t resident, int at_most,
                              size_t budget = SHARED_BYTES) {
  const int fit = int((budget - 1024 - resident) / stage);
  return fit < at_most ? fit : at_most;
}

// A block's eight warps form a grid, 1 x 8 or 2 x 4: the first number, which this returns, divides
// the rank, the second one the `length` rows (shrink) or columns (rectangle.cuh) of the tile. It is
// 1 x 8 if the rank is short and the tile is long enough for all eight: then each part of x is read
// once from shared memory.
constexpr int warps_along_rank(int R, int length) {
  return R <= 32 && length >= 128 ? 1 : 2;
}

// ---- shrink ----

// Rows of a tile: low or tall. At rank 256 both are the same.
constexpr int SHRINK_LOW = 64;
constexpr int shrink_tall(int R) {
  return R <= 128 ? 128 : SHRINK_LOW;
}
// A block may have several tall tiles, so that A is read once for all of them: 32 accumulators per
// thread if two blocks are to fit, else 64.
constexpr int shrink_subs(int R, int rows) {
  if (rows != shrink_tall(R)) return 1;
  if (R == 16) return 4;
  return R == 32 ? 2 : 1;
}
// Columns of x in a stage: at most 16 KB of x, and at most 16 KB of A.
constexpr int shrink_cols(size_t element, int R, int rows) {
  const int longest = rows > R ? rows : R;
  const int cols = int(16384 / element) / longest;
  return cols > 128 ? 128 : cols;
}

// ---- fold, row_core and their gradients: tiles of the output ----

constexpr int SMALL_ROWS = 32, SMALL_COLS = 16;

// ---- factor_grad ----

// Columns of a tile, which are complete 128-byte lines of x. A wide tile reads each part of v for
// more columns. At rank 64 there is also a narrow one, for matrices of few columns.
constexpr int factor_grad_wide(int R) {
  return R == 32 || R == 64 ? 128 : 64;
}
constexpr int factor_grad_narrow(int R) {
  return R == 64 ? 64 : factor_grad_wide(R);
}
// Column tiles of a block, with sums in registers: 32 accumulators per thread if two blocks are to
// fit, else 64.
constexpr int factor_grad_subs(int R, int cols) {
  const int accumulators = blocks_of_one_product(R) == 2 ? 32 : 64;  // of each of 256 threads
  const int ranks = R < 32 ? 32 : R;
  return accumulators * 256 / (ranks * cols);
}
// Rows of a tile: 16 KB of x, but at most 64 (32 at rank 256) if v is as wide as x or wider.
constexpr int factor_grad_rows(size_t element, int R, int cols) {
  if (R == 256) return 32;
  return R >= 64 && cols == 64 ? 64 : int(16384 / element) / cols;
}

// ---- shrink_grad ----

constexpr int SHRINK_GRAD_ROWS = 64, SHRINK_GRAD_ROW_BYTES = 256;  // of a tile
constexpr int shrink_grad_cols(size_t element) {
  return SHRINK_GRAD_ROW_BYTES / int(element);
}
// Column tiles of a block. Their rows of F stay in shared memory, at most 32 KB, and their sums in
// registers, at most 64 per thread.
constexpr int shrink_grad_subs(size_t element, int R) {
  const int fit = int(32768 / (shrink_grad_cols(element) * R * element));
  const int subs = 128 / R;
  return fit < subs ? fit : subs;
}

// ---- expand_add ----

// Threads. Each warp keeps 16 rows of u, so a large rank leaves room for fewer warps.
constexpr int expand_threads(size_t element, int R) {
  const size_t row = R * element;
  if (row <= 128) return 256;
  return row <= 256 ? 128 : 64;
}
// Column tiles of 128 bytes, whose rows of F stay in shared memory.
constexpr int expand_subs(size_t element, int R) {
  const size_t warps = size_t(expand_threads(element, R)) / 32;
  const size_t factor = size_t(128) * R;
  const size_t stage = warps * (16 * 128 + 16 * R * element);
  const size_t stages = R == 16 ? 3 : 2;
  const int fit = int((shared_budget(blocks_together(R)) - 1024 - stages * stage) / factor);
  return fit < 8 ? fit : 8;
}

}  // namespace lotr::kernels
