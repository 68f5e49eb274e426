// sm_90: mbarriers, and the TMA copies that complete at them.
#include <cstring>

#include "hopper.h"
#include "state.h"

namespace lotr::simt {
namespace {

constexpr char MARK[] = "mbarrier";  // stored as its 8 bytes of shared memory, so that overwriting it shows
constexpr uint32_t CHUNK = 16;
constexpr int64_t MOST = (1 << 20) - 1;  // arrivals, and bytes that are announced or have come early

uint32_t row_bytes(const TensorMap& map) {
  return map.box_cols * 2;
}

// One element of a box: zero outside the matrix.
void copy_element(unsigned char* to, const TensorMap& map, int64_t row, int64_t col) {
  if (row >= 0 && row < map.rows && col >= 0 && col < map.cols)
    memcpy(to, map.base + (size_t(row) * map.row_stride + size_t(col)) * 2, 2);
  else
    memset(to, 0, 2);
}

// 128-byte swizzle: bits 4 to 6 of the shared address ^= bits 7 to 9; of 64 bytes the lower two of them, of
// 32 the lowest.
size_t swizzled(size_t offset, uint32_t row) {
  return offset ^ (offset >> 7 & (row / CHUNK - 1)) << 4;
}

void land(unsigned char* shared, size_t offset, const TensorMap& map, int col, int row) {
  for (uint32_t r = 0; r < map.box_rows; ++r)
    for (uint32_t chunk = 0; chunk < row_bytes(map) / CHUNK; ++chunk) {
      unsigned char* to = shared + swizzled(offset + r * row_bytes(map) + chunk * CHUNK, row_bytes(map));
      for (uint32_t e = 0; e < CHUNK / 2; ++e)
        copy_element(to + 2 * e, map, int64_t(row) + r, int64_t(col) + chunk * (CHUNK / 2) + e);
    }
}

void count_box(const TensorMap& map, int col, int row) {
  const int64_t first = std::max(col, 0), last = std::min<int64_t>(int64_t(col) + map.box_cols, map.cols);
  for (int64_t r = std::max(row, 0); r < std::min<int64_t>(int64_t(row) + map.box_rows, map.rows); ++r)
    if (first < last)
      count_global(Space::global_read,
                   reinterpret_cast<uintptr_t>(map.base) + (size_t(r) * map.row_stride + size_t(first)) * 2,
                   uint64_t(last - first) * 2);
}

}  // namespace

MemoryBarrier& memory_barrier(const void* barrier, Site site) {
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
  for (Thread* t : b.waiting)
    if (t->state == State::spinning) set_ready(*t->warp, 1u << t->lane);
  b.waiting.clear();
}

void arrive(MemoryBarrier& b, Site site) {
  if (!b.pending)
    fail("%s at %s:%d: more arrivals than the mbarrier expects (%u)", self().op, site.file, site.line,
         b.expected);
  --b.pending;
  complete_if_done(b);
}

TensorMap tensor_map_2d(const void* base, uint32_t rows, uint32_t cols, uint32_t row_stride,
                        uint32_t box_rows, uint32_t box_cols) {
  if (reinterpret_cast<uintptr_t>(base) % 16 || row_stride % 8)
    throw Error("tensor map: rows must start at multiples of 16 bytes");
  if (!rows || !cols) throw Error("tensor map: expected at least one row and column");
  if (rows > 1 && row_stride < cols) throw Error("tensor map: rows overlap");
  if (box_rows < 1 || box_rows > 256)
    throw Error("tensor map: a box has 1 to 256 rows, got " + std::to_string(box_rows));
  if (box_cols != 16 && box_cols != 32 && box_cols != 64)
    throw Error("tensor map: a box has 16, 32 or 64 columns, got " + std::to_string(box_cols));
  return {static_cast<const unsigned char*>(base), rows, cols, row_stride, box_rows, box_cols};
}

void mbarrier_init(void* barrier, uint32_t arrivals, Site site) {
  race::ExecutorScope scope;
  enter("mbarrier.init", site);
  check_shared(barrier, 8, 8, self().op, site);
  if (!arrivals || arrivals > MOST)
    fail("mbarrier.init at %s:%d: %u arrivals, expected 1 to 2^20 - 1", site.file, site.line, arrivals);
  memcpy(barrier, MARK, 8);
  Block& block = *self().block;
  if (block.unfenced.empty()) block.unfenced.assign(block.shared_bytes / 4 + 1, 0);  // it may start bulk copies
  MemoryBarrier b;
  b.expected = b.pending = arrivals;
  b.unfenced = &self();
  machine.memory_barriers[barrier] = b;
}

void fence_mbarrier_init(Site site) {
  race::ExecutorScope scope;
  const Thread& t = enter("fence.mbarrier_init", site);
  if (left_out(t.op, site)) return;
  for (auto& [place, b] : machine.memory_barriers)
    if (b.unfenced == &t) b.unfenced = nullptr;
}

void check_fenced(const MemoryBarrier& b, Site site) {
  if (b.unfenced)
    fail("%s at %s:%d: no fence.mbarrier_init after the mbarrier's mbarrier.init", self().op, site.file,
         site.line);
}

void mbarrier_arrive(void* barrier, uint32_t bytes, Site site) {
  race::ExecutorScope scope;
  enter(bytes ? "mbarrier.arrive.expect_tx" : "mbarrier.arrive", site);
  if (left_out(self().op, site)) return;
  MemoryBarrier& b = memory_barrier(barrier, site);
  race::release(b.sync);
  b.bytes += bytes;
  if (b.bytes > MOST)
    fail("%s at %s:%d: %lld bytes are announced, expected at most 2^20 - 1", self().op, site.file, site.line,
         (long long)b.bytes);
  arrive(b, site);
}

void mbarrier_wait(void* barrier, uint32_t parity, bool cluster, Site site) {
  race::ExecutorScope scope;
  enter("mbarrier.try_wait", site);
  if (left_out(self().op, site)) return;
  for (;;) {
    MemoryBarrier& b = memory_barrier(barrier, site);
    if ((b.phase & 1) != (parity & 1)) break;
    b.waiting.push_back(&self());
    wait_here(State::spinning, "mbarrier.try_wait", site);
  }
  progress();
  const MemoryBarrier& b = memory_barrier(barrier, site);
  race::acquire(b.sync);
  if (cluster) race::acquire(b.remote);
  maybe_preempt();
}

void tma_load_2d(void* shared, const TensorMap& map, int col, int row, void* barrier, Site site) {
  tma_load_2d_multicast(shared, map, col, row, barrier, uint16_t(1u << self().block->rank), site);
}

// The tile becomes NaN at issue. The engine writes it later and then counts the bytes at the mbarrier.
void tma_load_2d_multicast(void* shared, const TensorMap& map, int col, int row, void* barrier,
                           uint16_t blocks, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("cp.async.bulk.tensor", site);
  const size_t row_size = row_bytes(map), bytes = map.box_rows * row_size;
  check_early(t.op, site);
  check_shared(shared, bytes, 128, t.op, site);
  check_shared(barrier, 8, 8, t.op, site);
  const size_t offset = shared_offset(shared);
  if (offset % (8 * row_size))
    fail("%s at %s:%d: a tile with %zu-byte swizzle starts at a multiple of %zu bytes, got offset %zu", t.op,
         site.file, site.line, row_size, 8 * row_size, offset);
  if (!blocks || blocks >> machine.cluster_size)
    fail("%s at %s:%d: blocks %#x of a cluster of %u", t.op, site.file, site.line, blocks,
         machine.cluster_size);
  const size_t barrier_offset = shared_offset(barrier);
  count_box(map, col, row);  // read once, however many blocks receive it
  ++totals.bulk_copies;
  for (uint32_t rank = 0; rank < machine.cluster_size; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    Block& block = block_of_cluster(rank, site);
    totals.bulk_bytes += bytes;
    unsigned char* tile = block.shared + offset;
    unpoison(tile, bytes);
    touch_fill(tile, 0xFF, bytes);
    MemoryBarrier& counts = memory_barrier(block.shared + barrier_offset, site);
    check_fenced(counts, site);
    race::release(counts.sync);  // orders this write before a thread that waits there
    poison(tile, bytes);
    ++block.copies_in_flight;
    // captured by value: the issuing thread may have exited when the copy lands
    machine.engine.push_back([&block, offset, bytes, map, col, row, barrier_offset] {
      unpoison(block.shared + offset, bytes);
      land(block.shared, offset, map, col, row);
      --block.copies_in_flight;
      MemoryBarrier& b = machine.memory_barriers.at(block.shared + barrier_offset);
      b.bytes -= int64_t(bytes);
      complete_if_done(b);
    });
  }
}

}  // namespace lotr::simt
