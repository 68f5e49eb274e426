// Vectors of one instruction set. A file that includes this defines LOTR_VB (bytes of a vector) and
// LOTR_ISA, the namespace of all code, so that the linker cannot replace an inline function by its
// copy for a newer CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define LOTR_INLINE inline __attribute__((always_inline))

namespace lotr::cpu::LOTR_ISA {

// Loads and stores go through types that may be unaligned and alias anything.
template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(LOTR_VB)));
  typedef T memory __attribute__((vector_size(LOTR_VB), aligned(sizeof(T)), may_alias));
};
using vf = VecOf<float>::type;
using vi = VecOf<uint32_t>::type;
// As many half-precision numbers as vf has lanes.
typedef uint16_t vh __attribute__((vector_size(LOTR_VB / 2)));
typedef uint16_t vh_memory __attribute__((vector_size(LOTR_VB / 2), aligned(2), may_alias));

// Storage types of tensor elements.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

LOTR_INLINE float to_float(bf16 h) {
  const uint32_t b = uint32_t(h.bits) << 16;
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}
// Without F16C by integers: g++ before 12 and clang++ before 15 have no _Float16 on x86.
LOTR_INLINE float to_float(f16 h) {
#ifdef __F16C__
  return _cvtsh_ss(h.bits);
#else
  const uint32_t exponent = h.bits >> 10 & 31u;
  const uint32_t fraction = h.bits & 0x3ffu;
  uint32_t b = (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
  const float subnormal = float(fraction) * 0x1p-24f;
  if (exponent == 0) std::memcpy(&b, &subnormal, 4);
  b |= (h.bits & 0x8000u) << 16;
  float f;
  std::memcpy(&f, &b, 4);
  return f;
#endif
}
LOTR_INLINE float to_float(float f) {
  return f;
}
LOTR_INLINE double to_float(double d) {
  return d;
}

template <typename T>
struct Narrow {  // Narrow<T>::from(wide) rounds to nearest even
  static LOTR_INLINE T from(double v) { return T(v); }
};
template <>
struct Narrow<bf16> {
  static LOTR_INLINE bf16 from(float f) {
    uint32_t b;
    std::memcpy(&b, &f, 4);
    if ((b & 0x7fffffffu) > 0x7f800000u) return {uint16_t((b >> 16) | 0x40u)};  // NaN stays NaN
    return {uint16_t((b + 0x7fffu + ((b >> 16) & 1u)) >> 16)};
  }
};
template <>
struct Narrow<f16> {
  static LOTR_INLINE f16 from(float f) {
#ifdef __F16C__
    return {uint16_t(_cvtss_sh(f, 0))};
#else
    uint32_t b;
    std::memcpy(&b, &f, 4);
    const uint32_t sign = b >> 16 & 0x8000u;
    b &= 0x7fffffffu;
    if (b > 0x7f800000u) return {uint16_t(sign | 0x7e00u | (b >> 13 & 0x3ffu))};
    if (b >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and above: infinity
    if (b < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
      float sum;
      std::memcpy(&sum, &b, 4);
      sum += 0.5f;
      std::memcpy(&b, &sum, 4);
      return {uint16_t(sign | (b - 0x3f000000u))};
    }
    return {uint16_t(sign | ((b + 0xfffu + (b >> 13 & 1u) - (112u << 23)) >> 13))};
#endif
  }
};

// Vector loads, which widen half types.
template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
LOTR_INLINE typename VecOf<T>::type load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::memory*>(p);
}
// Loads 16-bit numbers into 32-bit lanes, by intrinsics if any: GCC converts in two halves.
LOTR_INLINE vi load_wide(const void* p) {
#if LOTR_VB == 64 && defined(__AVX512F__)
  return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif LOTR_VB == 32 && defined(__AVX2__)
  return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*static_cast<const vh_memory*>(p), vi);
#endif
}
LOTR_INLINE vf load(const bf16* p) {
  return reinterpret_cast<vf>(load_wide(p) << 16);
}
LOTR_INLINE vf load(const f16* p) {
#if LOTR_VB == 64 && defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif LOTR_VB == 32 && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < int(LOTR_VB / 4); ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
// The first n of a vector's lanes, with zeros for the others.
LOTR_INLINE vf load_first(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_loadu_ps(__mmask16(n < 16 ? (1u << n) - 1 : 0xffffu), p);
#elif defined(__AVX2__)
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return (vf)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), lane));
#else
  vf v = {};
  for (int64_t i = 0; i < LOTR_VB / 4 && i < n; ++i) v[i] = p[i];
  return v;
