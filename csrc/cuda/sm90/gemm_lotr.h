// The base product with the adapter's product inside (gemm_lotr.cuh), without torch: raw pointers
// and a stream.  For sm_90a.
//
//   forward   y = x W^T + bias + u F^T        backward   dx = g W + k A^T
#pragma once
#include <string>

#include "../launch.h"

namespace lotr::cuda {

constexpr int GEMM_LOTR_MAX_RANK = 128;

// One direction; in the backward pass read x, W, u, F and y as g, W, k, A and dx.  N and K are the
// extents of y's and x's rows, so in the backward pass N is in and K is out.
struct GemmLotr {
  bool backward;
  Matrix y;          // [M, N]
  Matrix x;          // [M, K]
  Matrix W;          // [N, K]; backward: [K, N], so the same matrix in memory
  const void* bias;  // [N], or null
  int64_t bias_stride;
  Matrix u;  // [M, r]
  Matrix F;  // [N, r]
  int64_t M, N, K;
  int32_t r;
};

// Why the kernel or the current device cannot run it (name, expected, got), or nothing.  Reads no
// memory.
std::string gemm_lotr_refusal(const Call& call, const GemmLotr& q);

// One launch.  Throws std::invalid_argument where gemm_lotr_refusal gives a reason.
void gemm_lotr(const Call& call, const GemmLotr& q);

}  // namespace lotr::cuda
