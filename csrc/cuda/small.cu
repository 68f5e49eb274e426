// The unfolded form for few tokens.  Forward: two launches, h = u core comes from shrink's last block.
#include <algorithm>

#include "launchers.h"

namespace lotr::cuda {
namespace {

// Takes an [M, r] matrix of the call's type, with rows of whole 16 bytes, off the front of the workspace.
MutableMatrix take_matrix(const Call& call, char*& workspace, int64_t M, int64_t r) {
  void* data = workspace;
  const int64_t chunk = row_elements(call.type), row = (r + chunk - 1) / chunk * chunk;
  workspace += aligned(size_t(M * row) * size_t(element_size(call.type)));
  return {data, row, 1, Access::vector};
}
Matrix transposed(const Matrix& m) {
  return {m.data, m.col, m.row, m.access == Access::float32_element ? m.access : Access::element};
}

ShrinkProblem shrink_params(const Matrix& x, const Matrix& A, const MutableMatrix& u, int64_t M, int64_t K,
                            int32_t r) {
  ShrinkProblem p{};
  p.x = x, p.A = A, p.u = u;
  p.M = M, p.K = K, p.r = r;
  p.scale = p.dropout.scale = 1.f;
  return p;
}

void add_core(ShrinkProblem& p, const Matrix& core, const MutableMatrix& h, int32_t r_core, float scale) {
  p.core = core, p.h = h;
  p.r_core = r_core, p.core_scale = scale;
}

ExpandProblem expand_params(const MutableMatrix& y, const Matrix& u, const Matrix& F, int64_t M, int64_t N,
                            int32_t r, float scale) {
  ExpandProblem p{};
  p.y = y, p.u = u, p.F = F;
  p.M = M, p.N = N, p.r = r;
  p.dropout.scale = scale;
  return p;
}

FactorGradProblem grad_params(const Matrix& x, const Matrix& v, float* D, int64_t row, int64_t col, int64_t M,
                              int64_t K, int32_t r, float scale, bool accumulate) {
  FactorGradProblem p{};
  p.x = x, p.v = v, p.D = D, p.D_row = row, p.D_col = col;
  p.M = M, p.K = K, p.r = r;
  p.accumulate = accumulate;
  p.dropout.scale = scale;
  return p;
}

// The products of the backward pass, in order, with their intermediate matrices taken off the workspace.
struct Backward {
  ShrinkProblem h, uc;  // h = g B (and k); uc = u core
  ExpandProblem dx;
  FactorGradProblem dA, dB, dcore;
  char* rest;  // workspace of whichever runs

  Backward(const Call& call, const SmallBackwardProblem& p, void* workspace)
      : rest(static_cast<char*>(workspace)) {
    const MutableMatrix mh = take_matrix(call, rest, p.M, p.r_out), mk = take_matrix(call, rest, p.M, p.r_in),
                        muc = take_matrix(call, rest, p.M, p.r_out);
    h = shrink_params(p.g, p.B, mh, p.M, p.N, p.r_out);
    if (p.dx.data || p.dA) add_core(h, transposed(p.core), mk, p.r_in, p.scale);
    uc = shrink_params(p.u, p.core, muc, p.M, p.r_in, p.r_out);
    dx = expand_params(p.dx, read_only(mk), p.A, p.M, p.K, p.r_in, 1.f);
    dA = grad_params(p.x, read_only(mk), p.dA, p.dA_row, p.dA_col, p.M, p.K, p.r_in, 1.f, true);
    dB = grad_params(p.g, read_only(muc), p.dB, p.dB_row, p.dB_col, p.M, p.N, p.r_out, p.scale, true);
    dcore = grad_params(p.u, read_only(mh), p.dcore, p.r_out, 1, p.M, p.r_in, p.r_out, p.scale, false);
  }
  template <class F>
  void each(F f) const {
    if (dx.y.data || dA.D || dcore.D) f(h);
    if (dx.y.data) f(dx);
    if (dA.D) f(dA);
    if (dB.D) f(uc), f(dB);
    if (dcore.D) f(dcore);
  }
};

struct Forward {
  ShrinkProblem u;
  ExpandProblem y;
  char* rest;

  Forward(const Call& call, const SmallForwardProblem& p, void* workspace)
      : rest(static_cast<char*>(workspace)) {
    const MutableMatrix h = take_matrix(call, rest, p.M, p.r_out);
    u = shrink_params(p.x, p.A, p.u, p.M, p.K, p.r_in);
    add_core(u, p.core, h, p.r_out, 1.f);
    y = expand_params(p.y, read_only(h), p.B, p.M, p.N, p.r_out, p.scale);
    y.of_rows = p.of_rows;
  }
  template <class F>
  void each(F f) const {
    f(u), f(y);
  }
};

template <class Products, class Problem>
PreparedSmall prepared_products(const Call& call, const Problem& p) {
  const Products products(call, p, nullptr);
  PreparedSmall made;
  size_t most = 0, next = 0;
  products.each([&](const auto& one) {
    const Prepared& chosen = made.products[next++] = prepare(call, one);
    most = std::max(most, chosen.workspace);
  });
  made.workspace = reinterpret_cast<size_t>(products.rest) + most;
  return made;
}

template <class Products, class Problem>
void run_products(const Call& call, const Problem& p, const PreparedSmall& prepared, void* workspace) {
  const Products products(call, p, workspace);
  size_t next = 0;
  products.each([&](const auto& one) { run(call, one, prepared.products[next++], products.rest); });
}

}  // namespace

PreparedSmall prepare(const Call& call, const SmallForwardProblem& p) {
  return prepared_products<Forward>(call, p);
}

void run(const Call& call, const SmallForwardProblem& p, const PreparedSmall& prepared, void* workspace) {
  run_products<Forward>(call, p, prepared, workspace);
}

PreparedSmall prepare(const Call& call, const SmallBackwardProblem& p) {
  return prepared_products<Backward>(call, p);
}

void run(const Call& call, const SmallBackwardProblem& p, const PreparedSmall& prepared, void* workspace) {
  run_products<Backward>(call, p, prepared, workspace);
}

}  // namespace lotr::cuda
