// What blocks of a cluster share, in kernels that are compiled for cards without clusters too: there these do
// nothing, and a kernel asks CLUSTERS first.  Cards that have none run cooperative launches instead:
// TOGETHER. The executor plays both.
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

// All threads of all blocks of the cluster: what each did before it, in shared memory too, is seen after it.
LOTR_DEVICE void cluster_sync(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
#else
  simt::cluster_sync(site);
#endif
}

// 16 bytes at the same place in the shared memory of block `rank`.
LOTR_DEVICE float4 load_cluster(const float4* p, uint32_t rank LOTR_SITE) {
  float4 v{};
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
#endif
#else
  simt::load_cluster(&v, p, sizeof v, rank, site);
#endif
  return v;
}

}  // namespace lotr::ptx
