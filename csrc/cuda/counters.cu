// csrc/cuda/counters.h: one array a device, cut into places.
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

#include "ptx/base.cuh"

namespace lotr::cuda {
namespace {

constexpr int PLACES = 160, PLACE = 8192;  // 5 MB
#ifdef __CUDACC__
__device__ int32_t places_of_device[PLACES * PLACE];
#else
int32_t places_of_device[PLACES * PLACE];
#endif

// Whose a place is.
struct Owner {
  void* stream;
  unsigned long long capture;  // 0: none
  bool operator==(const Owner& o) const { return stream == o.stream && capture == o.capture; }
};
struct Device {
  int32_t* base = nullptr;
  std::array<Owner, PLACES> owners{};
  int used = 0;
};

}  // namespace

int32_t* counters(void* stream, int64_t count) {
  if (count > PLACE) return nullptr;
  Owner owner{stream, 0};
  int32_t* base = nullptr;
  int device = 0;
#ifdef __CUDACC__
  const auto check = [](cudaError_t error) {
    if (error != cudaSuccess)
      throw std::runtime_error(std::string("counters of arrival: ") + cudaGetErrorString(error));
  };
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &capture));
  if (status == cudaStreamCaptureStatusActive) owner.capture = capture;
  check(cudaGetDevice(&device));
  const auto find = [&] {
    void* address = nullptr;
    check(cudaGetSymbolAddress(&address, places_of_device));
    base = static_cast<int32_t*>(address);
  };
#else
  const auto find = [&] { base = places_of_device; };
#endif
  constexpr int DEVICES = 64;
  static std::array<Device, DEVICES> devices;
  static std::mutex mutex;
  if (device >= DEVICES) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  Device& d = devices[size_t(device)];
  if (!d.base) find(), d.base = base;
  for (int i = d.used; i-- > 0;)
    if (d.owners[size_t(i)] == owner) return d.base + int64_t(i) * PLACE;
  if (d.used == PLACES) return nullptr;
  d.owners[size_t(d.used)] = owner;
  return d.base + int64_t(d.used++) * PLACE;
}

#ifndef __CUDACC__
void forget_arrivals() {
  std::memset(places_of_device, 0, sizeof(places_of_device));
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
