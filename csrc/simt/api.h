// The SIMT executor: runs CUDA kernels, compiled by a host compiler, on the CPU, so that they can
// be tested without a GPU.  Test builds only.  Host programs (the tests, the Python module) include
// this header.
//
//   site.h device.h hopper.h  what csrc/cuda/ptx calls: each wrapper of an instruction is one
//   function here grid.cpp scheduler.cpp    clusters of blocks one after another; one fiber a GPU
//   thread, switched where
//                             threads wait
//   fiber.cpp                 stacks and the switch itself
//   barrier.cpp memory.cpp matrix.cpp mbarrier.cpp tma.cpp wgmma.cpp     the instructions
//   counters.cpp              bytes, sectors, bank conflicts, by array
//   race.cpp race_hooks.cpp   the race detector (a build of its own)
//   early.cpp                 programmatic dependent launches
//   sites.cpp                 skips one barrier, for mutation tests
//
// It cannot test the PTX inside the wrappers, speed, or what the hardware's memory model allows
// beyond the race detector's model.  mma sums in float32 in a fixed order, so results differ from a
// GPU's in the last bits. Not thread-safe: one thread launches.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "site.h"

namespace lotr::simt {

// Which ready thread runs next, and which block after the last.
enum class Order { forward, reverse, random };
Order order_of(const std::string& argument,
               const std::string& name);  // throws std::invalid_argument

struct Options {
  Order order = Order::forward;
  uint64_t seed = 1;          // of the random order; the same seed gives the same schedule
  unsigned preempt = 0;       // random order: chance in 256 to switch away at a memory access
  bool count_memory = false;  // bytes, sectors and bank conflicts (about twice as slow)
  size_t shared_limit =
      232448;  // bytes that a block may ask for: 101376 on sm_86 and 89, 166912 on sm_80
};
// Mutation without a compiler: barriers, warp synchronisation, commits, waits and fences at this
// line do nothing, as if the line were deleted.  file: the end of its path, as "tile/reduce.cuh";
// empty: no line.
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
// `options`, changed by LOTR_SIMT_ORDER, LOTR_SIMT_SEED and LOTR_SIMT_PREEMPT.
Options options_from_environment(Options options = {});

// Traffic between a block and one registered array.  Lanes that execute a call site together are
// one instruction; a byte that several of its lanes touch counts once.
struct Traffic {
  std::string name;
  uint64_t size = 0;  // bytes of the array
  uint64_t read_bytes = 0, read_sectors = 0;
  uint64_t written_bytes = 0, written_sectors = 0;
  uint64_t unwrapped =
      0;  // race build: bytes touched by plain loads and stores, which nothing else counts
};

struct LaunchRecord {
  std::string name;
  unsigned grid[3], block[3], cluster[3];
  size_t shared_bytes;
  bool early;  // a programmatic dependent launch: may begin before the launch before it has ended
  uint64_t let_next = 0;  // blocks that called griddepcontrol.launch_dependents
};

struct Counters {
  uint64_t blocks = 0, threads = 0, switches = 0;
  uint64_t barriers = 0;                     // completed __syncthreads and named barriers
  uint64_t warp_collectives = 0;             // shuffles, __syncwarp, ldmatrix, mma, ...
  uint64_t mma = 0, wgmma = 0;               // per warp, per warpgroup
  uint64_t ldmatrix = 0;                     // per warp
  uint64_t async_copies = 0;                 // cp.async, per lane
  uint64_t bulk_copies = 0, bulk_bytes = 0;  // TMA tiles; bytes that arrive, zeros included
  uint64_t async_waits = 0;                  // cp.async.wait_group, per lane
  // Shared memory, ldmatrix and cp.async writes included.  A phase is what one cycle could serve
  // without conflicts; wavefronts / phases is the bank-conflict degree.  Without count_memory:
  // ldmatrix only.
  uint64_t shared_phases = 0, shared_wavefronts = 0;
  uint64_t shared_unwrapped = 0;  // race build: bytes
  std::vector<LaunchRecord> launches;
  std::vector<Traffic> arrays;  // in the order of registration; last "(unregistered)"
};

Counters counters();
void reset_counters();  // registered arrays stay

// Names [base, base + bytes).  Throws std::invalid_argument if it overlaps another array.
void register_array(const std::string& name, const void* base, size_t bytes);
void clear_arrays();

// Zero pages that take memory only when touched: for arrays beyond 2^31 elements.
void* map_sparse(size_t bytes);  // throws std::bad_alloc
void unmap_sparse(void* p, size_t bytes);

// The coverage build: writes the line counts of this process now (they are written at exit anyway).
void write_coverage();

}  // namespace lotr::simt
