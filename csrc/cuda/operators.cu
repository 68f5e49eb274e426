// Implements the products with a large matrix of launch.h. Each operator does the same: it packs
// inputs that cannot be read 16 bytes at a time, and for each launch of at most max_rank_of_launch
// ranks it makes a plan, takes memory for parts if blocks share an output, launches the kernel of
// the element type, and adds the parts.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "launchers.h"
#include "plans.h"
#include "ptx/stream.cuh"

namespace lotr::cuda {
namespace {

// Calls f with the launchers of the call's element type.
template <class F>
void with_launchers(const Call& call, F f) {
  dispatch_type(call.type, [&](auto element) {
    using T = decltype(element);
    f(Launchers<std::conditional_t<std::is_same_v<T, float>, tile::Exact, tile::Half<T>>>{});
  });
}

// The matrix without its first columns.
Matrix columns(Matrix m, int64_t first, DType type) {
  const int64_t size = m.access == Access::float32_element ? 4 : element_size(type);
  m.data = static_cast<char*>(m.data) + first * m.col * size;
  return m;
}

// Calls f(first, ranks) for each launch of a product of rank r. A launch computes the ranks from
// `first` to `first` + `ranks` - 1.
template <class F>
void each_launch(const Call& call, int64_t r, F f) {
  const int64_t step = max_rank_of_launch(call.type);
  for (int64_t first = 0; first < r; first += step) f(first, int32_t(std::min(step, r - first)));
}

// Replaces m, if it cannot be read 16 bytes at a time, by a copy that can.
void pack(const Call& call, Workspace& memory, Matrix& m, int64_t rows, int64_t cols) {
  if (m.access == Access::vector) return;
  const Matrix copy = take_matrix(call, memory, rows, cols);
  run(call, PackProblem{m, copy, rows, cols}, memory);
  m = copy;
}

// Without tokens no kernel runs, so this zeroes a contiguous sum, unless it is added to.
void clear(const Call& call, const Workspace& memory, const FloatSum& sum, int64_t count) {
  if (!sum.add && !memory.is_measuring())
    ptx::clear(sum.data, size_t(count) * sizeof(float), call.stream);
}

Matrix matrix_of(const FloatSum& sum) {
  return {sum.data, sum.row, sum.col, Access::element};
}

// The second launch for `splits` parts: it adds them, and rounds the sum to the call's type in
// `out` [rows, cols].
SumPartsParams rounded_sum(const Call& call, const float* parts, const Matrix& out, int64_t rows,
                           int32_t cols, int64_t splits, float scale) {
  SumPartsParams sum{};
  sum.parts = parts;
  sum.parts_row = row_of_parts(cols);
  sum.out = out;
  sum.out_type = call.type;
  sum.rows = rows;
  sum.cols = cols;
  sum.splits = int32_t(splits);
  sum.scale = scale;
  return sum;
}

// Splits a float32 sum [rows, cols]: `sum` becomes `splits` parts in the workspace, which the first
// launch writes. Returns the second launch, which adds them to the original sum.
SumPartsParams split_sum(FloatSum& sum, Workspace& memory, int64_t rows, int32_t cols,
                         int64_t splits, float scale) {
  const int64_t row = row_of_parts(cols);
  SumPartsParams parts_sum{};
  parts_sum.parts = memory.take<float>(splits * rows * row);
  parts_sum.parts_row = row;
  parts_sum.out = matrix_of(sum);
  parts_sum.out_type = DType::float32;
  parts_sum.add = sum.add;
  parts_sum.rows = rows;
  parts_sum.cols = cols;
  parts_sum.splits = int32_t(splits);
  parts_sum.scale = scale;
  sum = {const_cast<float*>(parts_sum.parts), row, 1, false};
  return parts_sum;
}

// h = scale * u core as a separate product: if u takes two launches, no block has all of its ranks.
void run_core_product(const Call& call, const Matrix& u, int64_t M, int32_t r,
                      const CoreProduct& product, Workspace& memory) {
  run(call, shrink_of(u, product.core, product.h, M, r, product.r_core, product.scale), memory);
}

// du and Q from two reads of g.
void two_reads(const Call& call, const ShrinkGradProblem& p, Workspace& memory) {
  ShrinkProblem du = shrink_of(p.g, p.F, p.du, p.M, p.N, p.r);
  du.core_product = p.core_product;
  run(call, du, memory);
  run(call, factor_grad_of(p.Q, p.g, p.u, p.M, p.N, p.r_u), memory);
}

}  // namespace

Matrix take_matrix(const Call& call, Workspace& memory, int64_t rows, int64_t cols) {
  const int64_t chunk = row_elements(call.type);
  const int64_t row = plan::ceil_div(cols, chunk) * chunk;
  return {memory.take<char>(rows * row * element_size(call.type)), row, 1, Access::vector};
}

void run(const Call& call, const ShrinkProblem& problem, Workspace& memory) {
  ShrinkProblem p = problem;
  const bool has_core = p.core_product.core.data;
  check_rank("shrink", "A", p.r);
  if (has_core) check_rank("shrink", "core", p.core_product.r_core);
  if (p.M == 0) return;
  const Workspace::Scope scope(memory);
  pack(call, memory, p.x, p.M, p.K);
  pack(call, memory, p.A, p.K, p.r);
  const bool is_one_launch = p.r <= max_rank_of_launch(call.type);
  each_launch(call, p.r, [&](int64_t first, int32_t ranks) {
    const Workspace::Scope launch_scope(memory);
    const plan::Plan plan = plan_of(call, Kernel::shrink, p.M, p.K, ranks);
    auto params = params_of<ShrinkParams>(p);
    params.r = ranks;
    params.A = columns(p.A, first, call.type);
    params.u = columns(p.u, first, call.type);
    if (!is_one_launch) params.core_product.core.data = nullptr;
    params.parts_row = row_of_parts(ranks);
    if (plan.n_blocks > 1)
      params.parts = memory.take<float>(plan.n_blocks * p.M * params.parts_row);
    if (memory.is_measuring()) return;
    with_launchers(call, [&](auto launchers) { launchers.shrink(call, params, plan); });
    if (!params.parts) return;
    SumTwoParams sums{};
    sums.first = rounded_sum(call, params.parts, params.u, p.M, ranks, plan.n_blocks,
                             p.scale * p.dropout.scale);
    sums.core_product = params.core_product;
    sum_parts(call, call.type, sums);
  });
  if (has_core && !is_one_launch) run_core_product(call, p.u, p.M, p.r, p.core_product, memory);
}

void run(const Call& call, const ExpandProblem& problem, Workspace& memory) {
  ExpandProblem p = problem;
  check_rank("expand_add", "F", p.r);
  if (p.M == 0) return;
  const Workspace::Scope scope(memory);
  pack(call, memory, p.u, p.M, p.r);
  pack(call, memory, p.F, p.N, p.r);
  each_launch(call, p.r, [&](int64_t first, int32_t ranks) {
    const plan::Plan plan = plan_of(call, Kernel::expand_add, p.M, p.N, ranks);
    auto params = params_of<ExpandParams>(p);
    params.r = ranks;
    params.u = columns(p.u, first, call.type);
    params.F = columns(p.F, first, call.type);
    if (first > 0) params.start = p.y;
    if (!memory.is_measuring())
      with_launchers(call, [&](auto launchers) { launchers.expand_add(call, params, plan); });
  });
}

void run(const Call& call, const FactorGradProblem& problem, Workspace& memory) {
  FactorGradProblem p = problem;
  check_rank("factor_grad", "v", p.r);
  if (p.M == 0) return clear(call, memory, p.D, p.K * p.r);
  const Workspace::Scope scope(memory);
  pack(call, memory, p.x, p.M, p.K);
  pack(call, memory, p.v, p.M, p.r);
  each_launch(call, p.r, [&](int64_t first, int32_t ranks) {
    const Workspace::Scope launch_scope(memory);
    const plan::Plan plan = plan_of(call, Kernel::factor_grad, p.M, p.K, ranks);
    auto params = params_of<FactorGradParams>(p);
    params.r = ranks;
    params.D_cols = ranks;
    params.v = columns(p.v, first, call.type);
    params.D.data += first * p.D.col;
    SumTwoParams sums{};
    if (plan.m_blocks > 1) {
      sums.first = split_sum(params.D, memory, p.K, ranks, plan.m_blocks, p.dropout.scale);
      params.D_cols = int32_t(params.D.row);
      params.D_part = p.K * params.D.row;
      params.dropout.scale = 1.f;  // comes with the sum
    }
    if (memory.is_measuring()) return;
    with_launchers(call, [&](auto launchers) { launchers.factor_grad(call, params, plan); });
    if (sums.first.rows) sum_parts(call, call.type, sums);
  });
}

void run(const Call& call, const ShrinkGradProblem& problem, Workspace& memory) {
  ShrinkGradProblem p = problem;
  check_rank("shrink_grad", "F", p.r);
  check_rank("shrink_grad", "u", p.r_u);
  if (p.M == 0) return clear(call, memory, p.Q, p.N * p.r_u);
  const int32_t r = std::max(p.r, p.r_u);
  const Workspace::Scope scope(memory);
  pack(call, memory, p.g, p.M, p.N);
  pack(call, memory, p.F, p.N, p.r);
  pack(call, memory, p.u, p.M, p.r_u);
  if (r > SHRINK_GRAD_MAX_RANK) return two_reads(call, p, memory);
  const plan::Plan plan = plan_of(call, Kernel::shrink_grad, p.M, p.N, r);
  auto params = params_of<ShrinkGradParams>(p);
  params.Q_cols = p.r_u;
  params.du_parts_row = row_of_parts(p.r);
  SumTwoParams sums{};
  if (plan.n_blocks > 1 || p.core_product.core.data) {  // sum_parts multiplies du with the core
    params.du_parts = memory.take<float>(plan.n_blocks * p.M * params.du_parts_row);
    sums.first = rounded_sum(call, params.du_parts, p.du, p.M, p.r, plan.n_blocks, 1.f);
    sums.core_product = p.core_product;
  }
  if (plan.m_blocks > 1) {
    sums.second = split_sum(params.Q, memory, p.N, p.r_u, plan.m_blocks, 1.f);
    params.Q_cols = int32_t(params.Q.row);
    params.Q_part = p.N * params.Q.row;
  }
  if (memory.is_measuring()) return;
  with_launchers(call, [&](auto launchers) { launchers.shrink_grad(call, params, plan); });
  if (sums.first.rows || sums.second.rows) sum_parts(call, call.type, sums);
}

}  // namespace lotr::cuda
