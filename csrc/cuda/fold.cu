// csrc/cuda/launch.h: fold and its gradients, in one launch each (fold in more above 65,535 layers).
#include "kernels/fold.cuh"

#include <algorithm>

#include "launchers.h"
#include "plans.h"

namespace lotr::cuda {

using kernels::FoldTraits;

void run(const Call& call, const FoldProblem& p, Workspace& memory) {
  check_rank("fold", "cores", p.r_in);
  check_rank("fold", "B", p.r_out);
  if (memory.counts()) return;
  constexpr int64_t MOST_LAYERS = 65535;  // of a grid in z
  for (int64_t first = 0; first < p.L; first += MOST_LAYERS) {
    FoldProblem some = p;
    some.L = int32_t(std::min(MOST_LAYERS, p.L - first));
    some.cores.data =
        static_cast<const char*>(p.cores.data) + first * p.core_stride * element_size(p.core_type);
    some.F = static_cast<char*>(p.F) + first * p.F_layer * element_size(p.F_type);
    const dim3 grid(unsigned(plan::ceil_div(p.N, kernels::FOLD_ROWS)),
                    unsigned(plan::ceil_div(p.r_in, kernels::FOLD_COLS)), unsigned(some.L));
    launch<FoldTraits, kernels::fold>(call, grid, some, "fold");
  }
}

void run(const Call& call, const FoldGradProblem& problem, Workspace& memory) {
  check_rank("fold_grad", "cores", problem.r_in);
  check_rank("fold_grad", "B", problem.r_out);
  if (problem.L == 0) return;
  const Workspace::Scope scope(memory);
  const plan::Split plan = fold_grad_plan(call, problem.N, problem.L, problem.r_in, problem.r_out);
  auto p = params_of<FoldGradParams>(problem);
  p.n_per_split = plan::ceil_div(p.N, plan.splits), p.splits = int(plan.splits);
  p.dcores_row = p.r_out;
  const int64_t rows = int64_t(p.L) * p.r_in;
  if (plan.splits > 1) {
    p.dcores_row = row_of_parts(p.r_out), p.dcores_part = rows * p.dcores_row;
    p.dcores = memory.take<float>(plan.splits * p.dcores_part);
  }
  if (memory.counts()) return;
  const int64_t dB_blocks =
      p.dB ? plan::ceil_div(p.N, kernels::FOLD_ROWS) * plan::ceil_div(p.r_out, kernels::FOLD_COLS) : 0;
  launch<FoldTraits, kernels::fold_grad>(call, dim3(unsigned(dB_blocks + plan.tiles * plan.splits)), p,
                                         "fold_grad");
  if (plan.splits > 1) sum_cores(call, p.dcores, problem.dcores, rows, p.r_out, p.splits);
}

}  // namespace lotr::cuda
