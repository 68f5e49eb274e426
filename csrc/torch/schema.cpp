// The schemas of all operators, for every device, and the operator info, which describes the build.
// The Python module has no functions: importing it registers the operators.
//
// For activations in T (float32, bfloat16, float16, float64) and sums in acc(T) = float32 (float64
// for float64):
//   shrink        u = drop(x) A
//   expand_add_   y += drop(u F^T)                         expand: u F^T onto a copy of y
//   fold          F = scaling B G^T
//   layer_*, shrink_backward_                              a direction of a layer, see layer.h
//   row_core            h_i = scaling u_t(i) G_c(i)
//   row_core_backward   du_t = scaling sum over the rows of t of g_i G_c(i)^T
//                       dG_c = scaling sum over the rows of c of u_t(i)^T g_i, in acc(T)
//
// row_core: index [rows] is c(i), or -1 for a row without a core; or offs [c]: where the rows of
// each core end, and the rows behind the last have none. tokens [rows]: t(i), else i. h is zero for
// a row without a core, which has no gradient.
//
// Only the LibTorch stable ABI is used: one build runs under torch 2.10 and later. Autograd, fake
// kernels and version counters are registered in Python (lotr_ext/core/operators.py), where that
// ABI has no place for them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <string>

#include "cpu/kernels.h"

#ifndef LOTR_VERSION
#define LOTR_VERSION "unknown"
#endif
#ifndef LOTR_CUDA_ARCHS
#define LOTR_CUDA_ARCHS ""
#endif

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef def = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&def);
}

namespace lotr {
namespace {

std::string info() {
  std::ostringstream s;
  s << "{\"version\": \"" LOTR_VERSION "\", \"torch_target\": \"" << (TORCH_TARGET_VERSION >> 56)
    << "." << ((TORCH_TARGET_VERSION >> 48) & 0xff) << "\", \"cpu\": {\"isa\": \""
    << cpu::isa_name() << "\"}, \"cuda\": {\"built\": "
#ifdef LOTR_WITH_CUDA
    << "true"
#else
    << "false"
#endif
    << ", \"archs\": \"" LOTR_CUDA_ARCHS "\"}}";
  return s.str();
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
  m.def("shrink(Tensor x, Tensor A, float p=0.0, Tensor? seed=None) -> Tensor");
  m.def("expand_add_(Tensor(a!) y, Tensor u, Tensor F, float p=0.0, Tensor? seed=None) -> ()");
  m.def("expand(Tensor y, Tensor u, Tensor F) -> Tensor");
  m.def("fold(Tensor B, Tensor core, float scaling, ScalarType dtype) -> Tensor");
  m.def(
      "row_core(Tensor u, Tensor cores, Tensor? index, Tensor? offs, Tensor? tokens, float "
      "scaling) -> "
      "Tensor");
  m.def(
      "row_core_backward(Tensor g, Tensor u, Tensor cores, Tensor? index, Tensor? offs, Tensor? "
      "tokens, "
      "float scaling, bool need_u, bool need_cores) -> (Tensor du, Tensor dcores)");

  // The forward and backward of a layer. A gradient that was not requested is an undefined tensor,
  // as in ATen's own backward operators, and None in Python: torch.compile has no support for
  // operators that write and return "Tensor?".
  m.def(
      "layer_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? A, Tensor B, Tensor core, "
      "float scaling, "
      "int strategy, Tensor? u=None, Tensor? F=None, float p=0.0, Tensor? seed=None) "
      "-> (Tensor y, Tensor? u, Tensor? F)");
  m.def(
      "layer_backward_(Tensor g, Tensor? weight, Tensor? x, Tensor? u, Tensor? A, Tensor? F, "
      "Tensor B, "
      "Tensor "
      "core, float scaling, int strategy, Tensor? k, Tensor(a!)? dx, Tensor(b!)? Q, Tensor(c!)? "
      "dA, "
      "Tensor(d!)? dB, bool need_B, bool need_core, float p=0.0, Tensor? seed=None) "
      "-> (Tensor dx, Tensor k, Tensor dA, Tensor dB, Tensor dcore)");
  m.def(
      "shrink_backward_(Tensor k, Tensor(a!)? dx, Tensor? x, Tensor? A, Tensor(b!)? dA, float "
      "p=0.0, Tensor? "
      "seed=None) -> Tensor dA");
#ifdef LOTR_WITH_CUDA
  m.def("cuda_versions() -> (int runtime, int driver)");
  m.def("cuda_plans(str op, int M, int N, int r, int device) -> str");
#endif
}
