// Device primitives that only sm_90a has: mbarriers, tiled bulk copies (TMA), wgmma, clusters.  See sm80.cuh
// for how wrappers work.  Kernels that use them are compiled for sm_90a alone.
//
// Under the executor a bulk copy's tile, and the accumulators of a product in flight, are NaN until the
// mbarrier's phase completes or the product is waited for; copies land when no thread can go on, or at random
// moments.
#pragma once
#include "sm80.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#else
#include "executor/hopper.h"
#endif

namespace lotr::ptx {

// ---- tensor maps: made on the host, passed to the kernel as `const __grid_constant__ TensorMap` ----

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = simt::TensorMap;
#endif

// Of a row-major matrix of 2-byte elements, row_stride a multiple of 8 elements, base aligned to 16 bytes:
// boxes of 64 columns (128 bytes) x box_rows (at most 256) with 128-byte swizzle; what lies outside the
// matrix reads as zero.
template <class T>
TensorMap tensor_map_2d(const T* base, uint32_t rows, uint32_t cols, uint32_t row_stride, uint32_t box_rows) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>,
                "T is __nv_bfloat16 or __half");
#ifdef __CUDACC__
  // found at run time, so that nothing links to libcuda
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                         &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
      throw std::runtime_error(
          "tensor map: the driver has no cuTensorMapEncodeTiled (expected CUDA 12 or later)");
    return reinterpret_cast<Encode>(function);
  }();
  TensorMap map;
  const cuuint64_t extent[2] = {cols, rows}, stride[1] = {cuuint64_t(row_stride) * sizeof(T)};
  const cuuint32_t box[2] = {64, box_rows}, step[2] = {1, 1};
  const CUresult result = encode(
      &map, std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
      const_cast<T*>(base), extent, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("tensor map: cuTensorMapEncodeTiled failed with error " +
                             std::to_string(int(result)));
  return map;
#else
  return simt::tensor_map_2d(base, rows, cols, row_stride, box_rows);
#endif
}

// ---- mbarriers: a phase completes when all arrivals and all announced bytes have come ----

LOTR_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t arrivals LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
#else
  simt::mbarrier_init(barrier, arrivals, site);
#endif
}

// After the inits, before a __syncthreads or cluster_sync: makes them visible to bulk copies and other
// blocks.
LOTR_DEVICE void fence_mbarrier_init() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Between plain stores to shared memory and their use by wgmma or bulk copies.  (The executor does not check
// it.)
LOTR_DEVICE void fence_proxy_async() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

LOTR_DEVICE void mbarrier_arrive(uint64_t* barrier LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  simt::mbarrier_arrive(barrier, 0, site);
#endif
}

LOTR_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
#else
  simt::mbarrier_arrive(barrier, bytes, site);
#endif
}

// Until the phase of this parity has completed (the first phase has parity 0; waiting for 1 on a new barrier
// returns).
LOTR_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT_%=;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  simt::mbarrier_wait(barrier, parity, site);
#endif
}

// One thread: the box at (col, row) to a tile aligned to 1024 bytes; its bytes, whole boxes always, count at
// barrier.
LOTR_DEVICE void tma_load_2d(void* shared, const TensorMap* map, int col, int row,
                             uint64_t* barrier LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(col), "r"(row)
      : "memory");
#else
  simt::tma_load_2d(shared, *map, col, row, barrier, site);
#endif
}

// ---- wgmma: products of a warpgroup on tiles in shared memory ----

// Describes a K-major tile of 128-byte rows with 128-byte swizzle, groups of 8 rows 1024 bytes apart.  To
// step along k inside the row, pass the address of the first element.
LOTR_DEVICE uint64_t swizzled_descriptor(const void* tile) {
  const uint64_t address = shared_address(tile);
  return (address & 0x3ffff) >> 4 | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Before the first product, and after the accumulators were read or written.
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

// d [64 x 64] = a [64 x 16] b [64 x 16]^T, plus d if accumulate.  Warp w holds rows 16 w to 16 w + 15 of d,
// columns 8 j to 8 j + 7 in d[4 j ..] as mma_m16n8k16 does.
template <class T>
LOTR_DEVICE void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b, bool accumulate LOTR_SITE) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>,
                "T is __nv_bfloat16 or __half");
#ifdef __CUDACC__
#define LOTR_WGMMA(TYPES)                                                                                    \
  asm volatile(                                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16." TYPES                                                        \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
      "%27,%28,%29,%30,%31}, %32, %33, p, 1, 1, 0, 0;\n}"                                                    \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),      \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),             \
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),           \
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),           \
        "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                                                \
      : "l"(a), "l"(b), "r"(int(accumulate)))
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    LOTR_WGMMA("f32.bf16.bf16");
  else
    LOTR_WGMMA("f32.f16.f16");
#undef LOTR_WGMMA
#else
  simt::wgmma(d, 64, {a, nullptr, b, false, false}, accumulate, std::is_same_v<T, __nv_bfloat16>, site);
#endif
}

// ---- clusters ----

LOTR_DEVICE void cluster_sync(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
  simt::cluster_sync(site);
#endif
}

LOTR_DEVICE uint32_t cluster_rank() {
#ifdef __CUDACC__
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return simt::cluster_rank();
#endif
}

// p's place in the shared memory of another block of the cluster.
template <class T>
LOTR_DEVICE T* cluster_map(T* p, uint32_t rank LOTR_SITE) {
#ifdef __CUDACC__
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(reinterpret_cast<uint64_t>(p)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#else
  return static_cast<T*>(simt::cluster_map(p, rank, site));
#endif
}

}  // namespace lotr::ptx
