// shrink_grad by wgmma (kernels/shrink_grad_wgmma.cuh): when it runs, and how it is cut.
#pragma once
#include "sm90.h"

namespace lotr::plan {

// Clusters that run side by side.  A GPC holds 16 or 18 multiprocessors, some GPUs one of fewer; a cluster
// lies in one GPC.
inline int64_t clusters_held(int multiprocessors, int64_t cluster) {
  return cluster == 1 ? multiprocessors : multiprocessors / 18 * 16 / cluster;
}

// The cheapest of the strips' widths and the clusters' sizes; rows 0: the GPU holds none.  What blocks of a
// cluster sum costs no time in memory, but passes from one to another; several pieces of M have to be there
// at the same time.
inline Plan shrink_grad_wgmma(int64_t M, int64_t N, int64_t r, int multiprocessors) {
  constexpr int ROWS = kernels::SHRINK_GRAD_WGMMA_ROWS, COLS = kernels::SHRINK_GRAD_WGMMA_COLS;
  // bytes of g in a microsecond that one block gets through
  const double alone = r <= 16 ? 63e3 : r <= 32 ? 60e3 : 52e3;
  const int64_t m_tiles = ceil_div(M, ROWS), n_tiles = ceil_div(N, COLS);
  const double large = 2.0 * double(M) * double(N), rank = double(r);
  Plan best;
  const auto attempt = [&](int64_t n, int64_t m, int64_t cluster) {
    const int64_t held = clusters_held(multiprocessors, cluster) * cluster;
    const double clusters = double(n / cluster), blocks = double(n * m);
    const double extra = 2 * rank * double(n * M + m * N) +
                         8 * rank * (clusters > 1 ? clusters : 0.0) * double(M) + 8 * rank * double(m * N);
    const double uneven = unevenness(m_tiles, m) * unevenness(n_tiles, n);
    const double memory = (large + EXTRA * extra) / (MEMORY * multiprocessors);
    const double own = double(ceil_div(n * m, held)) * large * uneven / blocks / alone;
    const double passed = cluster > 1 ? 4 * rank * double(M) / double(m) / PASSING : 0.0;
    // after it each block stores its sums of Q, and adds as many
    const double rate = std::min(SUMMING, ALL_SUMMING * multiprocessors / blocks);
    const double summed = 2 * 4 * rank * double(N) / double(n) / rate;
    const double cost = overlapped(memory, own, passed) + 1.5 * ARRIVING + summed;
    best.better_of({ROWS, COLS, m_tiles, n_tiles, m, n, extra, cost, false, false, m > 1, int(cluster)});
  };
  for (int64_t sub = 1; sub <= kernels::SHRINK_GRAD_WGMMA_SUBS; ++sub)
    for (int64_t cluster = 1; cluster <= MOST_OF_CLUSTER; cluster *= 2) {
      const int64_t n = ceil_div(n_tiles, sub), held = clusters_held(multiprocessors, cluster) * cluster;
      if (n % cluster || held == 0) continue;
      const int64_t most = std::clamp<int64_t>(held / n, 1, m_tiles);
      attempt(n, most, cluster);
      if (most > 1)
        attempt(n, ceil_div(m_tiles, ceil_div(m_tiles, most)), cluster);  // no longer for being fewer
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
  plan::Plan wgmma = plan::shrink_grad_wgmma(p.M, p.N, p.r, call.multiprocessors);
  wgmma.together &= !call.off.together;
  return wgmma.rows && wgmma.cost < plan::shrink_grad(p.M, p.N, p.r, 2, machine_of(call)).cost ? wgmma
                                                                                               : plan::Plan{};
}

size_t shrink_grad_wgmma_workspace(const plan::Plan& plan, int64_t r);
void shrink_grad_wgmma(const Call& call, ShrinkGradParams p, const plan::Plan& plan, void* workspace);

}  // namespace lotr::cuda
