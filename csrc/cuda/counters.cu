// csrc/cuda/counters.h, and the workspaces of gemm_lotr.h: of each one array a device, cut into places.
//
// Kernels of one stream run one after another and may share a place.  A captured kernel runs whenever and
// wherever its graph is replayed, so a capture gets places that nobody else ever has: each stream of it its
// own.
#include "counters.h"

#include <array>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "gemm_lotr.h"
#include "ptx/base.cuh"

namespace lotr::cuda {
namespace {

constexpr int COUNTERS = 160, COUNTERS_EACH = 8192;  // 5 MB
constexpr int WORDS = 128, WORDS_EACH = 4104;        // 2 MB; for 262,144 rows, see gemm_lotr_workspace
#ifdef __CUDACC__
__device__ int32_t counters_of_device[COUNTERS * COUNTERS_EACH];
__device__ int32_t words_of_device[WORDS * WORDS_EACH];
#else
int32_t counters_of_device[COUNTERS * COUNTERS_EACH];
int32_t words_of_device[WORDS * WORDS_EACH];
#endif

// Whose a place is.
struct Owner {
  void* stream;
  unsigned long long capture;  // 0: none
  bool operator==(const Owner& o) const { return stream == o.stream && capture == o.capture; }
};

// An array of every device in `places` places of `each` words.
template <int places, int each>
class Places {
 public:
  // The place of a stream, its own from the first call on; null where all are taken.  find(): the array on
  // the current device.
  template <class Find>
  int32_t* of(void* stream, Find find) {
    Owner owner{stream, 0};
    int device = 0;
#ifdef __CUDACC__
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0;
    check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &capture));
    if (status == cudaStreamCaptureStatusActive) owner.capture = capture;
    check(cudaGetDevice(&device));
#endif
    if (device >= DEVICES) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    Device& d = devices_[size_t(device)];
    if (!d.base) d.base = find();
    for (int i = d.used; i-- > 0;)
      if (d.owners[size_t(i)] == owner) return d.base + int64_t(i) * each;
    if (d.used == places) return nullptr;
    d.owners[size_t(d.used)] = owner;
    return d.base + int64_t(d.used++) * each;
  }

#ifdef __CUDACC__
  static void check(cudaError_t error) {
    if (error != cudaSuccess)
      throw std::runtime_error(std::string("memory of a stream: ") + cudaGetErrorString(error));
  }
#endif

 private:
  static constexpr int DEVICES = 64;
  struct Device {
    int32_t* base = nullptr;
    std::array<Owner, places> owners{};
    int used = 0;
  };
  std::array<Device, DEVICES> devices_;
  std::mutex mutex_;
};

#ifdef __CUDACC__
template <class Symbol>
int32_t* on_device(const Symbol& symbol) {
  void* address = nullptr;
  Places<1, 1>::check(cudaGetSymbolAddress(&address, symbol));
  return static_cast<int32_t*>(address);
}
#else
int32_t* on_device(int32_t* memory) {
  return memory;
}
#endif

}  // namespace

int32_t* counters(void* stream, int64_t count) {
  static Places<COUNTERS, COUNTERS_EACH> places;
  return count > COUNTERS_EACH ? nullptr : places.of(stream, [] { return on_device(counters_of_device); });
}

void* gemm_lotr_workspace_of(void* stream, size_t bytes) {
  static Places<WORDS, WORDS_EACH> places;
  return bytes > WORDS_EACH * sizeof(int32_t) ? nullptr
                                              : places.of(stream, [] { return on_device(words_of_device); });
}

#ifndef __CUDACC__
void forget_arrivals() {
  std::memset(counters_of_device, 0, sizeof(counters_of_device));
}

int64_t arrivals() {
  int64_t sum = 0;
  for (const int32_t count : counters_of_device) sum += count;
  return sum;
}
#endif

void clear(void* data, size_t bytes, void* stream) {
#ifdef __CUDACC__
  const cudaError_t error = cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("clearing memory: ") + cudaGetErrorString(error));
#else
  (void)stream;
  std::memset(data, 0, bytes);
#endif
}

}  // namespace lotr::cuda
