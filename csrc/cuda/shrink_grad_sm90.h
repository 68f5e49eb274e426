// shrink_grad by wgmma (kernels/shrink_grad_wgmma.cuh): when it runs, and how it is cut.
#pragma once
#include "launch.h"
#include "plan.h"
#include "sm90.h"

namespace lotr::plan {

// Clusters that run side by side.  A GPC holds 16 or 18 multiprocessors, some GPUs one of fewer; a cluster
// lies in one GPC.
inline int64_t clusters_held(int multiprocessors, int64_t cluster) {
  return cluster == 1 ? multiprocessors : multiprocessors / 18 * 16 / cluster;
}

// The cheapest of the clusters' sizes and the strips' widths; rows 0: the GPU holds none.
inline Plan shrink_grad_wgmma(int64_t M, int64_t N, int64_t r, int multiprocessors) {
  constexpr int ROWS = kernels::SHRINK_GRAD_WGMMA_ROWS, COLS = kernels::SHRINK_GRAD_WGMMA_COLS;
  // bytes of g in a microsecond that one block gets through
  const double alone = r <= 16 ? 63e3 : r <= 32 ? 60e3 : 52e3;
  const int64_t m_tiles = ceil_div(M, ROWS), n_tiles = ceil_div(N, COLS);
  Plan best;
  for (int64_t sub = 1; sub <= kernels::SHRINK_GRAD_WGMMA_SUBS; ++sub)
    for (int64_t m = 1; m <= MOST_OF_CLUSTER; m *= 2) {
      const int64_t n = ceil_div(n_tiles, sub), held = clusters_held(multiprocessors, m),
                    longest = ceil_div(m_tiles, m);
      if (m > m_tiles || held == 0 || 2 * longest > kernels::SHRINK_GRAD_MOST_TILES) continue;
      const double large = 2.0 * double(M) * double(N), rank = double(r);
      const double extra = (2 + 8) * rank * double(n * M + m * N);  // factors, and partial sums in and out
      const double uneven = unevenness(m_tiles, m) * unevenness(n_tiles, n);
      const double memory = (large + EXTRA * extra) / (MEMORY * multiprocessors);
      const double own = double(ceil_div(n, held)) * large * uneven / double(n * m) / alone;
      const double stream = std::pow(std::pow(memory, 8) + std::pow(own, 8), 1 / 8.);
      // after it: of k, the row tiles that a block is the last to reach; of Q, its share of all blocks' sums
      const double summed =
          4 * rank * (double(ceil_div(longest, n) * std::min<int64_t>(ROWS, M) * n) + double(N) / double(n));
      best.better_of(
          {ROWS, COLS, m_tiles, n_tiles, m, n, extra, stream + ARRIVING + summed / SUMMING, false, false});
    }
  return best;
}

}  // namespace lotr::plan

namespace lotr::cuda {

// The plan where shrink_grad runs by wgmma, of matrices that can be read 16 bytes at a time; rows 0: it does
// not, for the device, the type, the rank, fewer tokens than a row tile has, or what bulk copies cannot read;
// or since shrink_grad's own plan is the cheaper one.
inline plan::Plan shrink_grad_wgmma_plan(const Call& call, const ShrinkGradParams& p) {
  if (!wgmma_takes(call, p.r, kernels::SHRINK_GRAD_WGMMA_RANK, p.M, kernels::SHRINK_GRAD_WGMMA_ROWS) ||
      !bulk_copies_read(p.g, p.M, p.N) || !bulk_copies_read(p.F, p.N, p.r) ||
      !bulk_copies_read(p.u, p.M, p.r))
    return {};
  const plan::Plan wgmma = plan::shrink_grad_wgmma(p.M, p.N, p.r, call.multiprocessors);
  const auto machine = plan::Machine::of(call.multiprocessors, call.shared, call.early);
  return wgmma.rows && wgmma.cost < plan::shrink_grad(p.M, p.N, p.r, 2, machine).cost ? wgmma : plan::Plan{};
}

size_t shrink_grad_wgmma_workspace(const plan::Plan& plan, int64_t r);
void shrink_grad_wgmma(const Call& call, ShrinkGradParams p, const plan::Plan& plan, void* workspace);

}  // namespace lotr::cuda
