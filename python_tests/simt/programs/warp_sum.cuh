// The sum over the warp, in every lane, by a butterfly.
#pragma once
#include "cuda/ptx/sm80.cuh"

LOTR_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += lotr::ptx::shfl_xor(value, mask);
  return value;
}
