// How a problem is cut into blocks, for a GPU of so many multiprocessors.  Host functions of sizes only: the
// same sizes give the same plan, hence the same order of summation, hence the same bits.
//
// A kernel reads its large matrix once whatever the plan is.  What the plan decides is the rest: factors are
// read again by every block that needs them (from L2 mostly), partial sums are written and read, and the
// block that comes last adds them alone, or all that share them do, where they may wait for one another: in a
// cluster, and on cards without clusters where the whole grid is there at once.  With s blocks along one side
// and t along the other, one of the two grows with s and the other with t, and s t must fill the GPU.  Each
// plan is the cheapest of some: all numbers of column tiles that a block may own, with the splits that fill
// the GPU once, and fewer where a problem is small.  Those that would move more than a part of the large
// matrix besides it are taken only where there are no others.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "kernels/traits.h"
#include "params.h"

namespace lotr::plan {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The rank a kernel is compiled for.
inline int padded_rank(int64_t r) {
  return r <= 16 ? 16 : r <= 32 ? 32 : r <= 64 ? 64 : r <= 128 ? 128 : 256;
}

// `tiles` in `count` pieces as equal as can be.
inline Pieces pieces(int64_t tiles, int64_t count) {
  return {int32_t(tiles / count), int32_t(tiles % count)};
}

// What a plan is made for.
struct Machine {
  int multiprocessors, shared;  // shared: bytes of shared memory of one of them
  bool has_clusters, clusters;  // and whether this kernel's may be one
  int blocks = 1;               // of this kernel that a multiprocessor holds
  bool cooperative = true;      // whether all blocks may be launched to be there at once

