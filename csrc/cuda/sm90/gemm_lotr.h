// The base product with the adapter's product in the same launch (gemm_lotr.cuh), without torch:
// raw pointers and a stream. For sm_90a.
//
//   forward   y = x W^T + bias + u F^T        backward   dx = g W + du A^T
#pragma once
#include <string>

#include "../launch.h"

namespace lotr::cuda {

constexpr int GEMM_LOTR_MAX_RANK = 128;

// One direction. In the backward pass x, W, u, F and y are g, W, du, A and dx. N and K are the
// columns of y and x, so in the backward pass N is in_features and K is out_features.
struct GemmLotr {
  bool backward;
  Matrix y;          // [M, N]
  Matrix x;          // [M, K]
  Matrix W;          // [N, K]; backward: [K, N]: the same matrix in memory
  const void* bias;  // [N], or null for zeros
  int64_t bias_stride;
  Matrix u;  // [M, r]
  Matrix F;  // [N, r]
  int64_t M, N, K;
  int32_t r;
};

// Returns why the kernel or the current device cannot run the problem (name, expected, got), or an
// empty string. Reads no memory.
std::string gemm_lotr_refusal(const Call& call, const GemmLotr& problem);

// One launch. Throws std::invalid_argument if gemm_lotr_refusal returns a reason.
void gemm_lotr(const Call& call, const GemmLotr& problem);

}  // namespace lotr::cuda
