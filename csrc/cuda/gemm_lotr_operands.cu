// Launches kernels/gemm_lotr_operands.cuh.
#include "gemm_lotr.h"
#include "kernels/gemm_lotr_operands.cuh"

namespace lotr::cuda {

void gemm_lotr_operands(const Call& call, const GemmLotrOperands& p) {
  const int64_t rows = kernels::FOLD_ROWS, cols = kernels::FOLD_COLS;
  const int64_t tiles = (p.N + rows - 1) / rows + (p.K + rows - 1) / rows, ranks = (p.r_in + cols - 1) / cols;
  if (!tiles || !ranks) return;
  ptx::launch({dim3(unsigned(tiles), unsigned(ranks)), dim3(kernels::FoldTraits::THREADS),
               sizeof(kernels::FoldTraits::Smem), static_cast<ptx::stream_t>(call.stream), dim3(1, 1, 1),
               "gemm_lotr_operands"},
              kernels::gemm_lotr_operands, p);
}

}  // namespace lotr::cuda
