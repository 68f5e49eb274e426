// What kernels include when a host compiler compiles them: the functions that csrc/cuda/ptx calls, and the
// CUDA built-ins.  Their code is in files that are never compiled with -fsanitize=thread, so that the race
// detector sees the kernel's accesses and not the executor's own.
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

// Real objects, set at every switch of threads: macros of these names would break CUDA's own headers.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace lotr::simt {

struct Launch {
  const char* name;
  dim3 grid, block, cluster;
  size_t smem;
  bool early, cooperative;  // as LaunchArgs has them
};
bool finds_room(dim3 grid);  // as a cooperative launch
void run_grid(const Launch& launch, void (*thread)(void*), void* context);

// False if a cooperative launch has more blocks than Options::room.
template <class... Params, class... Args>
bool launch(const Launch& launch, void (*kernel)(Params...), Args&&... params) {
  if (launch.cooperative && !finds_room(launch.grid)) return false;
  std::tuple<std::decay_t<Params>...> copies(std::forward<Args>(params)...);
  auto thread = [&] { std::apply(kernel, copies); };
  const auto run = [](void* context) { (*static_cast<decltype(thread)*>(context))(); };
  run_grid(launch, run, &thread);
  return true;
}

void* shared_memory(size_t bytes);  // checks that the launch gave as much
uint32_t shared_offset(const void* p);
[[noreturn]] void trap(const char* message, Site site);

void load_global(void* value, const void* p, uint32_t bytes, bool read_only, Site site);
void store_global(void* p, const void* value, uint32_t bytes, Site site);
void load_shared(void* value, const void* p, uint32_t bytes, Site site);
void store_shared(void* p, const void* value, uint32_t bytes, Site site);
void cluster_sync(Site site);
void cluster_sync_relaxed(Site site);
void load_cluster(void* value, const void* p, uint32_t bytes, uint32_t rank, Site site);
void fence_device(Site site);
void griddepcontrol_wait(Site site);
void griddepcontrol_launch_dependents(Site site);
int32_t atomic_add(int32_t* p, int32_t value, bool acq_rel, Site site);
void store_release(int32_t* p, int32_t value, Site site);
void wait_equal(const int32_t* p, int32_t value, bool acquire, Site site);
float atomic_add(float* p, float value, Site site);
int32_t atomic_wrap(int32_t* p, int32_t limit, Site site);  // atomicInc, relaxed

void cp_async(void* shared, const void* global, uint32_t bytes, int src_bytes, Site site);
void cp_async_commit(Site site);
void cp_async_wait(int keep, Site site);  // keep < 0: everything, committed or not

void ldmatrix(uint32_t* r, const void* row, int tiles, bool trans, Site site);
uint32_t movmatrix_trans(uint32_t a, Site site);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool is_bf16, Site site);
void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b, Site site);
uint32_t to_tf32(float x);

void sync_threads(Site site);
void sync_warp(uint32_t mask, Site site);
void barrier_sync(int id, int threads, Site site);
void barrier_arrive(int id, int threads, Site site);

enum class Shuffle { index, exclusive_or };
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t bits, int operand, int width, Site site);

template <class T>
T shuffle_value(Shuffle kind, uint32_t mask, T value, int operand, int width, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, operand, width, site);
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
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, LOTR_SIMT_SITE) {
  return ::lotr::simt::shuffle_value(::lotr::simt::Shuffle::index, mask, value, lane, width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, LOTR_SIMT_SITE) {
  return ::lotr::simt::shuffle_value(::lotr::simt::Shuffle::exclusive_or, mask, value, lanes, width, site);
}
