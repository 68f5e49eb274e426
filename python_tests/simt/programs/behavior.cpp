// One subcommand per behavior of the executor; test_executor.py says what each must print.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/ptx/sm80.cuh"
#include "simt/api.h"

namespace {
using namespace lotr;

struct Smem {
  float f[128];
  uint32_t word;
};

// The order in which threads write down their numbers. A plain counter works, because one thread
// runs at a time.
struct Trace {
  int* next;
  int* threads;
};
__global__ void trace(Trace p) {
  p.threads[(*p.next)++] = int(blockIdx.x * blockDim.x + threadIdx.x);
}

// One launch without clusters.
template <auto KERNEL, class... Args>
void launch(unsigned blocks, unsigned threads, size_t shared, const char* name, Args&&... args) {
  ptx::launch<KERNEL>({dim3(blocks), dim3(threads), shared, nullptr, dim3(1, 1, 1), name}, args...);
}

void schedule() {
  int next = 0;
  std::vector<int> threads(3 * 64, -1);
  launch<trace>(3, 64, 0, "trace", Trace{&next, threads.data()});
  for (int t : threads) printf("%d ", t);
  printf("\n");
}

__global__ void poison(float* out) {
  Smem& s = ptx::shared_storage<Smem>();
  const int t = threadIdx.x;
  out[t] = ptx::load_shared(&s.f[t]);
  ptx::store_shared(&s.f[t], 1.f);  // the next block must not see it
}

void shared_starts_as_nan() {
  std::vector<float> out(128);
  launch<poison>(3, 128, sizeof(Smem), "poison", out.data());
  int nans = 0;
  for (float v : out) nans += std::isnan(v);
  printf("%d\n", nans);
}

__global__ void copy_in_flight(const float* x, float* out) {
  Smem& s = ptx::shared_storage<Smem>();
  const int t = threadIdx.x;
  for (int i = t; i < 128; i += 32) ptx::store_shared(&s.f[i], 2.f);
  ptx::cp_async16(&s.f[4 * t], x + 4 * t);
  ptx::cp_async_commit();
  out[t] = ptx::load_shared(&s.f[4 * t]);
  ptx::cp_async_wait<0>();
  out[32 + t] = ptx::load_shared(&s.f[4 * t]);
}

void copies_land_at_the_wait() {
  alignas(16) float x[128];
  float out[64];
  for (float& v : x) v = 7.f;
  launch<copy_in_flight>(1, 32, sizeof(Smem), "copies", x, out);
  printf("%g %g\n", double(out[0]), double(out[32]));
}

// x[i] += 1 at elements far beyond 2^31
__global__ void far(float* x, int64_t step) {
  float* p = x + step * int64_t(blockIdx.x);
  if (threadIdx.x == 0) ptx::store(p, ptx::load(p) + 1.f);
}

void sparse() {
  const int64_t elements = int64_t(3) << 31, bytes = elements * 4;
  auto* x = static_cast<float*>(simt::map_sparse(size_t(bytes)));
  launch<far>(7, 32, 0, "far", x, elements / 7);
  double sum = 0;
  for (int64_t i = 0; i < 7; ++i) sum += x[elements / 7 * i];
  printf("%g\n", sum);
  simt::unmap_sparse(x, size_t(bytes));
}

__global__ void nothing() {}

void many_blocks() {
  launch<nothing>(8000, 128, sizeof(Smem), "nothing");
  printf("%lu\n", simt::counters().blocks);
}

void launches() {
  for (int i = 0; i < 2; ++i)
    ptx::launch<nothing>(
        {dim3(2, 3), dim3(32, 2), 64, nullptr, dim3(1, 1, 1), i ? "second" : "first"});
  for (const simt::LaunchRecord& l : simt::counters().launches)
    printf("%s %u %u %u %u %zu\n", l.name.c_str(), l.grid[0], l.grid[1], l.block[0], l.block[1],
           l.shared_bytes);
}

// x[t] += 1 in blocks that may start before the previous launch has ended. All but the first
// let the next one start.
__global__ void early(float* x) {
  ptx::griddepcontrol_wait();
  if (blockIdx.x) ptx::griddepcontrol_launch_dependents();
  ptx::store(x + threadIdx.x, ptx::load(x + threadIdx.x) + 1.f);
}

void early_launches() {
  std::vector<float> x(128);
  for (const bool is_early : {true, false})
    ptx::launch<early>({dim3(3), dim3(128), 0, nullptr, dim3(1, 1, 1), "early", is_early},
                       x.data());
  for (const simt::LaunchRecord& l : simt::counters().launches)
    printf("%d %lu ", l.early, l.launched_dependents);
  printf("%g\n", double(x[127]));
}

// A tree of sums that needs both of its barriers.
__global__ void needs_barriers(float* out) {
  Smem& s = ptx::shared_storage<Smem>();
  const int t = threadIdx.x;
  ptx::store_shared(&s.f[t], float(t));
  __syncthreads();  // FIRST BARRIER
  const float v = ptx::load_shared(&s.f[t]) + ptx::load_shared(&s.f[127 - t]);
  __syncthreads();  // SECOND BARRIER
  ptx::store_shared(&s.f[t], v);
  __syncwarp();
  out[t] = ptx::load_shared(&s.f[t ^ 1]);
}

void skip(int line) {
  simt::skip_synchronization({line ? "behavior.cpp" : "", line});
  std::vector<float> out(128);
  bool right = true;
  for (simt::Order order : {simt::Order::forward, simt::Order::reverse}) {
    simt::Options options;
    options.order = order;
    simt::set_options(options);
    launch<needs_barriers>(1, 128, sizeof(Smem), "tree", out.data());
    for (float v : out) right = right && v == 127.f;
  }
  printf("%s\n", right ? "right" : "wrong");
  for (const simt::SynchronizationSite& site : simt::synchronization_sites())
    printf("%s %d %lu\n", site.op.c_str(), site.line, site.calls);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  try {
    simt::set_options(simt::options_from_environment());
    if (what == "schedule") schedule();
    if (what == "poison") shared_starts_as_nan();
    if (what == "copies") copies_land_at_the_wait();
    if (what == "sparse") sparse();
    if (what == "blocks") many_blocks();
    if (what == "launches") launches();
    if (what == "early") early_launches();
    if (what == "skip") skip(atoi(argv[2]));
  } catch (const std::exception& error) {
    printf("error: %s\n", error.what());
  }
}
