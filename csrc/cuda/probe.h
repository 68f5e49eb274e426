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

// Blocks of the largest cluster, a power of two, that the current device holds if each block takes a whole
// multiprocessor: fewer than MOST_OF_CLUSTER on a GPU or MIG slice without that many in one GPC; 1 without
// clusters.  shared: the most bytes that a block may have.
int largest_cluster(int shared);

}  // namespace lotr::cuda
