// Views of a checked argument as torch tensors, without a copy or a call of the dispatcher.
#pragma once

#include <vector>

#include "arg.h"

namespace lotr {

// `of`'s elements as a matrix.
inline Tensor matrix_view(AtenTensorHandle of, int64_t rows, int64_t cols, int64_t row_stride,
                          int64_t col_stride) {
  const int64_t size[] = {rows, cols}, stride[] = {row_stride, col_stride};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(of, 2, size, stride, 0, &handle));  // from of's own offset
  return Tensor(handle);
}
inline Tensor matrix_view(const Arg& a) {
  if (a.dim == 2) return *a.tensor;
  return matrix_view(a.handle, a.flat.rows, a.flat.cols, a.flat.row_stride, a.flat.col_stride);
}
inline Tensor transposed_view(const Arg& a) {
  return matrix_view(a.handle, a.size[1], a.size[0], a.stride[1], a.stride[0]);
}

// A contiguous tensor in another size. Autograd does not see a view, which users could not write into.
inline Tensor contiguous_view(const Tensor& of, const std::vector<int64_t>& size) {
  std::vector<int64_t> stride(size.size(), 1);
  for (size_t i = size.size() - 1; i-- > 0;) stride[i] = stride[i + 1] * size[i + 1];
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(of.get(), int64_t(size.size()), size.data(), stride.data(), 0, &handle));
  return Tensor(handle);
}

// The size of a tensor with like's leading dimensions and `cols` columns.
inline std::vector<int64_t> size_like(const Arg& like, int64_t cols) {
  std::vector<int64_t> size(like.size, like.size + like.dim);
  size.back() = cols;
  return size;
}

inline void* read_data(const Arg& a) {
  const void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(a.handle, &data));
  return const_cast<void*>(data);  // for the matrices of kernels: those that only read do not write it
}
inline void* written_data(const Arg& a) {
  void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(a.handle, &data));
  return data;
}

}  // namespace lotr
