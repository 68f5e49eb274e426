// Loads and stores of 2, 4, 8 or 16 bytes, one instruction each. The executor counts them: bytes
// and 32-byte sectors of global memory, bank conflicts of shared memory. The address must be
// aligned to the size.
#pragma once
#include "base.cuh"

namespace lotr::ptx {

#ifdef __CUDACC__
// INSTRUCTION: the opcode without its type ("ld.global"). LOTR_PTX_ADDRESS is defined below.
#define LOTR_PTX_LOAD(T, p, INSTRUCTION)                                                   \
  if constexpr (sizeof(T) == 16) {                                                         \
    uint4 v;                                                                               \
    asm volatile(INSTRUCTION ".v4.u32 {%0,%1,%2,%3}, [%4];"                                \
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)                              \
                 : LOTR_PTX_ADDRESS(p)                                                     \
                 : "memory");                                                              \
    return bit_cast<T>(v);                                                                 \
  } else if constexpr (sizeof(T) == 8) {                                                   \
    uint2 v;                                                                               \
    asm volatile(INSTRUCTION ".v2.u32 {%0,%1}, [%2];"                                      \
                 : "=r"(v.x), "=r"(v.y)                                                    \
                 : LOTR_PTX_ADDRESS(p)                                                     \
                 : "memory");                                                              \
    return bit_cast<T>(v);                                                                 \
  } else if constexpr (sizeof(T) == 4) {                                                   \
    uint32_t v;                                                                            \
    asm volatile(INSTRUCTION ".u32 %0, [%1];" : "=r"(v) : LOTR_PTX_ADDRESS(p) : "memory"); \
    return bit_cast<T>(v);                                                                 \
  } else {                                                                                 \
    uint16_t v;                                                                            \
    asm volatile(INSTRUCTION ".u16 %0, [%1];" : "=h"(v) : LOTR_PTX_ADDRESS(p) : "memory"); \
    return bit_cast<T>(v);                                                                 \
  }
#define LOTR_PTX_STORE(T, p, value, INSTRUCTION)                                                \
  if constexpr (sizeof(T) == 16) {                                                              \
    const uint4 v = bit_cast<uint4>(value);                                                     \
    asm volatile(INSTRUCTION ".v4.u32 [%0], {%1,%2,%3,%4};" ::LOTR_PTX_ADDRESS(p), "r"(v.x),    \
                 "r"(v.y), "r"(v.z), "r"(v.w)                                                   \
                 : "memory");                                                                   \
  } else if constexpr (sizeof(T) == 8) {                                                        \
    const uint2 v = bit_cast<uint2>(value);                                                     \
    asm volatile(INSTRUCTION ".v2.u32 [%0], {%1,%2};" ::LOTR_PTX_ADDRESS(p), "r"(v.x), "r"(v.y) \
                 : "memory");                                                                   \
  } else if constexpr (sizeof(T) == 4) {                                                        \
    asm volatile(INSTRUCTION ".u32 [%0], %1;" ::LOTR_PTX_ADDRESS(p),                            \
                 "r"(bit_cast<uint32_t>(value))                                                 \
                 : "memory");                                                                   \
  } else {                                                                                      \
    asm volatile(INSTRUCTION ".u16 [%0], %1;" ::LOTR_PTX_ADDRESS(p),                            \
                 "h"(bit_cast<uint16_t>(value))                                                 \
                 : "memory");                                                                   \
  }
#endif

// By C++'s rules CUDA's pair types are not trivially copyable, so this checks the destructor.
template <class T>
constexpr bool is_word = std::is_trivially_destructible_v<T> &&
                         (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);

// ---- global memory ----

#define LOTR_PTX_ADDRESS(p) "l"(p)

// ld.global: reads what this thread, its block (before a barrier) or an earlier launch has stored.
template <class T>
LOTR_DEVICE T load(const T* p LOTR_SITE) {
  static_assert(is_word<T>, "2, 4, 8 or 16 bytes");
#ifdef __CUDACC__
  LOTR_PTX_LOAD(T, p, "ld.global")
#else
  T value;
  simt::load_global(&value, p, sizeof(T), site);
  return value;
#endif
}

template <class T>
LOTR_DEVICE void store(T* p, std::common_type_t<T> value LOTR_SITE) {
  static_assert(is_word<T>, "2, 4, 8 or 16 bytes");
#ifdef __CUDACC__
  LOTR_PTX_STORE(T, p, value, "st.global")
#else
  simt::store_global(p, &value, sizeof(T), site);
#endif
}

#undef LOTR_PTX_ADDRESS

// ---- shared memory ----

#define LOTR_PTX_ADDRESS(p) "r"(shared_address(p))

template <class T>
LOTR_DEVICE T load_shared(const T* p LOTR_SITE) {
  static_assert(is_word<T>, "2, 4, 8 or 16 bytes");
#ifdef __CUDACC__
  LOTR_PTX_LOAD(T, p, "ld.shared")
#else
  T value;
  simt::load_shared(&value, p, sizeof(T), site);
  return value;
#endif
}

template <class T>
LOTR_DEVICE void store_shared(T* p, std::common_type_t<T> value LOTR_SITE) {
  static_assert(is_word<T>, "2, 4, 8 or 16 bytes");
#ifdef __CUDACC__
  LOTR_PTX_STORE(T, p, value, "st.shared")
#else
  simt::store_shared(p, &value, sizeof(T), site);
#endif
}

// p[0] = first, p[1] = second in one store.
template <class T>
LOTR_DEVICE void store_shared2(T* p, std::common_type_t<T> first,
                               std::common_type_t<T> second LOTR_SITE) {
  static_assert(sizeof(T) <= 8 && is_word<T>, "a pair is one store of at most 16 bytes");
  struct alignas(2 * sizeof(T)) Pair {
    T a, b;
  };
  const Pair value{first, second};
#ifdef __CUDACC__
  LOTR_PTX_STORE(Pair, p, value, "st.shared")
#else
  simt::store_shared(p, &value, sizeof(Pair), site);
#endif
}

#undef LOTR_PTX_ADDRESS
#ifdef __CUDACC__
#undef LOTR_PTX_LOAD
#undef LOTR_PTX_STORE
#endif

}  // namespace lotr::ptx
