// k = g F and Q = g^T u: kernels/shrink_grad.cuh, or by wgmma kernels/shrink_grad_wgmma.cuh.
#pragma once
#include "search.h"

namespace lotr::plan {

// Clusters that run side by side.  A GPC holds 16 or 18 multiprocessors, some GPUs one of fewer; a cluster
// lies in one GPC.
inline int64_t clusters_held(int multiprocessors, int64_t cluster) {
  return cluster == 1 ? multiprocessors : multiprocessors / 18 * 16 / cluster;
}

// Sums within a cluster pass from block to block and cause no memory traffic.  Several pieces of M must run
// at the same time.
inline void add_shrink_grad_wgmma(Plans& found, const Machine& machine, int64_t M, int64_t N, int64_t r) {
  constexpr int ROWS = kernels::SHRINK_GRAD_WGMMA_ROWS, COLS = kernels::SHRINK_GRAD_WGMMA_COLS;
  const double rate = r <= 16 ? 36 : r <= 32 ? 34 : 29.6;  // bytes of g a clock, by bench.static
  const int64_t m_tiles = ceil_div(M, ROWS), n_tiles = ceil_div(N, COLS);
  const double rank = double(r);
  const auto attempt = [&](int64_t n, int64_t m, int64_t cluster, int64_t held) {
    const double clusters = double(n / cluster);
    Plan plan{ROWS, COLS, m_tiles, n_tiles, m, n};
    plan.wgmma = true, plan.of_row = int(cluster), plan.together = m > 1 && machine.cooperative;
    Work work;
    work.large = 2.0 * double(M) * double(N);
    // k of several clusters and Q of several pieces of M go through memory
    work.factors = 2 * rank * double(n * M + m * N);
    work.partials = 8 * rank * (clusters > 1 ? clusters : 0.0) * double(M) + 8 * rank * double(m * N);
    work.rate = rate;
    // each block stores its sums of Q, and adds as many
    work.together = 2 * 4 * rank * double(N) * double(m);
    if (cluster > 1) work.meanwhile = 4 * rank * double(M) / double(m);
    Machine holds = machine;
    holds.card.multiprocessors = int(held);
    holds.card.memory *= float(machine.card.multiprocessors) / float(held);
    add(found, holds, plan, work);
  };
  for (int64_t sub = 1; sub <= kernels::SHRINK_GRAD_WGMMA_SUBS; ++sub)
    for (int64_t cluster = 1; cluster <= MOST_OF_CLUSTER; cluster *= 2) {
      const int64_t n = ceil_div(n_tiles, sub),
                    held = clusters_held(machine.card.multiprocessors, cluster) * cluster;
      if (n % cluster || held == 0) continue;
      const int64_t most = std::clamp<int64_t>(held / n, 1, m_tiles);
      attempt(n, most, cluster, held);
      const int64_t even = ceil_div(m_tiles, ceil_div(m_tiles, most));
      if (even != most) attempt(n, even, cluster, held);
    }
}

// wgmma: whether that kernel may run.
inline Plans shrink_grad(int64_t M, int64_t N, int64_t r, int element, const Machine& on, bool wgmma) {
  const int R = padded_rank(r), rows = kernels::SHRINK_GRAD_ROWS,
            cols = kernels::shrink_grad_cols(size_t(element));
  const int64_t n_tiles = ceil_div(N, cols), m_tiles = ceil_div(M, rows);
  Machine machine = on.with(1);
  machine.clusters &= kernels::shrink_grad_in_cluster(R);
  Plans found;
  each_split(machine, n_tiles, m_tiles, kernels::shrink_grad_subs(size_t(element), R),
             [&](int64_t n, int64_t m) {
               Plan plan{rows, cols, m_tiles, n_tiles, m, n};
               plan.cluster = machine.cluster(m), plan.together = machine.together(n, m);
               const double rank = double(r), one = 4.0 * rank * double(N),
                            sent = m > 1 && !plan.cluster ? double(m) : 0.0;
               // what is left to sum at the end: the last row tile of k, the last column tile of Q
               const double k_last = 4.0 * rank * double(std::min<int64_t>(rows, M)) * double(n);
               const double Q_last = 4.0 * rank * double(std::min<int64_t>(cols, N)) * sent;
               Work work;
               work.large = double(M) * double(N) * element;
               work.factors = double(element) * rank * double(n * M + m * N);
               work.partials = 8.0 * rank * double(n * M) + 2 * one * sent;
               work.rate = block_rate(R, 19.4, 8.5);
               if (plan.cluster) work.passed = one / double(n);
               if (plan.together)
                 work.together = Q_last * double(n) + k_last * double(m);
               else
                 work.last = Q_last + k_last;
               add(found, machine, plan, work);
             });
  if (wgmma) add_shrink_grad_wgmma(found, machine, M, N, r);
  return found;
}

}  // namespace lotr::plan
