// The executor's state: one Machine, the blocks of the cluster that runs, their warps and threads.
#pragma once
#include <algorithm>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "api.h"
#include "device.h"
#include "fiber.h"
#include "race.h"

namespace lotr::simt {

struct Block;
struct Warp;

// ---- what a thread has in flight ----
//
// The thread keeps a list of each kind, in the order of issue. A commit adds an entry that ends a
// group; a wait removes the oldest groups (covered_by_wait, below).

struct AsyncCopy {
  bool ends_group = false;  // instead of a copy
  void* to = nullptr;
  const void* from = nullptr;
  uint32_t bytes = 0, source_bytes = 0;
};

// A bulk copy from shared to global memory.
struct BulkStore {
  bool ends_group = false;  // instead of a copy
  const unsigned char* tile = nullptr;
  size_t bytes = 0;
  std::shared_ptr<bool> landed;
};

struct WarpgroupProduct {
  bool ends_group = false;  // instead of a product
  float* d = nullptr;
  uint64_t a = 0, b = 0;  // descriptors
  int n = 0;
  bool accumulate = true, is_bf16 = false, b_mn_major = false;
  uint64_t number = 0;  // counts the thread's products: equal in all threads of the warpgroup
  // The accumulators before the product, unless an earlier product in flight has them.
  std::vector<float> held;
};

// ---- threads, warps, blocks ----

enum class State : uint8_t { ready, in_warp, at_barrier, at_cluster_barrier, spinning, exited };

enum class Space : uint8_t { global_read, global_write, shared };
struct Access {
  uintptr_t address;  // in shared memory: the offset
  const char* file;
  int line;
  uint32_t bytes;
  Space space;
};

struct Thread {
  // Its place:
  Fiber fiber;
  uint3 index{};  // threadIdx
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint32_t lane = 0, linear = 0;  // in the warp, in the block
  uint32_t id = 0;                // among all that run now
  // What it does:
  State state = State::ready;
  const char* op = "";  // the operation in which it waits, or its latest one
  Site site{"", 0};     // of op
  int barrier = 0;      // the block's barrier at which it waits
  uint32_t mask = 0;    // of the warp collective in which it waits
  void* operand = nullptr;
  // What it has in flight:
  std::vector<AsyncCopy> copies;
  std::vector<BulkStore> stores;
  std::vector<WarpgroupProduct> products;
  uint64_t products_issued = 0;
  // What the checks and counters need:
  uint32_t proxy_fences = 0;  // its calls of fence.proxy.async
  bool wgmma_fenced = false;
  bool may_touch_global = true;  // false in an early launch, until griddepcontrol.wait
  std::vector<Access> log;       // since the warp last converged
};

struct Warp {
  Thread* thread = nullptr;  // lane 0
  Block* block = nullptr;
  size_t number = 0;  // among all that run now
  uint32_t index = 0;
  uint32_t present = 0, alive = 0, ready = 0;  // lanes
  uint32_t arrived = 0;                        // lanes inside a collective
  bool logged = false;
};

struct Barrier {
  uint32_t arrived = 0, expected = 0, generation = 0;
  Site site{"", 0};
  const char* op = "";
};

struct MemoryBarrier {  // an mbarrier
  uint32_t expected_arrivals = 0;
  uint32_t pending_arrivals = 0;  // of this phase, as pending_bytes
  int64_t pending_bytes = 0;      // negative if bytes arrive before they are announced
  uint64_t phase = 0;
  race::Sync arrivals, completed;       // a wait acquires only the arrivals of completed phases
  const Thread* initializer = nullptr;  // until it calls fence.mbarrier_init
  std::vector<Thread*> waiting;         // threads to wake when the phase completes
};

// Operands of a warpgroup's product in flight, as the latest thread read them at its wait.
struct DecodedProduct {
  std::vector<unsigned char> raw_a[4], raw_b;  // the bytes from which a and b were decoded
  std::vector<float> a[4], b;                  // a: of each warp, [16][16]; b: [n][16]
  uint64_t descriptor_a = 0, descriptor_b = 0;
  int users = 0;  // threads that have computed their elements
};

// The latest st.shared to a word. fence.proxy.async must precede bulk copies and wgmma there.
struct WordStore {
  uint32_t thread = 0;
  uint32_t proxy_fences = UINT32_MAX;  // the thread's, at the store; no thread has as many
};

struct Block {
  uint3 index{};      // blockIdx
  uint32_t rank = 0;  // in its cluster
  uint32_t thread_count = 0, threads_left = 0;
  uint32_t copies_in_flight = 0;  // bulk copies, to or from its shared memory
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<WordStore> stores;  // by word of shared memory
  Barrier barriers[16];
  bool launched_dependents = false;  // has called griddepcontrol.launch_dependents
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unordered_map<uint64_t, DecodedProduct> products;  // by number and warpgroup
};

struct Machine {
  Options options;
  Launch launch{};
  void (*entry)(void*) = nullptr;
  void* entry_context = nullptr;