#endif
}
// Vector stores, which round to half types.
template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
LOTR_INLINE void store(T* p, typename VecOf<T>::type v) {
  *reinterpret_cast<typename VecOf<T>::memory*>(p) = v;
}
LOTR_INLINE void store(bf16* p, vf v) {
#if LOTR_VB == 64 && defined(__AVX512BF16__)
  const vh h = (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  const vi b = reinterpret_cast<vi>(v);
  const vi rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const vi nan = (b >> 16) | 0x40u;
  const vi is_nan = reinterpret_cast<vi>((b & 0x7fffffffu) > 0x7f800000u);
  const vh h = __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), vh);
#endif
  *reinterpret_cast<vh_memory*>(p) = h;
}
LOTR_INLINE void store(f16* p, vf v) {
#if LOTR_VB == 64 && defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif LOTR_VB == 32 && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < int(LOTR_VB / 4); ++i) p[i] = Narrow<f16>::from(v[i]);
#endif
}

// Two vectors side by side.
template <typename T>
LOTR_INLINE void store(T* p, vf a, vf b) {
#if LOTR_VB == 64 && defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
    return;
  }
#endif
  store(p, a);
  store(p + LOTR_VB / 4, b);
}

// Kinds of arithmetic: single numbers as units (Plain), or pairs of bfloat16 (BF2; tiles.h).
template <typename T>
struct Plain {
  using Unit = T;
  using Acc = T;
  using Vec = typename VecOf<T>::type;
  static constexpr int kPair = 1;
  static constexpr int kLanes = LOTR_VB / sizeof(T);
  static LOTR_INLINE Vec madd(Vec acc, Vec b, T a) { return acc + b * a; }
};
using F32 = Plain<float>;
using F64 = Plain<double>;
// The kind for an element type.
template <typename T>
struct KindOf {
  using type = F32;
};
template <>
struct KindOf<double> {
  using type = F64;
};
#if defined(__AVX512BF16__)
struct BF2 {
  using Unit = uint32_t;
  using Acc = float;
  using Vec = vf;
  static constexpr int kPair = 2;
  static constexpr int kLanes = LOTR_VB / 4;
  static LOTR_INLINE Vec madd(Vec acc, vi b, uint32_t a) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)b,
                                (__m512bh)_mm512_set1_epi32(int(a)));
  }
  // The units of two rows: low[i] | high[i] << 16.
  static LOTR_INLINE vi pair_up(const uint16_t* low, const uint16_t* high) {
    return load_wide(low) | load_wide(high) << 16;
  }
};
template <>
struct KindOf<bf16> {
  using type = BF2;
};
#endif

template <int n>
using Int = std::integral_constant<int, n>;

// Lanes 0, n, 1, n + 1, .. of the first (half = 0) or second (half = 1) halves of a and b.
template <int half, typename V, int... I>
LOTR_INLINE V zip_lanes(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, ((I % 2) * n + I / 2 + half * n / 2)...);
}
template <int half, int n, typename V>
LOTR_INLINE V zip(V a, V b) {
  return zip_lanes<half>(a, b, std::make_integer_sequence<int, n>{});
}

// The pairs a[i] | b[i] << 16 in the order that costs one instruction: half 0 has the first four of
// every eight pairs, half 1 the others. pair_at computes the column of each.
template <int half, int... I>
LOTR_INLINE vi pair_lanes(VecOf<uint16_t>::type a, VecOf<uint16_t>::type b,
                          std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return reinterpret_cast<vi>(
      __builtin_shufflevector(a, b, (I / 8 * 8 + I % 8 / 2 + half * 4 + I % 2 * n)...));
}
template <int half>
LOTR_INLINE vi pairs_of(VecOf<uint16_t>::type a, VecOf<uint16_t>::type b) {
  return pair_lanes<half>(a, b, std::make_integer_sequence<int, LOTR_VB / 2>{});
}
// The column of the pair at place i of both halves: 0 to 3, 8 to 11, .. in the first half.
constexpr int64_t pair_at(int64_t i) {
  constexpr int64_t lanes = LOTR_VB / 4;
  return i % lanes / 4 * 8 + i % 4 + i / lanes * 4;
}

// Transposes n vectors of n lanes in registers: log2(n) perfect shuffles.
template <int n, typename V>
LOTR_INLINE void transpose(V (&a)[n]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < n; stage *= 2) {
    V b[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      b[2 * i] = zip<0, n>(a[i], a[i + n / 2]);
      b[2 * i + 1] = zip<1, n>(a[i], a[i + n / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) a[i] = b[i];
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t n, int64_t to) {
  return ceil_div(n, to) * to;
}
constexpr int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

}  // namespace lotr::cpu::LOTR_ISA
