// Runtime functions of the launchers besides launches: device memory that outlives a launch, the current
// device, and the capture of a stream.  Under the executor there is one device and no capture.
#pragma once
#include "launch.cuh"

#ifdef __CUDACC__
#define LOTR_GLOBAL_MEMORY __device__
#else
#define LOTR_GLOBAL_MEMORY
#endif

namespace lotr::ptx {

#ifdef __CUDACC__
// Throws std::runtime_error that begins with `what`.
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
#endif

inline int current_device() {
  int device = 0;
#ifdef __CUDACC__
  check(cudaGetDevice(&device), "current device");
#endif
  return device;
}

// Whether the handle is that of each thread's own default stream, so of several streams.
inline bool of_each_thread([[maybe_unused]] void* stream) {
#ifdef __CUDACC__
  return static_cast<cudaStream_t>(stream) == cudaStreamPerThread;
#else
  return false;
#endif
}

// The id of the capture that the stream belongs to, 0: none.
inline unsigned long long capture_of([[maybe_unused]] void* stream) {
  unsigned long long capture = 0;
#ifdef __CUDACC__
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &capture),
        "capture of a stream");
  if (status != cudaStreamCaptureStatusActive) capture = 0;
#endif
  return capture;
}

// An array declared LOTR_GLOBAL_MEMORY, on the current device.
template <class T, size_t N>
T* global_memory(T (&array)[N]) {
#ifdef __CUDACC__
  const DriverQuery query;
  void* address = nullptr;
  check(cudaGetSymbolAddress(&address, array), "global memory");
  return static_cast<T*>(address);
#else
  return array;
#endif
}

// Zeros, in the order of the stream.
inline void clear(void* data, size_t bytes, [[maybe_unused]] void* stream) {
#ifdef __CUDACC__
  check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)), "clearing memory");
#else
  memset(data, 0, bytes);
#endif
}

}  // namespace lotr::ptx
