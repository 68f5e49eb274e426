// wgmma of sm_90a: products of a warpgroup (128 threads), d [64 x N] = a [64 x 16] b [N x 16]^T in float32.
//
// A product runs while its threads go on: between its issue and a wgmma_wait that covers its group, its
// accumulators, its registers and its tiles belong to it.  Under the executor the accumulators are NaN until
// then, and the operands are read at the wait.
#pragma once
#include "base.cuh"

#ifndef __CUDACC__
#include "simt/hopper.h"
#endif

namespace lotr::ptx {

// ---- descriptors of tiles in shared memory, swizzled: the canonical layouts of the PTX manual ("Strides" of
// asynchronous warpgroup-level matrix instructions), as CUTLASS's make_gmma_desc has them ----

// K-major: a row of the tile is 64 k of one m or n, 128 bytes; 8 rows are a pattern of 1024 bytes.  To step
// along k, pass the address of the first element.
LOTR_DEVICE uint64_t swizzled_descriptor(const void* tile) {
  const uint64_t address = shared_address(tile);
  return (address & 0x3ffff) >> 4 | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// MN-major: a row is WIDTH m or n of one k, with a swizzle as long as the row; 8 rows are a pattern.  The
// next WIDTH are a panel of their own, panel_bytes further on (any number where there is one panel).  The
// product's N (64 of an A) is whole panels: a narrower product from a wider panel is in no canonical layout,
// so a rank of 16 or 32 has rows of its own width.  To step along k, pass the address of a k that is a
// multiple of 8.
template <int WIDTH = 64>
LOTR_DEVICE uint64_t swizzled_descriptor_mn(const void* tile, uint32_t panel_bytes) {
  static_assert(WIDTH == 16 || WIDTH == 32 || WIDTH == 64, "rows of 32, 64 or 128 bytes");
  constexpr uint64_t SWIZZLE = WIDTH == 64 ? 1 : WIDTH == 32 ? 2 : 3;
  const uint64_t address = shared_address(tile);
  return (address & 0x3ffff) >> 4 | uint64_t(panel_bytes >> 4) << 16 | uint64_t(16 * WIDTH >> 4) << 32 |
         SWIZZLE << 62;
}

// ---- order ----

// Before the first product, and after accumulators or register operands were read or written.
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

// Until at most N groups are in flight.
template <int N>
LOTR_DEVICE void wgmma_wait(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
  simt::wgmma_wait(N, site);
#endif
}

// After the wait, which names no registers: no read of these sums may move above it.  Not an instruction.
template <int COUNT>
LOTR_DEVICE void wgmma_landed([[maybe_unused]] float (&d)[COUNT]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// ---- products ----

#ifdef __CUDACC__
// The accumulators' names in the text of the instruction, and as operands of the asm statement.
#define LOTR_D16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define LOTR_D32 \
  LOTR_D16       \
  ","            \
  "%8,%9,%10,%11,%12,%13,%14,%15"
#define LOTR_D64 \
  LOTR_D32       \
  ","            \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LOTR_D128                                                                                \
  LOTR_D64                                                                                       \
  ","                                                                                            \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54," \
  "%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LOTR_D256                                                                                \
  LOTR_D128                                                                                      \
  ","                                                                                            \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86," \
  "%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107," \
  "%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,"   \
  "%126,%127"
#define LOTR_OUT8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LOTR_OUT16(i) LOTR_OUT8(i), LOTR_OUT8(i + 8)
#define LOTR_OUT32(i) LOTR_OUT16(i), LOTR_OUT16(i + 16)
#define LOTR_OUT64(i) LOTR_OUT32(i), LOTR_OUT32(i + 32)
#define LOTR_OUT128(i) LOTR_OUT64(i), LOTR_OUT64(i + 64)
// One N and type: A, B, P and T are the operands' names in the text; OUT the accumulators, N / 2 of them.
#define LOTR_WGMMA(N_, TYPE, OUT, A, B, P, SIGNS_AND_T, ...)                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P                                            \
               ", 0;\n"                                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #N_ "k16.f32." TYPE "." TYPE " {" LOTR_D##N_ \
               "}, " A ", " B ", p, 1, 1, " SIGNS_AND_T ";\n}"                                  \
               : OUT(0)                                                                         \
               : __VA_ARGS__, "l"(b), "r"(int(accumulate)), "n"(int(B_MAJOR)), "n"(int(A_MAJOR)))
#define LOTR_WGMMA_TYPES(N_, ...)                   \
  if constexpr (N == N_) {                          \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) \
      LOTR_WGMMA(N_, "bf16", __VA_ARGS__);          \
    else                                            \
      LOTR_WGMMA(N_, "f16", __VA_ARGS__);           \
  }
#endif

// The N that are written out here.
template <class T, int N>
constexpr bool has_wgmma = (std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>) &&
                           (N == 16 || N == 32 || N == 64 || N == 128 || N == 256);

// How an operand lies in shared memory: the elements of a row, along the sum, are neighbours (k), or those of
// a column are (mn).
enum class Major { k = 0, mn = 1 };

// d = a b^T, plus d if accumulate.  Warp w holds rows 16 w to 16 w + 15 of d, columns 8 j to 8 j + 7 in
// d[4 j ..] as mma_m16n8k16 does.
template <class T, int N, Major B_MAJOR = Major::k, Major A_MAJOR = Major::k>
LOTR_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate LOTR_SITE) {
  static_assert(has_wgmma<T, N>, "T is __nv_bfloat16 or __half, N is 16, 32, 64, 128 or 256");
#ifdef __CUDACC__
  LOTR_WGMMA_TYPES(16, LOTR_OUT8, "%8", "%9", "%10", "%12, %11", "l"(a))
  LOTR_WGMMA_TYPES(32, LOTR_OUT16, "%16", "%17", "%18", "%20, %19", "l"(a))
  LOTR_WGMMA_TYPES(64, LOTR_OUT32, "%32", "%33", "%34", "%36, %35", "l"(a))
  LOTR_WGMMA_TYPES(128, LOTR_OUT64, "%64", "%65", "%66", "%68, %67", "l"(a))
  LOTR_WGMMA_TYPES(256, LOTR_OUT128, "%128", "%129", "%130", "%132, %131", "l"(a))
#else
  simt::wgmma(d, N, {a, nullptr, b, A_MAJOR == Major::mn, B_MAJOR == Major::mn}, accumulate,
              std::is_same_v<T, __nv_bfloat16>, site);
#endif
}

