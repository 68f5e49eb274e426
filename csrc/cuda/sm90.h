// What the kernels by wgmma that read their matrices by bulk copies ask for alike.
#pragma once
#include "launchers.h"

namespace lotr::cuda {

// Whether the device, the type and the rank are such a kernel's, and there are as many rows as its tile has.
inline bool wgmma_takes(const Call& call, int64_t r, int64_t most_rank, int64_t rows, int64_t tile) {
  return call.wgmma && !call.off.wgmma && !call.off.cluster && call.type != DType::float32 &&
         r <= most_rank && rows >= tile;
}

// Whether bulk copies can read m [rows, cols], whose rows start at multiples of 16 bytes: they do not count
// beyond 2^30 elements here, and no row may begin before the one ahead of it has ended, as in one that is
// expanded.
inline bool bulk_copies_read(const Matrix& m, int64_t rows, int64_t cols) {
  constexpr int64_t MOST = int64_t(1) << 30;
  return rows <= MOST && cols <= MOST && (rows <= 1 || (m.row >= cols && m.row <= MOST));
}

}  // namespace lotr::cuda
