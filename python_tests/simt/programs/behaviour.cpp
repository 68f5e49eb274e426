// One behaviour of the executor a subcommand; test_executor.py says what must come out.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/ptx/sm90.cuh"
#include "simt/api.h"

namespace {
using namespace lotr;

struct Smem {
  float f[128];
  uint32_t word;
};

// The order in which threads write down their number.
struct Trace {
  int32_t* next;
  int* threads;
};
__global__ void trace(Trace p) {
  const int at = ptx::atomic_add(p.next, 1);
  ptx::store(p.threads + at, int(blockIdx.x * blockDim.x + threadIdx.x));
}

void schedule() {
  int32_t next = 0;
  std::vector<int> threads(3 * 64, -1);
  ptx::launch({dim3(3), dim3(64), 0, nullptr, dim3(1, 1, 1), "trace"}, trace, Trace{&next, threads.data()});
  for (int t : threads) printf("%d ", t);
  printf("\n");
}

// The same in a cooperative launch, and whether that found room for 3 blocks and for 2.
void cooperative() {
  int32_t next = 0;
  std::vector<int> threads(3 * 64, -1);
  auto options = simt::options();
  for (uint64_t room : {2, 3}) {
    options.room = room;
    simt::set_options(options);
    const ptx::LaunchArgs args{dim3(3), dim3(64), 0, nullptr, dim3(1, 1, 1), "trace", false, true};
    const bool launched = ptx::launch(args, trace, Trace{&next, threads.data()});
    printf("%d %d\n", launched, int(next));
  }
  for (int t : threads) printf("%d ", t);
  printf("\n%d %d\n", int(simt::counters().launches.size()), simt::counters().launches.back().cooperative);
}

__global__ void poison(float* out) {
  Smem& s = ptx::shared_storage<Smem>();
  const int t = threadIdx.x;
  out[t] = ptx::load_shared(&s.f[t]);
  ptx::store_shared(&s.f[t], 1.f);  // the next block must not see it
}

void shared_starts_as_nan() {
  std::vector<float> out(128);
  ptx::launch({dim3(3), dim3(128), sizeof(Smem), nullptr, dim3(1, 1, 1), "poison"}, poison, out.data());
  int nans = 0;
  for (float v : out) nans += std::isnan(v);
  printf("%d\n", nans);
}

__global__ void reaches_too_early() {
  auto& word = ptx::shared_storage<int32_t>();
  ptx::store_cluster(&word, 1 - ptx::cluster_rank(), 1);  // REMOTE LINE
}

__global__ void mbarrier(uint32_t arrivals, uint32_t bytes) {
  auto& s = ptx::shared_storage<uint64_t>();
  ptx::mbarrier_init(&s, arrivals);
  ptx::fence_mbarrier_init();
  ptx::mbarrier_arrive_expect_tx(&s, bytes);
}

// 128-thread block, half of which never comes.
__global__ void deadlock() {
  if (threadIdx.x < 64) __syncthreads();  // DEADLOCK LINE
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
  ptx::launch({dim3(1), dim3(32), sizeof(Smem), nullptr, dim3(1, 1, 1), "copies"}, copy_in_flight, x, out);
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
  ptx::launch({dim3(7), dim3(32), 0, nullptr, dim3(1, 1, 1), "far"}, far, x, elements / 7);
  double sum = 0;
  for (int64_t i = 0; i < 7; ++i) sum += x[elements / 7 * i];
  printf("%g %d\n", sum, simt::resident_bytes(x, size_t(bytes)) < (1u << 20));
  simt::unmap_sparse(x, size_t(bytes));
}

__global__ void trapped() {
  if (threadIdx.x == 5) ptx::trap("r is 300, expected at most 256");  // TRAP LINE
}
__global__ void throws() {
  throw std::runtime_error("from a kernel");
}
__global__ void nothing() {}

void many_blocks() {
  ptx::launch({dim3(4000, 2), dim3(128), sizeof(Smem), nullptr, dim3(1, 1, 1), "nothing"}, nothing);
  printf("%lu\n", simt::counters().blocks);
}

void launches() {
  for (int i = 0; i < 2; ++i)
    ptx::launch({dim3(2, 3), dim3(32, 2), 64, nullptr, dim3(1, 1, 1), i ? "second" : "first"}, nothing);
  for (const simt::LaunchRecord& l : simt::counters().launches)
    printf("%s %u %u %u %u %zu\n", l.name.c_str(), l.grid[0], l.grid[1], l.block[0], l.block[1],
           l.shared_bytes);
}

// An early launch: a thread may touch global memory, let the next launch begin and end only once it has
// waited.
enum Early { RIGHT, TOUCHES, COPIES, LETS_NEXT, LEAVES, READS_ONLY };
__global__ void early(int what, float* x) {
  Smem& s = ptx::shared_storage<Smem>();
  const int t = threadIdx.x;
  ptx::store_shared(&s.f[t], 1.f);              // shared memory is the block's own
  if (what == TOUCHES) ptx::store(x + t, 1.f);  // EARLY STORE
  if (what == COPIES && t == 5) {
    ptx::cp_async16(&s.f[4 * t], x + 4 * t);  // EARLY COPY
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  }
  if (what == LETS_NEXT) ptx::griddepcontrol_launch_dependents();  // EARLY LAUNCH
  if (what == LEAVES && t == 100) return;
  ptx::griddepcontrol_wait();
  if (blockIdx.x) ptx::griddepcontrol_launch_dependents();
  if (what == READS_ONLY && t == 7) ptx::store_shared(&s.f[t], ptx::load_nc(x + 200));  // EARLY READ
  ptx::store(x + t, ptx::load(x + t) + 1.f);
}

void early_launch(int what, bool is_early) {
  std::vector<float> x(256);
  ptx::launch({dim3(3), dim3(128), sizeof(Smem), nullptr, dim3(1, 1, 1), "early", is_early}, early, what,
              x.data());
  const simt::LaunchRecord& l = simt::counters().launches[0];
  printf("%g %d %lu\n", double(x[127]), l.early, l.let_next);
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
  simt::skip_synchronisation({line ? "behaviour.cpp" : "", line});
  std::vector<float> out(128);
  bool right = true;
  for (simt::Order order : {simt::Order::forward, simt::Order::reverse}) {
    simt::Options options;
    options.order = order;
    simt::set_options(options);
    ptx::launch({dim3(1), dim3(128), sizeof(Smem), nullptr, dim3(1, 1, 1), "tree"}, needs_barriers,
                out.data());
    for (float v : out) right = right && v == 127.f;
  }
  printf("%s\n", right ? "right" : "wrong");
  for (const simt::SynchronisationSite& site : simt::synchronisation_sites())
    printf("%s %d %lu\n", site.op.c_str(), site.line, site.calls);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  const auto one = [](void (*kernel)(), unsigned threads, const char* name) {
    ptx::launch({dim3(1), dim3(threads), 0, nullptr, dim3(1, 1, 1), name}, kernel);
  };
  try {
    simt::set_options(simt::options_from_environment());
    if (what == "schedule") schedule();
    if (what == "poison") shared_starts_as_nan();
    if (what == "deadlock") one(deadlock, 128, "half");
    if (what == "copies") copies_land_at_the_wait();
    if (what == "sparse") sparse();
    if (what == "trap") one(trapped, 32, "trapped");
    if (what == "throw") one(throws, 32, "throws");
    if (what == "again") {  // a failed launch leaves nothing behind
      try {
        one(deadlock, 128, "half");
      } catch (const simt::Error&) {
      }
      schedule();
    }
    if (what == "no_grid") ptx::launch({dim3(0), dim3(32), 0, nullptr, dim3(1, 1, 1), "empty"}, nothing);
    if (what == "crowd") ptx::launch({dim3(64), dim3(1024), 0, nullptr, dim3(1, 1, 1), "crowd"}, nothing);
    if (what == "cooperative") cooperative();
    if (what == "cooperative crowd")
      ptx::launch({dim3(64), dim3(1024), 0, nullptr, dim3(1, 1, 1), "crowd", false, true}, nothing);
    if (what == "shared") ptx::launch({dim3(1), dim3(32), 300000, nullptr, dim3(1, 1, 1), "large"}, nothing);
    if (what == "cluster") ptx::launch({dim3(16), dim3(32), 0, nullptr, dim3(16), "large"}, nothing);
    if (what == "early cooperative")
      ptx::launch({dim3(1), dim3(32), 0, nullptr, dim3(1, 1, 1), "both", true, true}, nothing);
    if (what == "remote") ptx::launch({dim3(2), dim3(32), 4, nullptr, dim3(2), "remote"}, reaches_too_early);
    if (what == "mbarrier")
      ptx::launch({dim3(1), dim3(1), 8, nullptr, dim3(1, 1, 1), "mbarrier"}, mbarrier,
                  uint32_t(atoi(argv[2])), uint32_t(atoi(argv[3])));
    if (what == "map") ptx::tensor_map_2d(static_cast<const __half*>(nullptr), 0, 64, 64, 64);
    if (what == "blocks") many_blocks();
    if (what == "launches") launches();
    if (what == "early") early_launch(atoi(argv[2]), atoi(argv[3]));
    if (what == "skip") skip(atoi(argv[2]));
  } catch (const std::exception& error) {
    printf("error: %s\n", error.what());
  }
}
