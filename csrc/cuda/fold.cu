// Implements fold and its gradients of launch.h.
#include "kernels/fold.cuh"

#include "launchers.h"
#include "plans.h"

namespace lotr::cuda {

using kernels::SmallTraits;

// The code of `fold` stands for all kernels: they are compiled for the same architectures.
bool waits_in_kernels() {
  return ptx::capability_of_code(reinterpret_cast<const void*>(&kernels::fold)) >= 90;
}

void run(const Call& call, const FoldProblem& p, Workspace& memory) {
  check_rank("fold", "core", p.r_in);
  check_rank("fold", "B", p.r_out);
  if (memory.is_measuring()) return;
  const dim3 grid(unsigned(plan::ceil_div(p.N, kernels::SMALL_ROWS)),
                  unsigned(plan::ceil_div(p.r_in, kernels::SMALL_COLS)));
  launch<SmallTraits, kernels::fold>(call, grid, p, "fold");
}

void run(const Call& call, const FoldGradProblem& problem, Workspace& memory) {
  check_rank("fold_grad", "core", problem.r_in);
  check_rank("fold_grad", "B", problem.r_out);
  const Workspace::Scope scope(memory);
  const plan::Split plan = fold_grad_plan(call, problem.N, problem.r_in, problem.r_out);
  const int64_t dB_tiles = plan::ceil_div(problem.N, kernels::SMALL_ROWS) *
                           plan::ceil_div(problem.r_out, kernels::SMALL_COLS);
  const int64_t dB_blocks = problem.dB.data ? dB_tiles : 0;
  const int64_t core_blocks = problem.dcore ? plan.tiles * plan.splits : 0;
  auto p = params_of<FoldGradParams>(problem);
  p.n_per_split = plan::ceil_div(p.N, plan.splits);
  p.splits = int(plan.splits);
  p.dcore_row = p.r_out;
  const bool has_parts = core_blocks > 0 && plan.splits > 1;
  if (has_parts) {
    p.dcore_row = row_of_parts(p.r_out);
    p.dcore_part = p.r_in * p.dcore_row;
    p.dcore = memory.take<float>(plan.splits * p.dcore_part);
  }
  if (memory.is_measuring() || dB_blocks + core_blocks == 0) return;
  launch<SmallTraits, kernels::fold_grad>(call, dim3(unsigned(dB_blocks + core_blocks)), p,
                                          "fold_grad");
  if (has_parts) sum_cores(call, p.dcore, problem.dcore, p.r_in, p.r_out, p.splits);
}

}  // namespace lotr::cuda
