// Launchers of kernels/row_core.cuh without torch, as launch.h is.  Operands may have any strides; the types
// are in the parameters.  There must be fewer than 2^31 rows, tokens and cores.
#pragma once
#include "kernels/row_core_params.h"
#include "launch.h"
#include "plan/row_core.h"

namespace lotr::cuda {

void row_core(const Call& call, const RowCoreParams& p);
void row_ends(const Call& call, const RowEndsParams& p);
using PreparedRowCoreGrad = PreparedOne<plan::RowCoreGrad>;
// rows: of u's gradient
PreparedRowCoreGrad prepare_row_core_grad(const Call& call, const RowCoreGradParams& p, int64_t rows);
void row_core_grad(const Call& call, const RowCoreGradParams& p, const PreparedRowCoreGrad& prepared,
                   void* workspace);
void sum_rows(const Call& call, const SumRowsParams& p);

}  // namespace lotr::cuda
