// A tensor as kernels see it on the host: the argument of every CPU kernel, and what the launchers
// of the CUDA kernels are filled from. It includes no torch header and has no functions, because
// files that are compiled for several instruction sets include it (cpu/kernels.h).
#pragma once

#include <cstdint>

namespace lotr {

// The element types that kernels exist for. float64 has CPU kernels only.
enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// A matrix [rows, cols] with any strides, which count elements.
struct TensorView {
  void* data = nullptr;  // null: an optional tensor is absent. Not const: outputs are views too
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;
  int64_t col_stride = 0;
  DType dtype = DType::float32;
};

}  // namespace lotr
