// The adapter's product inside the base product (cuda/sm90/gemm_lotr.h), for sm_90a: in a layer whose
// strategy is FUSED (layer.h), and as an operator for tests and benchmarks.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>

#include "cuda/sm90/gemm_lotr.h"
#include "products_cuda.h"

namespace lotr {

#ifndef LOTR_SM90A
// In a build without sm_90a order_of refuses FUSED.
inline bool CudaProducts::fuses(const Output&, const Arg&, const Arg&, const Value&, const Value&,
                                bool) const {
  return false;
}
inline void CudaProducts::fused(Output&, const Arg&, const Arg&, const Value&, const Value&, bool) const {}
#else

// The problem of the base product: x [M, K], weight [N, K]; backward: g [M, K], weight [K, N].
inline cuda::GemmLotr fused_problem(const CudaProducts& p, const Arg& x, const Arg& weight, int64_t r,
                                    bool backward) {
  cuda::GemmLotr q{};
  q.backward = backward;
  q.x = p.in(p.read(x)), q.W = p.in(p.read(weight));
  q.M = x.flat.rows, q.K = x.flat.cols, q.N = weight.size[backward ? 1 : 0], q.r = int32_t(r);
  return q;
}

inline std::string fused_refusal(const CudaProducts& p, const Arg& x, const Arg& weight, int64_t r,
                                 bool backward) {
  cuda::GemmLotr q = fused_problem(p, x, weight, r, backward);
  // u, F and y as fused() will have them: in aligned memory, u and F in padded rows
  q.u = q.F = {nullptr, (r + 7) / 8 * 8, 1, Access::vector};
  q.y = {nullptr, q.N, 1, Access::vector};
  return cuda::gemm_lotr_refusal(p.context().call(), q);
}

inline bool CudaProducts::fuses(const Output&, const Arg& x, const Arg& weight, const Value& u, const Value&,
                                bool backward) const {
  return fused_refusal(*this, x, weight, u.cols, backward).empty();
}

inline void CudaProducts::fused(Output& y, const Arg& x, const Arg& weight, const Value& u, const Value& F,
                                bool backward) const {
  const DType type = context_.call().type;
  // rows in the call's type that start at multiples of 16 bytes, as tensor maps need them
  const auto in_rows = [&](const Value& v, OptionalTensor& copy) {
    const bool fits = v.type == type && v.col == 1 && v.row % 8 == 0 && v.row >= v.cols &&
                      reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
    return in(fits ? v : packed(copy, v));
  };
  OptionalTensor u_copy, F_copy;
  cuda::GemmLotr q = fused_problem(*this, x, weight, u.cols, backward);
  q.u = in_rows(u, u_copy), q.F = in_rows(F, F_copy), q.y = out(y.value);
  q.bias = y.bias.data, q.bias_stride = y.bias.col;
  const std::string refusal = cuda::gemm_lotr_refusal(context_.call(), q);
  if (!refusal.empty())
    fail(context_.op(), ": ", refusal, ". Strategies 0 (two_pass) and 1 (beta) take every layout.");
  cuda::gemm_lotr(context_.call(), q);
}

// ---- the launch as an operator: in the backward pass g, k and A for x, u and F ----

// Why gemm_lotr cannot run for these at rank r, or "".
inline std::string gemm_lotr_refusal(const Tensor& x, const Tensor& weight, int64_t r, bool backward) {
  const Check c{"lotr::gemm_lotr_refusal"};
  const Arg ax(backward ? "g" : "x", x), aweight("weight", weight), none("seed", OptionalTensor());
  c.arguments({&ax, &aweight}), c.supported(ax);
  Sizes(c, ax.dtype, {{ax, As::same, {M, backward ? N : K}}, {aweight, As::same, {N, K}}});
  if (ax.dtype == ScalarType::Double) return "dtype: expected bfloat16 or float16, got float64";
  return fused_refusal(CudaProducts(c, ax, 0.0, none), ax, aweight, r, backward);
}

// y = x W^T + bias + u F^T; backward: dx = g W + k A^T.
inline Tensor gemm_lotr(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& u,
                        const Tensor& F, bool backward) {
  const Check c{"lotr::gemm_lotr"};
  const Arg ax(backward ? "g" : "x", x), aweight("weight", weight), abias("bias", bias),
      au(backward ? "k" : "u", u), aF(backward ? "A" : "F", F), none("seed", OptionalTensor());
  c.arguments({&ax, &aweight, &abias, &au, &aF}), c.supported(ax);
  const Dim of_x = backward ? N : K, of_y = backward ? K : N;
  const Sizes s(c, ax.dtype,
                {{ax, As::same, {M, of_x}},
                 {aweight, As::same, {N, K}},
                 {abias, As::same, {of_y}},
                 {au, As::same, {M, R}},
                 {aF, As::factor, {of_y, R}}});
  if (backward && abias) fail(c.op, ": bias: expected None in the backward pass, got a tensor");
  const CudaProducts p(c, ax, 0.0, none);
  auto y = p.output(ax, s[of_y], abias);
  p.fused(y, ax, aweight, p.read(au), p.read(aF), backward);
  return p.result(y);
}
#endif

}  // namespace lotr
