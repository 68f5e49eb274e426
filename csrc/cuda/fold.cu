// csrc/cuda/launch.h: fold and its gradients, in one launch each (fold in more above 65,535 layers).
#include "kernels/fold.cuh"

#include <algorithm>

#include "launchers.h"
#include "plans.h"

namespace lotr::cuda {

Prepared prepare(const Call&, const FoldProblem& p) {
  check_rank("fold", "cores", p.r_in);
  check_rank("fold", "B", p.r_out);
  if ((p.Ft.data || p.At.data) && p.L != 1)
    throw std::invalid_argument("fold: cores: expected one where transposes are made, got " +
                                std::to_string(p.L));
  return {};
}

namespace {

// Up to MOST_LAYERS layers.
constexpr int64_t MOST_LAYERS = 65535;  // of a grid in z
void launch(const Call& call, const FoldProblem& p) {
  const int64_t row_tiles = plan::ceil_div(p.N, kernels::FOLD_ROWS) + plan::ceil_div(p.K, kernels::FOLD_ROWS);
  const dim3 grid(unsigned(row_tiles), unsigned(plan::ceil_div(p.r_in, kernels::FOLD_COLS)), unsigned(p.L));
  ptx::launch({grid, dim3(kernels::FoldTraits::THREADS), sizeof(kernels::FoldTraits::Smem),
               static_cast<ptx::stream_t>(call.stream), dim3(1, 1, 1), "fold", call.begins_early()},
              kernels::fold, p);
}

}  // namespace

void run(const Call& call, const FoldProblem& p, const Prepared&, void*) {
  for (int64_t first = 0; first < p.L; first += MOST_LAYERS) {
    FoldProblem some = p;
    some.L = int32_t(std::min(MOST_LAYERS, p.L - first));
    some.cores.data =
        static_cast<const char*>(p.cores.data) + first * p.core_stride * element_size(p.core_type);
    some.F = static_cast<char*>(p.F) + first * p.F_layer * element_size(p.F_type);
    launch(call, some);
  }
}

PreparedFoldGrad prepare(const Call& call, const FoldGradProblem& p) {
  check_rank("fold_grad", "cores", p.r_in);
  check_rank("fold_grad", "B", p.r_out);
  PreparedFoldGrad made;
  made.plan = fold_grad_plan(call, p.L, p.N, p.r_in, p.r_out, p.dB);
  made.workspace =
      reduction_bytes(made.plan.core_tiles, made.plan.splits, kernels::FOLD_ROWS * kernels::FOLD_COLS);
  return made;
}

void run(const Call& call, const FoldGradProblem& problem, const PreparedFoldGrad& prepared,
         void* workspace) {
  if (problem.L == 0) return;
  const plan::FoldGrad& plan = prepared.plan;
  auto p = params_of<FoldGradParams>(problem);
  p.n_per_split = plan.n_per_split, p.splits = plan.splits;
  if (plan.splits > 1) p.sum = Workspace(call, workspace, plan.core_tiles).take(plan.core_tiles, 0);
  ptx::launch({dim3(unsigned(plan.dB_blocks + plan.core_tiles * plan.splits)),
               dim3(kernels::FoldTraits::THREADS), sizeof(kernels::FoldTraits::Smem),
               static_cast<ptx::stream_t>(call.stream), dim3(1, 1, 1), "fold_grad", call.begins_early()},
              kernels::fold_grad, p);
}

}  // namespace lotr::cuda
