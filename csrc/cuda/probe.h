// Queries the driver, with one kernel, for the code of this build that a device runs.
#pragma once

namespace lotr::cuda {

// Loads a kernel that is never launched, compiled for the same architectures as all others, on the current
// device. Returns the cudaError_t, 0 if the driver can.
int load_probe();

// Whether the current device runs code of compute capability 9.0 or later, whose kernels call
// griddepcontrol_wait and may be launched early (ptx/launch.cuh).  Code for an older capability, which the
// driver translates for a newer card, does not.
bool waits_in_kernels();

}  // namespace lotr::cuda
