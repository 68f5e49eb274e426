// Implements the per-row cores of launch.h.
#include <cstdlib>

#include "kernels/row_core.cuh"
#include "launchers.h"
#include "plans.h"

namespace lotr::cuda {
namespace {

using kernels::Order;
using kernels::SmallTraits;

// Blocks for one thread per element.
dim3 blocks_of(int64_t elements) {
  return dim3(unsigned(plan::ceil_div(elements, SmallTraits::THREADS)));
}

}  // namespace

void run(const Call& call, const RowCoreProblem& problem, Workspace& memory) {
  if (problem.index.rows == 0 || memory.is_measuring()) return;
  auto p = params_of<RowCoreParams>(problem);
  p.rows_of_block = plan::rows_of_block(call.card, p.index.rows, p.r_out);
  // In a core as it is stored, neighbors in memory are neighbors along r_out. The backward pass
  // exchanges the strides, which makes them neighbors along the sum.
  const bool along_k = std::abs(p.cores.row) < std::abs(p.cores.col);
  const dim3 grid(unsigned(plan::ceil_div(p.index.rows, p.rows_of_block)),
                  unsigned(plan::ceil_div(p.r_out, kernels::SMALL_COLS)));
  constexpr size_t shared = sizeof(kernels::RowCoreTraits::Smem);
  if (along_k)
    launch<SmallTraits, kernels::row_core<Order::along_k>>(call, grid, p, "row_core", shared);
  else
    launch<SmallTraits, kernels::row_core<Order::across_k>>(call, grid, p, "row_core", shared);
}

void run(const Call& call, const RowEndsProblem& p, Workspace& memory) {
  if (!memory.is_measuring())
    launch<SmallTraits, kernels::row_ends>(call, blocks_of(p.bound + 1), p, "row_ends", 0);
}

void run(const Call& call, const RowCoreGradProblem& problem, Workspace& memory) {
  const Workspace::Scope scope(memory);
  const plan::Split plan =
      row_core_grad_plan(call, problem.rows, problem.cores, problem.r_in, problem.r_out);
  auto p = params_of<RowCoreGradParams>(problem);
  p.splits = int(plan.splits);
  p.dcores_row = p.r_out;
  const int64_t rows = p.cores * p.r_in;
  if (plan.splits > 1) {
    p.dcores_row = row_of_parts(p.r_out);
    p.dcores_part = rows * p.dcores_row;
    p.dcores = memory.take<float>(plan.splits * p.dcores_part);
  }
  if (memory.is_measuring()) return;
  launch<SmallTraits, kernels::row_core_grad>(call, dim3(unsigned(plan.tiles * plan.splits)), p,
                                              "row_core_grad");
  if (plan.splits > 1) sum_cores(call, p.dcores, problem.dcores, rows, p.r_out, p.splits);
}

void run(const Call& call, const SumRowsProblem& p, Workspace& memory) {
  if (p.tokens == 0 || memory.is_measuring()) return;
  launch<SmallTraits, kernels::sum_rows>(call, blocks_of(p.tokens * p.r), p, "sum_rows", 0);
}

}  // namespace lotr::cuda
