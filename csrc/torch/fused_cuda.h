// The adapter's product inside the base product (cuda/sm90/gemm_lotr.h), for sm_90a: in a layer whose strategy
// is FUSED (layer.h), and as an operator for tests and benchmarks.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>

#include "cuda/sm90/gemm_lotr.h"
#include "products_cuda.h"

namespace lotr {

// What the base product says of the problem: x [M, K], weight [N, K]; backward: g [M, K], weight [K, N].
inline cuda::GemmLotr fused_problem(const CudaProducts& p, const Arg& x, const Arg& weight, int64_t r,
                                    bool backward) {
  cuda::GemmLotr q{};
  q.backward = backward;
  q.x = p.in(p.read(x)), q.W = p.in(p.read(weight));
  q.M = x.flat.rows, q.K = x.flat.cols, q.N = weight.size[backward ? 1 : 0], q.r = int32_t(r);
  return q;
}

inline std::string CudaProducts::fused_refusal(const Arg& x, const Arg& weight, int64_t r,
                                               bool backward) const {
  cuda::GemmLotr q = fused_problem(*this, x, weight, r, backward);
  // u, F and y as fused() will have them: in aligned memory, u and F in padded rows
  q.u = q.F = {nullptr, (r + 7) / 8 * 8, 1, Access::vector};
  q.y = {nullptr, q.N, 1, Access::vector};
  return cuda::gemm_lotr_refusal(context_.call(), q);
}

inline void CudaProducts::fused(Output& y, const Arg& x, const Arg& weight, const Arg& bias, const Value& u,
                                const Value& F, bool backward) const {
  const DType type = context_.call().type;
  OptionalTensor u_copy, F_copy, packed_bias;
  // rows in the call's type that start at multiples of 16 bytes, as tensor maps need them
  const auto in_rows = [&](const Value& v, OptionalTensor& copy) {
    const bool fits = v.type == type && v.col == 1 && v.row % 8 == 0 && v.row >= v.cols &&
                      reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
    return in(fits ? v : packed(copy, v));
  };
  cuda::GemmLotr q = fused_problem(*this, x, weight, u.cols, backward);
  q.u = in_rows(u, u_copy), q.F = in_rows(F, F_copy), q.y = out(y.value);
  if (bias) packed_bias = torch::stable::contiguous(*bias.tensor), q.bias = packed_bias->const_data_ptr();
  const std::string refusal = cuda::gemm_lotr_refusal(context_.call(), q);
  if (!refusal.empty())
    fail(context_.op(), ": ", refusal, ". Strategies 0 (two_pass) and 1 (beta) take every layout.");
  cuda::gemm_lotr(context_.call(), q);
}

// ---- the launch as an operator ----

inline void check_fused_base(const Check& c, const Arg& x, const Arg& weight, bool backward) {
  c.supported(x), c.dims(x, 2, backward ? "[M, N]" : "[M, K]"), c.dims(weight, 2, "[N, K]");
  c.dtype(weight, x.dtype);
  c.size(weight, backward ? 0 : 1, x.size[1], backward ? "N, as in g" : "K, as in x");
}

// Why gemm_lotr cannot run for these at rank r, or "".
inline std::string gemm_lotr_refusal(const Tensor& x, const Tensor& weight, int64_t r, bool backward) {
  const Check c{"lotr::gemm_lotr_refusal"};
  const Arg ax(backward ? "g" : "x", x), aweight("weight", weight);
  c.arguments({&ax, &aweight}), c.supported(ax);
  if (ax.dtype == ScalarType::Double) return "dtype: expected bfloat16 or float16, got float64";
  check_fused_base(c, ax, aweight, backward);
  return CudaProducts(c, ax, 0.0, Arg("seed", OptionalTensor())).fused_refusal(ax, aweight, r, backward);
}

// y = x W^T + bias + u F^T; backward: dx = g W + k A^T, with g, k and A for x, u and F.
inline Tensor gemm_lotr(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& u,
                        const Tensor& F, bool backward) {
  const Check c{"lotr::gemm_lotr"};
  const Arg ax(backward ? "g" : "x", x), aweight("weight", weight), abias("bias", bias),
      au(backward ? "k" : "u", u), aF(backward ? "A" : "F", F);
  c.arguments({&ax, &aweight, &abias, &au, &aF});
  check_fused_base(c, ax, aweight, backward);
  const int64_t n = aweight.size[backward ? 1 : 0];
  c.dims(au, 2, "[M, r]"), c.dtype(au, ax.dtype), c.size(au, 0, ax.size[0], backward ? "M, as in g" : "M, as in x");
  c.dims(aF, 2, backward ? "[K, r]" : "[N, r]"), c.factor(aF, ax.dtype);
  c.size(aF, 0, n, "as weight has columns of y"), c.size(aF, 1, au.size[1], "the rank");
  if (abias) {
    if (backward) fail(c.op, ": bias: expected None in the backward pass, got a tensor");
    c.dims(abias, 1, "[N]"), c.dtype(abias, ax.dtype), c.size(abias, 0, n, "N, as in weight");
  }
  const CudaProducts p(c, ax, 0.0, Arg("seed", OptionalTensor()));
  auto y = p.gradient(Arg("dx", OptionalTensor()), ax, n);
  p.fused(y, ax, aweight, abias, p.read(au), p.read(aF), backward);
  return p.result(y);
}

}  // namespace lotr
