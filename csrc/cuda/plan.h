// How a problem is cut into blocks, for a GPU of so many multiprocessors.  Host functions of sizes only: the
// same sizes give the same plan, hence the same order of summation, hence the same bits.
//
// A kernel reads its large matrix once whatever the plan is.  What the plan decides is the rest: factors are
// read again by every block that needs them (from L2 mostly), partial sums are written and read.  With s
// blocks along one side and t along the other, one of the two grows with s and the other with t, and s t must
// fill the GPU.  Each plan takes the cheapest of a few tile sizes, split just often enough that nine in ten
// multiprocessors have a block.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels/traits.h"

namespace lotr::plan {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The rank a kernel is compiled for.
inline int padded_rank(int64_t r) {
  return r <= 16 ? 16 : r <= 32 ? 32 : r <= 64 ? 64 : r <= 128 ? 128 : 256;
}
inline int64_t blocks_wanted(int multiprocessors) {
  return ceil_div(int64_t(multiprocessors) * 9, 10);
}

// Pieces of `steps` steps: at least `pieces` of them if there are so many steps, all but the last of equal
// length.
inline int64_t steps_per_piece(int64_t steps, int64_t pieces) {
  return std::max<int64_t>(1, steps / std::max<int64_t>(1, pieces));
}

// What a plan costs: bytes, more if it leaves the GPU empty.
inline double cost(double bytes, int64_t blocks, int64_t wanted) {
  return blocks >= wanted ? bytes : bytes * double(wanted) / double(blocks);
}

struct Shrink {
  int rows = 0;         // tokens of a tile
  int64_t m_tiles = 0;  // blocks along tokens
  int64_t k_per_split = 0;
  int splits = 0;          // blocks along k
  double extra_bytes = 0;  // factors and partial sums
};

inline Shrink shrink(int64_t M, int64_t K, int64_t r, int element, int multiprocessors) {
  const int R = padded_rank(r);
  const int64_t wanted = blocks_wanted(multiprocessors);
  Shrink best;
  double least = 0;
  for (const int rows : {kernels::SHRINK_LOW, kernels::shrink_tall(R)}) {
    const int cols = kernels::shrink_cols(size_t(element), R, rows);
    const int64_t tiles = ceil_div(M, rows), steps = ceil_div(K, cols);
    const int64_t per = steps_per_piece(steps, ceil_div(wanted, tiles)), splits = ceil_div(steps, per);
    const double extra = double(tiles) * K * r * element + (splits > 1 ? 8.0 * splits * M * r : 0.0);
    const double c = cost(double(M) * K * element + extra, tiles * splits, wanted);
    if (best.rows == 0 || c < least) best = {rows, tiles, per * cols, int(splits), extra}, least = c;
  }
  return best;
}

// Blocks of m_per_block x n_per_block of the large matrix.
struct Rectangles {
  int64_t m_per_block = 0, n_per_block = 0;
  int64_t m_blocks = 0, n_blocks = 0;
  double extra_bytes = 0;
};

// subs: column tiles that a block may own.  extra(m_blocks, n_blocks): bytes besides the large matrix.
template <class Extra>
Rectangles rectangles(int64_t M, int64_t N, int rows, int cols, int subs, double large_bytes,
                      int multiprocessors, Extra extra) {
  const int64_t wanted = blocks_wanted(multiprocessors), n_tiles = ceil_div(N, cols),
                m_tiles = ceil_div(M, rows);
  Rectangles best;
  double least = 0;
  for (int sub = 1; sub <= subs; ++sub) {
    const int64_t n_blocks = ceil_div(n_tiles, sub),
                  per = steps_per_piece(m_tiles, ceil_div(wanted, n_blocks));
    const int64_t m_blocks = ceil_div(m_tiles, per);
    const double bytes = extra(double(m_blocks), double(n_blocks));
    const double c = cost(large_bytes + bytes, m_blocks * n_blocks, wanted);
    if (best.m_blocks == 0 || c < least)
      best = {per * rows, int64_t(sub) * cols, m_blocks, n_blocks, bytes}, least = c;
  }
  return best;
}

inline Rectangles expand_add(int64_t M, int64_t N, int64_t r, int element, int multiprocessors) {
  const int R = padded_rank(r);
  return rectangles(M, N, kernels::expand_rows(R), 128 / element, kernels::expand_subs(size_t(element), R),
                    2.0 * M * N * element, multiprocessors,
                    [&](double m, double n) { return element * r * (n * M + m * N); });
}

inline Rectangles factor_grad(int64_t M, int64_t K, int64_t r, int element, int multiprocessors) {
  const int R = padded_rank(r);
  return rectangles(M, K, kernels::factor_grad_rows(size_t(element), R), 64, kernels::factor_grad_subs(R),
                    1.0 * M * K * element, multiprocessors, [&](double m, double n) {
                      return element * r * n * M + (m > 1 ? 8.0 * r * m * K : 0.0);
                    });
}

inline Rectangles shrink_grad(int64_t M, int64_t N, int64_t r, int element, int multiprocessors) {
  const int R = padded_rank(r);
  return rectangles(M, N, 64, 64, kernels::shrink_grad_subs(size_t(element), R), 1.0 * M * N * element,
                    multiprocessors, [&](double m, double n) {
                      return element * r * (n * M + m * N) + 8.0 * r * n * M +
                             (m > 1 ? 8.0 * r * m * N : 0.0);
                    });
}

struct FoldGrad {
  int64_t dB_blocks = 0, core_tiles = 0, n_per_split = 0;
  int splits = 0;
};

// The core's gradient is small and its sum long: split N until its tiles fill the GPU, but not below 256 rows
// a block.
inline FoldGrad fold_grad(int64_t N, int64_t L, int64_t r_in, int64_t r_out, bool dB, int multiprocessors) {
  const int64_t out = ceil_div(r_out, kernels::FOLD_COLS);
  FoldGrad plan;
  plan.dB_blocks = dB ? ceil_div(N, kernels::FOLD_ROWS) * out : 0;
  plan.core_tiles = L * ceil_div(r_in, kernels::FOLD_ROWS) * out;
  const int64_t per = std::max<int64_t>(
      8, steps_per_piece(ceil_div(N, 32), ceil_div(blocks_wanted(multiprocessors), plan.core_tiles)));
  plan.n_per_split = per * 32;
  plan.splits = int(ceil_div(N, plan.n_per_split));
  return plan;
}

}  // namespace lotr::plan