// The same with a in registers: each thread holds its fragment of its warp's 16 rows, as for mma_m16n8k16.
template <class T, int N, Major B_MAJOR = Major::k>
LOTR_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate LOTR_SITE) {
  static_assert(has_wgmma<T, N>, "T is __nv_bfloat16 or __half, N is 16, 32, 64, 128 or 256");
#ifdef __CUDACC__
  constexpr Major A_MAJOR = Major::k;  // of the text, which does not name it here
  LOTR_WGMMA_TYPES(16, LOTR_OUT8, "{%8,%9,%10,%11}", "%12", "%13", "%14", "r"(a[0]), "r"(a[1]), "r"(a[2]),
                   "r"(a[3]))
  LOTR_WGMMA_TYPES(32, LOTR_OUT16, "{%16,%17,%18,%19}", "%20", "%21", "%22", "r"(a[0]), "r"(a[1]), "r"(a[2]),
                   "r"(a[3]))
  LOTR_WGMMA_TYPES(64, LOTR_OUT32, "{%32,%33,%34,%35}", "%36", "%37", "%38", "r"(a[0]), "r"(a[1]), "r"(a[2]),
                   "r"(a[3]))
  LOTR_WGMMA_TYPES(128, LOTR_OUT64, "{%64,%65,%66,%67}", "%68", "%69", "%70", "r"(a[0]), "r"(a[1]), "r"(a[2]),
                   "r"(a[3]))
  LOTR_WGMMA_TYPES(256, LOTR_OUT128, "{%128,%129,%130,%131}", "%132", "%133", "%134", "r"(a[0]), "r"(a[1]),
                   "r"(a[2]), "r"(a[3]))
#else
  simt::wgmma(d, N, {0, a, b, false, B_MAJOR == Major::mn}, accumulate, std::is_same_v<T, __nv_bfloat16>,
              site);
#endif
}

#ifdef __CUDACC__
#undef LOTR_WGMMA_TYPES
#undef LOTR_WGMMA
#undef LOTR_OUT8
#undef LOTR_OUT16
#undef LOTR_OUT32
#undef LOTR_OUT64
#undef LOTR_OUT128
#undef LOTR_D16
#undef LOTR_D32
#undef LOTR_D64
#undef LOTR_D128
#undef LOTR_D256
#endif

}  // namespace lotr::ptx
