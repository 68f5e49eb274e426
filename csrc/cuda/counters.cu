// The arrival counters of counters.h and the workspaces of gemm_lotr.h: one array of each per device, cut
// into places.
//
// Kernels of one stream run one after another and may share a place.  A captured kernel runs when its graph
// is replayed, on any stream, so each stream of a capture gets a place that no other launch uses.
#include "counters.h"

#include <array>
#include <mutex>

#include "gemm_lotr.h"
#include "ptx/stream.cuh"

namespace lotr::cuda {
namespace {

constexpr int COUNTERS = 160, WORDS = 128;  // places: 5 and 2 MB
constexpr int WORDS_EACH = 4104;            // for 262,144 rows, see gemm_lotr_workspace
LOTR_GLOBAL_MEMORY int32_t counters_of_device[COUNTERS * COUNTERS_EACH];
LOTR_GLOBAL_MEMORY int32_t words_of_device[WORDS * WORDS_EACH];

struct Owner {
  void* stream;
  unsigned long long capture;  // 0: none
  bool operator==(const Owner& o) const { return stream == o.stream && capture == o.capture; }
};

// An array of every device in PLACES places of EACH words.
template <int PLACES, int EACH>
class Places {
 public:
  // The place of a stream, the same at each call; null if all are taken, or if the handle means several
  // streams.  find(): the array on the current device.
  template <class Find>
  int32_t* of(void* stream, Find find) {
    if (ptx::of_each_thread(stream)) return nullptr;
    const Owner owner{stream, ptx::capture_of(stream)};
    const int device = ptx::current_device();
    if (device >= DEVICES) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    Device& d = devices_[size_t(device)];
    if (!d.base) d.base = find();
    for (int i = d.used; i-- > 0;)
      if (d.owners[size_t(i)] == owner) return d.base + int64_t(i) * EACH;
    if (d.used == PLACES) return nullptr;
    d.owners[size_t(d.used)] = owner;
    return d.base + int64_t(d.used++) * EACH;
  }

 private:
  static constexpr int DEVICES = 64;
  struct Device {
    int32_t* base = nullptr;
    std::array<Owner, PLACES> owners{};
    int used = 0;
  };
  std::array<Device, DEVICES> devices_;
  std::mutex mutex_;
};

}  // namespace

int32_t* counters(void* stream, int64_t count) {
  static Places<COUNTERS, COUNTERS_EACH> places;
  if (count > COUNTERS_EACH) return nullptr;
  return places.of(stream, [] { return ptx::global_memory(counters_of_device); });
}

void* gemm_lotr_workspace_of(void* stream, size_t bytes) {
  static Places<WORDS, WORDS_EACH> places;
  if (bytes > WORDS_EACH * sizeof(int32_t)) return nullptr;
  return places.of(stream, [] { return ptx::global_memory(words_of_device); });
}

void clear(void* data, size_t bytes, void* stream) {
  ptx::clear(data, bytes, stream);
}

}  // namespace lotr::cuda
