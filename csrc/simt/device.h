// What kernels include when a host compiler compiles them: the functions that csrc/cuda/ptx calls,
// and the CUDA built-ins. Their code is in files that are never compiled with -fsanitize=thread,
// so that the race detector sees the kernel's accesses and not the executor's own.
#pragma once
#ifdef __CUDACC__
#error "csrc/simt is for host compilers; nvcc must not see it"
#endif
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "site.h"

#define __launch_bounds__(...)

// Real objects, because macros of these names would break CUDA's own headers. A switch of threads
// sets threadIdx and blockIdx, a launch the other two.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace lotr::simt {

struct Launch {
  const char* name;
  dim3 grid, block, cluster;
  size_t smem;  // bytes
  bool early;   // a programmatic dependent launch, csrc/cuda/ptx/launch.cuh
};
void run_grid(const Launch& launch, void (*thread)(void*), void* context);

template <class... Params, class... Args>
void launch(const Launch& launch, void (*kernel)(Params...), Args&&... params) {
  std::tuple<std::decay_t<Params>...> copies(std::forward<Args>(params)...);
  auto thread = [&] { std::apply(kernel, copies); };
  const auto run = [](void* context) { (*static_cast<decltype(thread)*>(context))(); };
  run_grid(launch, run, &thread);
}

void* shared_memory(size_t bytes);  // checks that the launch gave at least as much
uint32_t shared_offset(const void* p);

void load_global(void* value, const void* p, uint32_t bytes, Site site);
void store_global(void* p, const void* value, uint32_t bytes, Site site);
void load_shared(void* value, const void* p, uint32_t bytes, Site site);
void store_shared(void* p, const void* value, uint32_t bytes, Site site);
void cluster_sync(Site site);
void griddepcontrol_wait(Site site);
void griddepcontrol_launch_dependents(Site site);
void cp_async(void* shared, const void* global, uint32_t bytes, int src_bytes, Site site);
void cp_async_commit(Site site);
void cp_async_wait(int keep, Site site);

void ldmatrix(uint32_t* r, const void* row, int tiles, bool trans, Site site);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool is_bf16, Site site);
void sync_threads(Site site);
void sync_warp(uint32_t mask, Site site);
void barrier_sync(int id, int threads, Site site);

uint64_t shuffle_xor(uint32_t mask, uint64_t bits, int lanes, int width, Site site);

template <class T>
T shuffle_xor_value(uint32_t mask, T value, int lanes, int width, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle_xor(mask, bits, lanes, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace lotr::simt

// ---- CUDA built-ins ----

#define LOTR_SIMT_SITE ::lotr::simt::Site site = ::lotr::simt::Site::here()

inline void __syncthreads(LOTR_SIMT_SITE) {
  ::lotr::simt::sync_threads(site);
}
inline void __syncwarp(unsigned mask = ~0u, LOTR_SIMT_SITE) {
  ::lotr::simt::sync_warp(mask, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, LOTR_SIMT_SITE) {
  return ::lotr::simt::shuffle_xor_value(mask, value, lanes, width, site);
}
