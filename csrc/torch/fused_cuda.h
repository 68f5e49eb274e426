// The adapter inside the base product (cuda/gemm_lotr.h), for sm_90a:
//
//   forward    y = x W^T + bias + u F^T,  u = x A       one launch, after fold's, which makes F, F^T and A^T
//   backward   dx = g W + k A^T,  k = g F               one launch, with Q = g^T u up to rank FUSED_Q_RANK
//
// gemm_lotr and gemm_lotr_refusal expose the launch and the reason against it as operators, for tests,
// benchmarks and the planner.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "cuda/gemm_lotr.h"
#include "cuda/plans.h"
#include "products_cuda.h"

namespace lotr {

constexpr int64_t FUSED_Q_RANK = cuda::GEMM_LOTR_FACTOR_RANK;

// The choice for a launch: why it cannot run (a missing matrix, an unsupported layout; "": it can), how it is
// cut, and its workspace.
struct FusedChoice {
  std::string refusal;
  cuda::GemmLotrPlan plan{};
  void* workspace = nullptr;
};

inline FusedChoice choose_fused(const Context& c, const cuda::GemmLotr& q) {
  FusedChoice made;
  made.refusal = cuda::gemm_lotr_refusal(c.call(), q);
  if (!made.refusal.empty()) return made;
  made.plan = cuda::gemm_lotr_plan(c.call(), q.M, q.N, q.r);
  made.refusal = cuda::gemm_lotr_obstacle(c.call(), q, made.plan);
  if (!made.refusal.empty()) return made;
  made.workspace = cuda::gemm_lotr_workspace_of(c.call().stream, cuda::gemm_lotr_workspace(q.M));
  if (!made.workspace)
    made.refusal = "workspace: expected one for " + std::to_string(q.M) +
                   " rows on this stream, got none: too many rows, or too many streams and graphs have one";
  return made;
}

inline void run_fused(const Context& c, const cuda::GemmLotr& q, const FusedChoice& chosen) {
  if (!chosen.refusal.empty()) fail(c.op(), ": ", chosen.refusal, "; LOTR_STRATEGY=beta runs");
  const size_t partial_bytes = cuda::gemm_lotr_partial(q, chosen.plan);
  c.with_workspace(partial_bytes, [&](void* partial) {
    cuda::gemm_lotr(c.call(), q, chosen.plan, chosen.workspace, cuda::gemm_lotr_workspace(q.M), partial,
                    partial_bytes);
  });
}

// The required matrices: x [M, K], weight [N, K]; backward: g [M, K], weight [K, N].
inline cuda::GemmLotr fused_base(const CudaProducts& p, const Arg& x, const Arg& weight, int64_t r,
                                 bool backward) {
  cuda::GemmLotr q{};
  q.backward = backward;
  q.x = p.in(p.read(x)), q.W = p.in(p.read(weight));
  q.M = x.flat.rows, q.K = x.flat.cols, q.N = weight.size[backward ? 1 : 0], q.r = int32_t(r);
  return q;
}

// The choice for x (g in backward), which may have any strides, and weight, before the other matrices exist.
inline FusedChoice choose_fused(const CudaProducts& p, const Arg& x, const Arg& weight, int64_t r,
                                bool backward) {
  cuda::GemmLotr q = fused_base(p, x, weight, r, backward);
  const auto* const anywhere = reinterpret_cast<const void*>(uintptr_t(4096));  // aligned; nothing reads it
  q.At = {anywhere, (q.K + 7) / 8 * 8, 1, Access::vector};
  q.F = {anywhere, (r + 7) / 8 * 8, 1, Access::vector};
  q.u = {const_cast<void*>(anywhere), (r + 7) / 8 * 8, 1, Access::vector};
  q.y = {const_cast<void*>(anywhere), q.N, 1, Access::vector};
  return choose_fused(p.context(), q);
}

inline Forward CudaProducts::fused_forward(const Check& c, const ForwardArgs& a, const Sizes& s,
                                           double scaling, double p) const {
  if (a.u || a.F || p != 0.0)
    fail(c.op, ": strategy: expected 0 (two_pass) or 1 (beta) where ",
         a.u   ? "u is given"
         : a.F ? "F is given"
               : "there is dropout",
         ", got 2 (fused)");
  const DType type = context_.call().type;
  OptionalTensor F, Ft, At, u;
  const Value F_out = rank_rows(F, s.n, s.r_in), Ft_out = rank_rows(Ft, s.r_in, s.n),
              At_out = rank_rows(At, s.r_in, s.k);
  FoldProblem f{};
  const Value A = read(a.A), B = read(a.B), core = read(a.core);
  f.B = in(B), f.cores = in(core), f.A = in(A);
  f.F = F_out.data, f.F_row = F_out.row, f.Ft = out(Ft_out), f.At = out(At_out);
  f.B_type = B.type, f.core_type = core.type, f.A_type = A.type, f.F_type = type;
  f.L = 1, f.N = s.n, f.K = s.k, f.r_in = int32_t(s.r_in), f.r_out = int32_t(s.r_out),
  f.scale = float(scaling);
  context_.run(f);
  Output y = new_output(a.x, s.n);
  cuda::GemmLotr q = fused_base(*this, a.x, a.weight, s.r_in, false);
  const Tensor bias = a.bias ? torch::stable::contiguous(*a.bias.tensor) : *At;
  if (a.bias) q.bias = bias.const_data_ptr();
  q.At = in(At_out), q.F = in(F_out), q.y = out(y.value), q.u = out(rank_rows(u, s.m, s.r_in));
  run_fused(context_, q, choose_fused(context_, q));
  // F as the transpose of what the backward pass reads
  return {std::move(y.tensor), std::move(u), torch::stable::transpose(*Ft, 0, 1)};
}

inline bool CudaProducts::fused_backward(Made& made, Value& k, const Sum& Q, const BackwardArgs& a,
                                         const Sizes& s) const {
  if (!a.weight || !a.A || !a.F || a.k || a.dx) return false;
  const FusedChoice chosen = choose_fused(*this, a.g, a.weight, s.r_in, true);
  if (!chosen.refusal.empty()) return false;
  // v in g's dtype with rows at multiples of 16 bytes, as tensor maps need them; no copy if it is so
  const auto in_rows = [&](const Value& v, OptionalTensor& copy) {
    const bool fits = v.type == context_.call().type && v.col == 1 && v.row % 8 == 0 && v.row >= v.cols &&
                      reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
    return fits ? v : packed(copy, v);
  };
  const Value F = read(a.F), Ft{F.data, F.cols, F.rows, F.col, F.row, F.type, F.handle};
  OptionalTensor F_copy, A_copy;
  cuda::GemmLotr q = fused_base(*this, a.g, a.weight, s.r_in, true);
  Output dx = new_output(a.g, s.k);
  k = rank_rows(made.k, s.m, s.r_in);
  q.At = in(in_rows(Ft, F_copy)), q.F = in(in_rows(read(a.A), A_copy)), q.y = out(dx.value), q.u = out(k);
  if (Q && s.r_in <= FUSED_Q_RANK && a.u.flat.col_stride == 1)
    q.u_forward = in(read(a.u)), q.Q = out(Q.value), q.accumulate = Q.add;
  else if (Q)
    add_outer(Q, read(a.g), a.u);  // one more read of g
  run_fused(context_, q, chosen);
  made.dx = std::move(dx.tensor);
  return true;
}

// ---- the launch as an operator ----

inline void check_fused_base(const Check& c, const Arg& x, const Arg& weight, bool backward) {
  c.supported(x), c.dims(x, 2, backward ? "[M, N]" : "[M, K]"), c.dims(weight, 2, "[N, K]");
  c.dtype(weight, x.dtype);
  c.size(weight, backward ? 0 : 1, x.size[1], backward ? "N, as in g" : "K, as in x");
}

inline std::string gemm_lotr_refusal(const Tensor& x, const Tensor& weight, int64_t r, bool backward) {
  const Check c{"lotr::gemm_lotr_refusal"};
  const Arg ax(backward ? "g" : "x", x), aweight("weight", weight);
  c.arguments({&ax, &aweight}), c.supported(ax);
  if (ax.dtype == ScalarType::Double) return "dtype: expected bfloat16 or float16, got float64";
  check_fused_base(c, ax, aweight, backward);
  return choose_fused(CudaProducts(c, ax, 0.0, Arg("seed", OptionalTensor())), ax, aweight, r, backward)
      .refusal;
}

inline std::tuple<Tensor, Tensor> gemm_lotr(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                            const Tensor& At, const Tensor& F, bool backward,
                                            const OptionalTensor& u_forward, const OptionalTensor& Q,
                                            bool accumulate) {
  const Check c{"lotr::gemm_lotr"};
  const Arg ax(backward ? "g" : "x", x), aweight("weight", weight), aAt(backward ? "Ft" : "At", At),
      aF(backward ? "A" : "F", F), abias("bias", bias), au("u_forward", u_forward), aQ("Q", Q);
  c.arguments({&ax, &aweight, &abias, &aAt, &aF, &au, &aQ}, {&aQ});
  check_fused_base(c, ax, aweight, backward);
  for (const Arg* a : {&aAt, &aF})
    c.dims(*a, 2, a == &aAt ? "[r, columns]" : "[columns, r]"), c.dtype(*a, ax.dtype);
  const CudaProducts p(c, ax, 0.0, Arg("seed", OptionalTensor()));
  cuda::GemmLotr q = fused_base(p, ax, aweight, aF.size[1], backward);
  c.size(aF, 0, q.N, "as y has columns");
  c.size(aAt, 0, q.r, "the rank"), c.size(aAt, 1, q.K, "as x has columns");
  if (abias) {
    if (backward) fail(c.op, ": bias: expected None in the backward pass, got a tensor");
    c.dims(abias, 1, "[N]"), c.dtype(abias, ax.dtype), c.size(abias, 0, q.N, "N, as in weight");
  }
  const Tensor packed_bias = bias ? torch::stable::contiguous(*bias) : At;
  if (bias) q.bias = packed_bias.const_data_ptr();
  OptionalTensor u;
  const Arg none("bias", OptionalTensor());
  auto y = p.output(ax, q.N, none, none);
  q.At = p.in(p.read(aAt)), q.F = p.in(p.read(aF)), q.y = p.out(y.value);
  q.u = p.out(p.rank_rows(u, q.M, q.r));
  if (bool(u_forward) != bool(Q)) fail(c.op, ": u_forward and Q: expected both or none, got one");
  if (Q) {
    c.matrix(au, ax.dtype, "[M, r]", q.M, "M, as in g", q.r, "the rank");
    c.matrix(aQ, ScalarType::Float, "[N, r]", q.K, "N, as in g", q.r, "the rank");
    q.u_forward = p.in(p.read(au)), q.Q = p.out(p.gradient(aQ, aQ, 0).value), q.accumulate = accumulate;
  }
  run_fused(p.context(), q, choose_fused(p.context(), q));
  return {y.tensor, *u};
}

}  // namespace lotr
