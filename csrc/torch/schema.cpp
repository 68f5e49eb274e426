// The schemas of all operators, for every device, and the operator info, which describes the build.
// The Python module has no functions: importing it registers the operators.
//
// For activations in T (float32, bfloat16, float16, float64) and sums in acc(T) = float32 (float64
// for float64):
//   shrink        u = drop(x) A
//   expand        y + u F^T                                expand_add_: y += drop(u F^T)
//   fold          F = s B G^T
//   row_core            h_i = s u_t(i) G_c(i)
//   row_core_backward   du_t = s sum over the rows of t of g_i G_c(i)^T
//                       dG_c = s sum over the rows of c of u_t(i)^T g_i, in acc(T)
//
// row_core: c(i) is index [rows], with -1 for a row without a core, or follows from offs [cores]:
// where the rows of each core end; rows past the last end have no core. t(i) is tokens [rows], or i
// without tokens. h is zero for a row without a core, which has no gradient.
//
// A layer in one direction is one operator (layer.h), y = x W^T + bias + u F^T:
//   layer_forward                starts at x:  u = drop(x) A,  F = s B G^T
//   layer_forward_few_tokens     starts at x:  u = x A, and h B^T with h = s u G in place of u F^T
//   layer_forward_projected      starts at u:  F = s B G^T
//   layer_forward_rows           starts at h:  h B^T in place of u F^T
//
// Each backward computes a gradient if the argument "if given" is given (or true), and adds it to
// the argument "added to" if that is given, else returns it:
//
//   operator                     if given    gradient                added to    else returned as
//   layer_backward_,             weight      dx = g W + drop(du A^T)             dx
//   layer_backward_few_tokens_   x           dA = drop(x)^T du       dA          dA
//                                need_B      dB = s Q G, Q = g^T u   dB          dB
//                                need_core   dG = s Q^T B                        dcore
//   layer_backward_projected_    weight      dx = g W                dx          dx
//                                F           du = g F, plus a given du           du
//                                need_B, need_core: as above
//   layer_backward_rows_         weight      dx = g W                dx          dx
//                                need_h      dh = g B                            dh
//                                need_B      dB = g^T h              dB          dB, in acc(T)
//   shrink_backward_             dx, A       dx += drop(du A^T)      dx
//                                x           dA = drop(x)^T du       dA          dA, in acc(T)
//
// New dA, dB and dcore have the dtype of the factors if these share one, else acc(T). A dA or dB
// that is added to has acc(T); dx and du have T.
//
// Only the LibTorch stable ABI is used: one build runs under torch 2.10 and later. Autograd, fake
// kernels and version counters are registered in Python (lotr_ext/core/operators.py), because
// that ABI cannot register them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <string>

#include "cpu/kernels.h"

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef def = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&def);
}

namespace lotr {
namespace {

std::string info() {
  std::ostringstream json;
  // TORCH_TARGET_VERSION has the major version in its highest byte, then the minor one.
  json << "{\"version\": \"" LOTR_VERSION "\", \"torch_target\": \"" << (TORCH_TARGET_VERSION >> 56)
       << "." << ((TORCH_TARGET_VERSION >> 48) & 0xff) << "\", \"cpu\": {\"isa\": \""
       << cpu::isa_name() << "\"}, \"cuda\": {\"built\": "
#ifdef LOTR_WITH_CUDA
       << "true, \"archs\": \"" LOTR_CUDA_ARCHS "\"}}";
#else
       << "false, \"archs\": \"\"}}";
#endif
  return json.str();
}

}  // namespace
}  // namespace lotr

// No tensor argument, so no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(lotr, CompositeExplicitAutograd, m)
{
  m.impl("info", TORCH_BOX(&lotr::info));
}

STABLE_TORCH_LIBRARY(lotr, m)
{
  m.def("info() -> str");
  m.def("shrink(Tensor x, Tensor A, float p=0.0, Tensor? seed=None) -> Tensor u");
  m.def("expand_add_(Tensor(a!) y, Tensor u, Tensor F, float p=0.0, Tensor? seed=None) -> ()");
  m.def("expand(Tensor y, Tensor u, Tensor F) -> Tensor sum");
  m.def("fold(Tensor B, Tensor core, float scaling, ScalarType dtype) -> Tensor F");
  m.def(
      "row_core(Tensor u, Tensor cores, Tensor? index, Tensor? offs, Tensor? tokens, "
      "float scaling) -> Tensor h");
  m.def(
      "row_core_backward(Tensor g, Tensor u, Tensor cores, Tensor? index, Tensor? offs, "
      "Tensor? tokens, float scaling, bool need_u, bool need_cores) -> (Tensor du, Tensor dcores)");

  m.def(
      "layer_forward(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor core, "
      "float scaling, int strategy, float p=0.0, Tensor? seed=None) "
      "-> (Tensor y, Tensor u, Tensor F)");
  m.def(
      "layer_forward_few_tokens(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, "
      "Tensor core, float scaling, int strategy) -> (Tensor y, Tensor u)");
  m.def(
      "layer_forward_projected(Tensor x, Tensor weight, Tensor? bias, Tensor u, Tensor B, "
      "Tensor core, float scaling, int strategy) -> (Tensor y, Tensor F)");
  m.def(
      "layer_forward_rows(Tensor x, Tensor weight, Tensor? bias, Tensor h, Tensor B, "
      "int strategy) -> Tensor y");

  // A gradient that is not returned is an undefined tensor, as in ATen's own backward operators,
  // and None in Python: torch.compile does not support operators that write and return "Tensor?".
  m.def(
      "layer_backward_(Tensor g, Tensor? weight, Tensor? x, Tensor u, Tensor A, Tensor F, "
      "Tensor B, Tensor core, float scaling, int strategy, Tensor(a!)? dA, Tensor(b!)? dB, "
      "bool need_B, bool need_core, float p=0.0, Tensor? seed=None) "
      "-> (Tensor dx, Tensor dA, Tensor dB, Tensor dcore)");
  m.def(
      "layer_backward_few_tokens_(Tensor g, Tensor? weight, Tensor? x, Tensor u, Tensor A, "
      "Tensor B, Tensor core, float scaling, int strategy, Tensor(a!)? dA, Tensor(b!)? dB, "
      "bool need_B, bool need_core) -> (Tensor dx, Tensor dA, Tensor dB, Tensor dcore)");
  m.def(
      "layer_backward_projected_(Tensor g, Tensor? weight, Tensor u, Tensor? F, Tensor B, "
      "Tensor core, float scaling, Tensor? du, Tensor(a!)? dx, Tensor(b!)? dB, bool need_B, "
      "bool need_core) -> (Tensor dx, Tensor du, Tensor dB, Tensor dcore)");
  m.def(
      "layer_backward_rows_(Tensor g, Tensor? weight, Tensor h, Tensor B, Tensor(a!)? dx, "
      "Tensor(b!)? dB, bool need_h, bool need_B) -> (Tensor dx, Tensor dh, Tensor dB)");
  m.def(
      "shrink_backward_(Tensor du, Tensor(a!)? dx, Tensor? x, Tensor? A, Tensor(b!)? dA, "
      "float p=0.0, Tensor? seed=None) -> Tensor dA");
#ifdef LOTR_WITH_CUDA
  m.def("cuda_versions() -> (int runtime, int driver)");
  m.def("cuda_plans(str op, int M, int N, int r, int device) -> str");
  m.def("gemm_lotr_refusal(int K, int N, int r, ScalarType dtype, int device) -> str");
#endif
}
