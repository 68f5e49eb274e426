// Device primitives that only sm_90a has: tensor maps, mbarriers, tiled bulk copies (TMA) in both
// directions, clusters. The products are in wgmma.cuh. ../ptx/sm80.cuh explains how wrappers
// work.
//
// In the executor a tile that a bulk copy fills is NaN until the mbarrier's phase completes, and a
// tile that a bulk copy stores is read at some time before the wait. Copies land when no thread
// can continue, or at random times.
#pragma once
#include "../ptx/memory.cuh"
#include "../ptx/sm80.cuh"
#include "wgmma.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#endif
#include <stdexcept>
#include <string>

namespace lotr::ptx {

// ---- tensor maps: made on the host, a kernel's parameter `const __grid_constant__ TensorMap` ----

#ifdef __CUDACC__
using TensorMap = CUtensorMap;

// cuTensorMapEncodeTiled, looked up at run time, so that nothing links to libcuda.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
#else  // 12.0 to 12.4 have no ByVersion; 13.0 has nothing else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess)
      throw std::runtime_error(
          "tensor map: expected a driver for CUDA 12 or later, got one without "
          "cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}
#else
using TensorMap = simt::TensorMap;
#endif

// Describes a row-major matrix of 2-byte elements, row_stride a multiple of 8 elements, base
// aligned to 16 bytes, in boxes of 64 columns x box_rows (at most 256) with a swizzle of 128 bytes.
// Elements outside the matrix read as zero and are not written.
template <class T>
TensorMap tensor_map_2d(const T* base, uint32_t rows, uint32_t cols, uint32_t row_stride,
                        uint32_t box_rows) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>,
                "T is __nv_bfloat16 or __half");
#ifdef __CUDACC__
  TensorMap map;
  const cuuint64_t extent[2] = {cols, rows};
  const cuuint64_t stride[1] = {cuuint64_t(row_stride) * sizeof(T)};
  const cuuint32_t box[2] = {64, box_rows};
  const cuuint32_t step[2] = {1, 1};
  const auto make = [&] {
    return tensor_map_encoder()(&map,
                                std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                          : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                2, const_cast<T*>(base), extent, stride, box, step,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = make();
  // The driver needs a current context. A thread gets one at its first call of the runtime, but
  // not from torch's device guard (pytorch issue 195256), so a new thread may have none, for
  // example one of autograd's.
  int device = 0;
  if (result == CUDA_ERROR_INVALID_CONTEXT && !cudaGetDevice(&device) && !cudaSetDevice(device))
    result = make();
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("tensor map: cuTensorMapEncodeTiled failed with error " +
                             std::to_string(int(result)));
  return map;
#else
  return simt::tensor_map_2d(base, rows, cols, row_stride, box_rows);
#endif
}

// Called by one thread. Starts to fetch the map, which is a parameter of the kernel and is written
// by no earlier kernel, so this may precede griddepcontrol_wait.
LOTR_DEVICE void prefetch_tensor_map([[maybe_unused]] const TensorMap* map) {
#ifdef __CUDACC__
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// The current device's number, 0 if there is none.
inline int current_device() {
  int device = 0;
#ifdef __CUDACC__
  if (cudaGetDevice(&device)) cudaGetLastError();  // clears the error
#endif
  return device;
}

// ---- clusters: blocks 2 c and 2 c + 1 of the grid, so a block's rank is its number modulo 2 ----

// A barrier of all threads of the cluster: memory accesses before it, shared memory included, are
// visible after it.
LOTR_DEVICE void cluster_sync(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
  simt::cluster_sync(site);
#endif
}

// ---- mbarriers: a phase completes when all arrivals and all announced bytes have arrived ----

LOTR_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t arrivals LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#else
  simt::mbarrier_init(barrier, arrivals, site);
#endif
}

// After the inits and before a cluster_sync. Makes the inits visible to bulk copies and to the
// other block.
LOTR_DEVICE void fence_mbarrier_init(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  simt::fence_mbarrier_init(site);
#endif
}

LOTR_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#else
  simt::mbarrier_arrive(barrier, bytes, site);
#endif
}

// Arrives at the same mbarrier of block `rank` of the cluster, after reads of memory that a copy of
// that block may then overwrite. It makes none of this thread's stores visible there.
LOTR_DEVICE void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#else
  simt::mbarrier_arrive_cluster(barrier, rank, site);
#endif
}

// Waits until the phase of this parity has completed. The first phase has parity 0; waiting for
// parity 1 on a new barrier returns at once.
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

// ---- bulk copies from global memory ----
//
// One thread starts them. Their bytes, always those of complete boxes, count at the mbarrier. A
// tile starts at a multiple of 1024 bytes.

// The box with the first element (col, row).
LOTR_DEVICE void tma_load_2d(void* shared, const TensorMap* map, int col, int row,
                             uint64_t* barrier LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(col), "r"(row)
      : "memory");
#else
  simt::tma_load_2d(shared, *map, col, row, barrier, simt::mask_of_block(), site);
#endif
}

// The same, to the same place in each block of the cluster that has its bit set in `blocks`. Counts
// at the same mbarrier of each.
LOTR_DEVICE void tma_load_2d_multicast(void* shared, const TensorMap* map, int col, int row,
                                       uint64_t* barrier, uint16_t blocks LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(col), "r"(row), "h"(blocks)
      : "memory");
#else
  simt::tma_load_2d(shared, *map, col, row, barrier, blocks, site);
#endif
}

// ---- bulk copies to global memory; one thread starts them and waits for them ----

// Called by each thread, after its stores to a tile and before the barrier that precedes
// tma_store_2d. Makes the stores visible to bulk copies.
LOTR_DEVICE void fence_proxy_async(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  simt::fence_proxy_async(site);
#endif
}

LOTR_DEVICE void tma_store_2d(const TensorMap* map, int col, int row,
                              const void* shared LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(shared_address(shared)), "r"(col), "r"(row)
      : "memory");
#else
  simt::tma_store_2d(*map, col, row, shared, site);
#endif
}

// Closes a group of the stores so far.
LOTR_DEVICE void bulk_commit(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  simt::bulk_commit(site);
#endif
}

// Waits until the tiles of all but the latest N groups have been read, and may be overwritten.
template <int N>
LOTR_DEVICE void bulk_wait_read(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
#else
  simt::bulk_wait(N, site);
#endif
}

// Waits until all stores are complete in global memory.
LOTR_DEVICE void bulk_wait_all(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#else
  simt::bulk_wait(0, site);
#endif
}

}  // namespace lotr::ptx
