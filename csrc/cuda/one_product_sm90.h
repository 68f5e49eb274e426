// shrink and factor_grad by wgmma (kernels/one_product_wgmma.cuh): when they run, and how they are cut.
#pragma once
#include "sm90.h"

namespace lotr::plan {

// A block for each tile of 64 rows that are `made` [made, r], of sums that are `length` long, in whole
// clusters; nothing is chosen but whether it runs.
inline Plan one_product_wgmma(int64_t made, int64_t length, int64_t r, int multiprocessors, bool down) {
  constexpr int64_t ROWS = kernels::ONE_PRODUCT_WGMMA_ROWS;
  // bytes of x in a microsecond that one multiprocessor gets through
  const double alone = down ? (r <= 32   ? 72e3
                               : r <= 64 ? 60e3
                                         : 39e3)
                            : (r <= 32   ? 62e3
                               : r <= 64 ? 50e3
                                         : 34e3);
  const int64_t cluster = kernels::one_product_wgmma_cluster(padded_rank(r)), tiles = ceil_div(made, ROWS),
                clusters = ceil_div(tiles, cluster), blocks = clusters * cluster;
  const double large = 2.0 * double(made) * double(length),
               extra = 2.0 * double(r) * double(length) * double(clusters);
  const double memory = (large + extra_of_one_product(padded_rank(r)) * extra) / (MEMORY * multiprocessors);
  const double own = double(ceil_div(blocks, multiprocessors)) * 2.0 * double(ROWS) * double(length) / alone;
  return {ROWS, ROWS, tiles, ceil_div(length, ROWS), blocks, 1, extra, overlapped(memory, own), false, false};
}

}  // namespace lotr::plan

namespace lotr::cuda {

// The plan where a kernel runs by wgmma, of matrices that can be read 16 bytes at a time; rows 0: it does
// not, for the device, the type, the rank, fewer tokens than a tile has rows, what bulk copies cannot read,
// or dropout; or since the other kernel's plan is the cheaper one, as it is where there are too few tiles.
// factor: A or v; down: as in kernels/traits.h.
template <class Params, class Other>
plan::Plan one_product_plan(const Call& call, const Params& p, const Matrix& factor, bool down, Other other) {
  const int64_t made = down ? p.K : p.M, length = down ? p.M : p.K;
  if (!wgmma_takes(call, p.r, kernels::ONE_PRODUCT_WGMMA_RANK, p.M, kernels::ONE_PRODUCT_WGMMA_ROWS) ||
      !bulk_copies_read(p.x, p.M, p.K) || !bulk_copies_read(factor, length, p.r) || p.dropout.seed)
    return {};
  const plan::Plan wgmma = plan::one_product_wgmma(made, length, p.r, call.multiprocessors, down);
  return wgmma.cost < other(p.M, p.K, p.r, 2, machine_of(call)).cost ? wgmma : plan::Plan{};
}
// Not with a second product.
inline plan::Plan shrink_wgmma_plan(const Call& call, const ShrinkParams& p) {
  return p.core.data ? plan::Plan{} : one_product_plan(call, p, p.A, false, plan::shrink);
}
inline plan::Plan factor_grad_wgmma_plan(const Call& call, const FactorGradParams& p) {
  return one_product_plan(call, p, p.v, true, plan::factor_grad);
}

void shrink_wgmma(const Call& call, const ShrinkParams& p, const plan::Plan& plan);
void factor_grad_wgmma(const Call& call, const FactorGradParams& p, const plan::Plan& plan);

}  // namespace lotr::cuda
