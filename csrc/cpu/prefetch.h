// Prefetches of what is multiplied next.
//
// A piece is a rectangle of a tensor. Its rows are too short and too far apart for the hardware's
// prefetcher, so it is prefetched line by line while another piece is multiplied. One line per
// step, because a burst of prefetches would stall the loads of the multiplication.
#pragma once

#include "cpu/tiles.h"

namespace lotr::cpu::LOTR_ISA {

struct Piece {
  const char* row = nullptr;
  int64_t step = 0;   // bytes between rows
  int64_t rows = 0;   // that are left
  int64_t bytes = 0;  // of a row
  int64_t at = 0;     // bytes of the first row that are prefetched

  Piece() = default;
  // A rectangle may extend past the tensor: only its part inside is prefetched.
  Piece(const Rectangle& part) {
    const TensorView& a = part.a;
    if (a.col_stride != 1 || part.i0 >= a.rows || part.c0 >= a.cols) return;
    const int64_t size = element_size(a.dtype);
    row = static_cast<const char*>(a.data) + (part.i0 * a.row_stride + part.c0) * size;
    step = a.row_stride * size;
    bytes = smaller(part.cols, a.cols - part.c0) * size;
    rows = smaller(part.rows, a.rows - part.i0);
  }
  LOTR_INLINE void next() {
    if (rows <= 0) return;
    __builtin_prefetch(row + at, 0, 2);
    at += 64;
    if (at < bytes) return;
    at = 0;
    row += step;
    --rows;
  }
};

// Two pieces, one after the other.
struct Ahead {
  Piece now;
  Piece later;

  // The current one, to be kept in registers while it advances.
  LOTR_INLINE Piece take() {
    if (now.rows <= 0) {
      now = later;
      later.rows = 0;
    }
    return now;
  }
};

}  // namespace lotr::cpu::LOTR_ISA
