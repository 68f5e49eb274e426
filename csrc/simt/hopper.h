// The executor's side of csrc/cuda/sm90.
#pragma once
#include "device.h"

namespace lotr::simt {

// A row-major matrix of 2-byte elements and the box of a copy: 64 columns, with 128-byte swizzle.
struct alignas(64) TensorMap {
  const unsigned char* base;
  uint32_t rows, cols, row_stride, box_rows;  // stride in elements
};
TensorMap tensor_map_2d(const void* base, uint32_t rows, uint32_t cols, uint32_t row_stride,
                        uint32_t box_rows);

void mbarrier_init(void* barrier, uint32_t arrivals, Site site);
void fence_mbarrier_init(Site site);
// bytes: added to those that the phase waits for.
void mbarrier_arrive(void* barrier, uint32_t bytes, Site site);
void mbarrier_wait(void* barrier, uint32_t parity, Site site);
// Arrives at the same mbarrier of block `rank`. It orders this thread's reads before what follows
// the wait, but makes none of its stores visible there: the race detector does not check that.
void mbarrier_arrive_cluster(void* barrier, uint32_t rank, Site site);

// blocks: mask of the cluster's blocks that receive the box, at the same offset of their shared
// memory, and count its bytes at the same mbarrier.
void tma_load_2d(void* shared, const TensorMap& map, int col, int row, void* barrier,
                 uint32_t blocks, Site site);
uint32_t mask_of_block();  // one bit: the running thread's block
// From shared memory to the matrix. The tile is read, and the matrix written, some time before a
// bulk_wait that keeps fewer groups in flight returns.
void tma_store_2d(const TensorMap& map, int col, int row, const void* shared, Site site);
void bulk_commit(Site site);
void bulk_wait(int keep, Site site);
void fence_proxy_async(Site site);

void wgmma_fence(Site site);
// d: the thread's n / 2 elements of the warpgroup's [64, n]. a, b: descriptors. mn_major: whether b
// is MN-major, else K-major.
void wgmma(float* d, int n, uint64_t a, uint64_t b, bool mn_major, bool accumulate, bool is_bf16,
           Site site);
void wgmma_commit(Site site);
void wgmma_wait(int keep, Site site);

}  // namespace lotr::simt
