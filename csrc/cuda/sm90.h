// The common requirements of the wgmma kernels that read their matrices by bulk copies.
#pragma once
#include "launchers.h"

namespace lotr::cuda {

// Whether such a kernel supports the device, the type and the rank, and there are at least its tile's rows.
inline bool wgmma_takes(const Call& call, int64_t r, int64_t most_rank, int64_t rows, int64_t tile) {
  return call.wgmma && !call.off.wgmma && !call.off.cluster && call.type != DType::float32 &&
         r <= most_rank && rows >= tile;
}

// Whether bulk copies can read m [rows, cols], whose rows start at multiples of 16 bytes: at most 2^30
// elements in a direction, and rows that do not overlap, as those of an expanded tensor do.
inline bool bulk_copies_read(const Matrix& m, int64_t rows, int64_t cols) {
  constexpr int64_t MOST = int64_t(1) << 30;
  return rows <= MOST && cols <= MOST && (rows <= 1 || (m.row >= cols && m.row <= MOST));
}

}  // namespace lotr::cuda
