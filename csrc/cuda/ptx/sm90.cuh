// Device primitives that only sm_90a has: mbarriers, tiled bulk copies (TMA), clusters, registers handed from
// warpgroup to warpgroup; and wgmma, in wgmma.cuh.  See sm80.cuh for how wrappers work.  Kernels that use
// them are compiled for sm_90a alone.
//
// Under the executor a bulk copy's tile is NaN until the mbarrier's phase completes; copies land when no
// thread can go on, or at random moments.
#pragma once
#include "cluster.cuh"
#include "sm80.cuh"
#include "wgmma.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#else
#include "simt/hopper.h"
#endif

namespace lotr::ptx {

// ---- tensor maps: made on the host, passed to the kernel as `const __grid_constant__ TensorMap` ----

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = simt::TensorMap;
#endif

// Of a row-major matrix of 2-byte elements, row_stride a multiple of 8 elements, base aligned to 16 bytes:
// boxes of 16, 32 or 64 columns x box_rows (at most 256) with a swizzle as long as a box's row; what lies
// outside the matrix reads as zero.
template <class T>
TensorMap tensor_map_2d(const T* base, uint32_t rows, uint32_t cols, uint32_t row_stride, uint32_t box_rows,
                        uint32_t box_cols = 64) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>,
                "T is __nv_bfloat16 or __half");
#ifdef __CUDACC__
  // found at run time, so that nothing links to libcuda
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &found);
#else  // 12.0 to 12.4 have no ByVersion; in 13.0 it is the only one
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess)
      throw std::runtime_error(
          "tensor map: the driver has no cuTensorMapEncodeTiled (expected CUDA 12 or later)");
    return reinterpret_cast<Encode>(function);
  }();
  TensorMap map;
  const cuuint64_t extent[2] = {cols, rows}, stride[1] = {cuuint64_t(row_stride) * sizeof(T)};
  const cuuint32_t box[2] = {box_cols, box_rows}, step[2] = {1, 1};
  const CUtensorMapSwizzle swizzle = box_cols == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : box_cols == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                      : CU_TENSOR_MAP_SWIZZLE_32B;
  const auto make = [&] {
    return encode(
        &map, std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        2, const_cast<T*>(base), extent, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = make();
  // The driver needs a current context.  A thread gets one at its first call of the runtime, but not from
  // torch's device guard (pytorch issue 195256), so a new thread, also one of autograd's, may have none.
  int device = 0;
  if (result == CUDA_ERROR_INVALID_CONTEXT && !cudaGetDevice(&device) && !cudaSetDevice(device))
    result = make();
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("tensor map: cuTensorMapEncodeTiled failed with error " +
                             std::to_string(int(result)));
  return map;
#else
  return simt::tensor_map_2d(base, rows, cols, row_stride, box_rows, box_cols);
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
LOTR_DEVICE void fence_mbarrier_init(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  simt::fence_mbarrier_init(site);
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
  simt::mbarrier_wait(barrier, parity, false, site);
#endif
}

// One thread: the map on its way from the kernel's parameters, which a launch ahead does not write, so also
// before griddepcontrol_wait.
LOTR_DEVICE void prefetch_tensor_map([[maybe_unused]] const TensorMap* map) {
#ifdef __CUDACC__
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// One thread: the box at (col, row) to a tile aligned to 8 rows of the box; its bytes, whole boxes always,
// count at barrier.
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

// ---- clusters, and what cluster.cuh has of them ----

LOTR_DEVICE uint32_t cluster_rank() {
#ifdef __CUDACC__
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return simt::cluster_rank();
#endif
}

// tma_load_2d to the same place in each block of the cluster whose bit is set in `blocks`; counts at the same
// mbarrier of each.
LOTR_DEVICE void tma_load_2d_multicast(void* shared, const TensorMap* map, int col, int row,
                                       uint64_t* barrier, uint16_t blocks LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(col), "r"(row), "h"(blocks)
      : "memory");
#else
  simt::tma_load_2d_multicast(shared, *map, col, row, barrier, blocks, site);
#endif
}

// Arrives at the same mbarrier of block `rank` and releases this thread's earlier accesses to a
// mbarrier_wait_cluster there. A fence of the whole GPU: not for inner loops.
LOTR_DEVICE void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#else
  simt::mbarrier_arrive_cluster(barrier, rank, true, site);
#endif
}

// Arrives at the same mbarrier of block `rank`, to release memory that finished products or loads have read;
// this thread's stores are not released.  No fence.  (The executor treats it as a full release.)
LOTR_DEVICE void mbarrier_give_back(uint64_t* barrier, uint32_t rank LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#else
  simt::mbarrier_arrive_cluster(barrier, rank, false, site);
#endif
}

// mbarrier_wait that also acquires the accesses of other blocks' threads.  Empties L1: not for inner loops.
LOTR_DEVICE void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT_%=;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  simt::mbarrier_wait(barrier, parity, true, site);
#endif
}

// A word at the same place in the shared memory of block `rank`.
LOTR_DEVICE void store_cluster(int32_t* p, uint32_t rank, int32_t value LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "st.shared::cluster.u32 [there], %2;\n}" ::"r"(shared_address(p)),
      "r"(rank), "r"(value)
      : "memory");
#else
  simt::store_cluster(p, rank, &value, sizeof value, site);
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

// ---- registers ----

// All warps of a warpgroup: from here on N registers a thread, fewer or more than before.  registers_more
// waits until the block's other warpgroups have given as many back.
template <int N>
LOTR_DEVICE void registers_fewer(LOTR_SITE_ONLY) {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "a multiple of 8 from 24 to 256");
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#else
  simt::set_registers(N, false, site);
#endif
}
template <int N>
LOTR_DEVICE void registers_more(LOTR_SITE_ONLY) {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "a multiple of 8 from 24 to 256");
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#else
  simt::set_registers(N, true, site);
#endif
}

}  // namespace lotr::ptx
