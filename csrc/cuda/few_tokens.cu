// Implements the few-token form of launch.h: tokens are multiplied with the core, which is not
// folded into B. A backward pass has as many launches as that of the folded form, a forward pass
// one fewer, because it makes no F.
#include <utility>

#include "launchers.h"

namespace lotr::cuda {
namespace {

// A matrix with rows and columns exchanged, as an operand of any strides.
Matrix transposed(Matrix m) {
  std::swap(m.row, m.col);
  if (m.access == Access::vector) m.access = Access::element;
  return m;
}

// The stored type of a factor or core.
DType type_of(const Call& call, const Matrix& m) {
  return m.access == Access::float32_element ? DType::float32 : call.type;
}

// y += scale u F^T
ExpandProblem expand_of(const Matrix& y, const Matrix& u, const Matrix& F, int64_t M, int64_t N,
                        int32_t r, float scale = 1.f) {
  ExpandProblem problem{};
  problem.y = y;
  problem.start = y;
  problem.u = u;
  problem.F = F;
  problem.M = M;
  problem.N = N;
  problem.r = r;
  problem.dropout.scale = scale;
  return problem;
}

// h = g B, du = scale h core^T, Q = g^T u; if `Q` is null, only h and du. The names differ from
// those of the problem that computes them:
//
//   here                 h = g B     du = scale h core^T
//   ShrinkGradProblem    du = g F    core_product.h = scale du core
void shrink_gradient(const Call& call, const FewTokensBackwardProblem& p, const Matrix& h,
                     const CoreProduct& core_product, const FloatSum& Q, Workspace& memory) {
  if (Q.data) {
    ShrinkGradProblem problem{};
    problem.g = p.g;
    problem.F = p.B;
    problem.u = p.u;
    problem.du = h;
    problem.Q = Q;
    problem.M = p.M;
    problem.N = p.N;
    problem.r = p.r_out;
    problem.r_u = p.r_in;
    problem.core_product = core_product;
    run(call, problem, memory);
  } else {
    ShrinkProblem problem = shrink_of(p.g, p.B, h, p.M, p.N, p.r_out);
    problem.core_product = core_product;
    run(call, problem, memory);
  }
}

}  // namespace

void run(const Call& call, const FewTokensForwardProblem& p, Workspace& memory) {
  const Workspace::Scope scope(memory);
  const Matrix h = take_matrix(call, memory, p.M, p.r_out);
  ShrinkProblem u = shrink_of(p.x, p.A, p.u, p.M, p.K, p.r_in);
  u.core_product = {p.core, h, p.r_out, 1.f};
  run(call, u, memory);
  run(call, expand_of(p.y, h, p.B, p.M, p.N, p.r_out, p.scale), memory);
}

// dB and dcore by Q = g^T u, as in the folded form: dB = scale Q core, dcore = scale Q^T B.
void run(const Call& call, const FewTokensBackwardProblem& p, Workspace& memory) {
  const Workspace::Scope scope(memory);
  const bool needs_du = p.dx.data || p.dA.data;
  const bool needs_Q = p.dB.data || p.dcore;
  const Matrix h = take_matrix(call, memory, p.M, p.r_out);
  const Matrix du = take_matrix(call, memory, p.M, p.r_in);
  FloatSum Q{};
  if (needs_Q) Q = {memory.take<float>(p.N * p.r_in), p.r_in, 1, false};
  if (needs_du)
    shrink_gradient(call, p, h, {transposed(p.core), du, p.r_in, p.scale}, Q, memory);
  else if (needs_Q)
    run(call, factor_grad_of(Q, p.g, p.u, p.M, p.N, p.r_in), memory);
  if (needs_Q) {
    FoldGradProblem problem{};
    problem.Q = {Q.data, Q.row, Q.col, Access::element};
    problem.B = p.B;
    problem.core = p.core;
    problem.dB = p.dB;
    problem.dcore = p.dcore;
    problem.B_type = type_of(call, p.B);
    problem.core_type = type_of(call, p.core);
    problem.N = p.N;
    problem.r_in = p.r_in;
    problem.r_out = p.r_out;
    problem.scale = p.scale;
    run(call, problem, memory);
  }
  if (p.dx.data) run(call, expand_of(p.dx, du, p.A, p.M, p.K, p.r_in), memory);
  if (p.dA.data) run(call, factor_grad_of(p.dA, p.x, du, p.M, p.K, p.r_in), memory);
}

}  // namespace lotr::cuda
