// The SIMT executor: runs CUDA kernels, compiled by a host compiler, on the CPU, so that tests need
// no GPU. Test builds only. Host programs (the tests, the Python module) include this header.
//
//   site.h device.h hopper.h  the functions that the wrappers of csrc/cuda/ptx and sm90 call
//   state.h                   the threads, warps and blocks that run, and what these files share
//   grid.cpp scheduler.cpp    clusters of blocks one after another; one fiber per GPU thread,
//                             switched where threads wait
//   fiber.cpp                 stacks and the switch
//   barrier.cpp memory.cpp    the instructions
//   matrix.cpp mbarrier.cpp
//   tma.cpp wgmma.cpp
//   counters.cpp              bytes, sectors, bank conflicts, by array
//   options.cpp               options, sparse memory
//   race.cpp race_hooks.cpp   the race detector, which is a separate build
//   early.cpp                 programmatic dependent launches
//   sites.cpp                 skips one synchronization, for mutation tests
//   module/ build.py          the Python module; compiles it and the test programs
//
// It cannot test the PTX inside the wrappers, speed, or what the hardware's memory model allows but
// the race detector's model does not. mma sums in float32 in a fixed order, so results differ from
// a GPU's in the last bits. Not thread-safe: one thread launches.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "site.h"

namespace lotr::simt {

// The order in which ready threads, and blocks, run.
enum class Order { forward, reverse, random };
// Throws std::invalid_argument, with the argument's name, for an unknown order.
Order order_of(const std::string& argument, const std::string& name);

struct Options {
  Order order = Order::forward;
  uint64_t seed = 1;          // of the random order; the same seed gives the same schedule
  unsigned preempt = 0;       // random order: chance in 256 of a switch at a memory access
  bool count_memory = false;  // bytes, sectors and bank conflicts (about twice as slow)
  // Bytes of shared memory that a block may request (sm_90; sm_86 and 89: 101376, sm_80: 166912).
  size_t shared_limit = 232448;
};

// For mutation tests: barriers, __syncwarp, arrivals, commits, waits and fences at this line do
// nothing, as if the line were deleted and the kernel compiled again.
struct Skip {
  std::string file;  // the end of its path, as "tile/load.cuh"; empty: nothing is skipped
  int line = 0;
};
void skip_synchronization(const Skip& at);

// The calls of one such place since reset_counters.
struct SynchronizationSite {
  std::string op, file;
  int line;
  uint64_t calls;  // each thread's call counts
};
std::vector<SynchronizationSite> synchronization_sites();

void set_options(const Options& options);  // throws std::invalid_argument
const Options& options();
// The same options, replaced by LOTR_SIMT_ORDER, LOTR_SIMT_SEED and LOTR_SIMT_PREEMPT where the
// environment has them.
Options options_from_environment(Options options = {});

// Traffic of one registered array. Lanes that execute a call site together count as one
// instruction, and a byte that several of its lanes access counts once.
struct Traffic {
  std::string name;
  uint64_t size = 0;  // bytes of the array
  uint64_t read_bytes = 0, read_sectors = 0;
  uint64_t written_bytes = 0, written_sectors = 0;
  // Race build: bytes that plain loads and stores touch, which nothing else counts.
  uint64_t unwrapped = 0;
};

struct LaunchRecord {
  std::string name;
  unsigned grid[3], block[3], cluster[3];
  size_t shared_bytes;
  bool early;  // a programmatic dependent launch: may start before the previous launch has ended
  uint64_t launched_dependents = 0;  // blocks that called griddepcontrol.launch_dependents
};

struct Counters {
  uint64_t blocks = 0, threads = 0, switches = 0;
  uint64_t barriers = 0;          // completed barriers: __syncthreads, named, the cluster's
  uint64_t warp_collectives = 0;  // shuffles, __syncwarp, ldmatrix, mma, ...
  uint64_t mma = 0, wgmma = 0;    // per warp, per warpgroup
  uint64_t ldmatrix = 0;          // per warp
  uint64_t async_copies = 0;      // cp.async, per lane
  uint64_t bulk_bytes = 0;        // of TMA's tiles: complete boxes, in each block that receives one
  uint64_t async_waits = 0;       // cp.async.wait_group, per lane
  // Shared memory, with ldmatrix and the writes of cp.async. A phase is the work of one cycle
  // without conflicts; wavefronts / phases is the degree of bank conflicts. Without count_memory:
  // only ldmatrix.
  uint64_t shared_phases = 0, shared_wavefronts = 0;
  uint64_t shared_unwrapped = 0;  // race build: bytes
  std::vector<LaunchRecord> launches;
  std::vector<Traffic> arrays;  // in the order of registration; last "(unregistered)"
};

Counters counters();
void reset_counters();  // registered arrays stay

// Names [base, base + bytes). Throws std::invalid_argument if it overlaps another array. The same
// array again has no effect.
void register_array(const std::string& name, const void* base, size_t bytes);
void clear_arrays();

// Zero pages that take memory only when touched: for arrays beyond 2^31 elements.
void* map_sparse(size_t bytes);  // throws std::bad_alloc
void unmap_sparse(void* p, size_t bytes);

}  // namespace lotr::simt
