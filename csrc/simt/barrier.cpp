// Block barriers, named barriers and the cluster's barrier; and where the lanes of a warp meet: for
// shuffles and __syncwarp, which are here, and for ldmatrix, mma and wgmma.
#include <cstring>

#include "state.h"

namespace lotr::simt {
namespace {

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file));
}

// The first thread at a barrier sets how many threads it expects. The others must give the same.
void agree_on_threads(Barrier& b, int id, uint32_t threads, const char* op, Site site) {
  if (!b.arrived) {
    b.site = site;
    b.op = op;
    b.expected = threads;
  } else if (b.expected != threads) {
    fail("barrier %d: %s at %s:%d gives %u threads, %s at %s:%d gave %u", id, op, site.file,
         site.line, threads, b.op, b.site.file, b.site.line, b.expected);
  }
}

// The lanes that wait at the barrier. It is .aligned: they must be all lanes of the warp, or none.
uint32_t lanes_at(const Warp& warp, int id) {
  uint32_t lanes = 0;
  for (uint32_t i = 0; i < 32 && (warp.present >> i & 1); ++i)
    if (warp.thread[i].state == State::at_barrier && warp.thread[i].barrier == id) lanes |= 1u << i;
  if (lanes && lanes != warp.alive)
    fail_diverged(warp.thread[__builtin_ctz(lanes)],
                  warp.thread[__builtin_ctz(warp.alive & ~lanes)]);
  return lanes;
}

// Makes every thread that waits at the barrier ready.
void open_barrier(Block& block, int id) {
  block.barriers[id].arrived = 0;
  ++totals.barriers;
  race::Sync sync;
  for (Warp& warp : block.warps) race::release(sync, warp.thread->id, lanes_at(warp, id));
  for (Warp& warp : block.warps) {
    const uint32_t lanes = lanes_at(warp, id);
    race::acquire(sync, warp.thread->id, lanes);
    if (lanes) set_ready(warp, lanes);
    if (id == 0) flush_log(warp);
  }
  progress();
}

// The running thread waits at barrier `id` of its block until `threads` threads have arrived.
void meet(int id, uint32_t threads, const char* op, Site site) {
  Thread& t = enter(op, site);
  Block& block = *t.block;
  Barrier& b = block.barriers[id];
  // A barrier is for full warps: no lane may wait in a collective.
  if (t.warp->arrived) fail_diverged(t, t.warp->thread[__builtin_ctz(t.warp->arrived)]);
  agree_on_threads(b, id, threads, op, site);
  if (id == 0 && !same(b.site, site))
    fail("divergent barrier: thread %u reached %s at %s:%d while others wait at %s:%d", t.linear,
         op, site.file, site.line, b.site.file, b.site.line);
  t.state = State::at_barrier;
  t.barrier = id;
  if (++b.arrived == threads)
    open_barrier(block, id);
  else
    wait_here(State::at_barrier, op, site);
  maybe_preempt();
}

void check_named(int id, int threads, const char* op, Site site) {
  if (id < 0 || id > 15)
    fail("%s at %s:%d: barrier is %d, expected 0 to 15", op, site.file, site.line, id);
  if (threads <= 0 || threads % 32 || uint32_t(threads) > self().block->thread_count)
    fail("%s at %s:%d: %d threads, expected a multiple of 32 up to the block's %u", op, site.file,
         site.line, threads, self().block->thread_count);
}

// A lane's operand of a shuffle.
struct Shuffled {
  uint64_t sent, received;
  int source;  // the lane that sends, or negative: the lane keeps its value
};

// The leader of a shuffle.
void exchange(Warp& warp, uint32_t mask, void*) {
  for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    auto& value = *static_cast<Shuffled*>(warp.thread[lane].operand);
    value.received = value.sent;
    if (value.source < 0) continue;
    if (!(mask >> value.source & 1))
      fail("%s: lane %d reads lane %d, which is not in mask %08x", self().op, lane, value.source,
           mask);
    value.received = static_cast<Shuffled*>(warp.thread[value.source].operand)->sent;
  }
}

}  // namespace

