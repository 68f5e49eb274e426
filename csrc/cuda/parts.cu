// The launches around a product: copies of its inputs, sums over the blocks that share an output.
#include "dispatch.h"
#include "kernels/pack.cuh"
#include "kernels/sum_parts.cuh"
#include "launchers.h"

namespace lotr::cuda {

void run(const Call& call, const PackProblem& p, Workspace& memory) {
  if (memory.counts() || p.rows == 0) return;
  dispatch_type(call.type, [&](auto element) {
    using Traits = kernels::PackTraits<decltype(element)>;
    const int64_t tiles =
        plan::ceil_div(p.rows, Traits::ROWS) * plan::ceil_div(p.to_row, Traits::COLS);
    launch<Traits, kernels::pack<Traits>>(call, dim3(unsigned(tiles)), p, "pack");
  });
}

void sum_parts(const Call& call, DType type, const SumTwoParams& p) {
  using Traits = kernels::SumPartsTraits;
  const auto strips = [](const SumPartsParams& one) {
    return plan::ceil_div(one.rows, Traits::ROWS);
  };
  const dim3 grid(unsigned(strips(p.first) + strips(p.second)));
  dispatch_type(type, [&](auto element) {
    launch<Traits, kernels::sum_parts<decltype(element)>>(
        call, grid, p, "sum_parts", p.core.core.data ? sizeof(Traits::Smem) : 0);
  });
}

}  // namespace lotr::cuda
