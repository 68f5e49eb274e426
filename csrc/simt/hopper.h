// The executor's side of csrc/cuda/ptx/sm90.cuh.
#pragma once
#include "device.h"

namespace lotr::simt {

// A row-major matrix of 2-byte elements and the box of a copy. A row of the box is one swizzle: 16, 32 or 64
// columns.
struct alignas(64) TensorMap {
  const unsigned char* base;
  uint32_t rows, cols, row_stride, box_rows, box_cols;  // stride in elements
};
TensorMap tensor_map_2d(const void* base, uint32_t rows, uint32_t cols, uint32_t row_stride,
                        uint32_t box_rows, uint32_t box_cols);

void mbarrier_init(void* barrier, uint32_t arrivals, Site site);
void fence_mbarrier_init(Site site);
void mbarrier_arrive(void* barrier, uint32_t bytes, Site site);  // bytes: added to what the phase waits for
// cluster: acquire.cluster, needed where threads of other blocks arrive.
void mbarrier_wait(void* barrier, uint32_t parity, bool cluster, Site site);
void tma_load_2d(void* shared, const TensorMap& map, int col, int row, void* barrier, Site site);

// Writes to the same offset in each block of the mask `blocks` and counts at that block's mbarrier.
void tma_load_2d_multicast(void* shared, const TensorMap& map, int col, int row, void* barrier,
                           uint16_t blocks, Site site);
// From shared memory to the matrix.  The tile is read, and the matrix written, some time before a bulk_wait
// that keeps fewer groups in flight returns.
void tma_store_2d(const TensorMap& map, int col, int row, const void* shared, Site site);
void bulk_commit(Site site);
void bulk_wait(int keep, Site site);
void fence_proxy_async(Site site);

// release: of cluster scope, so the wait needs cluster scope too.  Without it the arrival still orders this
// thread's reads before the waiting thread.
void mbarrier_arrive_cluster(void* barrier, uint32_t rank, bool release, Site site);
void store_cluster(void* p, uint32_t rank, const void* value, uint32_t bytes, Site site);

void set_registers(int n, bool more, Site site);  // setmaxnreg

void wgmma_fence(Site site);
// a: a descriptor, or each thread's four registers.  trans: the tile is MN-major.
struct WgmmaOperands {
  uint64_t a;
  const uint32_t* a_registers;
  uint64_t b;
  bool trans_a, trans_b;
};
void wgmma(float* d, int n, const WgmmaOperands& of, bool accumulate, bool is_bf16, Site site);
void wgmma_commit(Site site);
void wgmma_wait(int keep, Site site);

uint32_t cluster_rank();
void* cluster_map(const void* shared, uint32_t rank, Site site);

}  // namespace lotr::simt
