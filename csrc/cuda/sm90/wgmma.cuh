// wgmma of sm_90a: products of a warpgroup (128 threads), d += a b^T in float32 with d [64, 256],
// a [64, 16] and b [256, 16]. Both operands are in shared memory.
//
// A product runs while its threads continue: between its issue and a wgmma_wait that covers its
// group, threads must not access its accumulators or write its tiles. In the executor the
// accumulators are NaN until then, and the operands are read at the wait.
#pragma once
#include "../ptx/base.cuh"

#ifndef __CUDACC__
#include "simt/hopper.h"
#endif

namespace lotr::ptx {

// ---- descriptors of swizzled tiles in shared memory ----
//
// The canonical layouts of the PTX manual ("Strides" of asynchronous warpgroup-level matrix
// instructions). From bit 0: the address / 16; from 16: the bytes to the next panel / 16 (K-major:
// unused, 1); from 32: the bytes of 8 rows / 16; from 62: 1, a swizzle of 128 bytes.

// K-major: a row of the tile is 64 k of one m or n, 128 bytes; 8 rows are a pattern of 1024 bytes.
LOTR_DEVICE uint64_t swizzled_descriptor(const void* tile) {
  const uint64_t address = shared_address(tile);
  return (address & 0x3ffff) >> 4 | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

// MN-major: a row is 64 n of one k, 128 bytes; 8 rows are a pattern of 1024 bytes. The next 64 n
// are the next panel, panel_bytes further on.
LOTR_DEVICE uint64_t swizzled_descriptor_mn(const void* tile, uint32_t panel_bytes) {
  const uint64_t address = shared_address(tile);
  return (address & 0x3ffff) >> 4 | uint64_t(panel_bytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

// Added to a descriptor, this moves it by `elements`: in a K-major tile by less than a row, in an
// MN-major tile by complete rows, 8 or a multiple of 8.
template <class T>
LOTR_DEVICE constexpr uint64_t descriptor_step(int elements) {
  return uint64_t(elements) * sizeof(T) >> 4;
}

// ---- order ----

// Before the first product, and after accumulators were read or written.
LOTR_DEVICE void wgmma_fence(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  simt::wgmma_fence(site);
#endif
}

LOTR_DEVICE void wgmma_commit(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  simt::wgmma_commit(site);
#endif
}

// Waits until at most N groups are in flight.
template <int N>
LOTR_DEVICE void wgmma_wait(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
  simt::wgmma_wait(N, site);
#endif
}

// Comes after the wait, which names no registers, so that the compiler moves no read of these sums
// above it. Not an instruction.
template <int COUNT>
LOTR_DEVICE void wgmma_landed([[maybe_unused]] float (&d)[COUNT]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// ---- the product ----

// The order of b in shared memory: neighbors are along the sum (k), or along n (mn).
enum class Major { k = 0, mn = 1 };

#ifdef __CUDACC__
// The 128 accumulators' names in the text of the instruction, and as operands of the asm statement.
#define LOTR_D256                                                                \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                      \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"             \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"             \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"             \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"             \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"             \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}"
#define LOTR_OUT8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LOTR_OUT32(i) LOTR_OUT8(i), LOTR_OUT8(i + 8), LOTR_OUT8(i + 16), LOTR_OUT8(i + 24)
// p: d is added to; 1, 1: a and b are not negated; 0: a is K-major; %130: the order of b.
#define LOTR_WGMMA(TYPE)                                                         \
  asm volatile(                                                                  \
      "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                 \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " " LOTR_D256 \
      ", %128, %129, p, 1, 1, 0, %130;\n}"                                       \
      : LOTR_OUT32(0), LOTR_OUT32(32), LOTR_OUT32(64), LOTR_OUT32(96)            \
      : "l"(a), "l"(b), "n"(int(B_MAJOR)))
#endif

// d += a b^T; a is K-major. Warp w of the warpgroup holds rows 16 w to 16 w + 15 of d,
// columns 8 j to 8 j + 7 in d[4 j ..] as mma_m16n8k16 does.
template <class T, Major B_MAJOR = Major::k>
LOTR_DEVICE void wgmma(float (&d)[128], uint64_t a, uint64_t b LOTR_SITE) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>,
                "T is __nv_bfloat16 or __half");
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    LOTR_WGMMA("bf16");
  else
    LOTR_WGMMA("f16");
#else
  simt::wgmma(d, 256, a, b, B_MAJOR == Major::mn, true, std::is_same_v<T, __nv_bfloat16>, site);
#endif
}

#ifdef __CUDACC__
#undef LOTR_WGMMA
#undef LOTR_OUT8
#undef LOTR_OUT32
#undef LOTR_D256
#endif

}  // namespace lotr::ptx
