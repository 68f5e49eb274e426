// How the problem of each kernel is divided into blocks: one function per kernel, from shape and
// card to a plan.
//
// A kernel reads its large matrix once, whatever the plan is. The plan decides the rest: every
// block that needs a factor reads it again, mostly from L2; and if several blocks share an output
// (split), they write parts, which a second launch (sum_parts) adds.
//
// An example: u = x A with x [2048, 4096] in bfloat16, r = 16, on an H100 of 132 SMs, which holds
// two blocks of this kernel per SM. Tiles of 64 x 128 are 16 KB; x has 32 x 32 of them, 16.8 MB.
//
//   m_blocks x splits                             32 x 1    32 x 4    32 x 8
//   blocks                                            32       128       256
//   blocks of the busiest SM                           1         1         2, resident together
//   block: its tiles x 16 KB, at 21.7 B/clock     24,161     6,040     4,027 clocks
//   memory: x and the parts, at 14 B/clock/SM      9,079     9,362     9,646
//   L2: x, A for each m_block, parts, at 30        5,296     5,428     5,561
//   the longest + a tenth of the other two        25,598    10,509    10,605
//   sum_parts, the second launch                       0     1,833     1,965
//   estimate                                      25,598    12,342    12,570
//
// Without a split, 100 SMs have no block. With 4 splits, 128 SMs have one. More splits let blocks
// overlap, but memory already limits, and more parts are written and read.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/traits.h"
#include "params.h"

namespace lotr::plan {

// Properties of a card, as the driver reports them. The defaults are an H100 SXM's.
struct Card {
  int32_t multiprocessors = 132;
  int32_t shared = 233472;  // bytes of shared memory per SM
};

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The rank that a kernel is compiled for.
constexpr int padded_rank(int64_t r) {
  for (const int R : {16, 32, 64, 128})
    if (r <= R) return R;
  return 256;
}

// `tiles` tiles in `count` pieces that differ by at most one tile.
inline Pieces pieces(int64_t tiles, int64_t count) {
  return {int32_t(tiles / count), int32_t(tiles % count)};
}

// The tiles of the large matrix [M, N] divided among m_blocks x n_blocks blocks: each has a piece
// along M and a piece along N.
struct Plan {
  int rows, cols;  // of a tile
  int64_t m_tiles, n_tiles;
  int64_t m_blocks = 1, n_blocks = 1;

