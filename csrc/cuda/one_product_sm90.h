// shrink and factor_grad by wgmma (kernels/one_product_wgmma.cuh): when they can run.
#pragma once
#include "sm90.h"

namespace lotr::cuda {

// Whether the wgmma kernel can run, given matrices that can be read 16 bytes at a time: checks the device,
// the type, the rank, that there are at least a tile's rows of tokens, that bulk copies can read the
// matrices, and that there is no dropout.  factor: A or v [length, r].
template <class Problem>
bool one_product_wgmma_takes(const Call& call, const Problem& p, const Matrix& factor, int64_t length) {
  return wgmma_takes(call, p.r, kernels::ONE_PRODUCT_WGMMA_RANK, p.M, kernels::ONE_PRODUCT_WGMMA_ROWS) &&
         bulk_copies_read(p.x, p.M, p.K) && bulk_copies_read(factor, length, p.r) && !p.dropout.seed;
}

void shrink_wgmma(const Call& call, const ShrinkProblem& p, const plan::Plan& plan);
void factor_grad_wgmma(const Call& call, const FactorGradProblem& p, const plan::Plan& plan);

}  // namespace lotr::cuda
