// The operators on CUDA tensors, one kernel a call: checks (check.h, the same as on the CPU), outputs,
// workspace, launch (cuda_args.h).
#include "cuda_args.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace lotr {
namespace {

Tensor shrink(const Tensor& x, const Tensor& A, double p, const OptionalTensor& seed) {
  const Arg ax("x", x), aA("A", A);
  const Sizes s = check_shrink(ax, aA, p, seed);
  check_rank("lotr::shrink", aA, 1);
  const Context c("lotr::shrink", ax);
  Tensor u = c.empty_rows<2>({s.m, s.r});
  ShrinkParams q{};
  q.x = c.read(ax), q.A = c.read(aA), q.u = c.written(Arg("u", u));
  q.M = s.m, q.K = s.k, q.r = int32_t(s.r);
  q.scale = 1.f, q.dropout = dropout(p, seed);
  c.with_workspace(cuda::shrink_workspace(c.call(), q), [&](void* w) { cuda::shrink(c.call(), q, w); });
  return u;
}

void expand_add_(const Tensor& y, const Tensor& u, const Tensor& F, double p, const OptionalTensor& seed) {
  const Arg ay("y", y), au("u", u), aF("F", F);
  const Sizes s = check_expand({"lotr::expand_add_"}, ay, au, aF, true, p, seed);
  check_rank("lotr::expand_add_", aF, 1);
  const Context c("lotr::expand_add_", ay);
  ExpandParams q{};
  q.y = c.written(ay), q.u = c.read(au), q.F = c.read(aF);
  q.M = s.m, q.N = s.n, q.r = int32_t(s.r), q.dropout = dropout(p, seed);
  c.with_workspace(cuda::expand_add_workspace(c.call(), q),
                   [&](void* w) { cuda::expand_add(c.call(), q, w); });
}

void factor_grad_(const Tensor& acc, const Tensor& x, const Tensor& k, double p, const OptionalTensor& seed) {
  const Arg aacc("acc", acc), ax("x", x), ak("k", k);
  const Sizes s = check_factor_grad(aacc, ax, ak, p, seed);
  check_rank("lotr::factor_grad_", ak, 1);
  const Context c("lotr::factor_grad_", ax);
  FactorGradParams q{};
  q.x = c.read(ax), q.v = c.read(ak), q.D = c.written_floats(aacc), q.D_row = aacc.stride[0],
  q.D_col = aacc.stride[1];
  q.M = s.m, q.K = s.k, q.r = int32_t(s.r), q.accumulate = 1, q.dropout = dropout(p, seed);
  c.with_workspace(cuda::factor_grad_workspace(c.call(), q),
                   [&](void* w) { cuda::factor_grad(c.call(), q, w); });
}

// k = g F and Q (+)= g^T u.
void run_shrink_grad(const Context& c, const Sizes& s, const Arg& k, const Arg& Q, const Arg& g, const Arg& F,
                     const Arg& u, bool accumulate) {
  ShrinkGradParams q{};
  q.g = c.read(g), q.F = c.read(F), q.u = c.read(u), q.k = c.written(k);
  q.Q = c.written_floats(Q), q.Q_row = Q.stride[0], q.Q_col = Q.stride[1], q.accumulate = accumulate;
  q.M = s.m, q.N = s.n, q.r = int32_t(s.r);
  c.with_workspace(cuda::shrink_grad_workspace(c.call(), q),
                   [&](void* w) { cuda::shrink_grad(c.call(), q, w); });
}

std::tuple<Tensor, Tensor> shrink_grad(const Tensor& g, const Tensor& F, const Tensor& u) {
  const Arg ag("g", g), aF("F", F), au("u", u);
  const Sizes s = check_shrink_grad(nullptr, ag, aF, au);
  check_rank("lotr::shrink_grad", aF, 1);
  const Context c("lotr::shrink_grad", ag);
  Tensor k = c.empty_rows<2>({s.m, s.r}), Q = c.empty_float<2>({s.n, s.r});
  run_shrink_grad(c, s, Arg("k", k), Arg("Q", Q), ag, aF, au, false);
  return {k, Q};
}

Tensor shrink_grad_(const Tensor& Q, const Tensor& g, const Tensor& F, const Tensor& u) {
  const Arg aQ("Q", Q), ag("g", g), aF("F", F), au("u", u);
  const Sizes s = check_shrink_grad(&aQ, ag, aF, au);
  check_rank("lotr::shrink_grad_", aF, 1);
  const Context c("lotr::shrink_grad_", ag);
  Tensor k = c.empty_rows<2>({s.m, s.r});
  run_shrink_grad(c, s, Arg("k", k), aQ, ag, aF, au, true);
  return k;
}

Tensor fold(const Tensor& B, const Tensor& cores, double scaling, ScalarType dtype) {
  const Arg aB("B", B), acores("cores", cores);
  const Sizes s = check_fold(aB, acores, scaling, dtype);
  const Context c("lotr::fold", aB);
  check_rank(c.op(), aB, 1), check_rank(c.op(), acores, 1);
  const DType type =
      dtype == ScalarType::Float      ? DType::float32
      : dtype == ScalarType::BFloat16 ? DType::bfloat16
      : dtype == ScalarType::Half
          ? DType::float16
          : (fail(c.op(), ": dtype: expected torch.float32, torch.bfloat16 or torch.float16 on CUDA, got ",
                  dtype_name(dtype)),
             DType::float32);
  Tensor F = c.empty_rows<3>({s.l, s.n, s.r_in}, type);
  FoldParams q{};
  q.B = c.read(aB), q.cores = c.read(acores), q.core_stride = acores.stride[0];
  const Arg aF("F", F);
  q.F = c.written(aF).data, q.F_layer = aF.stride[0], q.F_row = aF.stride[1];
  q.B_type = dtype_of(c.op(), aB), q.core_type = dtype_of(c.op(), acores), q.F_type = type;
  q.N = s.n, q.L = int32_t(s.l), q.r_in = int32_t(s.r_in), q.r_out = int32_t(s.r_out),
  q.scale = float(scaling);
  cuda::fold(c.call(), q);
  return F;
}

Tensor fold_grad(const Tensor& Q, const Tensor& B, const Tensor& cores, double scaling,
                 const OptionalTensor& dB) {
  const Arg aQ("Q", Q), aB("B", B), acores("cores", cores);
  const auto adB = optional_arg("dB", dB);
  const Sizes s = check_fold_grad(aQ, aB, acores, scaling, pointer(adB));
  const Context c("lotr::fold_grad", aQ);
  check_rank(c.op(), aB, 1), check_rank(c.op(), acores, 1);
  Tensor dcores = c.empty_float<3>({s.l, s.r_in, s.r_out});
  FoldGradParams q{};
  q.Q = c.read(aQ), q.Q_stride = aQ.stride[0];
  q.B = c.read(aB), q.cores = c.read(acores), q.core_stride = acores.stride[0];
  if (adB) q.dB = c.written_floats(*adB), q.dB_row = adB->stride[0], q.dB_col = adB->stride[1];
  q.dcores = c.written_floats(Arg("dcores", dcores));
  q.B_type = dtype_of(c.op(), aB), q.core_type = dtype_of(c.op(), acores);
  q.N = s.n, q.L = int32_t(s.l), q.r_in = int32_t(s.r_in), q.r_out = int32_t(s.r_out),
  q.scale = float(scaling);
  c.with_workspace(cuda::fold_grad_workspace(c.call(), q), [&](void* w) { cuda::fold_grad(c.call(), q, w); });
  return dcores;
}

Tensor small_forward_(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& core, const Tensor& B,
                      double scaling) {
  const Arg ay("y", y), ax("x", x), aA("A", A), acore("core", core), aB("B", B);
  const Sizes s = check_small_forward({"lotr::small_forward_"}, ay, ax, aA, acore, aB, true, scaling);
  const Context c("lotr::small_forward_", ax);
  check_rank(c.op(), aA, 1), check_rank(c.op(), aB, 1);
  Tensor u = c.empty_rows<2>({s.m, s.r_in});
  SmallForwardParams q{};
  q.y = c.written(ay), q.x = c.read(ax), q.A = c.read(aA), q.core = c.read(acore), q.B = c.read(aB);
  q.u = c.written(Arg("u", u)), q.M = s.m, q.K = s.k, q.N = s.n;
  q.r_in = int32_t(s.r_in), q.r_out = int32_t(s.r_out), q.scale = float(scaling);
  c.with_workspace(cuda::small_forward_workspace(c.call(), q),
                   [&](void* w) { cuda::small_forward(c.call(), q, w); });
  return u;
}

Tensor small_backward_(const OptionalTensor& dx, const Tensor& g, const OptionalTensor& x, const Tensor& u,
                       const Tensor& A, const Tensor& core, const Tensor& B, double scaling,
                       const OptionalTensor& dA, const OptionalTensor& dB, bool need_core) {
  const auto adx = optional_arg("dx", dx), ax = optional_arg("x", x), adA = optional_arg("dA", dA),
             adB = optional_arg("dB", dB);
  const Arg ag("g", g), au("u", u), aA("A", A), acore("core", core), aB("B", B);
  const Sizes s = check_small_backward(pointer(adx), ag, pointer(ax), au, aA, acore, aB, scaling,
                                       pointer(adA), pointer(adB));
  const Context c("lotr::small_backward_", ag);
  check_rank(c.op(), aA, 1), check_rank(c.op(), aB, 1);
  Tensor dcore = need_core ? c.empty_float<2>({s.r_in, s.r_out}) : c.empty_float<2>({0, 0});
  SmallBackwardParams q{};
  if (adx) q.dx = c.written(*adx);
  q.g = c.read(ag), q.u = c.read(au), q.A = c.read(aA), q.core = c.read(acore), q.B = c.read(aB);
  if (adA) {
    q.x = c.read(*ax);
    q.dA = c.written_floats(*adA), q.dA_row = adA->stride[0], q.dA_col = adA->stride[1];
  }
  if (adB) q.dB = c.written_floats(*adB), q.dB_row = adB->stride[0], q.dB_col = adB->stride[1];
  if (need_core) q.dcore = c.written_floats(Arg("dcore", dcore));
  q.M = s.m, q.K = s.k, q.N = s.n;
  q.r_in = int32_t(s.r_in), q.r_out = int32_t(s.r_out), q.scale = float(scaling);
  c.with_workspace(cuda::small_backward_workspace(c.call(), q),
                   [&](void* w) { cuda::small_backward(c.call(), q, w); });
  return dcore;
}

}  // namespace
}  // namespace lotr

STABLE_TORCH_LIBRARY_IMPL(lotr, CUDA, m)
{
  m.impl("shrink", TORCH_BOX(&lotr::shrink));
  m.impl("expand_add_", TORCH_BOX(&lotr::expand_add_));
  m.impl("factor_grad_", TORCH_BOX(&lotr::factor_grad_));
  m.impl("shrink_grad", TORCH_BOX(&lotr::shrink_grad));
  m.impl("shrink_grad_", TORCH_BOX(&lotr::shrink_grad_));
  m.impl("fold", TORCH_BOX(&lotr::fold));
  m.impl("fold_grad", TORCH_BOX(&lotr::fold_grad));
  m.impl("small_forward_", TORCH_BOX(&lotr::small_forward_));
  m.impl("small_backward_", TORCH_BOX(&lotr::small_backward_));
}
