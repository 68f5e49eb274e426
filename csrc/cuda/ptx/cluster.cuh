// Clusters of blocks, for kernels that are compiled for cards without clusters too.  There these functions do
// nothing, and a kernel tests CLUSTERS first.  Cards without clusters run cooperative launches instead
// (TOGETHER).  The executor runs both.
#pragma once
#include "memory.cuh"

namespace lotr::ptx {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool CLUSTERS = false;
#else
constexpr bool CLUSTERS = true;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool TOGETHER = false;
#else
constexpr bool TOGETHER = true;
#endif

// A barrier of all threads of the cluster: memory accesses before it, shared memory included, are visible
// after it.
LOTR_DEVICE void cluster_sync(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
#else
  simt::cluster_sync(site);
#endif
}

// The same, but only mbarriers after fence_mbarrier_init become visible: for a kernel's start.  cluster_sync
// is also a fence of the whole GPU, which empties L1.
LOTR_DEVICE void cluster_sync_relaxed(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
#else
  simt::cluster_sync_relaxed(site);
#endif
}

// 16 bytes at the same place in the shared memory of block `rank`, if it is there, under a predicate as
// load_cg_if.
LOTR_DEVICE float4 load_cluster_if(bool there, const float4* p, uint32_t rank LOTR_SITE) {
  float4 v{};
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 place;\n.reg .pred there;\n"
      "setp.ne.s32 there, %6, 0;\n"
      "@there mapa.shared::cluster.u32 place, %4, %5;\n"  // of a rank that there is: else it means nothing
      "@there ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [place];\n}"
      : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w)
      : "r"(shared_address(p)), "r"(rank), "r"(int(there))
      : "memory");
#else  // the block is alone
  asm volatile(
      "{\n.reg .pred there;\n"
      "setp.ne.s32 there, %5, 0;\n"
      "@there ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];\n}"
      : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w)
      : "r"(shared_address(p)), "r"(int(there && rank == 0))
      : "memory");
#endif
#else
  if (there) simt::load_cluster(&v, p, sizeof v, rank, site);
#endif
  return v;
}

}  // namespace lotr::ptx
