// csrc/cuda/launch.h: the unfolded form for few tokens.
#include "launch.h"

namespace lotr::cuda {
namespace {

// An [M, r] matrix of the call's type, with rows of whole 16 bytes.
MutableMatrix take_matrix(const Call& call, Workspace& memory, int64_t M, int64_t r) {
  const int64_t chunk = row_elements(call.type), row = plan::ceil_div(r, chunk) * chunk;
  return {memory.take<char>(M * row * element_size(call.type)), row, 1, Access::vector};
}
Matrix transposed(const Matrix& m) {
  return {m.data, m.col, m.row, m.access == Access::float32_element ? m.access : Access::element};
}

ShrinkProblem shrink_params(const Matrix& x, const Matrix& A, const MutableMatrix& u, int64_t M,
                            int64_t K, int32_t r) {
  ShrinkProblem p{};
  p.x = x, p.A = A, p.u = u;
  p.M = M, p.K = K, p.r = r;
  p.scale = p.dropout.scale = 1.f;
  return p;
}

void add_core(ShrinkProblem& p, const Matrix& core, const MutableMatrix& h, int32_t r_core,
              float scale) {
  p.core = core, p.h = h;
  p.r_core = r_core, p.core_scale = scale;
}

ExpandProblem expand_params(const MutableMatrix& y, const Matrix& u, const Matrix& F, int64_t M,
                            int64_t N, int32_t r, float scale) {
  ExpandProblem p{};
  p.y = y, p.u = u, p.F = F;
  p.M = M, p.N = N, p.r = r;
  p.dropout.scale = scale;
  return p;
}

FactorGradProblem grad_params(const Matrix& x, const Matrix& v, float* D, int64_t row, int64_t col,
                              int64_t M, int64_t K, int32_t r, float scale, bool accumulate) {
  FactorGradProblem p{};
  p.x = x, p.v = v, p.D = D, p.D_row = row, p.D_col = col;
  p.M = M, p.K = K, p.r = r;
  p.accumulate = accumulate;
  p.dropout.scale = scale;
  return p;
}

}  // namespace

void run(const Call& call, const SmallForwardProblem& p, Workspace& memory) {
  const Workspace::Scope scope(memory);
  const MutableMatrix h = take_matrix(call, memory, p.M, p.r_out);
  ShrinkProblem u = shrink_params(p.x, p.A, p.u, p.M, p.K, p.r_in);
  add_core(u, p.core, h, p.r_out, 1.f);
  run(call, u, memory);
  run(call, expand_params(p.y, read_only(h), p.B, p.M, p.N, p.r_out, p.scale), memory);
}

void run(const Call& call, const SmallBackwardProblem& p, Workspace& memory) {
  const Workspace::Scope scope(memory);
  const MutableMatrix h = take_matrix(call, memory, p.M, p.r_out),
                      k = take_matrix(call, memory, p.M, p.r_in),
                      uc = take_matrix(call, memory, p.M, p.r_out);
  if (p.dx.data || p.dA || p.dcore) {
    ShrinkProblem of_g = shrink_params(p.g, p.B, h, p.M, p.N, p.r_out);
    if (p.dx.data || p.dA) add_core(of_g, transposed(p.core), k, p.r_in, p.scale);
    run(call, of_g, memory);
  }
  if (p.dx.data) run(call, expand_params(p.dx, read_only(k), p.A, p.M, p.K, p.r_in, 1.f), memory);
  if (p.dA)
    run(call,
        grad_params(p.x, read_only(k), p.dA, p.dA_row, p.dA_col, p.M, p.K, p.r_in, 1.f, p.add_dA),
        memory);
  if (p.dB) {
    run(call, shrink_params(p.u, p.core, uc, p.M, p.r_in, p.r_out), memory);
    run(call,
        grad_params(p.g, read_only(uc), p.dB, p.dB_row, p.dB_col, p.M, p.N, p.r_out, p.scale,
                    p.add_dB),
        memory);
  }
  if (p.dcore)
    run(call,
        grad_params(p.u, read_only(h), p.dcore, p.r_out, 1, p.M, p.r_in, p.r_out, p.scale, false),
        memory);
}

}  // namespace lotr::cuda
