// Implements the few-token form of launch.h: tokens are multiplied with the core, which is not
// folded into B.  A backward pass has the launches of the folded form; a forward pass has one
// fewer, because no F is made.
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

void expand(const Call& call, const Matrix& y, const Matrix& u, const Matrix& F, int64_t M,
            int64_t N, int32_t r, float scale, Workspace& memory) {
  ExpandProblem p{};
  p.y = y;
  p.start = y;
  p.u = u;
  p.F = F;
  p.M = M;
  p.N = N;
  p.r = r;
  p.dropout.scale = scale;
  run(call, p, memory);
}

// h = g B, k = scale h core^T, Q = g^T u; without `Q` (null) h and k.
void shrink_gradient(const Call& call, const SmallBackwardProblem& p, const Matrix& h,
                     const CoreProduct& core_product, const FloatSum& Q, Workspace& memory) {
  if (Q.data) {
    ShrinkGradProblem q{};
    q.g = p.g;
    q.F = p.B;
    q.u = p.u;
    q.k = h;
    q.Q = Q;
    q.M = p.M;
    q.N = p.N;
    q.r = p.r_out;
    q.r_u = p.r_in;
    q.core_product = core_product;
    run(call, q, memory);
  } else {
    ShrinkProblem q = shrink_of(p.g, p.B, h, p.M, p.N, p.r_out);
    q.core_product = core_product;
    run(call, q, memory);
  }
}

}  // namespace

void run(const Call& call, const SmallForwardProblem& p, Workspace& memory) {
  const Workspace::Scope scope(memory);
  const Matrix h = take_matrix(call, memory, p.M, p.r_out);
  ShrinkProblem u = shrink_of(p.x, p.A, p.u, p.M, p.K, p.r_in);
  u.core_product = {p.core, h, p.r_out, 1.f};
  run(call, u, memory);
  expand(call, p.y, h, p.B, p.M, p.N, p.r_out, p.scale, memory);
}

// dB and dcore by Q = g^T u, as in the folded form: dB = scale Q core, dcore = scale Q^T B.
void run(const Call& call, const SmallBackwardProblem& p, Workspace& memory) {
  const Workspace::Scope scope(memory);
  const bool needs_k = p.dx.data || p.dA.data;
  const bool needs_Q = p.dB.data || p.dcore;
  const Matrix h = take_matrix(call, memory, p.M, p.r_out);
  const Matrix k = take_matrix(call, memory, p.M, p.r_in);
  FloatSum Q{};
  if (needs_Q) Q = {memory.take<float>(p.N * p.r_in), p.r_in, 1, false};
  if (needs_k)
    shrink_gradient(call, p, h, {transposed(p.core), k, p.r_in, p.scale}, Q, memory);
  else if (needs_Q)
    run(call, factor_grad_of(Q, p.g, p.u, p.M, p.N, p.r_in), memory);
  if (needs_Q) {
    FoldGradProblem q{};
    q.Q = {Q.data, Q.row, Q.col, Access::element};
    q.B = p.B;
    q.core = p.core;
    q.dB = p.dB;
    q.dcore = p.dcore;
    q.B_type = type_of(call, p.B);
    q.core_type = type_of(call, p.core);
    q.N = p.N;
    q.r_in = p.r_in;
    q.r_out = p.r_out;
    q.scale = p.scale;
    run(call, q, memory);
  }
  if (p.dx.data) expand(call, p.dx, k, p.A, p.M, p.K, p.r_in, 1.f, memory);
  if (p.dA.data) run(call, factor_grad_of(p.dA, p.x, k, p.M, p.K, p.r_in), memory);
}

}  // namespace lotr::cuda
