// The gradients of a scale of y's columns: kernels/scale_backward.cuh.
#pragma once
#include "machine.h"

namespace lotr::plan {

struct ScaleBackward {
  int64_t n_tiles = 0, m_tiles = 0, splits = 0;
};

// Tokens are split until there are four blocks per multiprocessor, but not below 256 tokens per block: then
// its rows still take several times as long as its sums.
inline ScaleBackward scale_backward(int64_t M, int64_t N, size_t element, int multiprocessors) {
  ScaleBackward plan;
  plan.n_tiles = ceil_div(N, kernels::scale_backward_cols(element));
  plan.m_tiles = ceil_div(M, kernels::SCALE_BACKWARD_ROWS);
  const int64_t wanted = ceil_div(4 * int64_t(multiprocessors), plan.n_tiles),
                sensible = std::max<int64_t>(1, plan.m_tiles * kernels::SCALE_BACKWARD_ROWS / 256);
  plan.splits = std::min(wanted, sensible);
  return plan;
}

}  // namespace lotr::plan
