// Loads, stores and asynchronous copies of the running thread.
#include <algorithm>
#include <cstring>

#include "state.h"

#if LOTR_SIMT_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace lotr::simt {
namespace {

// The offset in the block's shared memory; huge for memory before it.
uintptr_t offset(const void* p) {
  return uintptr_t(static_cast<const unsigned char*>(p) - self().block->shared);
}

void check_global(const void* p, uint32_t bytes, const char* op, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail("%s at %s:%d: global address %s is not aligned to %u bytes", op, site.file, site.line,
         global_name(reinterpret_cast<uintptr_t>(p)).c_str(), bytes);
  check_early(op, site);
  const Block& block = *self().block;
  if (offset(p) < block.shared_bytes)
    fail("%s at %s:%d: a global access to shared memory", op, site.file, site.line);
}

// With a constant size, memcpy is one instruction, which AddressSanitizer instruments.
void move(void* to, const void* from, uint32_t bytes) {
  switch (bytes) {
    case 16:
      memcpy(to, from, 16);
      break;
    case 8:
      memcpy(to, from, 8);
      break;
    case 4:
      memcpy(to, from, 4);
      break;
    case 2:
      memcpy(to, from, 2);
      break;
    default:
      memcpy(to, from, bytes);
  }
}

}  // namespace

void check_shared(const void* p, size_t bytes, size_t align, const char* op, Site site) {
  const Block& block = *self().block;
  const std::ptrdiff_t start = static_cast<const unsigned char*>(p) - block.shared;
  if (start < 0 || size_t(start) + bytes > block.shared_bytes)
    fail("%s at %s:%d: address is outside the block's shared memory: offset %td, %zu bytes, of %zu",
         op, site.file, site.line, start, bytes, block.shared_bytes);
  if (size_t(start) % align)
    fail("%s at %s:%d: shared address (offset %td) is not aligned to %zu bytes", op, site.file,
         site.line, start, align);
}

void touch_copy(void* to, const void* from, size_t bytes) {
  race::access(from, bytes, race::Use::read);
  race::access(to, bytes, race::Use::write);
  memcpy(to, from, bytes);
}
void touch_fill(void* to, int value, size_t bytes) {
  race::access(to, bytes, race::Use::write);
  memset(to, value, bytes);
}
void touch_read(const void* from, size_t bytes) {
  race::access(from, bytes, race::Use::read);
}

void poison([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if LOTR_SIMT_ASAN
  __asan_poison_memory_region(p, bytes);
#endif
}
void unpoison([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if LOTR_SIMT_ASAN
  __asan_unpoison_memory_region(p, bytes);
#endif
}

void* shared_memory(size_t bytes) {
  const Block& block = *self().block;
  if (bytes > block.shared_bytes)
    fail("the kernel's shared struct has %zu bytes, the launch gave %zu", bytes,
         block.shared_bytes);
  return block.shared;
}

uint32_t shared_offset(const void* p) {
  return uint32_t(offset(p));
}

void load_global(void* value, const void* p, uint32_t bytes, Site site) {
  race::ExecutorScope scope;
  check_global(p, bytes, enter("ld.global", site).op, site);
  record(Space::global_read, p, bytes, site);
  race::access(p, bytes, race::Use::read);
  move(value, p, bytes);
  maybe_preempt();
}

void store_global(void* p, const void* value, uint32_t bytes, Site site) {
  race::ExecutorScope scope;
  enter("st.global", site);
  check_global(p, bytes, self().op, site);
  record(Space::global_write, p, bytes, site);
  maybe_preempt();
  race::access(p, bytes, race::Use::write);
  move(p, value, bytes);
}

void load_shared(void* value, const void* p, uint32_t bytes, Site site) {
  race::ExecutorScope scope;
  enter("ld.shared", site);
  check_shared(p, bytes, bytes, self().op, site);
  record(Space::shared, p, bytes, site);
  race::access(p, bytes, race::Use::read);
  move(value, p, bytes);
  maybe_preempt();
}

void store_shared(void* p, const void* value, uint32_t bytes, Site site) {
  race::ExecutorScope scope;
  enter("st.shared", site);
  check_shared(p, bytes, bytes, self().op, site);
  record(Space::shared, p, bytes, site);
  maybe_preempt();
  note_store(p, bytes);
  race::access(p, bytes, race::Use::write);
  move(p, value, bytes);
}

// At issue the destination becomes NaN (with AddressSanitizer it is poisoned). The data is written
// at the wait.
void cp_async(void* shared, const void* global, uint32_t bytes, int src_bytes, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("cp.async", site);
  check_shared(shared, bytes, bytes, t.op, site);
  if (src_bytes < 0 || uint32_t(src_bytes) > bytes)
    fail("cp.async at %s:%d: source size is %d, expected 0 to %u", site.file, site.line, src_bytes,
         bytes);
  check_global(global, bytes, t.op, site);
  const uint32_t source = uint32_t(src_bytes);
  if (source) {
    alignas(16) unsigned char discarded[16];
    move(discarded, global, source);  // so that a bad address fails here and not at the wait
    record(Space::global_read, global, source, site);
  }
  record(Space::shared, shared, bytes, site);
  ++totals.async_copies;
  unpoison(shared, bytes);
  touch_fill(shared, 0xFF, bytes);
  poison(shared, bytes);
  t.copies.push_back({/*ends_group=*/false, shared, global, bytes, source});
  maybe_preempt();
}

void cp_async_commit(Site site) {
  race::ExecutorScope scope;
  if (counted_and_skipped("cp.async.commit_group", site)) return;
  AsyncCopy end;
  end.ends_group = true;
  enter("cp.async.commit_group", site).copies.push_back(end);
}

void cp_async_wait(int keep, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("cp.async.wait_group", site);
  if (counted_and_skipped(t.op, site)) return;
  ++totals.async_waits;
  const size_t landing = covered_by_wait(t.copies, keep);
  for (size_t i = 0; i < landing; ++i) {
    const AsyncCopy& copy = t.copies[i];
    if (copy.ends_group) continue;
    unpoison(copy.to, copy.bytes);
    if (copy.source_bytes) touch_copy(copy.to, copy.from, copy.source_bytes);
    if (copy.source_bytes < copy.bytes)
      touch_fill(static_cast<char*>(copy.to) + copy.source_bytes, 0,
                 copy.bytes - copy.source_bytes);
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + std::ptrdiff_t(landing));
  maybe_preempt();
}

}  // namespace lotr::simt
