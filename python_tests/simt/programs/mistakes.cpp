// Kernels with one mistake each, of the kind that people write. test_mistakes.py says how the
// executor notices it.
//
// `program NAME` prints what was caught, or "nothing"; then "right" if a kernel without a mistake
// has the right results.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/ptx/sm80.cuh"
#include "cuda/sm90/ptx.cuh"
#include "simt/api.h"

namespace {
using namespace lotr;

constexpr int THREADS = 128;

struct alignas(1024) Smem {
  __half tile[64][64];
  float f[THREADS];
  uint64_t full;
};

struct Params {
  float* y;            // [2 THREADS]
  const float* x;      // [2 THREADS]
  ptx::TensorMap map;  // of 64 x 64
};

struct Shape {
  unsigned blocks = 1, threads = THREADS, cluster = 1;
  size_t shared = sizeof(Smem);
  bool early = false;
};
constexpr Shape PAIR{2, THREADS, 2}, EARLY{1, THREADS, 1, sizeof(Smem), true};
constexpr Shape WIDE{1, THREADS, 1, 4 * sizeof(Smem)};  // room for wgmma's 256 rows

std::map<std::string, std::function<void(const Params&)>> mistakes;

// Puts a launch among the mistakes.
struct Mistake {
  template <class F>
  Mistake(const char* name, F launch) {
    mistakes[name] = launch;
  }
};

template <auto KERNEL>
auto launch(Shape shape = {}) {
  return [shape](const Params& p) {
    ptx::launch<KERNEL>({dim3(shape.blocks), dim3(shape.threads), shape.shared, nullptr,
                         dim3(shape.cluster), "kernel", shape.early},
                        p);
  };
}

// A kernel, and the shape of its launch: one block unless it is given.
#define MISTAKE(name, ...)                                          \
  __global__ void name(Params p);                                   \
  const Mistake launch_of_##name(#name, launch<name>(__VA_ARGS__)); \
  __global__ void name([[maybe_unused]] Params p)
#define SHARED                                                              \
  Smem& s = ptx::shared_storage<Smem>();                                    \
  const int t [[maybe_unused]] = threadIdx.x;                               \
  const int lane [[maybe_unused]] = t % 32, warp [[maybe_unused]] = t / 32, \
                 block [[maybe_unused]] = blockIdx.x

LOTR_DEVICE void start(Smem& s, int arrivals) {
  if (threadIdx.x == 0) ptx::mbarrier_init(&s.full, uint32_t(arrivals));
  if (threadIdx.x == 0) ptx::fence_mbarrier_init();
  ptx::cluster_sync();
}

LOTR_DEVICE void multiply(uint64_t a) {
  float d[128] = {};
  ptx::wgmma_fence();
  ptx::wgmma<__half>(d, a, a);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

// Correct: each block's part of y is x backwards, by way of shared memory. It has each
// synchronization that others lack.
MISTAKE(right, {2, THREADS, 2, sizeof(Smem), true}) {
  SHARED;
  start(s, 1);
  ptx::griddepcontrol_wait();
  if (lane % 4 == 0) ptx::cp_async16(&s.f[t], p.x + THREADS * block + t);
  ptx::cp_async_commit();
  if (t == 0) {
    ptx::mbarrier_arrive_expect_tx(&s.full, sizeof s.tile);
    ptx::tma_load_2d(s.tile, &p.map, 0, 0, &s.full);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  float v = ptx::load_shared(&s.f[THREADS - 1 - t]);
  __syncthreads();
  ptx::store_shared(&s.f[t], v);
  __syncwarp();
  v = ptx::load_shared(&s.f[t ^ 1]);
  v = __shfl_xor_sync(0xffffffffu, v, 1);
  if (warp < 2) ptx::barrier_sync(1, 64);
  ptx::mbarrier_wait(&s.full, 0);
  ptx::fence_proxy_async();
  ptx::store(p.y + THREADS * block + t, v);
  ptx::cluster_sync();
  ptx::griddepcontrol_launch_dependents();
}

// Correct too: the halves of each warp synchronize separately.
MISTAKE(right_halves) {
  SHARED;
  ptx::store_shared(&s.f[t], 1.f);
  __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
  ptx::load_shared(&s.f[t ^ 1]);
}

// ---- barriers and warps ----

MISTAKE(deadlock) {
  if (threadIdx.x < 64) __syncthreads();
}
MISTAKE(divergent_barrier) {
  if (threadIdx.x < 96)
    __syncthreads();
  else
    __syncthreads();
}
MISTAKE(named_barrier_alone) {
  if (threadIdx.x < 32) ptx::barrier_sync(1, 64);
  __syncthreads();
}
MISTAKE(named_barrier_counts) {
  if (threadIdx.x < 64) ptx::barrier_sync(1, threadIdx.x < 32 ? 64 : THREADS);
}
MISTAKE(half_warps_at_a_barrier) {
  if (threadIdx.x % 32 < 16) ptx::barrier_sync(1, 64);
}
MISTAKE(divergent_warp) {
  if (threadIdx.x % 32 < 16)
    __shfl_xor_sync(0xffffffffu, 1.f, 1);
  else
    __syncwarp();
}
MISTAKE(shuffle_outside_mask) {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffu, 1.f, 16);
}
MISTAKE(product_of_half_a_warp) {
  uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  if (threadIdx.x % 32 < 16) ptx::mma_m16n8k16<__half>(d, a, b);
  __syncwarp();
}
MISTAKE(throws) {
  throw std::runtime_error("from a kernel");
}

// ---- memory ----

MISTAKE(shared_store_outside) {
  SHARED;
  ptx::store_shared(s.f + sizeof s / 4 + t, 1.f);
}
MISTAKE(copy_outside) {
  SHARED;
  ptx::cp_async16(&s + 1, p.x);
}
MISTAKE(misaligned_copy) {
  SHARED;
  ptx::cp_async16(&s.f[4 * lane], p.x + 1);
}
MISTAKE(misaligned_load) {
  ptx::load(reinterpret_cast<const float4*>(p.x + 1));
}
MISTAKE(exits_with_a_copy_in_flight) {
  SHARED;
  ptx::cp_async16(&s.f[4 * lane], p.x);
}
MISTAKE(reads_a_copy_in_flight) {
  SHARED;
  ptx::cp_async16(&s.f[4 * lane], p.x);
  ptx::cp_async_commit();
  ptx::load_shared(&s.f[4 * lane]);
  ptx::cp_async_wait<0>();
}
MISTAKE(copy_beyond_an_array) {
  SHARED;
  ptx::cp_async16(&s.f[4 * lane], p.x + 2 * THREADS);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}
MISTAKE(store_beyond_an_array) {
  ptx::store(p.y + 2 * THREADS, 1.f);
}

// ---- races ----

MISTAKE(no_barrier) {
  SHARED;
  ptx::store_shared(&s.f[t], 1.f);
  ptx::load_shared(&s.f[THREADS - 1 - t]);
}
MISTAKE(no_syncwarp) {
  SHARED;
  ptx::store_shared(&s.f[t], 1.f);
  ptx::load_shared(&s.f[t ^ 1]);
}
MISTAKE(plain_sum) {
  SHARED;
  if (t == 0) s.f[0] = 0;
  __syncthreads();
  if (lane == 0) s.f[0] += 1.f;
}
MISTAKE(one_output, {2}) {
  if (threadIdx.x == 0) ptx::store(p.y, 1.f);
}
MISTAKE(reads_its_neighbor, {2}) {
  if (threadIdx.x > 0) return;
  ptx::store(p.y + blockIdx.x, 1.f);
  if (blockIdx.x > 0) ptx::load(p.y + blockIdx.x - 1);
}
MISTAKE(loads_what_another_block_stores, {2}) {
  SHARED;
  start(s, 1);
  if (t > 0) return;
  if (block == 0) {
    ptx::tma_store_2d(&p.map, 0, 0, s.tile);
    ptx::bulk_commit();
    ptx::bulk_wait_all();
  } else {
    ptx::mbarrier_arrive_expect_tx(&s.full, sizeof s.tile);
    ptx::tma_load_2d(s.tile, &p.map, 0, 0, &s.full);
    ptx::mbarrier_wait(&s.full, 0);
  }
}
MISTAKE(syncwarp_of_other_lanes) {
  SHARED;
  if (lane < 16) {
    ptx::store_shared(&s.f[t], 1.f);
    for (int i = 0; i < 2; ++i) __syncwarp(0xffffu);
  } else {
    __syncwarp(0xffff0000u);
    ptx::load_shared(&s.f[t - 16]);
  }
}
MISTAKE(barrier_of_other_threads) {
  SHARED;
  if (t < 64) {
    ptx::store_shared(&s.f[t], 1.f);
    for (int i = 0; i < 2; ++i) ptx::barrier_sync(1, 64);
  } else {
    ptx::barrier_sync(1, 64);
    ptx::load_shared(&s.f[t - 64]);
  }
}
MISTAKE(waits_for_the_phase_before) {
  SHARED;
  start(s, 2);
  if (t < 2) ptx::mbarrier_arrive_expect_tx(&s.full, 0);
  __syncwarp();
  if (t == 0) ptx::store_shared(&s.f[0], 1.f);
  if (t == 0) ptx::mbarrier_arrive_expect_tx(&s.full, 0);  // the first of two of the next phase
  if (t == 64) ptx::mbarrier_wait(&s.full, 0);
  if (t == 64) ptx::load_shared(&s.f[0]);
}
MISTAKE(no_barrier_after_init) {
  SHARED;
  if (t == 0) ptx::mbarrier_init(&s.full, 1);
  if (t == 64) ptx::mbarrier_arrive_expect_tx(&s.full, 0);
}

// ---- clusters, bulk copies, wgmma ----

MISTAKE(mbarrier_without_init) {
  SHARED;
  ptx::mbarrier_arrive_expect_tx(&s.full, 0);
}
MISTAKE(mbarrier_of_a_block_without_init, PAIR) {
  SHARED;
  ptx::cluster_sync();
  ptx::mbarrier_arrive_cluster(&s.full, 1 - block);
}
MISTAKE(every_thread_inits) {
  SHARED;
  ptx::mbarrier_init(&s.full, 1);
}
MISTAKE(no_init_fence, PAIR) {
  SHARED;
  if (t == 0) ptx::mbarrier_init(&s.full, 2);
  ptx::cluster_sync();
  ptx::mbarrier_arrive_cluster(&s.full, 1 - block);
}
MISTAKE(too_many_arrivals) {
  SHARED;
  start(s, 2);
  ptx::mbarrier_arrive_expect_tx(&s.full, 16);
}
MISTAKE(arrivals_beyond_20_bits) {
  SHARED;
  start(s, 1 << 20);
}
MISTAKE(bytes_beyond_20_bits) {
  SHARED;
  start(s, 1);
  if (t == 0) ptx::mbarrier_arrive_expect_tx(&s.full, 1 << 20);
}
MISTAKE(reaches_a_block_too_early, PAIR) {
  SHARED;
  ptx::mbarrier_init(&s.full, 1);
  ptx::fence_mbarrier_init();
  ptx::mbarrier_arrive_cluster(&s.full, 1 - block);
}
MISTAKE(reaches_a_block_that_has_exited, PAIR) {
  SHARED;
  start(s, THREADS);
  if (block == 1) ptx::mbarrier_arrive_cluster(&s.full, 0);
}
MISTAKE(divergent_cluster_barrier, PAIR) {
  SHARED;
  start(s, 1);
  if (t == 0) ptx::mbarrier_wait(&s.full, 0);
  ptx::cluster_sync();
}
MISTAKE(misaligned_tile) {
  SHARED;
  start(s, 1);
  if (t == 0) ptx::tma_load_2d(s.tile[1], &p.map, 0, 0, &s.full);
}
MISTAKE(multicast_outside, PAIR) {
  SHARED;
  start(s, 1);
  if (t == 0) ptx::tma_load_2d_multicast(s.tile, &p.map, 0, 0, &s.full, 7);
}
MISTAKE(exits_with_a_bulk_copy_in_flight) {
  SHARED;
  start(s, 1);
  if (t == 0) ptx::mbarrier_arrive_expect_tx(&s.full, sizeof s.tile);
  if (t == 0) ptx::tma_load_2d(s.tile, &p.map, 0, 0, &s.full);
}
MISTAKE(no_proxy_fence) {
  SHARED;
  start(s, 1);
  ptx::store_shared(reinterpret_cast<float*>(s.tile) + t, 1.f);
  __syncthreads();
  if (t == 0) ptx::tma_store_2d(&p.map, 0, 0, s.tile);
  ptx::bulk_commit();
  ptx::bulk_wait_all();
}
MISTAKE(no_proxy_fence_nor_mbarrier) {
  SHARED;
  ptx::store_shared(reinterpret_cast<float*>(s.tile) + t, 1.f);
  __syncthreads();
  if (t == 0) ptx::tma_store_2d(&p.map, 0, 0, s.tile);
  ptx::bulk_commit();
  ptx::bulk_wait_all();
}
MISTAKE(no_proxy_fence_before_a_load) {
  SHARED;
  start(s, 1);
  ptx::store_shared(reinterpret_cast<float*>(s.tile) + t, 1.f);
  __syncthreads();
  if (t == 0) ptx::mbarrier_arrive_expect_tx(&s.full, sizeof s.tile);
  if (t == 0) ptx::tma_load_2d(s.tile, &p.map, 0, 0, &s.full);
  ptx::mbarrier_wait(&s.full, 0);
}
MISTAKE(no_proxy_fence_before_wgmma, WIDE) {
  SHARED;
  ptx::store_shared(reinterpret_cast<float*>(s.tile) + t, 1.f);
  __syncthreads();
  multiply(ptx::swizzled_descriptor(s.tile));
}
MISTAKE(product_of_one_warp, WIDE) {
  SHARED;
  if (warp == 0) multiply(ptx::swizzled_descriptor(s.tile));
}
MISTAKE(descriptor_per_warp, WIDE) {
  SHARED;
  multiply(ptx::swizzled_descriptor(s.tile) + ptx::descriptor_step<__half>(16 * warp));
}
MISTAKE(no_wgmma_fence) {
  SHARED;
  float d[128] = {};
  const uint64_t tile = ptx::swizzled_descriptor(s.tile);
  ptx::wgmma<__half>(d, tile, tile);
}

// ---- early launches ----

MISTAKE(stores_early, EARLY) {
  ptx::store(p.y + threadIdx.x, 1.f);
}
MISTAKE(copies_early, EARLY) {
  SHARED;
  if (t == 5) ptx::cp_async16(&s.f[4 * t], p.x);
  ptx::griddepcontrol_wait();
}
MISTAKE(lets_the_next_begin_early, EARLY) {
  ptx::griddepcontrol_launch_dependents();
}
MISTAKE(exits_early, EARLY) {
  if (threadIdx.x == 100) return;
  ptx::griddepcontrol_wait();
}

// ---- launches that a GPU refuses ----

const Mistake no_grid("no_grid", launch<right>({0}));
const Mistake too_many_threads("too_many_threads", launch<right>({1, 1056}));
const Mistake too_large_a_cluster("too_large_a_cluster", launch<right>({16, THREADS, 16}));
const Mistake too_much_shared_memory("too_much_shared_memory",
                                     launch<right>({1, THREADS, 1, 300000}));
const Mistake too_little_shared_memory("too_little_shared_memory",
                                       launch<right>({1, THREADS, 1, sizeof(Smem) / 2}));
const Mistake empty_tensor_map("empty_tensor_map", [](const Params&) {
  ptx::tensor_map_2d(static_cast<const __half*>(nullptr), 0, 64, 64, 64);
});

}  // namespace

int main(int, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  std::vector<float> x(2 * THREADS), y(2 * THREADS, NAN);
  std::vector<__half> matrix(64 * 64 + 8);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i);
  auto* aligned =
      reinterpret_cast<__half*>((reinterpret_cast<uintptr_t>(matrix.data()) + 15) / 16 * 16);
  const Params p{y.data(), x.data(), ptx::tensor_map_2d(aligned, 64, 64, 64, 64)};
  simt::set_options(simt::options_from_environment());
  simt::register_array("y", y.data(), y.size() * sizeof(float));
  try {
    mistakes.at(argv[1])(p);
    printf("nothing\n");
  } catch (const simt::Error& error) {
    std::string text = error.what();
    for (char& c : text) c = c == '\n' ? ';' : c;
    printf("%s\n", text.c_str());
  }
  mistakes.at("right")(p);  // a failed launch has no effect on the next one
  bool is_right = true;
  for (int block = 0; block < 2; ++block)
    for (int t = 0; t < THREADS; ++t)
      is_right &= y[THREADS * block + t] == x[THREADS * block + THREADS - 1 - t];
  printf("%s\n", is_right ? "right" : "wrong");
}
