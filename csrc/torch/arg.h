// One argument of an operator: the properties of a tensor that checks and kernels read.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "tensor_view.h"

namespace lotr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A plain exception instead of STD_TORCH_CHECK, whose message starts with a source file and line.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A dtype of arguments. code: its number in libtorch's C functions.
struct DtypeInfo {
  ScalarType type;
  const char* name;
  int32_t code;
  int64_t bytes;  // per element; 0 for a dtype that no argument may have
};
inline const std::array<DtypeInfo, 6>& dtypes() {
  static const std::array<DtypeInfo, 6> all{
      {{ScalarType::Float, "torch.float32", aoti_torch_dtype_float32(), 4},
       {ScalarType::BFloat16, "torch.bfloat16", aoti_torch_dtype_bfloat16(), 2},
       {ScalarType::Half, "torch.float16", aoti_torch_dtype_float16(), 2},
       {ScalarType::Double, "torch.float64", aoti_torch_dtype_float64(), 8},
       {ScalarType::Long, "torch.int64", aoti_torch_dtype_int64(), 8},
       {ScalarType::Int, "torch.int32", aoti_torch_dtype_int32(), 4}}};
  return all;
}
// The row of a dtype. One that is not in the table has torch's name, for errors: Short, Byte, ..
inline DtypeInfo dtype_info(ScalarType type) {
  for (const DtypeInfo& info : dtypes())
    if (info.type == type) return info;
  return {type, torch::headeronly::toString(type), int32_t(type), 0};
}
// The dtype of a tensor. Unlike Tensor::scalar_type it accepts dtypes outside the table.
inline DtypeInfo dtype_info(AtenTensorHandle t) {
  int32_t code = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &code));
  for (const DtypeInfo& info : dtypes())
    if (info.code == code) return info;
  return dtype_info(ScalarType(code));
}

inline const char* device_name(int32_t type) {
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  if (type == aoti_torch_device_type_cuda()) return "cuda";
  if (type == aoti_torch_device_type_meta()) return "meta";
  return "another device";
}

inline bool is_half(ScalarType t) {
  return t == ScalarType::BFloat16 || t == ScalarType::Half;
}
inline bool is_supported(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || is_half(t);
}
inline DType kernel_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::Double:
      return DType::float64;
    default:
      fail("lotr: expected a dtype that kernels exist for, got ", torch::headeronly::toString(t));
  }
}
// The dtype of sums: float32, or float64 for float64.
inline ScalarType acc_dtype(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// One argument of an operator, read once: each read is a call into libtorch.
struct Arg {
  const char* name;
  const Tensor* tensor = nullptr;  // null: an optional argument that is not given
  AtenTensorHandle handle = nullptr;
  // Undefined: Python passed None for an argument that is not optional. The fields below are unset.
  ScalarType dtype = ScalarType::Undefined;
  int64_t dim = 0;
  const int64_t* size = nullptr;    // borrowed from the tensor
  const int64_t* stride = nullptr;  // borrowed from the tensor, in elements
  int32_t device_type = 0;
  int32_t device_index = 0;
  TensorView matrix;  // [.., cols] as [rows, cols]; view_of fills in data and dtype
  // The last leading dimension whose stride is not the stride times the size of the next one, or
  // -1 if all rows have one common stride.
  int64_t split = -1;

  explicit Arg(const char* name) : name(name) {}  // an argument that is not given (yet)
  Arg(const char* name, const Tensor& t) : name(name) { set(t); }
  Arg(const char* name, const OptionalTensor& t) : name(name) { set(t); }
  explicit operator bool() const { return tensor; }

  void set(const OptionalTensor& t) {
    if (t) set(*t);
  }
  void set(const Tensor& t) {
    tensor = &t;
    handle = t.get();
    dtype = dtype_info(handle).type;
    if (dtype == ScalarType::Undefined) return;
    dim = t.dim();
    int64_t* borrowed = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &borrowed));
    size = borrowed;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &borrowed));
    stride = borrowed;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index));
    if (dim) flatten();
  }

  std::string shape() const {
    std::ostringstream s;
    s << "[";
    for (int64_t i = 0; i < dim; ++i) s << (i ? ", " : "") << size[i];
    s << "]";
    return s.str();
  }

 private:
  // Finds the matrix, or the split. Example: a tensor [4, 3, 8] with the strides (30, 10, 1) is 12
  // rows that are 10 apart. With (40, 10, 1), as x[:, :3, :8] of [4, 4, 10] has, it is split at 0.
  void flatten() {
    matrix.cols = size[dim - 1];
    matrix.col_stride = stride[dim - 1];
    matrix.rows = 1;
    for (int64_t i = 0; i < dim - 1; ++i) matrix.rows *= size[i];
    int64_t expected = -1;  // stride of the next dimension, once a dimension has more than one row
    for (int64_t i = dim - 2; i >= 0 && matrix.rows; --i) {
      if (size[i] == 1) continue;
      if (expected < 0)
        matrix.row_stride = stride[i];
      else if (stride[i] != expected && split < 0)
        split = i;
      expected = stride[i] * size[i];
    }
    if (matrix.rows <= 1) matrix.row_stride = matrix.cols;  // there is no second row: as if dense
  }
};

}  // namespace lotr
