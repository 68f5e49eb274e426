// The SIMT executor: runs CUDA kernels, compiled by a host compiler, on the CPU, so that they can be tested
// without a GPU.  Test builds only.  A host program (a test, the Python module) uses this
// header.
//
//   site.h device.h hopper.h  what kernels see of it, through csrc/cuda/ptx: every wrapper is one call
//   grid.cpp scheduler.cpp    blocks one after another, or several at a time; one fiber a GPU thread,
//                             switched where threads wait
//   fiber.cpp                 stacks and the switch itself
//   barrier.cpp memory.cpp matrix.cpp mbarrier.cpp cluster.cpp wgmma.cpp registers.cpp     the instructions
//   counters.cpp              bytes, sectors, bank conflicts, by array
//   race.cpp race_hooks.cpp   the race detector (a build of its own)
//   early.cpp                 launches that may begin before the one ahead has ended
//   sites.cpp                 leaving out one barrier, for mutation tests
//
// What it cannot show: the PTX inside the wrappers, speed, and what the hardware's memory model allows beyond
// the race detector's model.  Sums of mma are in float32 in a fixed order: bound errors, do not compare
// bits with a GPU. Not thread-safe: one thread launches.
#pragma once
#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "site.h"

namespace lotr::simt {

// Which of the threads that could go on runs next, and which block after the last.  in_turn: forward, but the
// warps take turns and bulk copies land as they were issued, so that blocks that run at the same time keep
// pace.
enum class Order { forward, reverse, random, in_turn };

constexpr unsigned MOST_RESIDENT = 128;

struct Options {
  Order order = Order::forward;
  uint64_t seed = 1;          // of the random order; the same seed gives the same schedule
  unsigned preempt = 0;       // random order: chance in 256 to switch away at a memory access
  bool count_memory = false;  // bytes, sectors and bank conflicts (about twice as slow)
  // Clusters that run at the same time, as on a GPU that holds so many; 1: one after another.  Blocks that
  // wait for each other need all of those they wait for to be among them.
  unsigned resident = 1;
  // Blocks that a cooperative launch may have, as on a GPU under MPS: a larger one is not launched.  Its
  // blocks all run at the same time, whatever `resident` is.
  uint64_t room = UINT64_MAX;
  size_t shared_limit = 232448;  // bytes a block may ask for: 101376 on sm_86 and 89, 166912 on sm_80
};
// Mutation without a compiler: calls of barriers, warp synchronisation, commits, waits and fences at this
// line do nothing, as if the line were deleted.  file: the end of its path, as "tile/reduce.cuh"; empty:
// nowhere.
struct Skip {
  std::string file;
  int line = 0;
};
void skip_synchronisation(const Skip& at);

// Every such call that has run since reset_counters.
struct SynchronisationSite {
  std::string op, file;
  int line;
  uint64_t calls;  // of threads
};
std::vector<SynchronisationSite> synchronisation_sites();

void set_options(const Options& options);  // throws std::invalid_argument
const Options& options();
// Over `options`: LOTR_SIMT_ORDER=forward|reverse|random|in_turn, and the numbers _SEED, _PREEMPT, _RESIDENT.
Options options_from_environment(Options options = {});

// Traffic between a block and one registered array.  Lanes that execute a call site together are one
// instruction; a byte that several of its lanes touch counts once.
struct Traffic {
  std::string name;
  uint64_t size = 0;  // bytes of the array
  uint64_t read_bytes = 0, read_sectors = 0;
  uint64_t written_bytes = 0, written_sectors = 0;
  uint64_t atomics = 0;    // lanes; their bytes count as written too
  uint64_t unwrapped = 0;  // race build: bytes touched by plain loads and stores, which nothing else counts
};

struct LaunchRecord {
  std::string name;
  unsigned grid[3], block[3], cluster[3];
  size_t shared_bytes;
  const void* kernel;  // its address in this module
  bool cleared;        // the host wrote to the watched memory since the launch before: a memset on a GPU
  bool early;          // may begin before the launch ahead of it has ended
  bool cooperative;    // all blocks have run at the same time
  uint64_t barriers = 0, half_loads = 0, bytes = 0;  // as Counters has them; bytes: of all arrays, in and out
  uint64_t let_next = 0;                             // blocks that let the next launch begin before their end
};

struct Counters {
  uint64_t blocks = 0, threads = 0, switches = 0;
  uint64_t barriers = 0;                     // completed __syncthreads and named barriers
  uint64_t warp_collectives = 0;             // shuffles, __syncwarp, ldmatrix, mma, ...
  uint64_t mma = 0, wgmma = 0;               // per warp, per warpgroup
  uint64_t multiply = 0;                     // warps of a block: the first so many, at most, issued those
  uint64_t ldmatrix = 0;                     // per warp
  uint64_t async_copies = 0;                 // cp.async, per lane
  uint64_t bulk_copies = 0, bulk_bytes = 0;  // TMA tiles; bytes that arrive, zeros included
  uint64_t async_waits = 0;                  // cp.async.wait_group, per lane
  uint64_t atomics = 0;                      // per lane
  // What a block still reads after its first atomic, as the last to arrive does, and after its last product:
  // the most of any thread and of any block.
  uint64_t late_loads = 0, late_bytes = 0;
  uint64_t late_total = 0;  // and those bytes of all blocks
  uint64_t cluster_loads = 0,
           cluster_bytes = 0;  // from shared memory of the cluster, its own included: the same
  uint64_t cluster_total = 0;  // and those of the whole launch, late or not
  uint64_t sum_loads = 0;      // of both kinds, the most of any thread
  // After its warps' last products: bytes that a block stores, bytes that it moves to and from its own shared
  // memory, loads from global memory of a thread; the most of any.
  uint64_t late_stored = 0, last_shared = 0, last_loads = 0;
  uint64_t half_loads = 0;  // per warp, of 2 bytes a lane, with count_memory
  // Shared memory, ldmatrix and cp.async writes included.  A phase is what one cycle could serve without
  // conflicts; wavefronts / phases is the bank-conflict degree.  Without count_memory: ldmatrix only.
  uint64_t shared_phases = 0, shared_wavefronts = 0;
  uint64_t shared_unwrapped = 0;  // race build: bytes
  std::vector<LaunchRecord> launches;
  std::vector<Traffic> arrays;  // in the order of registration; last "(unregistered)"
};
// How the operands of a wgmma lay, of each kind that ran since reset_counters: bytes of a's swizzle (0: in
// registers), whether a is MN-major, the same of b, n, whether of bfloat16.
using ProductLayout = std::tuple<int, bool, int, bool, int, bool>;
extern std::set<ProductLayout> product_layouts;

Counters counters();
uint64_t bytes_moved();
void reset_counters();  // registered arrays stay

// Names [base, base + bytes).  Throws std::invalid_argument if it overlaps another array.
void register_array(const std::string& name, const void* base, size_t bytes);
void clear_arrays();

// Memory whose changes between launches are noted; null: none.
void watch(const void* base, size_t bytes);

// Zero pages that take memory only once touched: arrays beyond 2^31 elements.
void* map_sparse(size_t bytes);  // throws std::bad_alloc
void unmap_sparse(void* p, size_t bytes);
size_t resident_bytes(const void* p, size_t bytes);

// The coverage build: writes the line counts of this process now (they are written at exit anyway).
void write_coverage();
// "plain", "asan", "race" or "coverage": how this executor was built.
const char* build_mode();

}  // namespace lotr::simt
