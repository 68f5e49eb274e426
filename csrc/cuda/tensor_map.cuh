// Tensor maps of the operators' matrices, for bulk copies of sm_90a.
#pragma once
#include "params.h"
#include "ptx/sm90.cuh"

namespace lotr::cuda {

// The map of m [rows, cols], whose rows start at multiples of 16 bytes, with boxes of box_cols x box_rows.
template <class T>
ptx::TensorMap tensor_map(const Matrix& m, int64_t rows, int64_t cols, int box_rows, int box_cols = 64) {
  const int64_t row = rows > 1 ? m.row : (cols + 7) / 8 * 8;  // the stride of a single row is anything
  return ptx::tensor_map_2d(static_cast<const T*>(m.data), uint32_t(rows), uint32_t(cols), uint32_t(row),
                            uint32_t(box_rows), uint32_t(box_cols));
}

}  // namespace lotr::cuda
