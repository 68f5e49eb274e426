// shrink by wgmma (kernels/shrink_wgmma.cuh): when it runs, and how it is cut.
#pragma once
#include "launch.h"
#include "plan.h"
#include "sm90.h"

namespace lotr::plan {

// A block for each row tile, in whole clusters; nothing is chosen but whether it runs.
inline Plan shrink_wgmma(int64_t M, int64_t K, int64_t r, int multiprocessors) {
  constexpr int64_t ROWS = kernels::SHRINK_WGMMA_ROWS, COLS = kernels::SHRINK_WGMMA_COLS;
  // bytes of x in a microsecond that one multiprocessor gets through
  const double alone = r <= 32 ? 62e3 : r <= 64 ? 50e3 : 34e3;
  const int64_t cluster = kernels::shrink_wgmma_cluster(padded_rank(r)), tiles = ceil_div(M, ROWS),
                clusters = ceil_div(tiles, cluster), blocks = clusters * cluster;
  const double large = 2.0 * double(M) * double(K), extra = 2.0 * double(r) * double(K) * double(clusters);
  const double memory = (large + EXTRA * extra) / (MEMORY * multiprocessors);
  const double own = double(ceil_div(blocks, multiprocessors)) * 2.0 * double(ROWS) * double(K) / alone;
  const double stream = std::pow(std::pow(memory, 8) + std::pow(own, 8), 1 / 8.);
  return {ROWS, COLS, tiles, ceil_div(K, COLS), blocks, 1, extra, stream, false, false};
}

}  // namespace lotr::plan

namespace lotr::cuda {

// The plan where shrink runs by wgmma, of matrices that can be read 16 bytes at a time; rows 0: it does not,
// for the device, the type, the rank, fewer tokens than a row tile has, or what bulk copies cannot read; with
// dropout or a second product; or since shrink's own plan is the cheaper one, as it is for few tokens.
inline plan::Plan shrink_wgmma_plan(const Call& call, const ShrinkParams& p) {
  if (!wgmma_takes(call, p.r, kernels::SHRINK_WGMMA_RANK, p.M, kernels::SHRINK_WGMMA_ROWS) ||
      !bulk_copies_read(p.x, p.M, p.K) || !bulk_copies_read(p.A, p.K, p.r) || p.dropout.seed || p.core.data)
    return {};
  const plan::Plan wgmma = plan::shrink_wgmma(p.M, p.K, p.r, call.multiprocessors);
  const auto machine = plan::Machine::of(call.multiprocessors, call.shared, call.early);
  return wgmma.cost < plan::shrink(p.M, p.K, p.r, 2, machine).cost ? wgmma : plan::Plan{};
}

void shrink_wgmma(const Call& call, const ShrinkParams& p, const plan::Plan& plan);

}  // namespace lotr::cuda
