// How each kernel's problem is cut into blocks: one function a kernel, from shape and card to a plan.
//
// A kernel reads its large matrix once whatever the plan is.  The plan decides the rest: every block that needs
// a factor reads it again, mostly from L2, and where several blocks share an output, their parts are written and
// read by a second launch (sum_parts).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/traits.h"
#include "params.h"

namespace lotr::plan {

// Properties of a card, as the driver reports them.  The defaults are an H100 SXM's.
struct Card {
  int32_t multiprocessors = 132;
  int32_t shared = 233472;  // bytes of shared memory of a multiprocessor
};

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The rank a kernel is compiled for.
constexpr int padded_rank(int64_t r) {
  return r <= 16 ? 16 : r <= 32 ? 32 : r <= 64 ? 64 : r <= 128 ? 128 : 256;
}

// `tiles` cut into `count` pieces that differ by at most one tile.
inline Pieces pieces(int64_t tiles, int64_t count) {
  return {int32_t(tiles / count), int32_t(tiles % count)};
}

// m_blocks x n_blocks blocks of the large matrix [M, N], and the pieces of its tiles that they own.
struct Plan {
  int rows, cols;  // of a tile
  int64_t m_tiles, n_tiles, m_blocks, n_blocks;

  Pieces m_pieces() const { return pieces(m_tiles, m_blocks); }
  Pieces n_pieces() const { return pieces(n_tiles, n_blocks); }
};

// Tiles that fill so many tenths of the multiprocessors are not split further: the parts and their launch cost
// more than the idle ones would add.
constexpr int FILLED_TENTHS = 9;

// Bytes of the large matrix that a block of a split reads at least: about 0.5 us at 60 bytes a clock, a third of
// what the second launch costs.
constexpr int64_t SPLIT_BYTES = 48 * 1024;

// Blocks of a kernel that the card holds at a time: at_most a multiprocessor, by its registers, or one where two
// do not fit in shared memory.
inline int64_t slots(const Card& card, int at_most) {
  const bool fit = size_t(card.shared) >= 2 * (kernels::SHARED_BYTES_OF_TWO + 1024);
  return int64_t(card.multiprocessors) * (fit ? at_most : 1);
}

// How many blocks share each of `owned` tiles or strips, along `steps` tiles that could be shared out: one where
// the owned ones fill the card, else as many as it holds, each with SPLIT_BYTES of the matrix at least.
inline int64_t splits(const Card& card, int64_t held, int64_t owned, int64_t steps, int64_t bytes) {
  if (10 * owned >= FILLED_TENTHS * int64_t(card.multiprocessors)) return 1;
  const int64_t sensible = std::max<int64_t>(1, bytes / (owned * SPLIT_BYTES));
  const int64_t most = std::min({held / owned, steps, sensible});
  return ceil_div(steps, ceil_div(steps, most));  // the fewest with this longest piece
}

// u = x A: kernels/shrink.cuh.  Tall tiles where they fill the card, since fewer blocks read A less often; a
// block owns several where these are more than the card holds.
inline Plan shrink(const Card& card, int64_t M, int64_t K, int64_t r, int element) {
  const int R = padded_rank(r);
  const int64_t held = slots(card, kernels::blocks_of_one_product(R));
  const int tall = kernels::shrink_tall(R);
  const bool fills = 10 * ceil_div(M, tall) >= FILLED_TENTHS * int64_t(card.multiprocessors);
  Plan plan{};
  plan.rows = fills ? tall : kernels::SHRINK_LOW;
  plan.cols = kernels::shrink_cols(size_t(element), R, plan.rows);
  plan.m_tiles = ceil_div(M, plan.rows), plan.n_tiles = ceil_div(K, plan.cols);
  const int64_t owned = std::clamp<int64_t>(plan.m_tiles / held, 1, kernels::shrink_subs(R, plan.rows));
  plan.m_blocks = ceil_div(plan.m_tiles, owned);
  plan.n_blocks = splits(card, held, plan.m_blocks, plan.n_tiles, M * K * element);
  return plan;
}

// y += u F^T: kernels/expand_add.cuh.  As many column tiles a block as keep F in shared memory; along the tokens
// as many blocks as the card holds.
inline Plan expand_add(const Card& card, int64_t M, int64_t N, int64_t r, int element) {
  const int R = padded_rank(r);
  const int64_t held = slots(card, kernels::blocks_together(R));
  Plan plan{};
  plan.rows = 16 * kernels::expand_threads(size_t(element), R) / 32, plan.cols = 128 / element;
  plan.m_tiles = ceil_div(M, plan.rows), plan.n_tiles = ceil_div(N, plan.cols);
  // fewer column tiles a block where the tokens alone do not fill the card
  const int64_t owned = std::clamp<int64_t>(plan.m_tiles * plan.n_tiles / held, 1,
                                            kernels::expand_subs(size_t(element), R));
  plan.n_blocks = ceil_div(plan.n_tiles, owned);
  plan.m_blocks = std::clamp<int64_t>(held / plan.n_blocks, 1, plan.m_tiles);
  plan.m_blocks = ceil_div(plan.m_tiles, ceil_div(plan.m_tiles, plan.m_blocks));
  return plan;
}

// D += x^T v: kernels/factor_grad.cuh.  Strips of columns, and as many pieces of M as fill the card.
inline Plan factor_grad(const Card& card, int64_t M, int64_t K, int64_t r, int element) {
  const int R = padded_rank(r);
  const int64_t held = slots(card, kernels::blocks_of_one_product(R));
  const int wide = kernels::factor_grad_wide(R);
  const bool fills = 10 * ceil_div(K, wide) >= FILLED_TENTHS * int64_t(card.multiprocessors);
  Plan plan{};
  plan.cols = fills ? wide : kernels::factor_grad_narrow(R);
  plan.rows = kernels::factor_grad_rows(size_t(element), R, plan.cols);
  plan.m_tiles = ceil_div(M, plan.rows), plan.n_tiles = ceil_div(K, plan.cols);
  const int64_t owned = std::clamp<int64_t>(plan.n_tiles / held, 1, kernels::factor_grad_subs(R, plan.cols));
  plan.n_blocks = ceil_div(plan.n_tiles, owned);
  plan.m_blocks = splits(card, held, plan.n_blocks, plan.m_tiles, M * K * element);
  return plan;
}

// k = g F and Q = g^T u: kernels/shrink_grad.cuh.  n blocks along N write n M r numbers of k, m along M write
// m N r of Q: with n m blocks of the card the sum is least at n = sqrt(n m N / M).
inline Plan shrink_grad(const Card& card, int64_t M, int64_t N, int64_t r, int element) {
  const int R = padded_rank(r);
  Plan plan{};
  plan.rows = kernels::SHRINK_GRAD_ROWS, plan.cols = kernels::shrink_grad_cols(size_t(element));
  plan.m_tiles = ceil_div(M, plan.rows), plan.n_tiles = ceil_div(N, plan.cols);
  const int64_t held = slots(card, 1), least = ceil_div(plan.n_tiles, kernels::shrink_grad_subs(size_t(element), R));
  const auto wanted = int64_t(std::lround(std::sqrt(double(held) * double(N) / double(M))));
  plan.n_blocks = std::clamp<int64_t>(wanted, least, plan.n_tiles);
  plan.n_blocks = ceil_div(plan.n_tiles, ceil_div(plan.n_tiles, plan.n_blocks));
  plan.m_blocks = std::clamp<int64_t>(held / plan.n_blocks, 1, plan.m_tiles);
  plan.m_blocks = ceil_div(plan.m_tiles, ceil_div(plan.m_tiles, plan.m_blocks));
  return plan;
}

// A small product whose sum is shared by `splits` blocks.
struct Split {
  int64_t tiles = 0;   // of the output
  int64_t splits = 1;
};

// dG_l = s Q_l^T B: kernels/fold.cuh.  The sum over N is long: split until the tiles fill the card, but not
// below 256 rows a block.
inline Split fold_grad(const Card& card, int64_t N, int64_t L, int64_t r_in, int64_t r_out) {
  Split plan{L * ceil_div(r_in, kernels::FOLD_ROWS) * ceil_div(r_out, kernels::FOLD_COLS)};
  const int64_t enough = ceil_div(int64_t(card.multiprocessors) * FILLED_TENTHS, 10);
  plan.splits = std::clamp<int64_t>(N / 256, 1, ceil_div(enough, plan.tiles));
  return plan;
}

// dG_c of the rows of a core: kernels/row_core.cuh.  Split until there are four blocks a multiprocessor, but not
// below 64 rows a block for a core of mean size.
inline Split row_core_grad(const Card& card, int64_t rows, int64_t cores, int64_t r_in, int64_t r_out) {
  Split plan{cores * ceil_div(r_in, kernels::FOLD_ROWS) * ceil_div(r_out, kernels::FOLD_COLS)};
  plan.splits = std::clamp<int64_t>(rows / cores / 64, 1, ceil_div(4 * int64_t(card.multiprocessors), plan.tiles));
  return plan;
}

// Rows of a block of row_core: a tile's, or fewer so that there are four blocks a multiprocessor.
inline int rows_of_block(const Card& card, int64_t rows, int64_t r_out) {
  const int64_t cols = ceil_div(r_out, kernels::FOLD_COLS);
  int most = kernels::FOLD_ROWS;
  while (most > 1 && ceil_div(rows, most) * cols < 4 * int64_t(card.multiprocessors)) most /= 2;
  return most;
}

}  // namespace lotr::plan