  Pieces m_pieces() const { return pieces(m_tiles, m_blocks); }
  Pieces n_pieces() const { return pieces(n_tiles, n_blocks); }
};

// The fewest blocks that divide `tiles` tiles into pieces no longer than `blocks` blocks do.
constexpr int64_t fewest_blocks(int64_t tiles, int64_t blocks) {
  return ceil_div(tiles, ceil_div(tiles, blocks));
}

// One block for a matrix [M, N] in tiles of rows x cols.
inline Plan one_block(int64_t M, int64_t N, int rows, int cols) {
  return {rows, cols, ceil_div(M, rows), ceil_div(N, cols)};
}

// ---- cost model ----

// Bytes per clock and SM. Device memory: 14.5 on an H100 SXM (3.35 TB/s), 13.4 on an A100 (2.04
// TB/s), by the vendor's data sheets. L2 while all SMs read: microbenchmarks of Hopper (arXiv
// 2402.13499).
constexpr double MEMORY_RATE = 14, L2_RATE = 30;

// Throughput of two resident blocks relative to one, because one computes while the other waits:
// 1.3 to 1.9, counted in the kernels' machine code.
constexpr double TWO_BLOCK_SPEEDUP = 1.5;

// Clocks of a second launch: a microsecond at 1.7 GHz.
constexpr double LAUNCH_CLOCKS = 1700;

// Share of the shorter two of block time, memory time and L2 time that is not hidden behind the
// longest: a guess, until a GPU has measured it.
constexpr double NOT_OVERLAPPED = 0.1;

// Bytes of the large matrix that a block processes per clock, counted in the kernels' machine code:
// up to rank 32 the loads limit it, above that the products.
constexpr double block_rate(int R, double up_to_32, double at_64) {
  return R <= 32 ? up_to_32 : at_64 * 64 / R;
}

// Resident blocks per SM: `at_most`, the limit by registers, or one if shared memory does not hold
// two of `bytes` and the 1 KB that the system reserves for each.
inline int resident_blocks(const Card& card, int at_most,
                           size_t bytes = kernels::SHARED_BYTES_OF_TWO) {
  return size_t(card.shared) >= 2 * (bytes + 1024) ? at_most : 1;
}

// The costs of a kernel that its plans have in common.
struct Costs {
  int resident_blocks = 1;     // per SM
  double bytes_per_clock = 0;  // of the matrix, by a block that is alone on its SM
  // Bytes:
  double matrix = 0;       // all of it, read and written
  double tile = 0;         // read and written; a tile at the edge of the matrix counts in full
  double per_m_block = 0;  // factors that each block along M reads
  double per_n_block = 0;  // factors that each block along N reads
  double part = 0;         // of a part, as large as the output, in float32; there are `splits`
};

// Estimates a plan in clocks: the longest of the busiest SM, memory and L2, plus a share of the
// other two, plus the second launch of a split. `splits` blocks share an output.
inline double clocks_of(const Card& card, const Costs& costs, const Plan& plan, int64_t splits) {
  const double sms = card.multiprocessors;
  // Turns: the busiest SM's time, where 1 is a block that is alone on it.
  const int64_t blocks_of_sm = ceil_div(plan.m_blocks * plan.n_blocks, card.multiprocessors);
  double turns = double(blocks_of_sm);
  if (costs.resident_blocks == 2)
    turns = double(blocks_of_sm / 2) * 2 / TWO_BLOCK_SPEEDUP + double(blocks_of_sm % 2);
  const double tiles =
      double(ceil_div(plan.m_tiles, plan.m_blocks) * ceil_div(plan.n_tiles, plan.n_blocks));

  const double parts = splits > 1 ? costs.part * double(splits) : 0;
  const double factors =
      costs.per_m_block * double(plan.m_blocks) + costs.per_n_block * double(plan.n_blocks);
  const double block_time = tiles * costs.tile * turns / costs.bytes_per_clock;
  const double memory_time = (costs.matrix + parts) / (MEMORY_RATE * sms);
  const double l2_time = (costs.matrix + factors + parts) / (L2_RATE * sms);
  double clocks = (1 - NOT_OVERLAPPED) * std::max({block_time, memory_time, l2_time}) +
                  NOT_OVERLAPPED * (block_time + memory_time + l2_time);
  if (splits > 1) clocks += LAUNCH_CLOCKS + parts / (L2_RATE * sms);
  return clocks;
}

// The fastest plan so far, by its estimate.
struct Fastest {
  Plan plan{};
  double clocks = 1e30;

