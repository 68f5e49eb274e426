// The versions of the driver and of this module's CUDA runtime, and whether the driver can load this module's
// kernels on a device, without a launch.  lotr_ext/ops/planner.py calls it once per device and uses the
// composite if it cannot, so that no training step fails halfway.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <string>

#include "cuda_args.h"

namespace lotr {
namespace {

// "" if the driver can load this module's kernels on the device, else the error's name.
std::string load_error(int device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (!error && device >= count) error = cudaErrorInvalidDevice;
  if (!error) {
    // Torch's guard and not cudaSetDevice, which would make a context, of some hundred megabytes, also on the
    // device that was current before.
    const torch::stable::accelerator::DeviceGuard guard{device};
    error = make_current(device);
    if (!error) error = static_cast<cudaError_t>(cuda::load_probe());
  }
  cudaGetLastError();  // clears the error
  return error ? cudaGetErrorName(error) : "";
}

// JSON: {"runtime": 13000, "driver": 12080, "float32": "exact", "float32_from": "torch", "error":
// "cudaErrorNoKernelImageForDevice"}.  Versions are 1000 x major + 10 x minor; driver 0: there is none.
// float32: the current precision of float32 products, "exact" or "tf32"; float32_from: how it was read, from
// libtorch ("torch") or through Python ("python"). device < 0: error is empty.
std::string cuda_probe(int64_t device) {
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver)) driver = 0;
  std::ostringstream s;
  s << "{\"runtime\": " << runtime << ", \"driver\": " << driver << ", \"float32\": \""
    << (float32_products() == Float32::tf32 ? "tf32" : "exact") << "\", \"float32_from\": \""
    << (Float32Setting::of_torch().found() ? "torch" : "python") << "\", \"error\": \""
    << (device < 0 ? "" : load_error(int(device))) << "\"}";
  return s.str();
}

}  // namespace
}  // namespace lotr

// No tensor argument, so no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(lotr, CompositeExplicitAutograd, m)
{
  m.impl("cuda_probe", TORCH_BOX(&lotr::cuda_probe));
}
