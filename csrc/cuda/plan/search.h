// The plans of a problem, and the choice among them.
//
// A kernel reads its large matrix once whatever the plan is.  The plan decides the rest: every block that
// needs a factor reads it again, mostly from L2; partial sums are written and read; the last block adds them
// alone, or all blocks that share them do, where they may wait for one another (in a cluster; on cards
// without clusters where the whole grid runs at once).  With s blocks along one side and t along the other,
// one of the two grows with s and the other with t, and s t blocks have to fill the GPU.
#pragma once
#include <algorithm>

#include "cost.h"

namespace lotr::plan {

inline double unevenness(int64_t tiles, int64_t blocks) {
  return double(ceil_div(tiles, blocks)) * double(blocks) / double(tiles);
}

// f(owners, splits) for the ways to cut a matrix of owned x split tiles.  A block owns up to `subs` tiles
// along one side; along the other the tiles are split.
template <class F>
void each_split(const Machine& machine, int64_t owned, int64_t split, int subs, F f) {
  std::vector<int64_t> tried;
  for (int sub = 1; sub <= subs; ++sub) {
    const int64_t owners = ceil_div(owned, sub);
    if (sub > 1 && owners == ceil_div(owned, sub - 1)) continue;
    tried.clear();
    const auto attempt = [&](int64_t splits) {
      splits = std::clamp<int64_t>(splits, 1, split);
      // the fewest splits with this longest piece, then the next count that makes it shorter
      for (const int64_t even : {ceil_div(split, ceil_div(split, splits)), ceil_div(split, split / splits)}) {
        if (even > 1 && owners * even > machine.slots()) continue;
        if (std::find(tried.begin(), tried.end(), even) != tried.end()) continue;
        tried.push_back(even);
        f(owners, even);
      }
    };
    attempt(1);
    for (int64_t power = 2; owners * power <= machine.slots(); power *= 2) attempt(power);
    // blocks on nine tenths of the multiprocessors, one on each, as many as run at a time
    attempt(ceil_div(ceil_div(int64_t(machine.card.multiprocessors) * 9, 10), owners));
    attempt(machine.card.multiprocessors / owners);
    attempt(machine.slots() / owners);
  }
}

// Adds the plan with the time of `work`.
inline void add(Plans& plans, const Machine& machine, Plan plan, const Work& work) {
  plan.extra_bytes = work.factors + work.partials;
  plan.at_once = plan.m_blocks * plan.n_blocks <= machine.slots();
  plan.microseconds =
      microseconds(machine, work, plan.m_blocks * plan.n_blocks,
                   unevenness(plan.m_tiles, plan.m_blocks) * unevenness(plan.n_tiles, plan.n_blocks));
  plans.push_back(plan);
}

// Sorts the plans: the chosen one first, then the fastest first.  Plans of fewer than `fill` blocks come last
// if another plan has as many and runs them at once: few multiprocessors do not use the full memory
// bandwidth, which the roofline ignores.  This does not apply to the wgmma kernels, which keep enough bytes
// in flight.  Of plans within 3 % of the fastest (less than the estimate's error), one with at least 10 %
// more blocks is chosen, if they run at the same time.
inline void sort(Plans& plans, const Machine& machine, int64_t fill) {
  const auto blocks = [](const Plan& plan) { return plan.m_blocks * plan.n_blocks; };
  const bool filled = std::any_of(plans.begin(), plans.end(),
                                  [&](const Plan& plan) { return plan.at_once && blocks(plan) >= fill; });
  const auto few = [&](const Plan& plan) { return filled && !plan.wgmma && blocks(plan) < fill; };
  std::stable_sort(plans.begin(), plans.end(), [&](const Plan& a, const Plan& b) {
    return std::pair(few(a), a.microseconds) < std::pair(few(b), b.microseconds);
  });
  auto taken = plans.begin();
  for (auto plan = plans.begin(); plan != plans.end(); ++plan)
    if (few(*plan) == few(plans[0]) && plan->microseconds <= 1.03 * plans[0].microseconds &&
        10 * blocks(*plan) > 11 * blocks(*taken) && blocks(*plan) <= machine.card.multiprocessors)
      taken = plan;
  std::rotate(plans.begin(), taken, taken + 1);
}

}  // namespace lotr::plan
