#pragma once
#include <pybind11/pybind11.h>

namespace lotr::simt {

void define_rows(pybind11::module_& m);

}  // namespace lotr::simt
