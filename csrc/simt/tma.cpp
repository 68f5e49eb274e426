// sm_90: bulk copies (TMA) of boxes between matrices and swizzled tiles in shared memory.
//
// Starting a copy fills its destination with NaN and adds its landing to machine.landings, which
// run when no thread can continue, or at random times. Only the landing reads the source and writes
// its data. So two mistakes are visible: reading a tile before the wait reads NaN, and overwriting
// a tile whose store has not landed changes what the matrix receives.
#include <algorithm>
#include <cstring>

#include "hopper.h"
#include "state.h"

namespace lotr::simt {
namespace {

constexpr uint32_t ROW = 128;  // bytes of a box's row, which is a row of the swizzle
constexpr int64_t COLS = ROW / 2;

// Bits 4 to 6 of the shared offset ^= bits 7 to 9.
size_t swizzled(size_t offset) {
  return offset ^ (offset >> 7 & 7) << 4;
}

// A box of a matrix: the one whose first element is (col, row), which may be outside the matrix.
struct Box {
  TensorMap map;
  int col, row;

  size_t bytes() const { return map.box_rows * ROW; }
  // f(offset in the tile, address in the matrix, bytes) for the part of each row inside the matrix.
  template <class F>
  void each_row(F f) const {
    const int64_t first_col = std::max(col, 0);
    const int64_t end_col = std::min<int64_t>(col + COLS, map.cols);
    const int64_t end_row = std::min<int64_t>(int64_t(row) + map.box_rows, map.rows);
    if (first_col >= end_col) return;
    for (int64_t r = std::max(row, 0); r < end_row; ++r) {
      const size_t element = size_t(r) * map.row_stride + size_t(first_col);
      f(size_t(r - row) * ROW + size_t(first_col - col) * 2,
        const_cast<unsigned char*>(map.base) + element * 2, size_t(end_col - first_col) * 2);
    }
  }
};

// The end of a load: fills the tile at `offset` of the block, and counts its bytes at the mbarrier.
void land_load(const Box& box, Block& block, size_t offset, size_t barrier_offset) {
  unsigned char* const shared = block.shared;
  unpoison(shared + offset, box.bytes());
  memset(shared + offset, 0, box.bytes());  // zeros outside the matrix
  box.each_row([&](size_t at, const unsigned char* from, size_t part) {
    for (size_t i = 0; i < part; i += 2) memcpy(shared + swizzled(offset + at + i), from + i, 2);
  });
  --block.copies_in_flight;
  MemoryBarrier& barrier = machine.memory_barriers.at(shared + barrier_offset);
  barrier.pending_bytes -= int64_t(box.bytes());
  complete_if_done(barrier);
}

// The end of a store: writes the tile at `offset` of the thread's block to the matrix.
void land_store(const Box& box, Thread& t, size_t offset) {
  const unsigned char* const shared = t.block->shared;
  box.each_row([&](size_t at, unsigned char* to, size_t part) {
    for (size_t i = 0; i < part; i += 2) memcpy(to + i, shared + swizzled(offset + at + i), 2);
  });
  --t.block->copies_in_flight;
  if (t.state == State::spinning) set_ready(*t.warp, 1u << t.lane);
}

void check_tile(const void* tile, const TensorMap& map, Site site) {
  check_early(self().op, site);
  check_shared(tile, map.box_rows * ROW, 128, self().op, site);
  if (shared_offset(tile) % (8 * ROW))
    fail("%s at %s:%d: a tile with %u-byte swizzle starts at a multiple of %u bytes, got offset %u",
         self().op, site.file, site.line, ROW, 8 * ROW, shared_offset(tile));
}

}  // namespace

TensorMap tensor_map_2d(const void* base, uint32_t rows, uint32_t cols, uint32_t row_stride,
                        uint32_t box_rows) {
  if (reinterpret_cast<uintptr_t>(base) % 16 || row_stride % 8)
    throw Error("tensor map: rows must start at multiples of 16 bytes");
  if (!rows || !cols) throw Error("tensor map: expected at least one row and column");
  if (rows > 1 && row_stride < cols) throw Error("tensor map: rows overlap");
  if (box_rows < 1 || box_rows > 256)
    throw Error("tensor map: a box has 1 to 256 rows, got " + std::to_string(box_rows));
  return {static_cast<const unsigned char*>(base), rows, cols, row_stride, box_rows};
}

uint32_t mask_of_block() {
  return 1u << self().block->rank;
}

void tma_load_2d(void* shared, const TensorMap& map, int col, int row, void* barrier,
                 uint32_t blocks, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("cp.async.bulk.tensor", site);
  const Box box{map, col, row};
  const size_t offset = shared_offset(shared);
  check_tile(shared, map, site);
  check_shared(barrier, 8, 8, t.op, site);
  if (!blocks || blocks >> machine.blocks.size())
    fail("%s at %s:%d: blocks %#x of a cluster of %zu", t.op, site.file, site.line, blocks,
         machine.blocks.size());
  const uint32_t barrier_offset = shared_offset(barrier);
  // Counted once: one read serves all blocks.
  box.each_row([](size_t, const void* from, size_t part) {
    count_global(Space::global_read, reinterpret_cast<uintptr_t>(from), part);
    touch_read(from, part);
  });
  for (uint32_t rank = 0; rank < machine.blocks.size(); ++rank) {
    if (!(blocks >> rank & 1)) continue;
    Block& block = block_of_cluster(rank, site);
    totals.bulk_bytes += box.bytes();
    unsigned char* tile = block.shared + offset;
    check_proxy_fence(block, offset, box.bytes());
    unpoison(tile, box.bytes());
    touch_fill(tile, 0xFF, box.bytes());
    MemoryBarrier& counted_at = memory_barrier(block, barrier_offset, site);
    check_fenced(counted_at, site);
    // Orders this write before what follows a wait there. The thread's earlier stores too, although
    // on a GPU only its arrivals order those.
    race::release(counted_at.arrivals, t.id);
    poison(tile, box.bytes());
    ++block.copies_in_flight;
    // The box by value: the thread may have exited when the copy lands.
    machine.landings.push_back(
        [&block, box, offset, barrier_offset] { land_load(box, block, offset, barrier_offset); });
  }
}

void note_store(const void* p, uint32_t bytes) {
  const Thread& t = self();
  for (uint32_t word = shared_offset(p) / 4; word * 4 < shared_offset(p) + bytes; ++word)
    t.block->stores[word] = {t.linear, t.proxy_fences};
}

void check_proxy_fence(const Block& block, size_t offset, size_t bytes) {
  for (size_t word = offset / 4; word < (offset + bytes) / 4; ++word) {
    const WordStore& store = block.stores[word];
    if (block.threads[store.thread].proxy_fences == store.proxy_fences)
      fail(
          "%s at %s:%d: thread %u has not called fence.proxy.async since its store to shared "
          "offset %zu",
          self().op, self().site.file, self().site.line, store.thread, word * 4);
  }
}

void fence_proxy_async(Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("fence.proxy.async", site);
  if (counted_and_skipped(t.op, site)) return;
  ++t.proxy_fences;
}

void tma_store_2d(const TensorMap& map, int col, int row, const void* shared, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("cp.async.bulk.tensor", site);
  Block& block = *t.block;
  const Box box{map, col, row};
  const size_t offset = shared_offset(shared);
  check_tile(shared, map, site);
  check_proxy_fence(block, offset, box.bytes());
  if (block.launched_dependents)
    fail(
        "%s at %s:%d: a store after griddepcontrol.launch_dependents: the next kernel may have "
        "started",
        t.op, site.file, site.line);
  touch_read(shared, box.bytes());
  box.each_row([](size_t, unsigned char* to, size_t part) {
    count_global(Space::global_write, reinterpret_cast<uintptr_t>(to), part);
    touch_fill(to, 0xFF, part);
  });
  totals.bulk_bytes += box.bytes();
  ++block.copies_in_flight;
  const auto landed = std::make_shared<bool>(false);
  t.stores.push_back({/*ends_group=*/false, block.shared + offset, box.bytes(), landed});
  machine.landings.push_back([&t, box, offset, landed] {
    land_store(box, t, offset);
    *landed = true;
  });
  maybe_preempt();
}

void bulk_commit(Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("cp.async.bulk.commit_group", site);
  if (counted_and_skipped(t.op, site)) return;
  BulkStore end;
  end.ends_group = true;
  t.stores.push_back(end);
}

void bulk_wait(int keep, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("cp.async.bulk.wait_group", site);
  if (counted_and_skipped(t.op, site)) return;
  const size_t landing = covered_by_wait(t.stores, keep);
  for (size_t i = 0; i < landing; ++i) {
    const BulkStore& store = t.stores[i];
    if (store.ends_group) continue;
    while (!*store.landed) wait_here(State::spinning, "cp.async.bulk.wait_group", site);
    // For the race detector, the copy reads its tile until now: another thread's store into the
    // tile must come after this wait.
    touch_read(store.tile, store.bytes);
  }
  t.stores.erase(t.stores.begin(), t.stores.begin() + std::ptrdiff_t(landing));
  progress();
  maybe_preempt();
}

}  // namespace lotr::simt
