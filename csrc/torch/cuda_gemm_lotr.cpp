// The base product with the adapter inside (cuda/gemm_lotr.h) as operators, which layer_products.cpp calls:
//
//   gemm_lotr           y = x W^T + bias + u F^T,  u = x A;  backward: dx = g W + k A^T,  k = g F, and up to
//                       rank 16 Q = g^T u for the u of the forward pass
//   fold_transposed     F = s B G^T with F^T and A^T, as that wants them: fold's launch
//   gemm_lotr_refusal   why that cannot run, "" if it can: what tensor maps want of the operands, this GPU's
//                       architecture and room, a workspace of this stream
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "cuda/gemm_lotr.h"
#include "cuda_args.h"

namespace lotr {
namespace {

static_assert(FUSED_Q_RANK == cuda::GEMM_LOTR_FACTOR_RANK);

// The matrices that are always there: x [M, K], weight [N, K]; backward: g [M, K], weight [K, N].
cuda::GemmLotr base_of(const Check& check, const Context& c, const Arg& x, const Arg& weight, int64_t r,
                       bool backward) {
  check.dims(x, 2, backward ? "[M, N]" : "[M, K]"), check.dims(weight, 2, "[N, K]");
  check.dtype(weight, x.dtype);
  check.size(weight, backward ? 0 : 1, x.size[1], backward ? "N, as in g" : "K, as in x");
  cuda::GemmLotr q{};
  q.backward = backward;
  q.x = c.read(x), q.W = c.read(weight);
  q.M = x.size[0], q.K = x.size[1], q.N = weight.size[backward ? 1 : 0], q.r = int32_t(r);
  return q;
}

// "" if it can run; q's other matrices are there or lie as they should.
std::string refusal(const Context& c, const cuda::GemmLotr& q) {
  std::string text = cuda::gemm_lotr_refusal(c.call(), q);
  if (text.empty()) text = cuda::gemm_lotr_obstacle(c.call(), q, cuda::gemm_lotr_plan(c.call(), q));
  if (text.empty() && !cuda::gemm_lotr_workspace_of(c.call().stream, cuda::gemm_lotr_workspace(q.M)))
    text = "workspace: expected one for " + std::to_string(q.M) +
           " rows on this stream, got none: too many rows, or too many streams and graphs have one";
  return text;
}

std::string gemm_lotr_refusal(const Tensor& x, const Tensor& weight, int64_t r, bool backward) {
  const Check check{"lotr::gemm_lotr_refusal"};
  const Arg ax(backward ? "g" : "x", x), aweight("weight", weight);
  check.arguments({&ax, &aweight}), check.supported(ax);
  if (ax.dtype == ScalarType::Double) return "dtype: expected bfloat16 or float16, got float64";
  const Context c(check.op, ax);
  cuda::GemmLotr q = base_of(check, c, ax, aweight, r, backward);
  static const auto* const anywhere = reinterpret_cast<const void*>(uintptr_t(4096));
  q.At = {anywhere, (q.K + 7) / 8 * 8, 1, Access::vector};
  q.F = {anywhere, (r + 7) / 8 * 8, 1, Access::vector};
  q.u = {const_cast<void*>(anywhere), (r + 7) / 8 * 8, 1, Access::vector};
  q.y = {const_cast<void*>(anywhere), q.N, 1, Access::vector};
  return refusal(c, q);
}

std::tuple<Tensor, Tensor, Tensor> fold_transposed(const Tensor& B, const Tensor& core, const Tensor& A,
                                                   double scaling, ScalarType dtype) {
  const Check check{"lotr::fold_transposed"};
  const Arg aB("B", B), acore("core", core), aA("A", A);
  if (!is_half(dtype))
    fail(check.op, ": dtype: expected torch.float16 or torch.bfloat16, got ", dtype_name(dtype));
  check.arguments({&aB, &acore, &aA});
  for (const Arg* a : {&aB, &acore, &aA}) check.supported(*a), check.dims(*a, 2, "a matrix");
  check.size(acore, 1, aB.size[1], "r_out, as in B"), check.size(aA, 1, acore.size[0], "r_in, as in core");
  const Context c(check.op, aB);
  const int64_t n = aB.size[0], k = aA.size[0], r = acore.size[0];
  const DType type = dtype == ScalarType::Half ? DType::float16 : DType::bfloat16;
  Tensor F = c.empty_rows<2>({n, r}, type), Ft = c.empty_rows<2>({r, n}, type),
         At = c.empty_rows<2>({r, k}, type);
  FoldParams p{};
  p.B = c.read(aB), p.cores = c.read(acore), p.A = c.read(aA);
  const MutableMatrix F_out = c.written(Arg("F", F));
  p.F = F_out.data, p.F_row = F_out.row;
  p.Ft = c.written(Arg("Ft", Ft)), p.At = c.written(Arg("At", At));
  p.B_type = dtype_of(check.op, aB), p.core_type = dtype_of(check.op, acore),
  p.A_type = dtype_of(check.op, aA);
  p.F_type = type, p.L = 1, p.N = n, p.K = k, p.r_in = int32_t(r), p.r_out = int32_t(aB.size[1]),
  p.scale = float(scaling);
  cuda::fold(c.call(), p);
  return {F, Ft, At};
}

std::tuple<Tensor, Tensor> gemm_lotr(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                     const Tensor& At, const Tensor& F, bool backward,
                                     const OptionalTensor& u_forward, const OptionalTensor& Q,
                                     bool accumulate) {
  const Check check{"lotr::gemm_lotr"};
  const Arg ax(backward ? "g" : "x", x), aweight("weight", weight), aAt(backward ? "Ft" : "At", At),
      aF(backward ? "A" : "F", F);
  const auto abias = optional_arg("bias", bias), au = optional_arg("u_forward", u_forward),
             aQ = optional_arg("Q", Q);
  check.arguments({&ax, &aweight, pointer(abias), &aAt, &aF, pointer(au), pointer(aQ)}, {pointer(aQ)});
  check.supported(ax);
  const Context c(check.op, ax);
  for (const Arg* a : {&aAt, &aF})
    check.dims(*a, 2, a == &aAt ? "[r, columns]" : "[columns, r]"), check.dtype(*a, ax.dtype);
  cuda::GemmLotr q = base_of(check, c, ax, aweight, aF.size[1], backward);
  check.size(aF, 0, q.N, "as y has columns");
  check.size(aAt, 0, q.r, "the rank"), check.size(aAt, 1, q.K, "as x has columns");
  if (abias) {
    if (backward) fail(check.op, ": bias: expected None in the backward pass, got a tensor");
    check.dims(*abias, 1, "[N]"), check.dtype(*abias, ax.dtype);
    check.size(*abias, 0, q.N, "N, as in weight");
  }
  Tensor packed_bias = bias ? torch::stable::contiguous(*bias) : At;
  if (bias) q.bias = packed_bias.const_data_ptr();
  Tensor y = c.empty<2>({q.M, q.N}), u = c.empty_rows<2>({q.M, int64_t(q.r)});
  q.At = c.read(aAt), q.F = c.read(aF), q.y = c.written(Arg("y", y)), q.u = c.written(Arg("u", u));
  if (bool(u_forward) != bool(Q)) fail(check.op, ": u_forward and Q: expected both or none, got one");
  if (Q) {
    check.dims(*au, 2, "[M, r]"), check.dtype(*au, ax.dtype);
    check.size(*au, 0, q.M, "M, as in g"), check.size(*au, 1, q.r, "the rank");
    check.dims(*aQ, 2, "[N, r]"), check.dtype(*aQ, ScalarType::Float);
    check.size(*aQ, 0, q.K, "N, as in g"), check.size(*aQ, 1, q.r, "the rank");
    q.u_forward = c.read(*au), q.Q = c.written(*aQ), q.accumulate = accumulate;
  }
  const std::string text = refusal(c, q);
  if (!text.empty()) fail(check.op, ": ", text, "; LOTR_STRATEGY=beta runs");
  const size_t bytes = cuda::gemm_lotr_workspace(q.M);
  const cuda::GemmLotrPlan plan = cuda::gemm_lotr_plan(c.call(), q);
  const size_t partial_bytes = cuda::gemm_lotr_partial(q, plan);
  c.with_workspace(partial_bytes, [&](void* partial) {
    cuda::gemm_lotr(c.call(), q, plan, cuda::gemm_lotr_workspace_of(c.call().stream, bytes), bytes, partial,
                    partial_bytes);
  });
  return {y, u};
}

}  // namespace
}  // namespace lotr

STABLE_TORCH_LIBRARY_FRAGMENT(lotr, m) {
  m.def(
      "gemm_lotr(Tensor x, Tensor weight, Tensor? bias, Tensor At, Tensor F, bool backward, "
      "Tensor? u_forward=None, Tensor(a!)? Q=None, bool accumulate=False) -> (Tensor y, Tensor u)");
  m.def(
      "fold_transposed(Tensor B, Tensor core, Tensor A, float scaling, ScalarType dtype) "
      "-> (Tensor F, Tensor Ft, Tensor At)");
  m.def("gemm_lotr_refusal(Tensor x, Tensor weight, int r, bool backward) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(lotr, CUDA, m)
{
  m.impl("gemm_lotr", TORCH_BOX(&lotr::gemm_lotr));
  m.impl("fold_transposed", TORCH_BOX(&lotr::fold_transposed));
  m.impl("gemm_lotr_refusal", TORCH_BOX(&lotr::gemm_lotr_refusal));
}
