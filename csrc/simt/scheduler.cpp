// Runs a grid: blocks (clusters of blocks) one after another, a block's threads as fibers that switch only
// where they wait, or at random at memory accesses.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace lotr::simt {

Machine machine;

namespace {

constexpr int LANES = 32;
#if LOTR_SIMT_ASAN || LOTR_SIMT_RACE
constexpr size_t STACK_BYTES = 256 << 10;
#else
constexpr size_t STACK_BYTES = 64 << 10;
#endif

int lowest(uint32_t bits) {
  return __builtin_ctz(bits);
}
int highest(uint32_t bits) {
  return 31 - __builtin_clz(bits);
}
int nth(uint64_t bits, size_t n) {
  while (n--) bits &= bits - 1;
  return __builtin_ctzll(bits);
}

void make_current(Thread& t) {
  machine.current = &t;
  threadIdx = t.index;
  blockIdx = t.block->index;
  ++totals.switches;
}

// Where every thread of the cluster is, threads at the same place together.
std::string whereabouts() {
  const auto same = [](const Thread& a, const Thread& b) {
    if ((a.state == State::exited) != (b.state == State::exited)) return false;
    return a.state == State::exited ||
           (a.op == b.op && a.site.line == b.site.line && !strcmp(a.site.file, b.site.file));
  };
  std::string text;
  int groups = 0;
  for (const Block& block : machine.blocks)
    for (const Thread& t : block.threads) {
      const auto first = std::find_if(block.threads.begin(), block.threads.end(),
                                      [&](const Thread& other) { return same(other, t); });
      if (&*first != &t || ++groups > 16) continue;
      const auto count = std::count_if(block.threads.begin(), block.threads.end(),
                                       [&](const Thread& other) { return same(other, t); });
      char line[400];
      int n = snprintf(line, sizeof line, "\n  block (%u,%u,%u): %d threads from %u on ", block.index.x,
                       block.index.y, block.index.z, int(count), t.linear);
      if (t.state == State::exited)
        snprintf(line + n, sizeof line - n, "have exited");
      else
        snprintf(line + n, sizeof line - n, "are at %s, %s:%d", t.op, t.site.file, t.site.line);
      text += line;
    }
  return text;
}

void run_oldest_engine() {
  const auto work = std::move(machine.engine.front());
  machine.engine.pop_front();
  work();
  progress();
}

Warp* choose_warp() {
  Warp* now = machine.warps[machine.current_warp];
  if (now->ready) return now;  // a warp goes on until all its lanes wait
  size_t count = 0;
  for (uint64_t bits : machine.ready_warps) count += __builtin_popcountll(bits);
  if (!count) return nullptr;
  const Order order = machine.options.order;
  size_t k = order == Order::forward ? 0 : order == Order::reverse ? count - 1 : next_random() % count;
  for (size_t i = 0;; ++i) {
    const size_t here = __builtin_popcountll(machine.ready_warps[i]);
    if (k < here) {
      machine.current_warp = i * 64 + nth(machine.ready_warps[i], k);
      return machine.warps[machine.current_warp];
    }
    k -= here;
  }
}

// The thread that runs next; null when all have exited, or after an error.
Thread* choose_thread() {
  const Order order = machine.options.order;
  for (;;) {
    if (!machine.engine.empty() && order == Order::random && next_random() % 16 == 0) run_oldest_engine();
    if (Warp* warp = choose_warp()) {
      const uint32_t ready = warp->ready;
      const int lane = order == Order::forward   ? lowest(ready)
                       : order == Order::reverse ? highest(ready)
                                                 : nth(ready, next_random() % __builtin_popcount(ready));
      return &warp->thread[lane];
    }
    if (!machine.threads_left) return nullptr;
    if (!machine.engine.empty()) {
      run_oldest_engine();
      continue;
    }
    // Threads that poll may look once more; if then nothing at all has moved, nothing ever will.
    if (machine.idle_rounds++ < 2) {
      wake_spinners();
      if (choose_warp()) continue;
    }
    machine.error = "deadlock: no thread can go on" + whereabouts();
    return nullptr;
  }
}

void reschedule() {
  Thread& me = self();
  Thread* next = choose_thread();
  if (!next) fiber_leave(me.fiber, machine.process);
  if (next == &me) return;
  make_current(*next);
  fiber_switch(me.fiber, next->fiber);
}

void run_thread() {
  fiber_entered();
  Thread& t = self();
  std::string exception;
  try {
    race::KernelScope scope;
    machine.entry(machine.entry_context);
  } catch (const std::exception& e) {
    exception = e.what();
  }
  if (!exception.empty()) fail("exception in a kernel: %s", exception.c_str());
  for (const AsyncCopy& copy : t.copies)
    if (!copy.commit)
      fail("thread exits with cp.async in flight (latest: %s at %s:%d)", t.op, t.site.file, t.site.line);
  if (!t.products.empty()) fail("thread exits with wgmma in flight");
  Warp& warp = *t.warp;
  for (uint32_t lanes = warp.arrived; lanes; lanes &= lanes - 1) {
    const Thread& other = warp.thread[lowest(lanes)];
    if (other.mask >> t.lane & 1)
      fail("lane %u exits while lane %u waits for it in %s at %s:%d", t.lane, other.lane, other.op,
           other.site.file, other.site.line);
  }
  t.state = State::exited;
  warp.alive &= ~(1u << t.lane);
  clear_ready(warp, 1u << t.lane);
  if (!warp.alive) flush_log(warp);
  --machine.threads_left;
  progress();
  Thread* next = choose_thread();
  if (!next) fiber_leave(t.fiber, machine.process);
  make_current(*next);
  fiber_leave(t.fiber, next->fiber);
}

void check_launch(const Launch& launch) {
  const auto refuse = [&](const char* what, unsigned long got, unsigned long most) {
    throw Error(std::string(launch.name) + ": a GPU would refuse this launch: " + what + " is " +
                std::to_string(got) + ", expected 1 to " + std::to_string(most));
  };
  const auto check = [&](const char* what, unsigned long got, unsigned long most) {
    if (got < 1 || got > most) refuse(what, got, most);
  };
  check("gridDim.x", launch.grid.x, 2147483647ul);
  check("gridDim.y", launch.grid.y, 65535);
  check("gridDim.z", launch.grid.z, 65535);
  check("blockDim.z", launch.block.z, 64);
  check("threads in a block", 1ul * launch.block.x * launch.block.y * launch.block.z, 1024);
  check("blocks in a cluster", 1ul * launch.cluster.x * launch.cluster.y * launch.cluster.z, 16);
  if (launch.smem > machine.options.shared_limit)
    refuse("shared memory in bytes", launch.smem, machine.options.shared_limit);
  if (launch.grid.x % launch.cluster.x || launch.grid.y % launch.cluster.y ||
      launch.grid.z % launch.cluster.z)
    throw Error(std::string(launch.name) +
                ": a GPU would refuse this launch: grid is no multiple of the cluster");
}

// Every block starts with shared memory full of NaN.
void give_shared_memory(Block& block, size_t i) {
  const size_t bytes = machine.launch.smem;
  if (bytes != machine.shared_pool_bytes) {
    for (void* p : machine.shared_pool) free(p);
    machine.shared_pool.clear();
    machine.shared_pool_bytes = bytes;
  }
  block.shared = nullptr;
  block.shared_bytes = bytes;
  if (!bytes) return;
  while (machine.shared_pool.size() <= i) {
    void* p = nullptr;
    if (posix_memalign(&p, 1024, bytes)) throw std::bad_alloc();
    machine.shared_pool.push_back(p);
  }
  block.shared = static_cast<unsigned char*>(machine.shared_pool[i]);
  unpoison(block.shared, bytes);
  memset(block.shared, 0xFF, bytes);
}

void start_block(Block& block, uint32_t rank, uint3 index) {
  const dim3 shape = machine.launch.block;
  const uint32_t threads = shape.x * shape.y * shape.z, warps = (threads + LANES - 1) / LANES;
  if (block.thread_count != threads) {
    block.threads = std::vector<Thread>(threads);
    block.warps = std::vector<Warp>(warps);
    block.thread_count = threads;
  }
  block.index = index;
  block.rank = rank;
  for (Barrier& b : block.barriers) b = Barrier{};
  give_shared_memory(block, rank);
  for (uint32_t w = 0; w < warps; ++w) {
    Warp& warp = block.warps[w];
    warp = Warp{};
    warp.thread = &block.threads[w * LANES];
    warp.block = &block;
    warp.index = w;
    warp.number = machine.warps.size();
    const uint32_t lanes = std::min<uint32_t>(LANES, threads - w * LANES);
    warp.present = warp.alive = lanes == LANES ? ~0u : (1u << lanes) - 1;
    machine.warps.push_back(&warp);
    set_ready(warp, warp.present);
  }
  for (uint32_t i = 0; i < threads; ++i) {
    Thread& t = block.threads[i];
    t.index = uint3{i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
    t.block = &block;
    t.warp = &block.warps[i / LANES];
    t.lane = i % LANES;
    t.linear = i;
    t.id = rank * threads + i;
    t.state = State::ready;
    t.op = "its start";
    t.site = Site{machine.launch.name, 0};
    t.copies.clear();
    t.products.clear();
    t.wgmma_fenced = false;
    t.log.clear();
    fiber_prepare(t.fiber, machine.stacks.stack(t.id), machine.stacks.bytes(), run_thread);
  }
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
  machine.current_warp = order == Order::forward   ? 0
                         : order == Order::reverse ? warps - 1
                                                   : next_random() % warps;
  machine.threads_left = size_t(count) * threads;
  machine.memory_barriers.clear();
  machine.engine.clear();
  machine.cluster_barrier = Barrier{};
  machine.idle_rounds = 0;
  for (uint32_t i = 0; i < count; ++i)
    start_block(
        machine.blocks[i], i,
        uint3{corner.x + i % shape.x, corner.y + i / shape.x % shape.y, corner.z + i / shape.x / shape.y});
  totals.blocks += count;
  totals.threads += size_t(count) * threads;
  race::begin_cluster(count * threads);
  Thread* first = choose_thread();
  make_current(*first);
  fiber_switch(machine.process, first->fiber);
  machine.current = nullptr;
  race::leave_kernel();
}

// The i-th cluster of n to run.  Random: i -> (a i + b) mod n with a prime to n, so that no list is needed.
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

uint64_t next_random() {
  uint64_t x = machine.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return machine.random = x;
}

void set_ready(Warp& warp, uint32_t lanes) {
  for (uint32_t m = lanes; m; m &= m - 1) warp.thread[lowest(m)].state = State::ready;
  warp.ready |= lanes;
  machine.ready_warps[warp.number / 64] |= uint64_t(1) << warp.number % 64;
}

void clear_ready(Warp& warp, uint32_t lanes) {
  warp.ready &= ~lanes;
  if (!warp.ready) machine.ready_warps[warp.number / 64] &= ~(uint64_t(1) << warp.number % 64);
}

void wait_here(State state, const char* op, Site site) {
  Thread& t = enter(op, site);
  t.state = state;
  clear_ready(*t.warp, 1u << t.lane);
  reschedule();
}

void wake_spinners() {
  for (Warp* warp : machine.warps)
    for (uint32_t lanes = warp->alive; lanes; lanes &= lanes - 1)
      if (warp->thread[lowest(lanes)].state == State::spinning) set_ready(*warp, lanes & -lanes);
}

void maybe_preempt() {
  if (!machine.options.preempt || machine.options.order != Order::random) return;
  if (next_random() % 256 >= machine.options.preempt) return;
  machine.current_warp = next_random() % machine.warps.size();
  reschedule();
}

void fail(const char* format, ...) {
  char text[1500];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const Thread& t = self();
  char who[200];
  snprintf(who, sizeof who, " [block (%u,%u,%u), thread %u: warp %u, lane %u]", t.block->index.x,
           t.block->index.y, t.block->index.z, t.linear, t.warp->index, t.lane);
  machine.error = std::string(text) + who;
  fiber_leave(self().fiber, machine.process);
}

void trap(const char* message, Site site) {
  race::ExecutorScope scope;
  fail("trap: %s at %s:%d", message, site.file, site.line);
}

void run_grid(const Launch& launch, void (*thread)(void*), void* context) {
  race::ExecutorScope scope;
  if (machine.current) fail("%s: a kernel cannot launch a kernel here", launch.name);
  check_launch(launch);
  machine.launch = launch;
  machine.entry = thread;
  machine.entry_context = context;
  machine.error.clear();
  machine.random = machine.options.seed * 0x9E3779B97F4A7C15ull | 1;
  for (int i = 0; i < 4; ++i) next_random();  // small seeds differ only in few bits
  blockDim = launch.block;
  gridDim = launch.grid;
  const auto three = [](dim3 d, unsigned (&to)[3]) { to[0] = d.x, to[1] = d.y, to[2] = d.z; };
  LaunchRecord record{launch.name, {}, {}, {}, launch.smem};
  three(launch.grid, record.grid);
  three(launch.block, record.block);
  three(launch.cluster, record.cluster);
  totals.launches.push_back(record);

  race::begin_launch();
  const dim3 g = launch.grid, c = launch.cluster;
  const uint64_t nx = g.x / c.x, ny = g.y / c.y, nz = g.z / c.z;
  const ClusterOrder order(nx * ny * nz);
  for (uint64_t i = 0; i < order.count && machine.error.empty(); ++i) {
    const uint64_t k = order[i];
    run_cluster(uint3{unsigned(k % nx) * c.x, unsigned(k / nx % ny) * c.y, unsigned(k / nx / ny) * c.z});
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
