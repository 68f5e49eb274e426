// What a CPU front end makes of an operator's arguments: matrices for the kernels in cpu/, and new outputs.
#pragma once

#include <array>

#include "check.h"
#include "cpu/kernels.h"

namespace lotr {

inline cpu::Dtype cpu_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return cpu::Dtype::f32;
    case ScalarType::Double:
      return cpu::Dtype::f64;
    case ScalarType::BFloat16:
      return cpu::Dtype::bf16;
    case ScalarType::Half:
      return cpu::Dtype::f16;
    default:
      fail("lotr: dtype ", dtype_name(t), " has no CPU kernel");
  }
}

inline int32_t dtype_code(ScalarType t) {
  return t == ScalarType::Float      ? aoti_torch_dtype_float32()
         : t == ScalarType::Double   ? aoti_torch_dtype_float64()
         : t == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                     : aoti_torch_dtype_float16();
}

inline void* read_data(const Arg& a) {
  const void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(a.handle, &data));
  return const_cast<void*>(data);  // for a Mat, which kernels that only read do not write
}

// A view of the last two dimensions of a checked argument.
inline cpu::Mat read(const Arg& a) {
  const int64_t* size = a.size + a.dim - 2;
  const int64_t* stride = a.stride + a.dim - 2;
  return {read_data(a), size[0], size[1], stride[0], stride[1], cpu_dtype(a.dtype)};
}

inline cpu::Mat written(const Arg& a) {
  cpu::Mat m = read(a);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(a.handle, &m.data));
  return m;
}

// A contiguous CPU tensor, not initialised. The C function underneath torch::stable::empty, without its pass
// through the dispatcher. Sizes: a std::array or std::vector of int64_t.
template <typename Sizes>
Tensor empty_of(const Sizes& size, ScalarType dtype) {
  Sizes stride = size;
  int64_t step = 1;
  for (size_t i = size.size(); i-- > 0; step *= size[i]) stride[i] = step;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), stride.data(),
                                                         dtype_code(dtype), aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}
template <size_t dim>
Tensor empty(const std::array<int64_t, dim>& size, ScalarType dtype) {
  return empty_of(size, dtype);
}

// A new matrix [rows, cols], to be written.
inline cpu::Mat make(OptionalTensor& made, int64_t rows, int64_t cols, ScalarType dtype) {
  made = empty<2>({rows, cols}, dtype);
  return {made->mutable_data_ptr(), rows, cols, cols, 1, cpu_dtype(dtype)};
}

inline cpu::Drop drop(double p, const OptionalTensor& seed) {
  cpu::Drop d;
  if (p == 0.0) return d;
  d.on = true;
  d.threshold = uint32_t(p * 4294967296.0);
  d.scale = 1.0 / (1.0 - p);
  d.seed = uint64_t(*static_cast<const int64_t*>(seed->const_data_ptr()));
  return d;
}

inline cpu::Mat written(const std::optional<Arg>& a) {
  return a ? written(*a) : cpu::Mat{};
}

}  // namespace lotr
