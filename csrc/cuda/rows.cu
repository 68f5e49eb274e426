// csrc/cuda/rows.h: how its problems are cut into blocks, and their launches.
#include <cstdlib>

#include "kernels/row_core.cuh"
#include "launchers.h"
#include "plans.h"
#include "rows.h"

namespace lotr::cuda {
namespace {

using kernels::FoldTraits;
using kernels::Order;

template <class Params>
void launch(const Call& call, void (*kernel)(Params), dim3 grid, const Params& p, size_t shared,
            const char* name) {
  ptx::launch({grid, dim3(FoldTraits::THREADS), shared, static_cast<ptx::stream_t>(call.stream),
               dim3(1, 1, 1), name, call.begins_early()},
              kernel, p);
}

dim3 threads(int64_t count) {
  return dim3(unsigned(plan::ceil_div(count, FoldTraits::THREADS)));
}

}  // namespace

void row_core(const Call& call, const RowCoreParams& problem) {
  if (problem.index.rows == 0) return;
  RowCoreParams p = problem;
  const int64_t cols = plan::ceil_div(p.r_out, kernels::FOLD_COLS);
  p.rows_of_block = plan::rows_of_block(p.index.rows, cols, call.card.multiprocessors);
  // G^T has its neighbours in memory along the sum
  const bool along = std::abs(p.cores.row) < std::abs(p.cores.col);
  launch(call, along ? kernels::row_core<Order::along_k> : kernels::row_core<Order::across_k>,
         dim3(unsigned(plan::ceil_div(p.index.rows, p.rows_of_block)), unsigned(cols)), p,
         sizeof(kernels::RowCoreTraits::Smem), "row_core");
}

void row_ends(const Call& call, const RowEndsParams& p) {
  launch(call, kernels::row_ends, threads(p.bound + 1), p, 0, "row_ends");
}

PreparedRowCoreGrad prepare_row_core_grad(const Call& call, const RowCoreGradParams& p, int64_t rows) {
  PreparedRowCoreGrad made;
  made.plan = row_core_grad_plan(call, rows, p.cores, p.r_in, p.r_out);
  made.workspace =
      reduction_bytes(made.plan.core_tiles, made.plan.splits, kernels::FOLD_ROWS * kernels::FOLD_COLS);
  return made;
}

void row_core_grad(const Call& call, const RowCoreGradParams& problem, const PreparedRowCoreGrad& prepared,
                   void* workspace) {
  const plan::RowCoreGrad& plan = prepared.plan;
  RowCoreGradParams p = problem;
  p.splits = plan.splits;
  if (p.splits > 1) p.sum = Workspace(call, workspace, plan.core_tiles).take(plan.core_tiles, 0);
  launch(call, kernels::row_core_grad, dim3(unsigned(plan.core_tiles * p.splits)), p,
         sizeof(FoldTraits::Smem), "row_core_grad");
}

void sum_rows(const Call& call, const SumRowsParams& p) {
  if (p.tokens == 0) return;
  launch(call, kernels::sum_rows, threads(p.tokens * p.r), p, 0, "sum_rows");
}

}  // namespace lotr::cuda
