// What the kernels by wgmma that read their matrices by bulk copies ask for alike.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "launch.h"

namespace lotr::cuda {

// Whether the device, the type and the rank are such a kernel's, there are as many rows as its tile has, and
// bulk copies count as far as these extents and strides.
inline bool wgmma_takes(const Call& call, int64_t r, int64_t most_rank, int64_t rows, int64_t tile,
                        std::initializer_list<int64_t> elements) {
  return call.wgmma && call.type != DType::float32 && r <= most_rank && rows >= tile &&
         std::max(elements) <= int64_t(1) << 30;
}

}  // namespace lotr::cuda
