// The one plan of shrink and factor_grad by wgmma: a block for each tile of 64 rows of the output, in whole
// clusters, each with the whole sum.
#pragma once
#include "search.h"

namespace lotr::plan {

// The output is [made, r], the sums are `length` long; down: factor_grad, where they run along M.
inline void add_one_product_wgmma(Plans& plans, Machine machine, int64_t made, int64_t length, int64_t r,
                                  bool down) {
  constexpr int ROWS = kernels::ONE_PRODUCT_WGMMA_ROWS;
  const int64_t cluster = kernels::one_product_wgmma_cluster(padded_rank(r)), tiles = ceil_div(made, ROWS),
                clusters = ceil_div(tiles, cluster), blocks = clusters * cluster,
                steps = ceil_div(length, ROWS);
  Plan plan{ROWS, ROWS, tiles, steps, blocks, 1};
  if (down) plan = {ROWS, ROWS, steps, tiles, 1, blocks};
  plan.wgmma = true;
  Work work;
  work.large = 2.0 * double(made) * double(length);
  work.factors = 2.0 * double(r) * double(length) * double(clusters);
  // bytes of x per clock, by bench.static
  work.rate = down ? (r <= 32 ? 41 : r <= 64 ? 34 : 22) : (r <= 32 ? 35 : r <= 64 ? 28.5 : 19.4);
  machine.blocks = 1;  // a second block of a multiprocessor adds nothing: bench.static
  add(plans, machine, plan, work);
}

}  // namespace lotr::plan
