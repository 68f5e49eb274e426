// D += x^T v: kernels/factor_grad.cuh, or by wgmma kernels/one_product_wgmma.cuh.
#pragma once
#include "one_product_wgmma.h"

namespace lotr::plan {

// wgmma: whether that kernel may run.
inline Plans factor_grad(int64_t M, int64_t K, int64_t r, int element, const Machine& on, bool wgmma) {
  const int R = padded_rank(r);
  Machine machine = on.with(kernels::blocks_of_one_product(R));
  machine.clusters &= kernels::factor_grad_in_cluster(R);
  Plans found;
  for (const int cols : {kernels::factor_grad_wide(R), kernels::factor_grad_narrow(R)}) {
    const int rows = kernels::factor_grad_rows(size_t(element), R, cols);
    const int64_t k_tiles = ceil_div(K, cols), m_tiles = ceil_div(M, rows);
    each_split(machine, k_tiles, m_tiles, kernels::factor_grad_subs(R, cols), [&](int64_t n, int64_t m) {
      Plan plan{rows, cols, m_tiles, k_tiles, m, n};
      plan.cluster = machine.cluster(m), plan.together = machine.together(n, m);
      const double one = m > 1 ? 4.0 * double(r) * double(K) : 0.0,
                   partial = plan.cluster ? 0.0 : one * double(m);
      Work work;
      work.large = double(M) * double(K) * element;
      work.factors = double(element) * double(r) * double(n) * double(M);
      work.partials = 2 * partial;
      work.rate = block_rate(R, 22.8, cols == 128 ? 11.4 : 9.7);
      if (plan.cluster) work.passed = one / double(n);
      (plan.together ? work.together : work.last) = plan.together ? partial : partial / double(n);
      add(found, machine, plan, work);
    });
    if (cols == kernels::factor_grad_narrow(R)) break;  // the two may be one
  }
  if (wgmma) add_one_product_wgmma(found, machine, K, M, r, true);
  return found;
}

}  // namespace lotr::plan
