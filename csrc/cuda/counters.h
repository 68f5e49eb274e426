// Arrival counters that outlive a launch.  They are zero before and after it (tile/reduce.cuh), so no launch
// has to clear them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lotr::cuda {

constexpr int COUNTERS_EACH = 8192;  // of a stream

// `count` zeros on the current device, used only by launches of `stream`, or during a capture only by those
// of its graph.  Null if all are taken, or for cudaStreamPerThread, whose handle means another stream in each
// thread: the caller then clears counters in the workspace.
int32_t* counters(void* stream, int64_t count);

void clear(void* data, size_t bytes, void* stream);

}  // namespace lotr::cuda
