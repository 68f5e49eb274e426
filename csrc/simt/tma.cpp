// sm_90: bulk copies (TMA) of boxes between matrices and swizzled tiles in shared memory.
//
// A copy lands when no thread can continue, or at a random time. A tile that is being filled is
// NaN until then. A tile that is being stored is read then, or at the latest when the wait for its
// group returns: so a tile that is overwritten too early is visible in the matrix, which is NaN
// until then.
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

// f(offset in the tile, address in the matrix, bytes) for the part of each row of the box inside
// the matrix.
template <class F>
void each_row(const TensorMap& map, int col, int row, F f) {
  const int64_t first = std::max(col, 0);
  const int64_t last = std::min<int64_t>(col + COLS, map.cols);
  for (int64_t r = std::max(row, 0); r < std::min<int64_t>(int64_t(row) + map.box_rows, map.rows);
       ++r)
    if (first < last)
      f(size_t(r - row) * ROW + size_t(first - col) * 2,
        const_cast<unsigned char*>(map.base) + (size_t(r) * map.row_stride + size_t(first)) * 2,
        size_t(last - first) * 2);
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

uint32_t own_block() {
  return 1u << self().block->rank;
}

void tma_load_2d(void* shared, const TensorMap& map, int col, int row, void* barrier,
                 uint32_t blocks, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("cp.async.bulk.tensor", site);
  const size_t bytes = map.box_rows * ROW;
  const size_t offset = shared_offset(shared);
  check_tile(shared, map, site);
  check_shared(barrier, 8, 8, t.op, site);
  if (!blocks || blocks >> machine.blocks.size())
    fail("%s at %s:%d: blocks %#x of a cluster of %zu", t.op, site.file, site.line, blocks,
         machine.blocks.size());
  const size_t barrier_offset = shared_offset(barrier);
  // Counted once: one read serves all blocks.
  each_row(map, col, row, [](size_t, const void* from, size_t part) {
    count_global(Space::global_read, reinterpret_cast<uintptr_t>(from), part);
  });
  ++totals.bulk_copies;
  for (uint32_t rank = 0; rank < machine.blocks.size(); ++rank) {
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
      memset(block.shared + offset, 0, bytes);  // zeros outside the matrix
      each_row(map, col, row, [&](size_t at, const unsigned char* from, size_t part) {
        for (size_t i = 0; i < part; i += 2)
          memcpy(block.shared + swizzled(offset + at + i), from + i, 2);
      });
      --block.copies_in_flight;
      MemoryBarrier& b = machine.memory_barriers.at(block.shared + barrier_offset);
      b.bytes -= int64_t(bytes);
      complete_if_done(b);
    });
  }
}

void note_store(const void* p, uint32_t bytes) {
  Thread& t = self();
  Block& block = *t.block;
  if (block.unfenced.empty()) return;
  for (uint32_t word = shared_offset(p) / 4; word * 4 < shared_offset(p) + bytes; ++word) {
    block.unfenced[word] = uint16_t(t.linear + 1);
    t.unfenced.push_back(word);
  }
}

void fence_proxy_async(Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("fence.proxy.async", site);
  if (left_out(t.op, site)) return;
  for (const uint32_t word : t.unfenced)
    if (t.block->unfenced[word] == t.linear + 1) t.block->unfenced[word] = 0;
  t.unfenced.clear();
}

void tma_store_2d(const TensorMap& map, int col, int row, const void* shared, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("cp.async.bulk.tensor", site);
  Block& block = *t.block;
  const size_t bytes = map.box_rows * ROW;
  const size_t offset = shared_offset(shared);
  check_tile(shared, map, site);
  for (size_t word = offset / 4; word < (offset + bytes) / 4 && !block.unfenced.empty(); ++word)
    if (block.unfenced[word])
      fail(
          "%s at %s:%d: thread %u has not called fence.proxy.async since its store to shared "
          "offset %zu",
          t.op, site.file, site.line, block.unfenced[word] - 1u, word * 4);
  if (block.let_next)
    fail(
        "%s at %s:%d: a store after griddepcontrol.launch_dependents: the next kernel may have "
        "started",
        t.op, site.file, site.line);
  touch_read(shared, bytes);
  each_row(map, col, row, [](size_t, unsigned char* to, size_t part) {
    count_global(Space::global_write, reinterpret_cast<uintptr_t>(to), part);
    touch_fill(to, 0xFF, part);
  });
  ++totals.bulk_copies;
  totals.bulk_bytes += bytes;
  ++block.copies_in_flight;
  auto landed = std::make_shared<bool>(false);
  t.stores.push_back({static_cast<const unsigned char*>(shared), bytes, landed});
  machine.engine.push_back([&t, &block, landed, offset, map, col, row] {
    each_row(map, col, row, [&](size_t at, unsigned char* to, size_t part) {
      for (size_t i = 0; i < part; i += 2)
        memcpy(to + i, block.shared + swizzled(offset + at + i), 2);
    });
    *landed = true;
    --block.copies_in_flight;
    if (t.state == State::spinning) set_ready(*t.warp, 1u << t.lane);
  });
  maybe_preempt();
}

void bulk_commit(Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("cp.async.bulk.commit_group", site);
  if (!left_out(t.op, site)) t.stores.push_back({nullptr, 0, nullptr});
}

void bulk_wait(int keep, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("cp.async.bulk.wait_group", site);
  if (left_out(t.op, site)) return;
  const size_t done =
      covered_by_wait(t.stores, keep, [](const BulkStore& store) { return !store.tile; });
  for (size_t i = 0; i < done; ++i) {
    if (!t.stores[i].tile) continue;
    while (!*t.stores[i].landed) wait_here(State::spinning, "cp.async.bulk.wait_group", site);
    // A thread's store that this wait does not precede is a race.
    touch_read(t.stores[i].tile, t.stores[i].bytes);
  }
  t.stores.erase(t.stores.begin(), t.stores.begin() + std::ptrdiff_t(done));
  progress();
  maybe_preempt();
}

}  // namespace lotr::simt
