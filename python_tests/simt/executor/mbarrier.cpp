// sm_90: mbarriers, the copies that count at them, and what blocks of a cluster share.
#include <cstring>

#include "hopper.h"
#include "state.h"

namespace lotr::simt {
namespace {

constexpr char MARK[] = "mbarrier";  // its 8 bytes in shared memory: overwriting them is noticed
constexpr uint32_t BOX_BYTES = 128, CHUNK = 16, PATTERN = 1024;

MemoryBarrier& find(const void* barrier, Site site) {
  const Thread& t = self();
  const auto found = machine.memory_barriers.find(barrier);
  const std::ptrdiff_t offset = static_cast<const unsigned char*>(barrier) - t.block->shared;
  if (found == machine.memory_barriers.end())
    fail("%s at %s:%d: the mbarrier at shared offset %td was never initialised", t.op, site.file, site.line,
         offset);
  if (memcmp(barrier, MARK, 8))
    fail("%s at %s:%d: the mbarrier at shared offset %td was overwritten", t.op, site.file, site.line,
         offset);
  return found->second;
}

void complete_if_done(MemoryBarrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.expected;
  progress();
  wake_spinners();
}

// Two bytes of a box: zero outside the matrix.
void copy_element(unsigned char* to, const TensorMap& map, int64_t row, int64_t col) {
  if (row >= 0 && row < map.rows && col >= 0 && col < map.cols)
    memcpy(to, map.base + (size_t(row) * map.row_stride + size_t(col)) * 2, 2);
  else
    memset(to, 0, 2);
}

// 128-byte swizzle: bits 4 to 6 of the shared address ^= bits 7 to 9.
size_t swizzled(size_t offset) {
  return offset ^ (offset >> 7 & 7) << 4;
}

void land(unsigned char* shared, size_t offset, const TensorMap& map, int col, int row) {
  for (uint32_t r = 0; r < map.box_rows; ++r)
    for (uint32_t chunk = 0; chunk < BOX_BYTES / CHUNK; ++chunk) {
      unsigned char* to = shared + swizzled(offset + r * BOX_BYTES + chunk * CHUNK);
      for (uint32_t e = 0; e < CHUNK / 2; ++e)
        copy_element(to + 2 * e, map, int64_t(row) + r, int64_t(col) + chunk * (CHUNK / 2) + e);
    }
}

void count_box(const TensorMap& map, int col, int row) {
  const int64_t first = std::max(col, 0), last = std::min<int64_t>(int64_t(col) + 64, map.cols);
  for (int64_t r = std::max(row, 0); r < std::min<int64_t>(int64_t(row) + map.box_rows, map.rows); ++r)
    if (first < last)
      count_global(Space::global_read,
                   reinterpret_cast<uintptr_t>(map.base) + (size_t(r) * map.row_stride + size_t(first)) * 2,
                   uint64_t(last - first) * 2);
}

}  // namespace

TensorMap tensor_map_2d(const void* base, uint32_t rows, uint32_t cols, uint32_t row_stride,
                        uint32_t box_rows) {
  if (reinterpret_cast<uintptr_t>(base) % 16 || row_stride % 8)
    throw Error("tensor map: rows must start at multiples of 16 bytes");
  if (box_rows < 1 || box_rows > 256)
    throw Error("tensor map: a box has 1 to 256 rows, got " + std::to_string(box_rows));
  return {static_cast<const unsigned char*>(base), rows, cols, row_stride, box_rows};
}

void mbarrier_init(void* barrier, uint32_t arrivals, Site site) {
  race::ExecutorScope scope;
  enter("mbarrier.init", site);
  check_shared(barrier, 8, 8, self().op, site);
  if (!arrivals) fail("mbarrier.init at %s:%d: 0 arrivals, expected 1 or more", site.file, site.line);
  memcpy(barrier, MARK, 8);
  MemoryBarrier b;
  b.expected = b.pending = arrivals;
  machine.memory_barriers[barrier] = b;
}

void mbarrier_arrive(void* barrier, uint32_t bytes, Site site) {
  race::ExecutorScope scope;
  enter(bytes ? "mbarrier.arrive.expect_tx" : "mbarrier.arrive", site);
  if (left_out(self().op, site)) return;
  MemoryBarrier& b = find(barrier, site);
  race::release(b.sync);
  if (!b.pending)
    fail("%s at %s:%d: more arrivals than the mbarrier expects (%u)", self().op, site.file, site.line,
         b.expected);
  b.bytes += bytes;
  --b.pending;
  complete_if_done(b);
}

void mbarrier_wait(void* barrier, uint32_t parity, Site site) {
  race::ExecutorScope scope;
  enter("mbarrier.try_wait", site);
  if (left_out(self().op, site)) return;
  while ((find(barrier, site).phase & 1) == (parity & 1))
    wait_here(State::spinning, "mbarrier.try_wait", site);
  progress();
  race::acquire(find(barrier, site).sync);
  maybe_preempt();
}

// The tile turns to NaN at issue; the engine writes it later and then counts the bytes at the mbarrier.
void tma_load_2d(void* shared, const TensorMap& map, int col, int row, void* barrier, Site site) {
  tma_load_2d_multicast(shared, map, col, row, barrier, uint16_t(1u << self().block->rank), site);
}

void tma_load_2d_multicast(void* shared, const TensorMap& map, int col, int row, void* barrier,
                           uint16_t blocks, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("cp.async.bulk.tensor", site);
  const size_t bytes = size_t(map.box_rows) * BOX_BYTES;
  check_shared(shared, bytes, BOX_BYTES, t.op, site);
  check_shared(barrier, 8, 8, t.op, site);
  const size_t offset = shared_offset(shared);
  if (offset % PATTERN)
    fail("%s at %s:%d: a tile with 128-byte swizzle starts at a multiple of 1024 bytes, got offset %zu", t.op,
         site.file, site.line, offset);
  if (!blocks || blocks >> machine.cluster_size)
    fail("%s at %s:%d: blocks %#x of a cluster of %u", t.op, site.file, site.line, blocks,
         machine.cluster_size);
  const size_t barrier_offset = shared_offset(barrier);
  std::vector<unsigned char*> bases;
  for (uint32_t rank = 0; rank < machine.cluster_size; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    const Block& block = machine.blocks[t.block->first + rank];
    for (const Thread& thread : block.threads)
      if (thread.state != State::exited) goto alive;
    fail("%s at %s:%d: block %u of the cluster has exited", t.op, site.file, site.line, rank);
  alive:
    bases.push_back(block.shared);
    unpoison(block.shared + offset, bytes);
    touch_fill(block.shared + offset, 0xFF, bytes);
    race::release(find(block.shared + barrier_offset, site).sync);  // who waits there comes after this write
    poison(block.shared + offset, bytes);
  }
  count_box(map, col, row);
  ++totals.bulk_copies;
  // by value: the issuing thread may be gone when it lands; the blocks' copies land one by one
  for (unsigned char* base : bases)
    machine.engine.push_back([base, offset, bytes, map, col, row, barrier_offset] {
      unpoison(base + offset, bytes);
      land(base, offset, map, col, row);
      MemoryBarrier& b = machine.memory_barriers.at(base + barrier_offset);
      b.bytes -= int64_t(bytes);
      complete_if_done(b);
    });
}

void mbarrier_arrive_cluster(void* barrier, uint32_t rank, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("mbarrier.arrive.cluster", site);
  if (left_out(t.op, site)) return;
  check_shared(barrier, 8, 8, t.op, site);
  if (rank >= machine.cluster_size)
    fail("%s at %s:%d: rank is %u, expected below %u", t.op, site.file, site.line, rank,
         machine.cluster_size);
  const Block& block = machine.blocks[t.block->first + rank];
  bool alive = false;
  for (const Thread& thread : block.threads) alive |= thread.state != State::exited;
  if (!alive) fail("%s at %s:%d: block %u of the cluster has exited", t.op, site.file, site.line, rank);
  MemoryBarrier& b = find(block.shared + shared_offset(barrier), site);
  race::release(b.sync);
  if (!b.pending)
    fail("%s at %s:%d: more arrivals than the mbarrier expects (%u)", t.op, site.file, site.line, b.expected);
  --b.pending;
  complete_if_done(b);
}

void cluster_sync(Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("barrier.cluster", site);
  if (left_out(t.op, site)) return;
  Barrier& b = machine.cluster_barriers[t.block->first / machine.cluster_size];
  const uint32_t all = machine.cluster_size * t.block->thread_count;
  race::Sync& sync = b.sync[b.generation % 2];
  race::release(sync);
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
      flush_log(*warp);
    }
  } else {
    wait_here(State::at_cluster_barrier, "barrier.cluster", site);
  }
  race::acquire(sync);
}

uint32_t cluster_rank() {
  return self().block->rank;
}

void* cluster_map(const void* shared, uint32_t rank, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("mapa", site);
  check_shared(shared, 1, 1, t.op, site);
  if (rank >= machine.cluster_size)
    fail("mapa at %s:%d: rank is %u, expected below %u", site.file, site.line, rank, machine.cluster_size);
  return machine.blocks[t.block->first + rank].shared + shared_offset(shared);
}

}  // namespace lotr::simt
