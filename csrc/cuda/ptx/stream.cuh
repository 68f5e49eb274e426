// Operations in a stream other than launches.
#pragma once
#include "launch.cuh"

namespace lotr::ptx {

// Writes zeros, in the order of the stream.
inline void clear(void* data, size_t bytes, [[maybe_unused]] void* stream) {
#ifdef __CUDACC__
  if (const cudaError_t error = cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)))
    throw std::runtime_error(std::string("clearing memory: ") + cudaGetErrorString(error));
#else
  memset(data, 0, bytes);
#endif
}

}  // namespace lotr::ptx
