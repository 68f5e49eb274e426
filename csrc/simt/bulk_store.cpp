// sm_90: TMA copies from shared to global memory, and the fence of the stores before them.
//
// A copy reads its tile when no thread can go on, or at a random moment, but before the wait for its group
// returns.  So a tile that is written again too early shows in the matrix, which is NaN until then.
#include <algorithm>
#include <cstring>

#include "hopper.h"
#include "state.h"

namespace lotr::simt {
namespace {

constexpr uint32_t CHUNK = 16;

// f(row of the box, its first column in the matrix, bytes) for the part of each row inside the matrix.
template <class F>
void each_row(const TensorMap& map, int col, int row, F f) {
  const int64_t first = std::max(col, 0), last = std::min<int64_t>(int64_t(col) + map.box_cols, map.cols);
  for (int64_t r = std::max(row, 0); r < std::min<int64_t>(int64_t(row) + map.box_rows, map.rows); ++r)
    if (first < last)
      f(r - row, const_cast<unsigned char*>(map.base) + (size_t(r) * map.row_stride + size_t(first)) * 2,
        size_t(first - col) * 2, size_t(last - first) * 2);
}

// Where byte `at` of the tile lies: bits 4 to 6 of its shared offset are exchanged with bits 7 to 9.
size_t swizzled(size_t offset, uint32_t row_bytes) {
  return offset ^ (offset >> 7 & (row_bytes / CHUNK - 1)) << 4;
}

}  // namespace

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
  const uint32_t row_bytes = map.box_cols * 2;
  const size_t bytes = map.box_rows * row_bytes, offset = shared_offset(shared);
  check_early(t.op, site);
  check_shared(shared, bytes, 128, t.op, site);
  if (offset % (8 * row_bytes))
    fail("%s at %s:%d: a tile with %u-byte swizzle starts at a multiple of %u bytes, got offset %zu", t.op,
         site.file, site.line, row_bytes, 8 * row_bytes, offset);
  for (size_t word = offset / 4; word < (offset + bytes) / 4; ++word)
    if (!block.unfenced.empty() && block.unfenced[word])
      fail("%s at %s:%d: thread %u has not called fence.proxy.async since its store to shared offset %zu",
           t.op, site.file, site.line, block.unfenced[word] - 1u, word * 4);
  if (block.let_next)
    fail("%s at %s:%d: a store after griddepcontrol.launch_dependents: the next kernel may have begun", t.op,
         site.file, site.line);
  touch_read(shared, bytes);
  each_row(map, col, row, [](int64_t, unsigned char* to, size_t, size_t part) {
    count_global(Space::global_write, reinterpret_cast<uintptr_t>(to), part);
    touch_fill(to, 0xFF, part);
  });
  ++totals.bulk_copies;
  totals.bulk_bytes += bytes;
  ++block.copies_in_flight;
  auto landed = std::make_shared<bool>(false);
  t.stores.push_back({static_cast<const unsigned char*>(shared), bytes, landed});
  machine.engine.push_back([&t, &block, landed, offset, row_bytes, map, col, row] {
    each_row(map, col, row, [&](int64_t r, unsigned char* to, size_t first, size_t part) {
      for (size_t i = 0; i < part; i += 2)
        memcpy(to + i, block.shared + swizzled(offset + size_t(r) * row_bytes + first + i, row_bytes), 2);
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
  size_t done = 0;
  int groups = 0;
  for (size_t i = t.stores.size(); i-- > 0;)
    if (!t.stores[i].tile && ++groups > keep) {
      done = i + 1;
      break;
    }
  for (size_t i = 0; i < done; ++i) {
    if (!t.stores[i].tile) continue;
    while (!*t.stores[i].landed) wait_here(State::spinning, "cp.async.bulk.wait_group", site);
    touch_read(t.stores[i].tile, t.stores[i].bytes);  // a store that this wait does not precede is a race
  }
  t.stores.erase(t.stores.begin(), t.stores.begin() + std::ptrdiff_t(done));
  progress();
  maybe_preempt();
}

}  // namespace lotr::simt
