// csrc/cuda/launch.h: the products with a large matrix.  Choice of the element type, ranks beyond
// one launch, inputs that have to be packed, sums over blocks.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "launchers.h"
#include "plans.h"
#include "ptx/stream.cuh"

namespace lotr::cuda {
namespace {

template <class F>
void dispatch_policy(const Call& call, F f) {
  dispatch_type(call.type, [&](auto element) {
    using T = decltype(element);
    f(Launchers<std::conditional_t<std::is_same_v<T, float>, tile::Exact, tile::Half<T>>>{});
  });
}

// Columns first .. of a matrix.
template <class M>
M columns(M m, int64_t first, DType type) {
  const int64_t size = m.access == Access::float32_element ? 4 : element_size(type);
  auto* data = static_cast<const char*>(m.data) + first * m.col * size;
  if constexpr (std::is_same_v<M, Matrix>)
    m.data = data;
  else
    m.data = const_cast<char*>(data);
  return m;
}

// f(first, ranks) for each of at most two launches, which takes so many ranks from `first` on
template <class F>
void each_launch(const Call& call, int64_t r, F f) {
  const int64_t most = max_rank(call.type);
  for (int64_t first = 0; first < r; first += most) f(first, int32_t(std::min(most, r - first)));
}

// m, or where it cannot be read 16 bytes at a time, a copy that can.
void pack(const Call& call, Workspace& memory, Matrix& m, int64_t rows, int64_t cols) {
  if (m.access == Access::vector) return;
  const int64_t chunk = row_elements(call.type), row = plan::ceil_div(cols, chunk) * chunk;
  void* const copy = memory.take<char>(rows * row * element_size(call.type));
  run(call, PackProblem{m, copy, rows, cols, row}, memory);
  m = {copy, row, 1, Access::vector};
}

// Zeros in a contiguous output of no tokens.
void clear(const Call& call, const Workspace& memory, float* data, int64_t count) {
  if (!memory.counts()) ptx::clear(data, size_t(count) * sizeof(float), call.stream);
}

// h = core_scale * u core as a product of its own, where no block has the whole rank of u.
void run_core_product(const Call& call, const ShrinkProblem& p, Workspace& memory) {
  ShrinkProblem h{};
  h.x = read_only(p.u), h.A = p.core, h.u = p.h;
  h.M = p.M, h.K = p.r, h.r = p.r_core;
  h.scale = p.core_scale, h.dropout.scale = 1.f;
  run(call, h, memory);
}

}  // namespace

void run(const Call& call, const ShrinkProblem& problem, Workspace& memory) {
  ShrinkProblem p = problem;
  check_rank("shrink", "A", p.r);
  if (p.core.data) check_rank("shrink", "core", p.r_core);
  if (p.M == 0) return;
  const Workspace::Scope scope(memory);
  pack(call, memory, p.x, p.M, p.K), pack(call, memory, p.A, p.K, p.r);
  const bool whole = p.r <= max_rank(call.type);
  each_launch(call, p.r, [&](int64_t first, int32_t ranks) {
    const Workspace::Scope of_launch(memory);
    const plan::Plan plan = plan_of(call, Kernel::shrink, p.M, p.K, ranks);
    auto piece = params_of<ShrinkParams>(p);
    piece.r = ranks;
    piece.A = columns(p.A, first, call.type), piece.u = columns(p.u, first, call.type);
    if (!whole) piece.core.data = nullptr;
    piece.parts_row = row_of_parts(ranks);
    if (plan.n_blocks > 1) piece.parts = memory.take<float>(plan.n_blocks * p.M * piece.parts_row);
    if (memory.counts()) return;
    dispatch_policy(call, [&](auto launchers) { launchers.shrink(call, piece, plan); });
    if (!piece.parts) return;
    SumTwoParams sum{};
    sum.first = {piece.parts,
                 piece.parts_row,
                 piece.u,
                 call.type,
                 p.M,
                 ranks,
                 int32_t(plan.n_blocks),
                 0,
                 p.scale * p.dropout.scale};
    sum.core = {piece.core, p.h, p.r_core, p.core_scale};
    sum_parts(call, call.type, sum);
  });
  if (p.core.data && !whole) run_core_product(call, p, memory);
}

void run(const Call& call, const ExpandProblem& problem, Workspace& memory) {
  ExpandProblem p = problem;
  check_rank("expand_add", "F", p.r);
  if (p.M == 0) return;
  const Workspace::Scope scope(memory);
  pack(call, memory, p.u, p.M, p.r), pack(call, memory, p.F, p.N, p.r);
  each_launch(call, p.r, [&](int64_t first, int32_t ranks) {
    const plan::Plan plan = plan_of(call, Kernel::expand_add, p.M, p.N, ranks);
    auto piece = params_of<ExpandParams>(p);
    piece.r = ranks;
    piece.u = columns(p.u, first, call.type), piece.F = columns(p.F, first, call.type);
    if (first > 0) piece.fresh = 0;
    if (!memory.counts())
      dispatch_policy(call, [&](auto launchers) { launchers.expand_add(call, piece, plan); });
  });
}

void run(const Call& call, const FactorGradProblem& problem, Workspace& memory) {
  FactorGradProblem p = problem;
  check_rank("factor_grad", "k", p.r);
  if (p.M == 0) {
    if (!p.accumulate) clear(call, memory, p.D, p.K * p.r);
    return;
  }
  const Workspace::Scope scope(memory);
  pack(call, memory, p.x, p.M, p.K), pack(call, memory, p.v, p.M, p.r);
  each_launch(call, p.r, [&](int64_t first, int32_t ranks) {
    const Workspace::Scope of_launch(memory);
    const plan::Plan plan = plan_of(call, Kernel::factor_grad, p.M, p.K, ranks);
    auto piece = params_of<FactorGradParams>(p);
    piece.r = ranks;
    piece.v = columns(p.v, first, call.type), piece.D += first * p.D_col;
    SumTwoParams sum{};
    if (plan.m_blocks > 1) {
      const int64_t row = row_of_parts(ranks);
      piece.D_part = p.K * row;
      float* const parts = memory.take<float>(plan.m_blocks * piece.D_part);
      const MutableMatrix D{piece.D, p.D_row, p.D_col, Access::element};
      sum.first = {
          parts,          row, D, DType::float32, p.K, ranks, int32_t(plan.m_blocks), p.accumulate,
          p.dropout.scale};
      piece.D = parts, piece.D_row = row, piece.D_col = 1;
      piece.accumulate = 0, piece.dropout.scale = 1.f;
    }
    if (memory.counts()) return;
    dispatch_policy(call, [&](auto launchers) { launchers.factor_grad(call, piece, plan); });
    if (sum.first.rows) sum_parts(call, call.type, sum);
  });
}

namespace {

// k and Q from two reads of g, for ranks whose parts would cost more than the second read.
void two_reads(const Call& call, const ShrinkGradProblem& p, Workspace& memory) {
  ShrinkProblem k{};
  k.x = p.g, k.A = p.F, k.u = p.k;
  k.M = p.M, k.K = p.N, k.r = p.r;
  k.scale = k.dropout.scale = 1.f;
  run(call, k, memory);
  FactorGradProblem Q{};
  Q.x = p.g, Q.v = p.u;
  Q.D = p.Q, Q.D_row = p.Q_row, Q.D_col = p.Q_col, Q.accumulate = p.accumulate;
  Q.M = p.M, Q.K = p.N, Q.r = p.r;
  Q.dropout.scale = 1.f;
  run(call, Q, memory);
}

}  // namespace

void run(const Call& call, const ShrinkGradProblem& problem, Workspace& memory) {
  ShrinkGradProblem p = problem;
  check_rank("shrink_grad", "F", p.r);
  if (p.M == 0) {
    if (!p.accumulate) clear(call, memory, p.Q, p.N * p.r);
    return;
  }
  const Workspace::Scope scope(memory);
  pack(call, memory, p.g, p.M, p.N), pack(call, memory, p.F, p.N, p.r),
      pack(call, memory, p.u, p.M, p.r);
  if (p.r > SHRINK_GRAD_MAX_RANK) return two_reads(call, p, memory);
  const plan::Plan plan = plan_of(call, Kernel::shrink_grad, p.M, p.N, p.r);
  auto params = params_of<ShrinkGradParams>(p);
  const int64_t row = params.parts_row = row_of_parts(p.r);
  SumPartsParams k{}, Q{};
  if (plan.n_blocks > 1) {
    params.k_parts = memory.take<float>(plan.n_blocks * p.M * row);
    k = {params.k_parts, row, p.k, call.type, p.M, p.r, int32_t(plan.n_blocks), 0, 1.f};
  }
  if (plan.m_blocks > 1) {
    params.Q_part = p.N * row;
    params.Q = memory.take<float>(plan.m_blocks * params.Q_part);
    const MutableMatrix out{p.Q, p.Q_row, p.Q_col, Access::element};
    Q = {params.Q, row, out, DType::float32, p.N, p.r, int32_t(plan.m_blocks), p.accumulate, 1.f};
    params.Q_row = row, params.Q_col = 1, params.accumulate = 0;
  }
  if (memory.counts()) return;
  dispatch_policy(call, [&](auto launchers) { launchers.shrink_grad(call, params, plan); });
  if (k.rows || Q.rows) sum_parts(call, call.type, {k, Q, {}});
}

}  // namespace lotr::cuda
