// Makes tensors without calling the dispatcher: new ones, and views of a checked argument.
#pragma once

#include <array>
#include <vector>

#include "arg.h"

namespace lotr {

// A tensor on `like`'s device, not initialized. Contiguous, except that rows start at multiples of
// `pad` elements.
template <size_t dim>
Tensor empty(const Arg& like, const std::array<int64_t, dim>& size, int32_t dtype_code,
             int64_t pad = 1) {
  std::array<int64_t, dim> stride;
  int64_t step = 1;
  for (size_t i = dim; i-- > 0;) {
    stride[i] = step;
    step *= i + 1 == dim ? (size[i] + pad - 1) / pad * pad : size[i];
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(dim), size.data(), stride.data(),
                                                         dtype_code, like.device_type,
                                                         like.device_index, &handle));
  return Tensor(handle);
}

// A view of `tensor` with other sizes and strides, and the same offset.
inline Tensor view(AtenTensorHandle tensor, int64_t dim, const int64_t* size,
                   const int64_t* stride) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor, dim, size, stride, 0, &handle));
  return Tensor(handle);
}
inline Tensor matrix_view(const Arg& a) {
  if (a.dim == 2) return *a.tensor;
  const int64_t size[] = {a.matrix.rows, a.matrix.cols};
  const int64_t stride[] = {a.matrix.row_stride, a.matrix.col_stride};
  return view(a.handle, 2, size, stride);
}
inline Tensor transposed_view(const Arg& a) {
  const int64_t size[] = {a.size[1], a.size[0]};
  const int64_t stride[] = {a.stride[1], a.stride[0]};
  return view(a.handle, 2, size, stride);
}
// `matrix`, which is new and contiguous, with `like`'s leading dimensions. For autograd it is not a
// view, so users can write into it.
inline Tensor with_leading(const Tensor& matrix, const Arg& like, int64_t cols) {
  if (like.dim == 2) return matrix;
  std::vector<int64_t> size(like.size, like.size + like.dim);
  std::vector<int64_t> stride(size_t(like.dim), 1);
  size.back() = cols;
  for (size_t i = size.size() - 1; i-- > 0;) stride[i] = stride[i + 1] * size[i + 1];
  return view(matrix.get(), like.dim, size.data(), stride.data());
}

// The address of an argument's first element. The cast: TensorView also serves outputs.
inline void* read_data(const Arg& a) {
  const void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(a.handle, &data));
  return const_cast<void*>(data);
}
inline void* write_data(const Arg& a) {
  void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(a.handle, &data));
  return data;
}

// A checked argument [.., cols] as kernels see it, to be read or to be written.
inline TensorView view_of(const Arg& a, void* data) {
  TensorView view = a.matrix;
  view.data = data;
  view.dtype = kernel_dtype(a.dtype);
  return view;
}
inline TensorView read_view(const Arg& a) {
  return view_of(a, read_data(a));
}
inline TensorView write_view(const Arg& a) {
  return view_of(a, write_data(a));
}

}  // namespace lotr