  void consider(const Card& card, const Costs& costs, const Plan& candidate, int64_t splits) {
    const double estimate = clocks_of(card, costs, candidate, splits);
    if (estimate < clocks) *this = {candidate, estimate};
  }
};

// Calls f(splits) for the numbers of splits of one dimension of the grid that are worth an
// estimate: one, as many as give one block per SM, and as many as give each SM all blocks that fit.
// tiles: along this dimension. other_blocks: along the other one.
template <class F>
void each_split(const Card& card, int resident_blocks, int64_t other_blocks, int64_t tiles, F f) {
  const int64_t sms = card.multiprocessors;
  int64_t previous = 0;
  for (const int64_t blocks : {int64_t(1), sms, sms * resident_blocks}) {
    const int64_t wanted = std::clamp<int64_t>(blocks / other_blocks, 1, tiles);
    const int64_t splits = fewest_blocks(tiles, wanted);
    if (splits != previous) f(splits);
    previous = splits;
  }
}

// ---- the plans of each kernel ----

// u = x A: kernels/shrink.cuh. Tall tiles read A fewer times, low ones fill a GPU with fewer
// tokens.
inline Plan shrink(const Card& card, int64_t M, int64_t K, int64_t r, int element) {
  const int R = padded_rank(r);
  const int tall = kernels::shrink_tall(R);
  Fastest fastest;
  for (const int rows : {kernels::SHRINK_LOW, tall}) {
    const int cols = kernels::shrink_cols(size_t(element), R, rows);
    Plan plan = one_block(M, K, rows, cols);
    Costs costs;
    costs.resident_blocks = resident_blocks(card, kernels::blocks_of_one_product(R));
    costs.bytes_per_clock = rows == tall ? block_rate(R, 18.8, 12.5) : block_rate(R, 21.7, 11.4);
    costs.matrix = double(M) * double(K) * element;
    costs.tile = double(rows * cols * element);
    costs.per_m_block = double(K) * double(r) * element;
    costs.part = 4 * double(M) * double(r);
    for (const int tiles_of_block : {1, kernels::shrink_subs(R, rows)}) {
      plan.m_blocks = ceil_div(plan.m_tiles, tiles_of_block);
      each_split(card, costs.resident_blocks, plan.m_blocks, plan.n_tiles, [&](int64_t splits) {
        plan.n_blocks = splits;
        fastest.consider(card, costs, plan, splits);
      });
    }
    if (rows == tall) break;  // at rank 256, tall is SHRINK_LOW
  }
  return fastest.plan;
}

// y = start + u F^T: kernels/expand_add.cuh. A block keeps F of some column tiles in shared
// memory.
inline Plan expand_add(const Card& card, int64_t M, int64_t N, int64_t r, int element) {
  const int R = padded_rank(r);
  const int rows = 16 * kernels::expand_threads(size_t(element), R) / 32;
  const int cols = 128 / element;
  const size_t shared = kernels::shared_budget(kernels::blocks_together(R));
  Plan plan = one_block(M, N, rows, cols);
  Costs costs;
  // 2 at all ranks: above rank 64 a block has only 64 or 128 threads.
  costs.resident_blocks = resident_blocks(card, 2, shared);
  costs.bytes_per_clock = block_rate(R, 31.9, 20.5);
  costs.matrix = 2.0 * double(M) * double(N) * element;
  costs.tile = 2.0 * rows * cols * element;
  costs.per_m_block = double(N) * double(r) * element;
  costs.per_n_block = double(M) * double(r) * element;
  const int subs = kernels::expand_subs(size_t(element), R);
  Fastest fastest;
  for (const int tiles_of_block : {1, 2, 4, subs}) {
    plan.n_blocks = ceil_div(plan.n_tiles, std::min(tiles_of_block, subs));
    each_split(card, costs.resident_blocks, plan.n_blocks, plan.m_tiles, [&](int64_t blocks) {
      plan.m_blocks = blocks;
      fastest.consider(card, costs, plan, 1);
    });
  }
  return fastest.plan;
}

// D += x^T v: kernels/factor_grad.cuh. Strips of columns, and pieces of M.
inline Plan factor_grad(const Card& card, int64_t M, int64_t K, int64_t r, int element) {
  const int R = padded_rank(r);
  const int wide = kernels::factor_grad_wide(R);
  Fastest fastest;
  for (const int cols : {kernels::factor_grad_narrow(R), wide}) {
    const int rows = kernels::factor_grad_rows(size_t(element), R, cols);
    Plan plan = one_block(M, K, rows, cols);
    Costs costs;
    costs.resident_blocks = resident_blocks(card, kernels::blocks_of_one_product(R));
    costs.bytes_per_clock = block_rate(R, 22.8, cols == 128 ? 11.4 : 9.7);
    costs.matrix = double(M) * double(K) * element;
    costs.tile = double(rows * cols * element);
    costs.per_n_block = double(M) * double(r) * element;
    costs.part = 4.0 * double(K) * double(r);
    for (const int tiles_of_block : {1, kernels::factor_grad_subs(R, cols)}) {
      plan.n_blocks = ceil_div(plan.n_tiles, tiles_of_block);
      each_split(card, costs.resident_blocks, plan.n_blocks, plan.m_tiles, [&](int64_t splits) {
        plan.m_blocks = splits;
        fastest.consider(card, costs, plan, splits);
      });
    }
    if (cols == wide) break;  // narrow and wide differ only at rank 64
  }
  return fastest.plan;
}

// du = g F and Q = g^T u: kernels/shrink_grad.cuh, one block per SM. p blocks along N write p M r
// elements of du, q blocks along M write q N r of Q. With p q = SMs the sum is least at
// p = sqrt(SMs N / M).
inline Plan shrink_grad(const Card& card, int64_t M, int64_t N, int64_t r, int element) {
  const int R = padded_rank(r);
  const int64_t sms = card.multiprocessors;
  Plan plan =
      one_block(M, N, kernels::SHRINK_GRAD_ROWS, kernels::shrink_grad_cols(size_t(element)));
  const int64_t least = ceil_div(plan.n_tiles, kernels::shrink_grad_subs(size_t(element), R));
  const auto wanted = int64_t(std::lround(std::sqrt(double(sms) * double(N) / double(M))));
  const int64_t n_blocks = std::clamp<int64_t>(wanted, least, plan.n_tiles);
  plan.n_blocks = fewest_blocks(plan.n_tiles, n_blocks);
  const int64_t m_blocks = std::clamp<int64_t>(sms / plan.n_blocks, 1, plan.m_tiles);
  plan.m_blocks = fewest_blocks(plan.m_tiles, m_blocks);
  return plan;
}

// A small product in `tiles` tiles of the output, with a sum that `splits` blocks share.
struct Split {
  int64_t tiles = 0;
  int64_t splits = 1;
};

// dG = s Q^T B: kernels/fold.cuh. The sum over N is long: split until there is one block per SM,
// with at least 256 rows per block.
inline Split fold_grad(const Card& card, int64_t N, int64_t r_in, int64_t r_out) {
  const int64_t sms = card.multiprocessors;
  Split plan{ceil_div(r_in, kernels::SMALL_ROWS) * ceil_div(r_out, kernels::SMALL_COLS)};
  plan.splits = std::clamp<int64_t>(N / 256, 1, ceil_div(sms, plan.tiles));
  return plan;
}

// dG_c for the rows of a core: kernels/row_core.cuh. Split until there are four blocks per SM,
// with at least 64 rows per block for a core of average size.
inline Split row_core_grad(const Card& card, int64_t rows, int64_t cores, int64_t r_in,
                           int64_t r_out) {
  const int64_t blocks = 4 * int64_t(card.multiprocessors);
  Split plan{cores * ceil_div(r_in, kernels::SMALL_ROWS) * ceil_div(r_out, kernels::SMALL_COLS)};
  plan.splits = std::clamp<int64_t>(rows / cores / 64, 1, ceil_div(blocks, plan.tiles));
  return plan;
}

// Rows per block of row_core: a full tile, or fewer so that there are four blocks per SM.
inline int rows_of_block(const Card& card, int64_t rows, int64_t r_out) {
  const int64_t blocks = 4 * int64_t(card.multiprocessors);
  const int64_t cols = ceil_div(r_out, kernels::SMALL_COLS);
  int rows_per_block = kernels::SMALL_ROWS;
  while (rows_per_block > 1 && ceil_div(rows, rows_per_block) * cols < blocks) rows_per_block /= 2;
  return rows_per_block;
}

}  // namespace lotr::plan
