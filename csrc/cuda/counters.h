// Counters of arrival that outlive a launch.  They are zero before it and zero after it (tile/reduce.cuh), so
// no launch has to clear them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lotr::cuda {

constexpr int COUNTERS_EACH = 8192;  // of a stream

// `count` zeros on the current device that no other launch uses at the same time as those of `stream`; during
// a capture, none but the graph's.  Null where there are no more of them: then clear(), in the workspace.
int32_t* counters(void* stream, int64_t count);

void clear(void* data, size_t bytes, void* stream);

}  // namespace lotr::cuda
