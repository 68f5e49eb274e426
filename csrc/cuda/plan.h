// How each kernel's problem is cut into blocks: one function a kernel, from shape and card to a
// plan.
//
// A kernel reads its large matrix once whatever the plan is.  The plan decides the rest: every
// block that needs a factor reads it again, mostly from L2, and where several blocks share an
// output, their parts are written and read by a second launch (sum_parts).
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

// Bytes a clock.  Of device memory for each multiprocessor: 3.35 TB/s of an H100 SXM are 14.5, 2.04
// TB/s of an A100 13.4.  Of L2 while all multiprocessors read: microbenchmarks of Hopper (arXiv
// 2402.13499).
constexpr double MEMORY_RATE = 14, L2_RATE = 30;

// Throughput of two resident blocks over one, which computes while the other waits: 1.3 to 1.9 by
// the kernels' machine code.
constexpr double TWO_BLOCK_SPEEDUP = 1.5;

// What a second launch costs: a microsecond at 1.7 GHz.
constexpr double LAUNCH_CLOCKS = 1700;

// Bytes of the large matrix that a block processes in a clock, counted in the kernels' machine
// code: up to rank 32 the loads limit it, above that the products.
constexpr double block_rate(int R, double up_to_32, double at_64) {
  return R <= 32 ? up_to_32 : at_64 * 64 / R;
}

// Blocks that a multiprocessor holds: at_most by registers, one where two of `bytes` do not fit in
// shared memory.
inline int blocks_held(const Card& card, int at_most, size_t bytes = kernels::SHARED_BYTES_OF_TWO) {
  return size_t(card.shared) >= 2 * (bytes + 1024) ? at_most : 1;
}

// How a kernel runs, for the choice among its plans.
struct Kind {
  int held;          // blocks that a multiprocessor holds
  double rate;       // bytes of the matrix that a block alone processes in a clock
  double matrix;     // bytes of the matrix, read and written
  double tile;       // bytes of a tile, also where the matrix does not fill it
  double per_block;  // bytes of factors that each block along M reads, and along N
  double per_column;
  double part;  // bytes of a part, of which each block that shares an output writes one
};

struct Choice {
  Plan plan{};
  double clocks = 1e30;
};

// Takes the plan if it is estimated to be faster: the longest of the busiest multiprocessor, memory
// and L2, then the second launch of a split.  `shared` blocks share an output.
inline void consider(Choice& best, const Card& card, const Kind& kind, Plan plan, int64_t shared) {
  const double all = card.multiprocessors;
  const int64_t mine = ceil_div(plan.m_blocks * plan.n_blocks, card.multiprocessors);
  const double turns =
      kind.held == 2 ? double(mine / 2) * 2 / TWO_BLOCK_SPEEDUP + double(mine % 2) : double(mine);
  const double longest =
      double(ceil_div(plan.m_tiles, plan.m_blocks) * ceil_div(plan.n_tiles, plan.n_blocks));
  const double parts = shared > 1 ? kind.part * double(shared) : 0;
  const double factors =
      kind.per_block * double(plan.m_blocks) + kind.per_column * double(plan.n_blocks);
  const double own = longest * kind.tile * turns / kind.rate,
               memory = (kind.matrix + parts) / (MEMORY_RATE * all),
               l2 = (kind.matrix + factors + parts) / (L2_RATE * all);
  // a tenth of the others, since they overlap not quite
  double clocks = 0.9 * std::max({own, memory, l2}) + 0.1 * (own + memory + l2);
  if (shared > 1) clocks += LAUNCH_CLOCKS + parts / (L2_RATE * all);
  if (clocks < best.clocks) best = {plan, clocks};
}

// f(count) for some counts from 1 to `most` pieces of a row of tiles: one, and as many as give each
// multiprocessor, or each block that it holds, one of `others` times so many blocks.
template <class F>
void each_count(const Card& card, int held, int64_t others, int64_t most, F f) {
  int64_t last = 0;
  for (const int64_t blocks :
       {int64_t(1), int64_t(card.multiprocessors), int64_t(card.multiprocessors) * held}) {
    const int64_t wanted = std::clamp<int64_t>(blocks / others, 1, most);
    const int64_t even =
        ceil_div(most, ceil_div(most, wanted));  // the fewest with this longest piece
    if (even != last) f(even);
    last = even;
  }
}

// u = x A: kernels/shrink.cuh.  Tall tiles read A less often, low ones fill a card with fewer
// tokens.
inline Plan shrink(const Card& card, int64_t M, int64_t K, int64_t r, int element) {
  const int R = padded_rank(r), tall = kernels::shrink_tall(R);
  const double numbers = double(M) * double(r), A = double(K) * double(r) * element;
  Choice best;
  for (const int rows : {kernels::SHRINK_LOW, tall}) {
    const int cols = kernels::shrink_cols(size_t(element), R, rows);
    const Plan tiles{rows, cols, ceil_div(M, rows), ceil_div(K, cols), 1, 1};
    const Kind kind{blocks_held(card, kernels::blocks_of_one_product(R)),
                    rows == tall ? block_rate(R, 18.8, 12.5) : block_rate(R, 21.7, 11.4),
                    double(M) * double(K) * element,
                    double(rows * cols * element),
                    A,
                    0,
                    4 * numbers};
    for (const int owned : {1, kernels::shrink_subs(R, rows)}) {
      Plan plan = tiles;
      plan.m_blocks = ceil_div(plan.m_tiles, owned);
      each_count(card, kind.held, plan.m_blocks, plan.n_tiles, [&](int64_t splits) {
        plan.n_blocks = splits;
        consider(best, card, kind, plan, splits);
      });
    }
    if (rows == tall) break;  // the two may be one
  }
  return best.plan;
}

