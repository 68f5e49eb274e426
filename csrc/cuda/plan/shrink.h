// u = x A: kernels/shrink.cuh, or by wgmma kernels/one_product_wgmma.cuh.
#pragma once
#include "one_product_wgmma.h"

namespace lotr::plan {

// wgmma: whether that kernel may run.
inline Plans shrink(int64_t M, int64_t K, int64_t r, int element, const Machine& on, bool wgmma) {
  const int R = padded_rank(r);
  const Machine machine = on.with(kernels::blocks_of_one_product(R));
  Plans found;
  for (const int rows : {kernels::SHRINK_LOW, kernels::shrink_tall(R)}) {
    const int cols = kernels::shrink_cols(size_t(element), R, rows);
    const int64_t tiles = ceil_div(M, rows), steps = ceil_div(K, cols);
    const double filled = double(M) / double(tiles * rows);  // rows that are not there take as long
    // bytes of x a clock, by bench.static
    const double rate = rows == kernels::SHRINK_LOW ? block_rate(R, 21.7, 11.4) : block_rate(R, 18.8, 12.5);
    each_split(machine, tiles, steps, kernels::shrink_subs(R, rows), [&](int64_t owners, int64_t splits) {
      const double partial = splits > 1 ? 4.0 * double(M) * double(r) * double(splits) : 0.0;
      Work work;
      work.large = double(M) * double(K) * element;
      work.factors = double(owners) * double(K) * double(r) * element;
      work.partials = 2 * partial;
      work.rate = rate * filled;
      work.last = partial / double(owners);
      add(found, machine, {rows, cols, tiles, steps, owners, splits}, work);
    });
    if (rows == kernels::shrink_tall(R)) break;  // the two may be one
  }
  if (wgmma) add_one_product_wgmma(found, machine, M, K, r, false);
  return found;
}

}  // namespace lotr::plan
