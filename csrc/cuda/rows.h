// Launchers of kernels/row_core.cuh without torch, as launch.h is.  Operands may have any strides; the types
// are in the parameters.  There must be fewer than 2^31 rows, tokens and cores.
#pragma once
#include "kernels/row_core_params.h"
#include "launch.h"

namespace lotr::cuda {

void row_core(const Call& call, const RowCoreParams& p);
void row_ends(const Call& call, const RowEndsParams& p);
// rows: of u's gradient
size_t row_core_grad_workspace(const Call& call, const RowCoreGradParams& p, int64_t rows);
void row_core_grad(const Call& call, const RowCoreGradParams& p, int64_t rows, void* workspace);
void sum_rows(const Call& call, const SumRowsParams& p);

}  // namespace lotr::cuda
