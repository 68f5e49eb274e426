// Loads, stores and atomics of 2, 4, 8 or 16 bytes, one instruction each.  Under the executor they are
// counted: bytes and 32-byte sectors for global memory, bank conflicts for shared memory.  The address must
// be aligned to the size.
#pragma once
#include "base.cuh"

namespace lotr::ptx {

#ifdef __CUDACC__
// INSTRUCTION is the opcode up to and without the type, as in "ld.global.nc"
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
#define LOTR_PTX_STORE(T, p, value, INSTRUCTION)                                                             \
  if constexpr (sizeof(T) == 16) {                                                                           \
    const uint4 v = bit_cast<uint4>(value);                                                                  \
    asm volatile(INSTRUCTION ".v4.u32 [%0], {%1,%2,%3,%4};" ::LOTR_PTX_ADDRESS(p), "r"(v.x), "r"(v.y),       \
                 "r"(v.z), "r"(v.w)                                                                          \
                 : "memory");                                                                                \
  } else if constexpr (sizeof(T) == 8) {                                                                     \
    const uint2 v = bit_cast<uint2>(value);                                                                  \
    asm volatile(INSTRUCTION ".v2.u32 [%0], {%1,%2};" ::LOTR_PTX_ADDRESS(p), "r"(v.x), "r"(v.y) : "memory"); \
  } else if constexpr (sizeof(T) == 4) {                                                                     \
    asm volatile(INSTRUCTION ".u32 [%0], %1;" ::LOTR_PTX_ADDRESS(p), "r"(bit_cast<uint32_t>(value))          \
                 : "memory");                                                                                \
  } else {                                                                                                   \
    asm volatile(INSTRUCTION ".u16 [%0], %1;" ::LOTR_PTX_ADDRESS(p), "h"(bit_cast<uint16_t>(value))          \
                 : "memory");                                                                                \
  }
#endif

// CUDA's pair types are not trivially copyable by C++'s rules, only in fact.
template <class T>
constexpr bool is_word = std::is_trivially_destructible_v<T> &&
                         (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);

// ---- global memory ----

#define LOTR_PTX_ADDRESS(p) "l"(p)

// ld.global: sees what this thread, its block (after a barrier) or, after fence_device, other blocks have
// stored.
template <class T>
LOTR_DEVICE T load(const T* p LOTR_SITE) {
  static_assert(is_word<T>, "2, 4, 8 or 16 bytes");
#ifdef __CUDACC__
  LOTR_PTX_LOAD(T, p, "ld.global")
#else
  T value;
  simt::load_global(&value, p, sizeof(T), false, site);
  return value;
#endif
}

// ld.global.nc: for memory that nothing writes during the launch (the race detector checks it).  Not in a
// launch that may be early, which the kernel ahead may still write for: no wait orders such loads after its
// stores, since the memory consistency model leaves them out (the executor checks it).
template <class T>
LOTR_DEVICE T load_nc(const T* p LOTR_SITE) {
  static_assert(is_word<T>, "2, 4, 8 or 16 bytes");
#ifdef __CUDACC__
  LOTR_PTX_LOAD(T, p, "ld.global.nc")
#else
  T value;
  simt::load_global(&value, p, sizeof(T), true, site);
  return value;
#endif
}

// ld.global.cg: from L2, past L1; for partial sums that other blocks have stored.
template <class T>
LOTR_DEVICE T load_cg(const T* p LOTR_SITE) {
  static_assert(is_word<T>, "2, 4, 8 or 16 bytes");
#ifdef __CUDACC__
  LOTR_PTX_LOAD(T, p, "ld.global.cg")
#else
  T value;
  simt::load_global(&value, p, sizeof(T), false, site);
  return value;
#endif
}

// The same of 16 bytes under a predicate, zeros without it: several such loads need not wait for one another,
// as they do where the compiler makes branches of an if.
LOTR_DEVICE float4 load_cg_if(bool there, const float4* p LOTR_SITE) {
  float4 v{};
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .pred there;\n"
      "setp.ne.s32 there, %5, 0;\n"
      "@there ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];\n}"
      : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w)
      : "l"(p), "r"(int(there))
      : "memory");
#else
  if (there) simt::load_global(&v, p, sizeof v, false, site);
#endif
  return v;
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
LOTR_DEVICE void store_shared2(T* p, std::common_type_t<T> first, std::common_type_t<T> second LOTR_SITE) {
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

// ---- between blocks ----

// fence.acq_rel.gpu: this thread's accesses before it, and those it has seen through barriers, come before
// what follows it, for every block.  To hand sums from block to block: barrier; one thread: fence,
// atomic_add, fence; barrier.
LOTR_DEVICE void fence_device(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#else
  simt::fence_device(site);
#endif
}

// Relaxed; returns the value before.  Float sums depend on the order of arrival: not in deterministic paths.
LOTR_DEVICE int32_t atomic_add(int32_t* p, int32_t value LOTR_SITE) {
#ifdef __CUDACC__
  int32_t old;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
#else
  return simt::atomic_add(p, value, false, site);
#endif
}

LOTR_DEVICE float atomic_add(float* p, float value LOTR_SITE) {
#ifdef __CUDACC__
  float old;
  asm volatile("atom.relaxed.gpu.global.add.f32 %0, [%1], %2;" : "=f"(old) : "l"(p), "f"(value) : "memory");
  return old;
#else
  return simt::atomic_add(p, value, site);
#endif
}

// Relaxed; adds one, or goes back to zero from `limit`; returns the value before.  A counter of limit + 1
// events that is ready for the next round after the last of them.
LOTR_DEVICE int32_t atomic_wrap(int32_t* p, int32_t limit LOTR_SITE) {
#ifdef __CUDACC__
  int32_t old;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(limit) : "memory");
  return old;
#else
  return simt::atomic_wrap(p, limit, site);
#endif
}

// fence, atomic_add and fence in one: what came before it is seen after a later one on the same word.
LOTR_DEVICE int32_t atomic_add_acq_rel(int32_t* p, int32_t value LOTR_SITE) {
#ifdef __CUDACC__
  int32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
#else
  return simt::atomic_add(p, value, true, site);
#endif
}

// st.release.gpu: fence_device and a store that wait_equal sees.  To hand data from block to block: all
// write; barrier; one thread: store_release; there wait_equal; barrier; all read.
LOTR_DEVICE void store_release(int32_t* p, int32_t value LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
#else
  simt::store_release(p, value, site);
#endif
}

// Until *p is value, with ld.acquire.gpu: what was written before its store_release can then be read, or
// before the fences ahead of the atomics that brought it there.
LOTR_DEVICE void wait_equal(const int32_t* p, int32_t value LOTR_SITE) {
#ifdef __CUDACC__
  int32_t now;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(p) : "memory");
  while (now != value);
#else
  simt::wait_equal(p, value, true, site);
#endif
}

}  // namespace lotr::ptx
