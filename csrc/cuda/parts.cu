// Implements the launches around a product: copies of its inputs, sums over the blocks that share
// an output.
#include "dispatch.h"
#include "kernels/pack.cuh"
#include "kernels/sum_parts.cuh"
#include "launchers.h"

namespace lotr::cuda {

void run(const Call& call, const PackProblem& p, Workspace& memory) {
  if (memory.is_measuring() || p.rows == 0) return;
  dispatch_type(call.type, [&](auto element) {
    using Traits = kernels::PackTraits<decltype(element)>;
    const int64_t tiles =
        plan::ceil_div(p.rows, Traits::ROWS) * plan::ceil_div(p.cols, Traits::COLS);
    launch<Traits, kernels::pack<Traits>>(call, dim3(unsigned(tiles)), p, "pack");
  });
}

void sum_parts(const Call& call, DType type, const SumTwoParams& p) {
  using Traits = kernels::SumPartsTraits;
  const int64_t strips =
      plan::ceil_div(p.first.rows, Traits::ROWS) + plan::ceil_div(p.second.rows, Traits::ROWS);
  const size_t shared = p.core_product.core.data ? sizeof(Traits::Smem) : 0;
  dispatch_type(type, [&](auto element) {
    launch<Traits, kernels::sum_parts<decltype(element)>>(call, dim3(unsigned(strips)), p,
                                                          "sum_parts", shared);
  });
}

void sum_cores(const Call& call, const float* parts, float* dcores, int64_t rows, int32_t cols,
               int32_t splits) {
  SumTwoParams sums{};
  sums.first.parts = parts;
  sums.first.parts_row = row_of_parts(cols);
  sums.first.out = {dcores, cols, 1, Access::element};
  sums.first.out_type = DType::float32;
  sums.first.rows = rows;
  sums.first.cols = cols;
  sums.first.splits = splits;
  sums.first.scale = 1.f;
  sum_parts(call, DType::float32, sums);
}

}  // namespace lotr::cuda
