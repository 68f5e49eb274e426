// Random bits of dropout: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
// 3", 2011). The mask of an element depends only on its place in the matrix and on the seed, so
// the backward pass, another tiling, the CPU and the GPU all draw the same mask.
#pragma once
#include "../params.h"
#include "../ptx/sm80.cuh"

namespace lotr::tile {

// One bit for each of the four elements 4 * quad .. 4 * quad + 3: set where the element is kept.
LOTR_DEVICE uint32_t philox_keep4(uint64_t seed, uint64_t quad, uint32_t threshold) {
  uint32_t c0 = uint32_t(quad), c1 = uint32_t(quad >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0;
    const uint64_t p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return uint32_t(c0 >= threshold) | uint32_t(c1 >= threshold) << 1 |
         uint32_t(c2 >= threshold) << 2 | uint32_t(c3 >= threshold) << 3;
}

// Bits of the elements first .. first + N - 1. One quad after another, which takes few of the
// kernel's registers.
template <int N>
LOTR_DEVICE uint32_t philox_keep(uint64_t seed, uint64_t first, uint32_t threshold) {
  const int shift = int(first & 3);
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; 4 * i < shift + N; ++i)
    bits |= philox_keep4(seed, first / 4 + i, threshold) << (4 * i);
  return bits >> shift & ((1u << N) - 1);
}

}  // namespace lotr::tile
