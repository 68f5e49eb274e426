// Dropout masks: philox4x32-10, a vector of counters at once. The same bits as on a GPU
// (csrc/cuda/tile/philox.cuh).
//
//   element e = i * cols + j is kept iff
//   philox(key = seed, counter = (low and high half of e / 4, 0, 0))[e % 4] >= threshold
#pragma once

#include "cpu/vec.h"

namespace lotr::cpu::LOTR_ISA {

typedef VecOf<uint64_t>::type vq;
constexpr int kCounters = LOTR_VB / 8;         // counters of one batch: one in each 64-bit lane
constexpr int kMaskSlack = 4 + 4 * kCounters;  // room a mask buffer needs beyond its elements

// The product of the low halves of the lanes.
LOTR_INLINE vq multiply_low(vq a, uint32_t b) {
#if LOTR_VB == 64 && defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif LOTR_VB == 32 && defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif LOTR_VB == 16 && defined(__SSE2__)
  return (vq)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffull) * uint64_t(b);
#endif
}

// Lanes of a and b in turn: the even ones (odd = 0) or the odd ones (odd = 1) of both.
template <int odd, int... I>
LOTR_INLINE vq every_other(vq a, vq b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I % 2) * kCounters + I / 2 * 2 + odd)...);
}

// keep[0 .. n + kMaskSlack): all ones where an element is kept, else 0. Returns e0's place.
inline const uint32_t* keep_mask(uint32_t* keep, uint64_t e0, int64_t n, uint64_t seed,
                                 uint32_t threshold) {
  const uint64_t q0 = e0 / 4;
  const int64_t counters = int64_t((e0 + uint64_t(n) + 3) / 4 - q0);
  // Lane order: the even lanes hold the first half of the batch, the odd ones the second, so that
  // interleaving 64-bit halves below puts the numbers in element order.
  vq lane;
  for (int i = 0; i < kCounters; ++i) lane[i] = uint64_t(i / 2 + (i % 2) * (kCounters / 2));
  for (int64_t q = 0; q < counters; q += kCounters) {
    const vq counter = lane + (q0 + uint64_t(q));
    // Lanes are 64 bits wide and only their low halves count.
    vq c0 = counter;
    vq c1 = counter >> 32;
    vq c2 = vq{};
    vq c3 = vq{};
    uint32_t k0 = uint32_t(seed);
    uint32_t k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const vq p0 = multiply_low(c0, 0xD2511F53u);
      const vq p1 = multiply_low(c2, 0xCD9E8D57u);
      c0 = (p1 >> 32) ^ c1 ^ uint64_t(k0);
      c2 = (p0 >> 32) ^ c3 ^ uint64_t(k1);
      c1 = p1;
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const vq first = (c0 & 0xffffffffull) | (c1 << 32);
    const vq second = (c2 & 0xffffffffull) | (c3 << 32);
    const vq even = every_other<0>(first, second, std::make_integer_sequence<int, kCounters>{});
    const vq odd = every_other<1>(first, second, std::make_integer_sequence<int, kCounters>{});
    store(keep + 4 * q, reinterpret_cast<vi>(reinterpret_cast<vi>(even) >= threshold));
    store(keep + 4 * q + 2 * kCounters,
          reinterpret_cast<vi>(reinterpret_cast<vi>(odd) >= threshold));
  }
  return keep + e0 % 4;
}

}  // namespace lotr::cpu::LOTR_ISA
