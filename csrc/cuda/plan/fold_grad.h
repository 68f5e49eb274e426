// dB += s sum_l Q_l G_l and dG_l = s Q_l^T B: kernels/fold.cuh.
#pragma once
#include "machine.h"

namespace lotr::plan {

struct FoldGrad {
  int64_t dB_blocks = 0, core_tiles = 0, n_per_split = 0;
  int splits = 0;
};

// The core's gradient is small and its sum long: split N until its tiles fill nine tenths of the GPU, but not
// below 256 rows per block.
inline FoldGrad fold_grad(int64_t N, int64_t L, int64_t r_in, int64_t r_out, bool dB, int multiprocessors) {
  const int64_t out = ceil_div(r_out, kernels::FOLD_COLS);
  FoldGrad plan;
  plan.dB_blocks = dB ? ceil_div(N, kernels::FOLD_ROWS) * out : 0;
  plan.core_tiles = L * ceil_div(r_in, kernels::FOLD_ROWS) * out;
  const int64_t steps = ceil_div(N, 32), enough = ceil_div(int64_t(multiprocessors) * 9, 10),
                wanted = ceil_div(enough, plan.core_tiles);
  plan.n_per_split = std::max<int64_t>(8, std::max<int64_t>(1, steps / wanted)) * 32;
  plan.splits = int(ceil_div(N, plan.n_per_split));
  return plan;
}

}  // namespace lotr::plan
