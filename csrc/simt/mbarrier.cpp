// sm_90: mbarriers.
#include <cstring>

#include "hopper.h"
#include "state.h"

namespace lotr::simt {
namespace {

// Stored in the 8 bytes of an mbarrier, so that overwriting it is noticed.
constexpr char MARK[] = "mbarrier";
// The most arrivals, and the most bytes, that a phase can wait for.
constexpr int64_t MAX_PENDING = (1 << 20) - 1;

// One arrival of the running thread.
void arrive(MemoryBarrier& b, Site site) {
  if (!b.pending_arrivals)
    fail("%s at %s:%d: more arrivals than the mbarrier expects (%u)", self().op, site.file,
         site.line, b.expected_arrivals);
  --b.pending_arrivals;
  complete_if_done(b);
}

}  // namespace

MemoryBarrier& memory_barrier(const Block& block, uint32_t offset, Site site) {
  const Thread& t = self();
  const void* const barrier = block.shared + offset;
  const auto entry = machine.memory_barriers.find(barrier);
  if (entry == machine.memory_barriers.end())
    fail("%s at %s:%d: the mbarrier of block %u at shared offset %u was never initialized", t.op,
         site.file, site.line, block.rank, offset);
  if (memcmp(barrier, MARK, 8))
    fail("%s at %s:%d: the mbarrier of block %u at shared offset %u was overwritten", t.op,
         site.file, site.line, block.rank, offset);
  race::access(barrier, 8, race::Use::read);  // must come after its mbarrier.init
  return entry->second;
}

void complete_if_done(MemoryBarrier& b) {
  if (b.pending_arrivals || b.pending_bytes) return;
  ++b.phase;
  b.completed = b.arrivals;
  b.pending_arrivals = b.expected_arrivals;
  progress();
  for (Thread* t : b.waiting)
    if (t->state == State::spinning) set_ready(*t->warp, 1u << t->lane);
  b.waiting.clear();
}

void check_fenced(const MemoryBarrier& b, Site site) {
  if (b.initializer)
    fail("%s at %s:%d: no fence.mbarrier_init after the mbarrier's mbarrier.init", self().op,
         site.file, site.line);
}

Block& block_of_cluster(uint32_t rank, Site site) {
  const Thread& t = self();
  if (rank >= machine.blocks.size())
    fail("%s at %s:%d: rank is %u, expected below %zu", t.op, site.file, site.line, rank,
         machine.blocks.size());
  Block& block = machine.blocks[rank];
  if (&block != t.block && !machine.cluster_barrier.generation)
    fail("%s at %s:%d: no barrier of the cluster yet: block %u may not have started", t.op,
         site.file, site.line, rank);
  if (!block.threads_left)
    fail("%s at %s:%d: block %u of the cluster has exited", t.op, site.file, site.line, rank);
  return block;
}

void mbarrier_init(void* barrier, uint32_t arrivals, Site site) {
  race::ExecutorScope scope;
  check_shared(barrier, 8, 8, enter("mbarrier.init", site).op, site);
  if (!arrivals || arrivals > MAX_PENDING)
    fail("mbarrier.init at %s:%d: %u arrivals, expected 1 to 2^20 - 1", site.file, site.line,
         arrivals);
  if (machine.memory_barriers.count(barrier))
    fail("mbarrier.init at %s:%d: there is an mbarrier here already", site.file, site.line);
  race::access(barrier, 8, race::Use::write);
  memcpy(barrier, MARK, 8);
  MemoryBarrier b;
  b.expected_arrivals = b.pending_arrivals = arrivals;
  b.initializer = &self();
  machine.memory_barriers[barrier] = b;
}

void fence_mbarrier_init(Site site) {
  race::ExecutorScope scope;
  const Thread& t = enter("fence.mbarrier_init", site);
  if (counted_and_skipped(t.op, site)) return;
  for (auto& [place, b] : machine.memory_barriers)
    if (b.initializer == &t) b.initializer = nullptr;
}

void mbarrier_arrive(void* barrier, uint32_t bytes, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter(bytes ? "mbarrier.arrive.expect_tx" : "mbarrier.arrive", site);
  if (counted_and_skipped(t.op, site)) return;
  MemoryBarrier& b = memory_barrier(*t.block, shared_offset(barrier), site);
  race::release(b.arrivals, t.id);
  b.pending_bytes += bytes;
  if (b.pending_bytes > MAX_PENDING)
    fail("%s at %s:%d: %lld bytes are announced, expected at most 2^20 - 1", t.op, site.file,
         site.line, (long long)b.pending_bytes);
  arrive(b, site);
}

void mbarrier_arrive_cluster(void* barrier, uint32_t rank, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("mbarrier.arrive.cluster", site);
  if (counted_and_skipped(t.op, site)) return;
  check_shared(barrier, 8, 8, t.op, site);
  Block& block = block_of_cluster(rank, site);
  MemoryBarrier& b = memory_barrier(block, shared_offset(barrier), site);
  if (&block != t.block) check_fenced(b, site);
  race::release(b.arrivals, t.id);
  arrive(b, site);
}

void mbarrier_wait(void* barrier, uint32_t parity, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("mbarrier.try_wait", site);
  if (counted_and_skipped(t.op, site)) return;
  for (;;) {
    MemoryBarrier& b = memory_barrier(*t.block, shared_offset(barrier), site);
    if ((b.phase & 1) != (parity & 1)) break;
    b.waiting.push_back(&t);
    wait_here(State::spinning, "mbarrier.try_wait", site);
  }
  progress();
  race::acquire(memory_barrier(*t.block, shared_offset(barrier), site).completed, t.id);
  maybe_preempt();
}

}  // namespace lotr::simt
