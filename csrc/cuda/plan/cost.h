// Estimates the time of a launch: a roofline of device memory, L2 and the multiprocessors' own rate, then the
// time of the reduction over blocks.
#pragma once
#include <cmath>

#include "machine.h"

namespace lotr::plan {

// Assumed the same on every card, of the size that microbenchmarks of Hopper report (arXiv 2402.13499).
struct Rates {
  double l2 = 30;         // bytes per clock that a multiprocessor reads from L2 while all of them read
  double l2_alone = 63;   // the same while it is the only one: the width of its port
  double l2_sums = 23;    // the same while all of them read partial sums, in short runs
  double cluster = 14;    // bytes per clock from the shared memory of another block of the cluster
  double handover = 0.5;  // microseconds from a block's last store of a partial sum to the load by another
};
constexpr Rates RATES;

// Bytes of a launch, as its kernel moves them.
struct Work {
  double large = 0;      // of the large matrix, read and written
  double factors = 0;    // of factors, read again and again from L2: a fiftieth misses it
  double partials = 0;   // of partial sums, written and read: half of them reach memory
  double rate = 1;       // of the large matrix that a block processes in a clock, alone on a multiprocessor
  double last = 0;       // of partial sums that the last block adds after the others have ended
  double passed = 0;     // of partial sums that each block adds from its cluster
  double meanwhile = 0;  // the same, added while the large matrix still arrives
  double together = 0;   // of partial sums that all blocks add at the same time; those of all blocks
};

// Bytes of the large matrix that a block processes in a clock, by bench.static: up to rank 32 the loads
// limit it, above that the products.
constexpr double block_rate(int R, double up_to_32, double at_64) {
  return R <= 32 ? up_to_32 : at_64 * 64 / R;
}

// Throughput of two resident blocks over one: one computes while the other waits.  bench.static gives 1.3 to
// 1.9.
constexpr double TWO_BLOCK_SPEEDUP = 1.5;

// The time of overlapping activities: that of the longest, and more if another takes as long.
inline double overlapped(double a, double b, double c, double d) {
  return std::pow(std::pow(a, 8) + std::pow(b, 8) + std::pow(c, 8) + std::pow(d, 8), 1 / 8.);
}

// uneven: the largest block over the mean one.
inline double microseconds(const Machine& machine, const Work& work, int64_t blocks, double uneven) {
  const Card& card = machine.card;
  const double all = card.multiprocessors, clock = card.clock;
  // Waves of blocks on the busiest multiprocessor: two blocks at a time where it holds two.
  const int64_t mine = ceil_div(blocks, card.multiprocessors);
  const double waves =
      machine.blocks == 2 ? double(mine / 2) * 2 / TWO_BLOCK_SPEEDUP + double(mine % 2) : double(mine);
  const double own = work.large * uneven / double(blocks) * waves / (work.rate * clock);
  const double memory = (work.large + work.partials / 2 + work.factors / 50) / (card.memory * all);
  const double l2 = (work.large + work.factors + work.partials) / (RATES.l2 * clock * all);
  double sums = 0;
  if (work.last > 0) sums += RATES.handover + work.last / (RATES.l2_alone * clock);
  if (work.passed > 0) sums += RATES.handover / 2 + work.passed / (RATES.cluster * clock);
  if (work.together > 0) sums += RATES.handover * 1.5 + work.together / (RATES.l2_sums * clock * all);
  return overlapped(memory, l2, own, work.meanwhile / (RATES.cluster * clock)) + sums;
}

}  // namespace lotr::plan
