// sm_90 clusters: the cluster barrier, and loads, stores and mbarrier arrivals in other blocks' shared
// memory.
#include <algorithm>
#include <cstring>

#include "hopper.h"
#include "state.h"

namespace lotr::simt {

Block& block_of_cluster(uint32_t rank, Site site) {
  const Thread& t = self();
  if (rank >= machine.cluster_size)
    fail("%s at %s:%d: rank is %u, expected below %u", t.op, site.file, site.line, rank,
         machine.cluster_size);
  Block& block = machine.blocks[t.block->first + rank];
  if (&block != t.block && !machine.cluster_barriers[t.block->first / machine.cluster_size].generation)
    fail("%s at %s:%d: no barrier of the cluster yet: block %u may not have started", t.op, site.file,
         site.line, rank);
  if (!block.threads_left)
    fail("%s at %s:%d: block %u of the cluster has exited", t.op, site.file, site.line, rank);
  return block;
}

void mbarrier_arrive_cluster(void* barrier, uint32_t rank, bool release, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("mbarrier.arrive.cluster", site);
  if (left_out(t.op, site)) return;
  check_shared(barrier, 8, 8, t.op, site);
  Block& block = block_of_cluster(rank, site);
  MemoryBarrier& b = memory_barrier(block.shared + shared_offset(barrier), site);
  if (&block != t.block) check_fenced(b, site);
  race::release(release && &block != t.block ? b.remote : b.sync);
  arrive(b, site);
}

void store_cluster(void* p, uint32_t rank, const void* value, uint32_t bytes, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("st.shared::cluster", site);
  check_shared(p, bytes, bytes, t.op, site);
  unsigned char* there = block_of_cluster(rank, site).shared + shared_offset(p);
  maybe_preempt();
  touch_copy(there, value, bytes);
}

void load_cluster(void* value, const void* p, uint32_t bytes, uint32_t rank, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("ld.shared::cluster", site);
  check_shared(p, bytes, bytes, t.op, site);
  const unsigned char* there = block_of_cluster(rank, site).shared + shared_offset(p);
  touch_read(there, bytes);
  std::memcpy(value, there, bytes);
  maybe_preempt();
}

namespace {

// relaxed: orders no memory accesses, except mbarrier.init before fence.mbarrier_init.
void cluster_barrier(bool relaxed, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("barrier.cluster", site);
  if (left_out(t.op, site)) return;
  Barrier& b = machine.cluster_barriers[t.block->first / machine.cluster_size];
  const uint32_t all = machine.cluster_size * t.block->thread_count;
  race::Sync& sync = b.sync[b.generation % 2];
  if (!relaxed) race::release(sync);
  if (++b.arrived == all) {
    b.arrived = 0;
    ++b.generation;
    ++totals.barriers;
    progress();
    for (Warp* warp : machine.warps) {
      if (warp->block->first != t.block->first) continue;
      for (uint32_t lanes = warp->alive; lanes; lanes &= lanes - 1)
        if (warp->thread[__builtin_ctz(lanes)].state == State::at_cluster_barrier)
          set_ready(*warp, lanes & -lanes);
    }
  } else {
    wait_here(State::at_cluster_barrier, "barrier.cluster", site);
  }
  if (relaxed) return;
  race::acquire(sync);
}

}  // namespace

void cluster_sync(Site site) {
  cluster_barrier(false, site);
}

void cluster_sync_relaxed(Site site) {
  cluster_barrier(true, site);
}

uint32_t cluster_rank() {
  return self().block->rank;
}

void* cluster_map(const void* shared, uint32_t rank, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("mapa", site);
  check_shared(shared, 1, 1, t.op, site);
  return block_of_cluster(rank, site).shared + shared_offset(shared);
}

}  // namespace lotr::simt
