// The Python module. It has no functions: importing it registers the operators. The operator info describes
// the build.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
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

// "80,90a-real" -> "80", "90a-real" between quotes.
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

// No tensor argument, so no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(lotr, CompositeExplicitAutograd, m)
{
  m.impl("info", TORCH_BOX(&lotr::info));
}
