// shrink_grad by wgmma (kernels/shrink_grad_wgmma.cuh): when it can run.
#pragma once
#include "sm90.h"

namespace lotr::cuda {

// Whether the wgmma kernel can run, given matrices that can be read 16 bytes at a time: checks the device,
// the type, the rank, that there are at least a row tile's tokens, and that bulk copies can read the
// matrices.
inline bool shrink_grad_wgmma_takes(const Call& call, const ShrinkGradProblem& p) {
  return wgmma_takes(call, p.r, kernels::SHRINK_GRAD_WGMMA_RANK, p.M, kernels::SHRINK_GRAD_WGMMA_ROWS) &&
         bulk_copies_read(p.g, p.M, p.N) && bulk_copies_read(p.F, p.N, p.r) &&
         bulk_copies_read(p.u, p.M, p.r);
}

size_t shrink_grad_wgmma_workspace(const plan::Plan& plan, int64_t r);
void shrink_grad_wgmma(const Call& call, const ShrinkGradProblem& problem, const plan::Plan& plan,
                       void* workspace);

}  // namespace lotr::cuda
