// Runs a grid: clusters of blocks, one after another.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "state.h"

namespace lotr::simt {
namespace {

constexpr uint32_t LANES = 32;
#if LOTR_SIMT_ASAN || LOTR_SIMT_RACE
constexpr size_t STACK_BYTES = 256 << 10;
#else
constexpr size_t STACK_BYTES = 64 << 10;
#endif

void check_launch(const Launch& launch) {
  const auto check = [&](const char* what, unsigned long got, unsigned long most, int least = 1) {
    if (got >= size_t(least) && got <= most) return;
    throw Error(std::string(launch.name) + ": a GPU would refuse this launch: " + what + " is " +
                std::to_string(got) + ", expected " + std::to_string(least) + " to " +
                std::to_string(most));
  };
  check("gridDim.x", launch.grid.x, 2147483647ul);
  check("gridDim.y", launch.grid.y, 65535);
  check("gridDim.z", launch.grid.z, 65535);
  check("blockDim.z", launch.block.z, 64);
  check("threads in a block", 1ul * launch.block.x * launch.block.y * launch.block.z, 1024);
  const unsigned long cluster = 1ul * launch.cluster.x * launch.cluster.y * launch.cluster.z;
  // More than 8 need an attribute of the kernel, and run on few GPUs.
  check("blocks in a cluster", cluster, 8);
  check("shared memory in bytes", launch.smem, machine.options.shared_limit, /*least=*/0);
  if (launch.grid.x % launch.cluster.x || launch.grid.y % launch.cluster.y ||
      launch.grid.z % launch.cluster.z)
    throw Error(std::string(launch.name) +
                ": a GPU would refuse this launch: the grid is not a multiple of the cluster");
}

// Every block starts with shared memory full of NaN, so that a read before the first write is
// visible.
void give_shared_memory(Block& block) {
  const size_t bytes = machine.launch.smem;
  if (bytes != machine.shared_pool_bytes) {
    for (void* p : machine.shared_pool) free(p);
    machine.shared_pool.clear();
    machine.shared_pool_bytes = bytes;
  }
  block.shared = nullptr;
  block.shared_bytes = bytes;
  if (!bytes) return;
  while (machine.shared_pool.size() <= block.rank) {
    void* p = nullptr;
    if (posix_memalign(&p, 1024, bytes)) throw std::bad_alloc();
    machine.shared_pool.push_back(p);
  }
  block.shared = static_cast<unsigned char*>(machine.shared_pool[block.rank]);
  unpoison(block.shared, bytes);
  memset(block.shared, 0xFF, bytes);
}

void start_warp(Block& block, uint32_t index) {
  Warp& warp = block.warps[index];
  warp = Warp{};
  warp.thread = &block.threads[index * LANES];
  warp.block = &block;
  warp.index = index;
  warp.number = machine.warps.size();
  const uint32_t lanes = std::min<uint32_t>(LANES, block.thread_count - index * LANES);
  warp.present = lanes == LANES ? ~0u : (1u << lanes) - 1;
  warp.alive = warp.present;
  machine.warps.push_back(&warp);
  set_ready(warp, warp.present);
}

void start_thread(Block& block, uint32_t linear) {
  const dim3 shape = machine.launch.block;
  Thread& t = block.threads[linear];
  t.index = uint3{linear % shape.x, linear / shape.x % shape.y, linear / shape.x / shape.y};
  t.block = &block;
  t.warp = &block.warps[linear / LANES];
  t.lane = linear % LANES;
  t.linear = linear;
  t.id = block.rank * block.thread_count + linear;
  t.state = State::ready;
  t.op = "its start";
  t.site = Site{machine.launch.name, 0};
  t.copies.clear();
  t.stores.clear();
  t.products.clear();
  t.products_issued = 0;
  t.proxy_fences = 0;
  t.wgmma_fenced = false;
  t.may_touch_global = !machine.launch.early;
  t.log.clear();
  fiber_prepare(t.fiber, machine.stacks.stack(t.id), machine.stacks.bytes(), run_thread);
}

void start_block(Block& block, uint32_t rank, uint3 index) {
  const dim3 shape = machine.launch.block;
  const uint32_t threads = shape.x * shape.y * shape.z;
  const uint32_t warps = (threads + LANES - 1) / LANES;
  if (block.thread_count != threads) {
    block.threads = std::vector<Thread>(threads);
    block.warps = std::vector<Warp>(warps);
    block.thread_count = threads;
  }
  block.index = index;
  block.launched_dependents = false;
  block.rank = rank;
  block.threads_left = threads;
  block.copies_in_flight = 0;
  for (Barrier& b : block.barriers) b = Barrier{};
  block.products.clear();
  give_shared_memory(block);
  block.stores.assign(block.shared_bytes / 4 + 1, WordStore{});
  for (uint32_t w = 0; w < warps; ++w) start_warp(block, w);
  for (uint32_t i = 0; i < threads; ++i) start_thread(block, i);
}

void run_cluster(uint3 corner) {
  const dim3 shape = machine.launch.cluster;
  const uint32_t count = shape.x * shape.y * shape.z;
  const uint32_t threads = machine.launch.block.x * machine.launch.block.y * machine.launch.block.z;
  const size_t warps = (threads + LANES - 1) / LANES * size_t(count);
  machine.stacks.reserve(size_t(count) * threads, STACK_BYTES);
  machine.blocks.resize(count);
  machine.warps.clear();
  machine.ready_warps.assign((warps + 63) / 64, 0);
  const Order order = machine.options.order;
  machine.current_warp = choose(order, warps);
  machine.threads_left = size_t(count) * threads;
  machine.memory_barriers.clear();
  machine.landings.clear();
  machine.cluster_barrier = Barrier{};
  machine.idle_rounds = 0;
  for (uint32_t i = 0; i < count; ++i)
    start_block(machine.blocks[i], i,
                uint3{corner.x + i % shape.x, corner.y + i / shape.x % shape.y,
                      corner.z + i / shape.x / shape.y});
  totals.blocks += count;
  totals.threads += size_t(count) * threads;
  race::begin_blocks(count * threads);
  Thread* first = choose_thread();
  make_current(*first);
  fiber_switch(machine.process, first->fiber);
  machine.current = nullptr;
  race::leave_kernel();
}

// order[i] is the i-th cluster to run, of `count`. The random order is (start + step i) mod count:
// with a step coprime to count it reaches every cluster once, and needs no list.
struct ClusterOrder {
  uint64_t count, step = 1, start = 0;
  bool reverse;
  explicit ClusterOrder(uint64_t n) : count(n), reverse(machine.options.order == Order::reverse) {
    if (machine.options.order != Order::random || n < 2) return;
    start = next_random() % n;
    do step = 1 + next_random() % n;
    while (gcd(step, n) != 1);
  }
  static uint64_t gcd(uint64_t a, uint64_t b) { return b ? gcd(b, a % b) : a; }
  uint64_t operator[](uint64_t i) const {
    return reverse ? count - 1 - i : uint64_t(((unsigned __int128)step * i + start) % count);
  }
};

}  // namespace

void run_grid(const Launch& launch, void (*thread)(void*), void* context) {
  race::ExecutorScope scope;
  if (machine.current) fail("%s: a kernel cannot launch a kernel here", launch.name);
  check_launch(launch);
  machine.launch = launch;
  machine.entry = thread;
  machine.entry_context = context;
  machine.error.clear();
  machine.random = machine.options.seed * 0x9E3779B97F4A7C15ull | 1;
  for (int i = 0; i < 4; ++i) next_random();  // small seeds differ in only a few bits
  blockDim = launch.block;
  gridDim = launch.grid;
  const dim3 g = launch.grid;
  const dim3 b = launch.block;
  const dim3 c = launch.cluster;
  totals.launches.push_back(
      {launch.name, {g.x, g.y, g.z}, {b.x, b.y, b.z}, {c.x, c.y, c.z}, launch.smem, launch.early});

  race::begin_launch();
  const uint64_t nx = g.x / c.x;
  const uint64_t ny = g.y / c.y;
  const uint64_t nz = g.z / c.z;
  const ClusterOrder order(nx * ny * nz);
  for (uint64_t i = 0; i < order.count && machine.error.empty(); ++i) {
    const uint64_t k = order[i];
    run_cluster(
        uint3{unsigned(k % nx) * c.x, unsigned(k / nx % ny) * c.y, unsigned(k / nx / ny) * c.z});
  }
  if (!machine.error.empty()) {
    machine.stacks.forget_frames();
    machine.blocks.clear();
    throw Error("kernel " + std::string(launch.name) + ": " + machine.error);
  }
  const std::string races = race::report();
  if (!races.empty()) throw Error("kernel " + std::string(launch.name) + ": " + races);
}

}  // namespace lotr::simt
