// What a rank and an element type imply, known to the kernels and to the planner alike.
#pragma once
#include <cstddef>

namespace lotr::kernels {

// Shared memory of a block: what the smallest of the supported GPUs (sm_86, 89, 120) grants, less the 1 KB it
// keeps.
constexpr size_t SHARED_BYTES = 99 * 1024;

constexpr int stages_that_fit(size_t stage, size_t resident, int at_most) {
  const int fit = int((SHARED_BYTES - 1024 - resident) / stage);
  return fit < at_most ? fit : at_most;
}

// Columns of x in a stage of shrink: 16 KB of x at most, and 16 KB of A at most.
constexpr int shrink_cols(size_t element, int R, int rows) {
  const int longest = rows > R ? rows : R;
  const int cols = int(16384 / element) / longest;
  return cols > 128 ? 128 : cols;
}
// The tall tile of shrink: A is read once for so many tokens.  As tall as 64 accumulators a thread allow.
constexpr int shrink_tall(int R) {
  return R <= 64 ? 256 : R == 128 ? 128 : 64;
}
constexpr int SHRINK_LOW = 64;

// Output tiles of fold and fold_grad.
constexpr int FOLD_ROWS = 32, FOLD_COLS = 16;

// Tiles of 64 columns that a block of factor_grad or shrink_grad may own: 64 accumulators a thread.  In
// shrink_grad and expand_add the rows of F that go with them stay in shared memory: 32 KB at most.
constexpr int factor_grad_rows(size_t element, int R) {
  return element == 2 && R == 256 ? 32 : 64;
}
constexpr int factor_grad_subs(int R) {
  return R <= 32 ? 8 : 256 / R;
}
constexpr int shrink_grad_subs(size_t element, int R) {
  const int fit = int(32768 / (64 * R * element)), subs = factor_grad_subs(R);
  return fit < subs ? fit : subs;
}
constexpr int expand_rows(int R) {
  return R <= 128 ? 64 : 32;
}
constexpr int expand_subs(size_t element, int R) {
  const size_t rows = size_t(expand_rows(R)), factor = size_t(128) * R,
               stage = rows * 128 + rows * R * element;
  const int fit =
      int((SHARED_BYTES - 1024 - (R <= 64 ? 3 : 2) * stage) / factor);  // a tile is 128 bytes wide
  return fit < 8 ? fit : 8;
}

}  // namespace lotr::kernels