void warp_collective(const char* op, uint32_t mask, Site site, void* operand, Leader leader,
                     void* context, bool orders_memory) {
  Thread& t = enter(op, site);
  Warp& warp = *t.warp;
  const uint32_t bit = 1u << t.lane;
  mask &= warp.present;
  if (!(mask & bit))
    fail("%s at %s:%d: lane %u is not in its mask %08x", op, site.file, site.line, t.lane, mask);
  if (mask & ~warp.alive)
    fail("%s at %s:%d: mask %08x names lanes that have exited: %08x", op, site.file, site.line,
         mask, mask & ~warp.alive);
  t.mask = mask;
  t.operand = operand;
  // The lanes that have arrived agree with each other, so it is enough to compare with one of them.
  if (const uint32_t arrived = warp.arrived & mask) {
    const Thread& other = warp.thread[__builtin_ctz(arrived)];
    if (other.op != op || other.mask != mask || !same(other.site, site))
      fail(
          "divergent warp: lane %u is at %s mask %08x, %s:%d, while lane %u is at %s mask %08x, "
          "%s:%d",
          t.lane, op, mask, site.file, site.line, other.lane, other.op, other.mask, other.site.file,
          other.site.line);
  } else {
    for (uint32_t lanes = mask & ~bit; lanes; lanes &= lanes - 1) {
      const Thread& other = warp.thread[__builtin_ctz(lanes)];
      if (other.state == State::at_barrier) fail_diverged(t, other);
    }
  }
  warp.arrived |= bit;
  if ((warp.arrived & mask) == mask) {
    if (leader) leader(warp, mask, context);
    warp.arrived &= ~mask;
    race::Sync sync;
    if (orders_memory) race::release(sync, warp.thread->id, mask);
    if (orders_memory) race::acquire(sync, warp.thread->id, mask);
    ++totals.warp_collectives;
    set_ready(warp, mask);
    if (mask == warp.alive) flush_log(warp);
    progress();
  } else {
    wait_here(State::in_warp, op, site);
  }
}

void sync_threads(Site site) {
  race::ExecutorScope scope;
  if (counted_and_skipped("__syncthreads", site)) return;
  meet(0, self().block->thread_count, "__syncthreads", site);
}

void barrier_sync(int id, int threads, Site site) {
  race::ExecutorScope scope;
  check_named(id, threads, "bar.sync", site);
  if (counted_and_skipped("bar.sync", site)) return;
  meet(id, uint32_t(threads), "bar.sync", site);
}

void cluster_sync(Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("barrier.cluster", site);
  if (counted_and_skipped(t.op, site)) return;
  Barrier& b = machine.cluster_barrier;
  if (++b.arrived < machine.blocks.size() * t.block->thread_count)
    return wait_here(State::at_cluster_barrier, "barrier.cluster", site);
  b.arrived = 0;
  ++b.generation;
  ++totals.barriers;
  progress();
  race::Sync sync;
  for (Warp* warp : machine.warps) race::release(sync, warp->thread->id, warp->present);
  for (Warp* warp : machine.warps) {
    race::acquire(sync, warp->thread->id, warp->present);
    set_ready(*warp, warp->present);
  }
}

void sync_warp(uint32_t mask, Site site) {
  race::ExecutorScope scope;
  if (counted_and_skipped("__syncwarp", site)) return;
  warp_collective("__syncwarp", mask, site, nullptr, nullptr, nullptr, true);
}

uint64_t shuffle_xor(uint32_t mask, uint64_t bits, int lanes, int width, Site site) {
  race::ExecutorScope scope;
  const char* op = "__shfl_xor_sync";
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("%s at %s:%d: width is %d, expected a power of two up to 32", op, site.file, site.line,
         width);
  const int lane = int(self().lane);
  const int last = lane / width * width + width - 1;
  const int source = (lane ^ lanes) > last ? -1 : lane ^ lanes;
  Shuffled value{bits, bits, source};
  warp_collective(op, mask, site, &value, exchange, nullptr, false);
  return value.received;
}

}  // namespace lotr::simt
