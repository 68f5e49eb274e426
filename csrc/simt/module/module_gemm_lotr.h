#pragma once
#include <pybind11/pybind11.h>

namespace lotr::simt {

void define_gemm_lotr(pybind11::module_& m);

}  // namespace lotr::simt