  std::vector<Block> blocks;  // the cluster that runs now
  Barrier cluster_barrier;
  std::vector<Warp*> warps;
  std::vector<uint64_t> ready_warps;  // bits
  size_t current_warp = 0, threads_left = 0;
  Thread* current = nullptr;
  Fiber process;
  FiberStacks stacks;
  std::vector<void*> shared_pool;
  size_t shared_pool_bytes = 0;

  uint64_t random = 1;
  int idle_rounds = 0;  // rounds since the latest progress in which every thread only polled
  std::string error;

  // What completes the bulk copies in flight: run when no thread is ready, or at random.
  std::deque<std::function<void()>> landings;
  std::unordered_map<const void*, MemoryBarrier> memory_barriers;
};
extern Machine machine;

// ---- scheduler.cpp ----
Thread* choose_thread();  // the next to run; null when all have exited, or after an error
void make_current(Thread& thread);
void run_thread();  // where a thread's fiber starts
uint64_t next_random();
size_t choose(Order order, size_t count);  // the first, the last or a random one of `count`
void set_ready(Warp& warp, uint32_t lanes);
void clear_ready(Warp& warp, uint32_t lanes);
void wait_here(State state, const char* op, Site site);  // until set_ready
void wake_spinners();
void maybe_preempt();  // after a load's read, before a store's write: others may come between
inline void progress() {
  machine.idle_rounds = 0;
}
// Ends the launch with an Error: the message, then the running thread.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);
[[noreturn]] void fail_diverged(const Thread& t, const Thread& other);  // two lanes of a warp

inline Thread& self() {
  return *machine.current;
}
inline Thread& enter(const char* op, Site site) {
  Thread& t = self();
  t.op = op;
  t.site = site;
  return t;
}

// ---- barrier.cpp ----
// Every lane of the mask must call with the same op from the same place. While a lane waits here,
// no other lane of its mask may wait at a barrier of the block. The last lane runs `leader`, unless
// that is null: it reads the lanes' operands from warp.thread[lane].operand.
using Leader = void (*)(Warp& warp, uint32_t mask, void* context);
void warp_collective(const char* op, uint32_t mask, Site site, void* operand, Leader leader,
                     void* context, bool orders_memory);

// How many of a thread's operations, oldest first, are covered by a wait that leaves `keep` groups
// in flight.
template <class Operation>
size_t covered_by_wait(const std::vector<Operation>& operations, int keep) {
  int groups = 0;
  for (size_t i = operations.size(); i-- > 0;)
    if (operations[i].ends_group && ++groups > keep) return i + 1;
  return 0;
}

// ---- memory.cpp ----
void check_shared(const void* p, size_t bytes, size_t align, const char* op, Site site);
void touch_copy(void* to, const void* from, size_t bytes);  // as accesses of the running thread
void touch_fill(void* to, int value, size_t bytes);
void touch_read(const void* from, size_t bytes);
void poison(void* p, size_t bytes);  // AddressSanitizer only
void unpoison(void* p, size_t bytes);

// ---- early.cpp ----
void check_early(const char* op, Site site);  // before the running thread accesses global memory
void check_early_end(const Thread& thread);   // before it ends

// ---- sites.cpp ----
// Counts a call that synchronizes. Returns true if skip_synchronization names its place: the caller
// then does nothing.
bool counted_and_skipped(const char* op, Site site);
void forget_sites();

// ---- tma.cpp ----
void note_store(const void* p, uint32_t bytes);  // to shared memory, by st.shared
// Fails if a store to these bytes of the block's shared memory is not fenced from the async proxy.
void check_proxy_fence(const Block& block, size_t offset, size_t bytes);

// ---- mbarrier.cpp ----
// The mbarrier at the offset in the block's shared memory. Fails if it is not initialized.
MemoryBarrier& memory_barrier(const Block& block, uint32_t offset, Site site);
void complete_if_done(MemoryBarrier& b);
void check_fenced(const MemoryBarrier& b, Site site);  // for bulk copies and other blocks
Block& block_of_cluster(uint32_t rank, Site site);     // alive, and synchronized with its start

// ---- matrix.cpp ----
float half_to_float(uint32_t bits, bool is_bf16);

// ---- counters.cpp ----
extern Counters totals;  // without arrays

void record(Space space, const void* address, uint32_t bytes, Site site);
void flush_log(Warp& warp);  // called when the warp has converged
void count_shared_phase(int wavefronts);
void count_global(Space space, uintptr_t address, uint64_t bytes);  // a contiguous run
void count_unwrapped(uintptr_t address, size_t bytes);
std::string global_name(uintptr_t address);  // "x + 128" in a registered array, else hexadecimal

}  // namespace lotr::simt