// y += u F^T: kernels/expand_add.cuh.  A block keeps F of some column tiles in shared memory.
inline Plan expand_add(const Card& card, int64_t M, int64_t N, int64_t r, int element) {
  const int R = padded_rank(r), rows = 16 * kernels::expand_threads(size_t(element), R) / 32,
            cols = 128 / element;
  const Kind kind{blocks_held(card, 2, kernels::shared_budget(kernels::blocks_together(R))),
                  block_rate(R, 31.9, 20.5),
                  2.0 * double(M) * double(N) * element,
                  2.0 * rows * cols * element,
                  double(N) * double(r) * element,
                  double(M) * double(r) * element,
                  0};
  Plan plan{rows, cols, ceil_div(M, rows), ceil_div(N, cols), 1, 1};
  const int subs = kernels::expand_subs(size_t(element), R);
  Choice best;
  for (const int owned : {1, 2, 4, subs}) {
    plan.n_blocks = ceil_div(plan.n_tiles, std::min(owned, subs));
    each_count(card, kind.held, plan.n_blocks, plan.m_tiles, [&](int64_t blocks) {
      plan.m_blocks = blocks;
      consider(best, card, kind, plan, 1);
    });
  }
  return best.plan;
}

// D += x^T v: kernels/factor_grad.cuh.  Strips of columns, and pieces of M.
inline Plan factor_grad(const Card& card, int64_t M, int64_t K, int64_t r, int element) {
  const int R = padded_rank(r), wide = kernels::factor_grad_wide(R);
  Choice best;
  for (const int cols : {kernels::factor_grad_narrow(R), wide}) {
    const int rows = kernels::factor_grad_rows(size_t(element), R, cols);
    const Plan tiles{rows, cols, ceil_div(M, rows), ceil_div(K, cols), 1, 1};
    const Kind kind{blocks_held(card, kernels::blocks_of_one_product(R)),
                    block_rate(R, 22.8, cols == 128 ? 11.4 : 9.7),
                    double(M) * double(K) * element,
                    double(rows * cols * element),
                    0,
                    double(M) * double(r) * element,
                    4.0 * double(K) * double(r)};
    for (const int owned : {1, kernels::factor_grad_subs(R, cols)}) {
      Plan plan = tiles;
      plan.n_blocks = ceil_div(plan.n_tiles, owned);
      each_count(card, kind.held, plan.n_blocks, plan.m_tiles, [&](int64_t splits) {
        plan.m_blocks = splits;
        consider(best, card, kind, plan, splits);
      });
    }
    if (cols == wide) break;  // the two may be one
  }
  return best.plan;
}

// k = g F and Q = g^T u: kernels/shrink_grad.cuh.  n blocks along N write n M r numbers of k, m
// along M write m N r of Q: with n m blocks of the card the sum is least at n = sqrt(n m N / M).
inline Plan shrink_grad(const Card& card, int64_t M, int64_t N, int64_t r, int element) {
  const int R = padded_rank(r);
  Plan plan{};
  plan.rows = kernels::SHRINK_GRAD_ROWS, plan.cols = kernels::shrink_grad_cols(size_t(element));
  plan.m_tiles = ceil_div(M, plan.rows), plan.n_tiles = ceil_div(N, plan.cols);
  const int64_t held = card.multiprocessors,
                least = ceil_div(plan.n_tiles, kernels::shrink_grad_subs(size_t(element), R));
  const auto wanted = int64_t(std::lround(std::sqrt(double(held) * double(N) / double(M))));
  plan.n_blocks = std::clamp<int64_t>(wanted, least, plan.n_tiles);
  plan.n_blocks = ceil_div(plan.n_tiles, ceil_div(plan.n_tiles, plan.n_blocks));
  plan.m_blocks = std::clamp<int64_t>(held / plan.n_blocks, 1, plan.m_tiles);
  plan.m_blocks = ceil_div(plan.m_tiles, ceil_div(plan.m_tiles, plan.m_blocks));
  return plan;
}

// A small product whose sum is shared by `splits` blocks.
struct Split {
  int64_t tiles = 0;  // of the output
  int64_t splits = 1;
};

// dG = s Q^T B: kernels/fold.cuh.  The sum over N is long: split until there is a block a
// multiprocessor, but not below 256 rows a block.
inline Split fold_grad(const Card& card, int64_t N, int64_t r_in, int64_t r_out) {
  Split plan{ceil_div(r_in, kernels::FOLD_ROWS) * ceil_div(r_out, kernels::FOLD_COLS)};
  plan.splits =
      std::clamp<int64_t>(N / 256, 1, ceil_div(int64_t(card.multiprocessors), plan.tiles));
  return plan;
}

// dG_c of the rows of a core: kernels/row_core.cuh.  Split until there are four blocks a
// multiprocessor, but not below 64 rows a block for a core of mean size.
inline Split row_core_grad(const Card& card, int64_t rows, int64_t cores, int64_t r_in,
                           int64_t r_out) {
  Split plan{cores * ceil_div(r_in, kernels::FOLD_ROWS) * ceil_div(r_out, kernels::FOLD_COLS)};
  plan.splits = std::clamp<int64_t>(rows / cores / 64, 1,
                                    ceil_div(4 * int64_t(card.multiprocessors), plan.tiles));
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
