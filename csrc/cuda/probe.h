// What this build's code is on a card: the driver says it of one kernel.
#pragma once

namespace lotr::cuda {

// Of a kernel that is never launched, compiled for the same architectures as all others.
const void* probe_kernel();

// Whether the code that the current device runs is of compute capability 9.0 or later, so that its kernels
// wait for what is ahead and may be launched early (ptx/launch.cuh).  Code for an older one, which the driver
// translates for a newer card, does not.
bool waits_in_kernels();

}  // namespace lotr::cuda
