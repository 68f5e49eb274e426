// Chooses the thread that runs next, and switches to it where the running thread waits, or at
// random memory accesses.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>

#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace lotr::simt {

Machine machine;

namespace {

int lowest(uint32_t bits) {
  return __builtin_ctz(bits);
}
int nth(uint64_t bits, size_t n) {
  while (n--) bits &= bits - 1;
  return __builtin_ctzll(bits);
}

// Where the threads are, for the message of a deadlock: one line for each block and place, with the
// number of its threads, up to 16 lines.
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
      int n = snprintf(line, sizeof line, "\n  block (%u,%u,%u): %d threads from %u on ",
                       block.index.x, block.index.y, block.index.z, int(count), t.linear);
      if (t.state == State::exited)
        snprintf(line + n, sizeof line - n, "have exited");
      else
        snprintf(line + n, sizeof line - n, "are at %s, %s:%d", t.op, t.site.file, t.site.line);
      text += line;
    }
  return text;
}

// Completes one bulk copy: the oldest, the newest or a random one, by Options::order. A GPU does
// not order them either.
void land_a_copy() {
  const size_t i = choose(machine.options.order, machine.landings.size());
  const auto land = std::move(machine.landings[i]);
  machine.landings.erase(machine.landings.begin() + std::ptrdiff_t(i));
  land();
  progress();
}

Warp* choose_warp() {
  Warp* current = machine.warps[machine.current_warp];
  if (current->ready) return current;  // a warp runs until all its lanes wait
  size_t count = 0;                    // ready warps
  for (const uint64_t bits : machine.ready_warps) count += __builtin_popcountll(bits);
  if (!count) return nullptr;
  size_t k = choose(machine.options.order, count);
  for (size_t i = 0;; ++i) {
    const size_t ready = __builtin_popcountll(machine.ready_warps[i]);
    if (k < ready) {
      machine.current_warp = i * 64 + nth(machine.ready_warps[i], k);
      return machine.warps[machine.current_warp];
    }
    k -= ready;
  }
}

// The cluster's barrier is .aligned: no lane may poll while others of its warp are there, or the
// reverse.
void check_aligned(const Thread& t, State state) {
  for (uint32_t lanes = t.warp->alive & ~(1u << t.lane); lanes; lanes &= lanes - 1) {
    const Thread& other = t.warp->thread[lowest(lanes)];
    const bool here_polls = state == State::spinning && other.state == State::at_cluster_barrier;
    const bool other_polls = state == State::at_cluster_barrier && other.state == State::spinning;
    if (here_polls || other_polls) fail_diverged(t, other);
  }
}

// Checks that no copy of the block is in flight, and that its warpgroups multiplied as a whole.
void check_block_end(const Block& block) {
  if (block.copies_in_flight)
    fail("the block exits while %u bulk copies to or from its shared memory are in flight",
         block.copies_in_flight);
  for (const auto& [key, product] : block.products)
    fail("wgmma: only %d of a warpgroup's 128 threads multiply", product.users);
}

void reschedule() {
  Thread& me = self();
  Thread* next = choose_thread();
  if (!next) fiber_leave(me.fiber, machine.process);
  if (next == &me) return;
  make_current(*next);
  fiber_switch(me.fiber, next->fiber);
}

}  // namespace

void make_current(Thread& t) {
  machine.current = &t;
  threadIdx = t.index;
  blockIdx = t.block->index;
  ++totals.switches;
}

Thread* choose_thread() {
  const Order order = machine.options.order;
  for (;;) {
    if (!machine.landings.empty() && order == Order::random && next_random() % 16 == 0)
      land_a_copy();
    if (Warp* warp = choose_warp()) {
      const size_t n = choose(order, __builtin_popcount(warp->ready));
      return &warp->thread[nth(warp->ready, n)];
    }
    if (!machine.threads_left) return nullptr;
    if (!machine.landings.empty()) {
      land_a_copy();
      continue;
    }
    // Every polling thread polls again, in at most two rounds. progress() resets the count if one
    // of them can go on; if none can, this is a deadlock.
    if (machine.idle_rounds++ < 2) {
      wake_spinners();
      if (choose_warp()) continue;
    }
    machine.error = "deadlock: no thread can go on" + whereabouts();
    return nullptr;
  }
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
    if (!copy.ends_group)
      fail("thread exits with cp.async in flight (latest: %s at %s:%d)", t.op, t.site.file,
           t.site.line);
  if (!t.products.empty()) fail("thread exits with wgmma in flight");
  check_early_end(t);
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
  if (!--t.block->threads_left) check_block_end(*t.block);
  --machine.threads_left;
  progress();
  Thread* next = choose_thread();
  if (!next) fiber_leave(t.fiber, machine.process);
  make_current(*next);
  fiber_leave(t.fiber, next->fiber);
}

uint64_t next_random() {
  uint64_t x = machine.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return machine.random = x;
}

size_t choose(Order order, size_t count) {
  switch (order) {
    case Order::forward:
      return 0;
    case Order::reverse:
      return count - 1;
    default:
      return next_random() % count;
  }
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
  check_aligned(t, state);
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

void fail_diverged(const Thread& t, const Thread& other) {
  fail("divergent warp: lane %u is at %s, %s:%d, while lane %u is at %s, %s:%d", t.lane, t.op,
       t.site.file, t.site.line, other.lane, other.op, other.site.file, other.site.line);
}

}  // namespace lotr::simt