  // For a kernel that has registers for so many blocks, of so many bytes of shared memory each.
  Machine with(int at_most, size_t bytes = kernels::SHARED_BYTES_OF_TWO) const {
    const int fit = size_t(shared) >= 2 * (bytes + 1024) ? 2 : 1;
    return {multiprocessors, shared, has_clusters, clusters, std::min(fit, at_most), cooperative};
  }
  // whether so many splits are to be one cluster
  bool cluster(int64_t splits) const {
    return clusters && splits > 1 && splits <= std::min(MOST_OF_CLUSTER, multiprocessors) &&
           (splits & (splits - 1)) == 0;
  }
  // whether the splits may wait for one another without a cluster: the whole grid is there at once
  bool together(int64_t owners, int64_t splits) const {
    return cooperative && !has_clusters && splits > 1 && owners * splits <= slots();
  }
  int64_t wanted() const { return ceil_div(int64_t(multiprocessors) * 9, 10); }
  int64_t slots() const { return int64_t(multiprocessors) * blocks; }
};

// Microseconds, roughly those of an H100 by bench.static: only their proportions matter.
constexpr double MEMORY = 25e3;       // bytes that a multiprocessor's share of the memory delivers in one
constexpr double SUMMING = 110e3;     // bytes of partial sums that one block reads from L2
constexpr double L2 = 52e3;           // bytes that it gets from L2, when all do
constexpr double EXTRA = 0.5;         // what a byte of a factor or of a partial sum costs, which L2 keeps
constexpr double FACTOR = 0.1;        // the same where there are factors alone, and nothing is written
constexpr double ARRIVING = 0.5;      // from the last store of a partial sum to the first load of it
constexpr double PASSING = 25e3;      // bytes of partial sums that one block reads from other shared memory
constexpr double ALL_SUMMING = 40e3;  // bytes of partial sums that a multiprocessor reads when all of them do
// Bytes of the large matrix that one block gets through in one, alone on its multiprocessor: what it computes
// it has to wait for.
constexpr double alone(int R, double least_rank, double rank_64) {
  return R <= 32 ? least_rank : rank_64 * 64 / R;
}

// At rank 16 the sums over the blocks of shrink and factor_grad take longer than L2 takes to give their
// factors once more: these cost next to nothing, and may be more of them.
constexpr double extra_of_one_product(int R) {
  return R == 16 ? 0.01 : EXTRA;
}
constexpr double most_of_one_product(int R) {
  return R == 16 ? 0.6 : 0.15;
}

// How much faster two blocks of a multiprocessor compute than one: at rank 16 it waits most of the time.
constexpr double two_of_one_product(int R) {
  return R == 16 ? 1.9 : 1.4;
}

struct Cost {
  double large,
      extra;            // bytes: of the large matrix; of factors, and of partial sums written and read
  double most;          // of extra over large, at rank 16
  double summed;        // bytes that the last block adds, 0: there is no sum
  double alone;         // see above
  double passed = 0;    // bytes that each block adds from its cluster
  double together = 0;  // bytes that all blocks add at the same time, all of them together
  double each = EXTRA;  // see above
  double two = 1.4;     // see above
  int64_t blocks = 0;
  double uneven = 1;  // the largest block over the mean one
};
// Times that overlap, but not quite where they are equal.
inline double overlapped(double a, double b, double c = 0) {
  return std::pow(std::pow(a, 8) + std::pow(b, 8) + std::pow(c, 8), 1 / 8.);
}
inline double microseconds(const Machine& machine, const Cost& c) {
  const double blocks = double(c.blocks), slots = double(machine.slots()), wanted = double(machine.wanted());
  const double waves = blocks > slots ? double(ceil_div(c.blocks, machine.slots())) * slots / blocks : 1.0;
  const double idle = blocks < wanted ? wanted / blocks : waves;
  const double share = idle * c.uneven / machine.multiprocessors;
  const double memory = (c.large + c.each * c.extra) * share / MEMORY,
               kept = (c.large + c.extra) * share / L2;
  // what the busiest multiprocessor gets: one after another, or two at a time where it holds two
  const int64_t mine = ceil_div(c.blocks, machine.multiprocessors);
  const double turns = machine.blocks == 2 ? double(mine / 2) * 2 / c.two + double(mine % 2) : double(mine);
  const double own = c.large * c.uneven / blocks * turns / c.alone;
  return overlapped(memory, kept, own) + (c.summed > 0 ? ARRIVING + c.summed / SUMMING : 0.0) +
         (c.passed > 0 ? ARRIVING / 2 + c.passed / PASSING : 0.0) +
         (c.together > 0 ? ARRIVING * 3 / 2 + c.together / (ALL_SUMMING * machine.multiprocessors) : 0.0);
}

// m_blocks x n_blocks blocks of the large matrix, and the pieces of its tiles that they own.
struct Plan {
  int rows = 0, cols = 0;  // of a tile
  int64_t m_tiles = 0, n_tiles = 0, m_blocks = 0, n_blocks = 0;
  double extra_bytes = 0, cost = 0;
  bool cluster = false;   // the blocks along M are one
  bool last = false;      // a last resort: it moves too much besides the matrix, or does not fill the GPU
  bool together = false;  // all blocks are there at once, and those along M wait for one another
  int of_row = 1;         // blocks along N that are one cluster: shrink_grad by wgmma
  void better_of(const Plan& other) {
    if (rows == 0 || std::pair(other.last, other.cost) < std::pair(last, cost)) *this = other;
  }
  Pieces m_pieces() const { return pieces(m_tiles, m_blocks); }
  Pieces n_pieces() const { return pieces(n_tiles, n_blocks); }
};

inline double unevenness(int64_t tiles, int64_t blocks) {
  return double(ceil_div(tiles, blocks)) * double(blocks) / double(tiles);
}

// Plans of a matrix of owned x split tiles.  A block owns up to `subs` tiles along one side; along the other
// the tiles are split, just often enough to fill the GPU or once for each of its places. cost(owners, splits)
// gives bytes and sums, without blocks and unevenness; f(owners, splits, microseconds, extra bytes, whether
// it is a last resort) hears of each plan.
template <class CostOf, class F>
void each_plan(const Machine& machine, int R, int64_t owned, int64_t split, int subs, CostOf cost, F f) {
  const int64_t few = int64_t(machine.multiprocessors) * 8 / 10;
  const auto attempt = [&](int64_t owners, int64_t splits) {
    splits = std::clamp<int64_t>(splits, 1, split);
    const int64_t even = ceil_div(split, ceil_div(split, splits));  // no longer for having fewer of them
    const int64_t more = ceil_div(split, split / splits);           // the least even number above it
    if (owners * even >= machine.wanted())
      splits = even;
    else if (owners * more <= machine.slots())
      splits = more;
    Cost c = cost(owners, splits);
    c.blocks = owners * splits;
    c.uneven = unevenness(owned, owners) * unevenness(split, splits);
    f(owners, splits, microseconds(machine, c), c.extra,
      c.extra > c.most * R / 16 * c.large || c.blocks < few);
  };
  // The second time what needs two turns of blocks, in one turn that leaves some multiprocessors without any.
  for (const bool again : {false, true})
    for (int sub = 1; sub <= subs; ++sub) {
      const int64_t owners = ceil_div(owned, sub);
      if (sub > 1 && owners == ceil_div(owned, sub - 1)) continue;
      const int64_t fewest = ceil_div(machine.wanted(), owners);
      if (again) {
        const int64_t one_turn = machine.slots() / owners;
        if (one_turn >= 1 && one_turn < fewest) attempt(owners, one_turn);
        continue;
      }
      attempt(owners, fewest);
      for (const int64_t full : {int64_t(machine.multiprocessors) / owners, machine.slots() / owners})
        if (full > fewest) attempt(owners, full);
      for (int64_t splits = 2; splits <= MOST_OF_CLUSTER; splits *= 2)
        if (machine.cluster(splits) && splits > fewest && owners * splits <= machine.slots())
          attempt(owners, splits);
    }
}

inline Plan shrink(int64_t M, int64_t K, int64_t r, int element, const Machine& machine) {
  const int R = padded_rank(r);
  Plan best;
  for (const int rows : {kernels::SHRINK_LOW, kernels::shrink_tall(R)}) {
    const int cols = kernels::shrink_cols(size_t(element), R, rows);
    const int64_t tiles = ceil_div(M, rows), steps = ceil_div(K, cols);
    const int subs = kernels::shrink_subs(R, rows);
    const double filled = double(M) / double(tiles * rows);  // rows that are not there take as long
    // The sum over many splits is what one waits for when the tokens are few: no more than memory needs.
    Machine few = machine.with(kernels::blocks_of_one_product(R));
    if (tiles == 1) few.multiprocessors = std::min(machine.multiprocessors, std::max(35, R + R / 8));
    each_plan(
        few, R, tiles, steps, subs,
        [&](int64_t blocks, int64_t splits) {
          const double partial = splits > 1 ? 4.0 * double(M) * double(r) * double(splits) : 0.0;
          Cost c{double(M) * double(K) * element,
                 double(blocks) * double(K) * double(r) * element + 2 * partial,  // written and read
                 most_of_one_product(R), partial / double(blocks),
                 (rows == kernels::SHRINK_LOW ? alone(R, 38e3, 20e3) : alone(R, 33e3, 22e3)) * filled};
          c.each = extra_of_one_product(R), c.two = two_of_one_product(R);
          return c;
        },
        [&](int64_t blocks, int64_t splits, double cost, double extra, bool last) {
          best.better_of({rows, cols, tiles, steps, blocks, splits, extra, cost, false, last});
        });
    if (rows == kernels::shrink_tall(R)) break;  // the two may be one
  }
  return best;
}

inline Plan expand_add(int64_t M, int64_t N, int64_t r, int element, const Machine& machine) {
  const int R = padded_rank(r), warps = kernels::expand_threads(size_t(element), R) / 32,
            cols = 128 / element;
  const int64_t n_tiles = ceil_div(N, cols), strips = ceil_div(M, 16 * warps);
  Plan best;
  each_plan(
      machine.with(2, kernels::shared_budget(kernels::blocks_together(R))), R, n_tiles, strips,
      kernels::expand_subs(size_t(element), R),
      [&](int64_t n, int64_t m) {
        Cost c{2.0 * double(M) * double(N) * element,
               double(element) * double(r) * (double(n) * double(M) + double(m) * double(N)), 0.15, 0,
               alone(R, 56e3, 36e3)};
        c.each = FACTOR;
        return c;
      },
      [&](int64_t n, int64_t m, double cost, double extra, bool last) {
        best.better_of({16 * warps, cols, strips, n_tiles, m, n, extra, cost, false, last});
      });
  return best;
}

inline Plan factor_grad(int64_t M, int64_t K, int64_t r, int element, const Machine& machine) {
  const int R = padded_rank(r);
  Plan best;
  Machine clusters = machine.with(kernels::blocks_of_one_product(R));
  clusters.clusters &= kernels::factor_grad_in_cluster(R);
  for (const int cols : {kernels::factor_grad_wide(R), kernels::factor_grad_narrow(R)}) {
    const int rows = kernels::factor_grad_rows(size_t(element), R, cols);
    const int64_t k_tiles = ceil_div(K, cols), m_tiles = ceil_div(M, rows);
    each_plan(
        clusters, R, k_tiles, m_tiles, kernels::factor_grad_subs(R, cols),
        [&](int64_t n, int64_t m) {
          const bool cluster = clusters.cluster(m), together = clusters.together(n, m);
          const double one = m > 1 ? 4.0 * double(r) * double(K) : 0.0,
                       partial = cluster ? 0.0 : one * double(m);
          Cost c{double(M) * double(K) * element,
                 double(element) * double(r) * double(n) * double(M) + 2 * partial,
                 most_of_one_product(R),
                 together ? 0.0 : partial / double(n),
                 alone(R, 40e3, cols == 128 ? 20e3 : 17e3),
                 cluster ? one / double(n) : 0.0,
                 together ? partial : 0.0};
          c.each = extra_of_one_product(R), c.two = two_of_one_product(R);
          return c;
        },
        [&](int64_t n, int64_t m, double cost, double extra, bool last) {
          best.better_of({rows, cols, m_tiles, k_tiles, m, n, extra, cost, clusters.cluster(m), last,
                          clusters.together(n, m)});
        });
    if (cols == kernels::factor_grad_narrow(R)) break;  // the two may be one
  }
  return best;
}

inline Plan shrink_grad(int64_t M, int64_t N, int64_t r, int element, const Machine& machine) {
  const int R = padded_rank(r), rows = kernels::SHRINK_GRAD_ROWS,
            cols = kernels::shrink_grad_cols(size_t(element));
  const int64_t n_tiles = ceil_div(N, cols), m_tiles = ceil_div(M, rows);
  Plan best;
  Machine clusters = machine.with(1);
  clusters.clusters &= kernels::shrink_grad_in_cluster(R);
  each_plan(
      clusters, R, n_tiles, m_tiles, kernels::shrink_grad_subs(size_t(element), R),
      [&](int64_t n, int64_t m) {
        const bool cluster = clusters.cluster(m), together = clusters.together(n, m);
        const double k = 4.0 * double(r) * double(n) * double(M), one = 4.0 * double(r) * double(N);
        const double sent = m > 1 && !cluster ? double(m) : 0.0;
        // what is left to sum at the end: the last row tile of k, the last column tile of Q
        const double k_last = 4.0 * double(r) * double(std::min<int64_t>(rows, M)) * double(n);
        const double Q_last = 4.0 * double(r) * double(std::min<int64_t>(cols, N)) * sent;
        return Cost{double(M) * double(N) * element,
                    double(element) * double(r) * (double(n) * double(M) + double(m) * double(N)) + 2 * k +
                        2 * one * sent,
                    0.35,
                    together ? 0.0 : Q_last + k_last,
                    alone(R, 34e3, 15e3),
                    cluster ? one / double(n) : 0.0,
                    together ? Q_last * double(n) + k_last * double(m) : 0.0};
      },
      [&](int64_t n, int64_t m, double cost, double extra, bool last) {
        best.better_of({rows, cols, m_tiles, n_tiles, m, n, extra, cost, clusters.cluster(m), last,
                        clusters.together(n, m)});
      });
  return best;
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
  const int64_t steps = ceil_div(N, 32),
                wanted = ceil_div(Machine{multiprocessors, 0, false, false}.wanted(), plan.core_tiles);
  plan.n_per_split = std::max<int64_t>(8, std::max<int64_t>(1, steps / wanted)) * 32;
  plan.splits = int(ceil_div(N, plan.n_per_split));
  return plan;
}

}  // namespace lotr::plan
