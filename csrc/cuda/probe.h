// Whether this build has code for a card: the kernel that csrc/torch/cuda_probe.cpp asks the driver about.
#pragma once

namespace lotr::cuda {

// Of a kernel that is never launched, compiled for the same architectures as all others.
const void* probe_kernel();

}  // namespace lotr::cuda
