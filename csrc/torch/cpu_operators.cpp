// The operators of lotr_ext: their schemas, and the CPU front end (checks, outputs, views for the kernels in
// cpu/).
//
// Equations, for activations in T (float32, bfloat16, float16, float64) and sums in acc(T) = float32 (float64
// for float64):
//   shrink        u = drop(x) A                            k = g F of the backward is the same product
//   expand_add_   y += drop(u F^T)                         dx += k A^T too
//   factor_grad_  acc += drop(x)^T k                       over all tokens
//   shrink_grad   k = g F, Q = g^T u                       one read of g
//   shrink_grad_  k = g F, Q += g^T u
//   fold          F_l = scaling B G_l^T
//   fold_grad     dB += scaling sum_l Q_l G_l, l = 0 .. L-1 in this order; dG_l = scaling Q_l^T B
//   small_*       the unfolded form, for few tokens
// Only the LibTorch stable ABI is used: one build runs under torch 2.10 and later. Autograd, fake kernels and
// version counters are registered in Python (lotr_ext/ops), where that ABI has no place for
// them.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "cpu_args.h"

#ifndef LOTR_VERSION
#define LOTR_VERSION "unknown"
#endif
#ifndef LOTR_CUDA_ARCHS
#define LOTR_CUDA_ARCHS ""
#endif

// The module has no Python functions: importing it registers the operators.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef def = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&def);
}

namespace lotr {
namespace {

Tensor shrink(const Tensor& x, const Tensor& A, double p, const OptionalTensor& seed) {
  const Arg ax("x", x), aA("A", A);
  const Sizes s = check_shrink(ax, aA, p, seed);
  Tensor u = empty<2>({s.m, s.r}, ax.dtype);
  cpu::shrink(written(Arg("u", u)), read(ax), read(aA), drop(p, seed));
  return u;
}

void expand_add_(const Tensor& y, const Tensor& u, const Tensor& F, double p, const OptionalTensor& seed) {
  const Arg ay("y", y), au("u", u), aF("F", F);
  check_expand({"lotr::expand_add_"}, ay, au, aF, true, p, seed);
  cpu::expand_add(written(ay), read(au), read(aF), drop(p, seed), {});
}

void factor_grad_(const Tensor& acc, const Tensor& x, const Tensor& k, double p, const OptionalTensor& seed) {
  const Arg aacc("acc", acc), ax("x", x), ak("k", k);
  check_factor_grad(aacc, ax, ak, p, seed);
  cpu::factor_grad(written(aacc), read(ax), read(ak), drop(p, seed), true);
}

std::tuple<Tensor, Tensor> shrink_grad(const Tensor& g, const Tensor& F, const Tensor& u) {
  const Arg ag("g", g), aF("F", F), au("u", u);
  const Sizes s = check_shrink_grad(nullptr, ag, aF, au);
  Tensor k = empty<2>({s.m, s.r}, ag.dtype), Q = empty<2>({s.n, s.r}, acc_dtype(ag.dtype));
  cpu::shrink_grad(written(Arg("k", k)), written(Arg("Q", Q)), read(ag), read(aF), read(au), false);
  return {k, Q};
}

Tensor shrink_grad_(const Tensor& Q, const Tensor& g, const Tensor& F, const Tensor& u) {
  const Arg aQ("Q", Q), ag("g", g), aF("F", F), au("u", u);
  const Sizes s = check_shrink_grad(&aQ, ag, aF, au);
  Tensor k = empty<2>({s.m, s.r}, ag.dtype);
  cpu::shrink_grad(written(Arg("k", k)), written(aQ), read(ag), read(aF), read(au), true);
  return k;
}

Tensor fold(const Tensor& B, const Tensor& cores, double scaling, ScalarType dtype) {
  const Arg aB("B", B), acores("cores", cores);
  const Sizes s = check_fold(aB, acores, scaling, dtype);
  Tensor F = empty<3>({s.l, s.n, s.r_in}, dtype);
  const Arg aF("F", F);
  cpu::fold(written(aF), aF.stride[0], read(aB), read(acores), acores.stride[0], s.l, scaling);
  return F;
}

Tensor fold_grad(const Tensor& Q, const Tensor& B, const Tensor& cores, double scaling,
                 const OptionalTensor& dB) {
  const Arg aQ("Q", Q), aB("B", B), acores("cores", cores);
  const auto adB = optional_arg("dB", dB);
  const Sizes s = check_fold_grad(aQ, aB, acores, scaling, pointer(adB));
  Tensor dcores = empty<3>({s.l, s.r_in, s.r_out}, aQ.dtype);
  const Arg adcores("dcores", dcores);
  cpu::fold_grad(written(adB), written(adcores), adcores.stride[0], read(aQ), aQ.stride[0], read(aB),
                 read(acores), acores.stride[0], s.l, scaling, true);
  return dcores;
}

Tensor small_forward_(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& core, const Tensor& B,
                      double scaling) {
  const Arg ay("y", y), ax("x", x), aA("A", A), acore("core", core), aB("B", B);
  const Sizes s = check_small_forward({"lotr::small_forward_"}, ay, ax, aA, acore, aB, true, scaling);
  Tensor u = empty<2>({s.m, s.r_in}, ax.dtype);
  cpu::small_forward(written(Arg("u", u)), written(ay), read(ax), read(aA), read(acore), read(aB), scaling,
                     {});
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
  Tensor dcore =
      need_core ? empty<2>({s.r_in, s.r_out}, acc_dtype(ag.dtype)) : empty<2>({0, 0}, acc_dtype(ag.dtype));
  cpu::SmallBackward b;
  b.dx = written(adx), b.g = read(ag), b.u = read(au), b.A = read(aA), b.core = read(acore), b.B = read(aB);
  b.dA = written(adA), b.dB = written(adB), b.scaling = scaling;
  if (ax && adA) b.x = read(*ax);
  if (need_core) b.dcore = written(Arg("dcore", dcore));
  cpu::small_backward(b);
  return dcore;
}

// "80;90a-real" -> "80", "90a-real" between quotes.
std::string quoted_list(const std::string& list) {
  std::string out;
  for (size_t at = 0; at < list.size();) {
    const size_t end = std::min(list.find(',', at), list.size());
    out += (out.empty() ? "\"" : ", \"") + list.substr(at, end - at) + "\"";
    at = end + 1;
  }
  return out;
}

std::string info() {
  std::ostringstream s;
  s << "{\"version\": \"" LOTR_VERSION "\", \"torch_target\": \"" << (TORCH_TARGET_VERSION >> 56) << "."
    << ((TORCH_TARGET_VERSION >> 48) & 0xff) << "\", \"cpu\": {\"isa\": \"" << cpu::isa_name()
    << "\"}, \"cuda\": {\"built\": "
#ifdef LOTR_WITH_CUDA
    << "true"
#else
    << "false"
#endif
    << ", \"archs\": [" << quoted_list(LOTR_CUDA_ARCHS) << "]}}";
  return s.str();
}

}  // namespace
}  // namespace lotr

