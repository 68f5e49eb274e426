// y += u F^T: kernels/expand_add.cuh.
#pragma once
#include "search.h"

namespace lotr::plan {

inline Plans expand_add(int64_t M, int64_t N, int64_t r, int element, const Machine& on) {
  const int R = padded_rank(r), rows = 16 * kernels::expand_threads(size_t(element), R) / 32,
            cols = 128 / element;
  const int64_t n_tiles = ceil_div(N, cols), m_tiles = ceil_div(M, rows);
  const Machine machine = on.with(2, kernels::shared_budget(kernels::blocks_together(R)));
  Plans found;
  each_split(machine, n_tiles, m_tiles, kernels::expand_subs(size_t(element), R), [&](int64_t n, int64_t m) {
    Work work;
    work.large = 2.0 * double(M) * double(N) * element;
    work.factors = double(element) * double(r) * (double(n) * double(M) + double(m) * double(N));
    work.rate = block_rate(R, 31.9, 20.5);
    add(found, machine, {rows, cols, m_tiles, n_tiles, m, n}, work);
  });
  return found;
}

}  // namespace lotr::plan
