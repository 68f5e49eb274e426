// Used by every wrapper: macros for a function that is PTX under nvcc and C++ in the SIMT executor,
// the kernel's shared memory, and bit casts.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define LOTR_DEVICE __device__ __forceinline__
// In the executor the last argument of a wrapper is its caller's file and line, for reports. On
// the device there is no such argument.
#define LOTR_SITE
#define LOTR_SITE_ONLY
#define LOTR_PASS_SITE
#else
#include "simt/device.h"
#define LOTR_DEVICE inline
#define LOTR_SITE_ONLY ::lotr::simt::Site site = ::lotr::simt::Site::here()
#define LOTR_SITE , LOTR_SITE_ONLY
// From a helper to the wrapper that it calls, so that reports name the helper's caller.
#define LOTR_PASS_SITE , site
// The host compiler would ignore __shared__, and every thread would have a copy: make it an error.
#undef __shared__
#define __shared__ no_static_shared_memory_use_lotr_ptx_shared_storage
#endif

namespace lotr::ptx {

// The block's dynamic shared memory as the kernel's one named struct.
template <class T>
LOTR_DEVICE T& shared_storage() {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) unsigned char lotr_shared_memory[];
  return *reinterpret_cast<T*>(lotr_shared_memory);
#else
  static_assert(std::is_trivially_destructible_v<T>, "shared memory is raw bytes");
  return *static_cast<T*>(simt::shared_memory(sizeof(T)));
#endif
}

// The 32-bit shared-window address that PTX instructions take.
LOTR_DEVICE uint32_t shared_address(const void* p) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
  return simt::shared_offset(p);
#endif
}

template <class To, class From>
LOTR_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof(To));
  return to;
}
LOTR_DEVICE uint32_t as_bits(float x) {
  return bit_cast<uint32_t>(x);
}
LOTR_DEVICE float as_float(uint32_t x) {
  return bit_cast<float>(x);
}

LOTR_DEVICE float to_float(float x) {
  return x;
}
LOTR_DEVICE float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
LOTR_DEVICE float to_float(__half x) {
  return __half2float(x);
}

// Rounds to nearest even.
template <class T>
LOTR_DEVICE T from_float(float x) {
  static_assert(
      std::is_same_v<T, float> || std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>,
      "T is float, __nv_bfloat16 or __half");
  if constexpr (std::is_same_v<T, float>)
    return x;
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return __float2half_rn(x);
}

// Converts two neighbors. Those of a half type are aligned to 4 bytes: one 32-bit word.
LOTR_DEVICE void to_floats(const float* from, float& a, float& b) {
  a = from[0];
  b = from[1];
}
LOTR_DEVICE void to_floats(const __nv_bfloat16* from, float& a, float& b) {
  uint32_t word;
  memcpy(&word, from, 4);
  a = as_float(word << 16);
  b = as_float(word & 0xffff0000u);
}
LOTR_DEVICE void to_floats(const __half* from, float& a, float& b) {
  a = __half2float(from[0]);
  b = __half2float(from[1]);
}
// Rounds two neighbors, by one instruction.
LOTR_DEVICE void from_floats(float* to, float a, float b) {
  to[0] = a;
  to[1] = b;
}
LOTR_DEVICE void from_floats(__nv_bfloat16* to, float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  to[0] = pair.x;
  to[1] = pair.y;
}
LOTR_DEVICE void from_floats(__half* to, float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  to[0] = pair.x;
  to[1] = pair.y;
}

// Returns the value, and keeps it in a register. Otherwise the compiler would compute it again in
// every iteration.
LOTR_DEVICE int held(int value) {
#ifdef __CUDACC__
  asm volatile("mov.b32 %0, %0;" : "+r"(value));
#endif
  return value;
}

}  // namespace lotr::ptx