STABLE_TORCH_LIBRARY(lotr, m)
{
  m.def("shrink(Tensor x, Tensor A, float p=0.0, Tensor? seed=None) -> Tensor");
  m.def("expand_add_(Tensor(a!) y, Tensor u, Tensor F, float p=0.0, Tensor? seed=None) -> ()");
  m.def("factor_grad_(Tensor(a!) acc, Tensor x, Tensor k, float p=0.0, Tensor? seed=None) -> ()");
  m.def("shrink_grad(Tensor g, Tensor F, Tensor u) -> (Tensor k, Tensor Q)");
  m.def("shrink_grad_(Tensor(a!) Q, Tensor g, Tensor F, Tensor u) -> Tensor");
  m.def("fold(Tensor B, Tensor cores, float scaling, ScalarType dtype) -> Tensor");
  m.def("fold_grad(Tensor Q, Tensor B, Tensor cores, float scaling, Tensor(a!)? dB) -> Tensor");
  m.def("small_forward_(Tensor(a!) y, Tensor x, Tensor A, Tensor core, Tensor B, float scaling) -> Tensor");
  m.def(
      "small_backward_(Tensor(a!)? dx, Tensor g, Tensor? x, Tensor u, Tensor A, Tensor core, Tensor B, float "
      "scaling, "
      "Tensor(b!)? dA, Tensor(c!)? dB, bool need_core) -> Tensor");
  m.def("info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(lotr, CPU, m)
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

// No tensor argument, so no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(lotr, CompositeExplicitAutograd, m)
{
  m.impl("info", TORCH_BOX(&lotr::info));
}
