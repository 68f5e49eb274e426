// The threads of the kernels are torch's. Their memory is a cache of a few blocks per thread.
#include "cpu/runtime.h"

#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <new>

namespace lotr::cpu {
namespace {

// Freed blocks are kept for the next call. The system would map a fresh block of this size, and
// fault in its pages, on every call.
constexpr size_t kMostBytes = size_t(16) << 20;  // of a block that is kept
constexpr int kBlocks = 4;  // a call holds packed factors, partial sums and copies of tiles at once
struct Cache {
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  } blocks[kBlocks];
  ~Cache() {
    for (Block& b : blocks) ::operator delete(b.data, std::align_val_t(64));
  }
};
thread_local Cache cache;

}  // namespace

Scratch::Scratch(size_t bytes) : data_(nullptr), bytes_(bytes) {
  if (bytes == 0) return;
  Cache::Block* best = nullptr;
  for (Cache::Block& b : cache.blocks) {
    if (b.data && b.bytes >= bytes && (!best || b.bytes < best->bytes)) best = &b;
  }
  if (best) {
    data_ = best->data;
    bytes_ = best->bytes;
    *best = {};
  } else {
    data_ = ::operator new(bytes, std::align_val_t(64));
  }
}

Scratch::~Scratch() {
  if (!data_) return;
  if (bytes_ <= kMostBytes) {
    Cache::Block(&all)[kBlocks] = cache.blocks;  // once: each access to a thread-local is a call
    Cache::Block* smallest = &all[0];
    for (Cache::Block& b : all) {
      if (b.bytes < smallest->bytes) smallest = &b;
    }
    if (smallest->bytes < bytes_) {
      ::operator delete(smallest->data, std::align_val_t(64));
      *smallest = {data_, bytes_};
      return;
    }
  }
  ::operator delete(data_, std::align_val_t(64));
}

int64_t l2_bytes() {
  static const int64_t bytes = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const long reported = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (reported > 0) return int64_t(reported);
#endif
    return int64_t(512) << 10;
  }();
  return bytes;
}

int64_t threads() {
  return int64_t(torch::stable::get_num_threads());
}

void parallel_for(int64_t tasks, int64_t grain, void (*body)(int64_t, int64_t, void*),
                  void* context) {
  torch::stable::parallel_for(0, tasks, grain,
                              [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace lotr::cpu
