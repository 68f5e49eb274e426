// What the CUDA runtime in this module finds on this machine, asked without a launch: the driver's and its
// own version, and whether the driver can load a kernel of ours on a device.  lotr_ext/ops/planner.py asks
// once a device and takes the composite where the answer is no, so that no step ends in the middle of it.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <string>

#include "cuda/probe.h"
#include "float32.h"

namespace lotr {
namespace {

// "" where the driver can load our kernel on the device, otherwise its error's name.  The current device is
// as before.
std::string load_error(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (!error) error = cudaSetDevice(device);
  if (!error) {
    cudaFuncAttributes attributes{};
    error = cudaFuncGetAttributes(&attributes, cuda::probe_kernel());
    const cudaError_t back = cudaSetDevice(before);
    if (!error) error = back;
  }
  cudaGetLastError();  // asked and answered: the next launch shall not find it
  return error ? cudaGetErrorName(error) : "";
}

// JSON: {"runtime": 13000, "driver": 12080, "float32": "exact", "float32_from": "torch", "error":
// "cudaErrorNoKernelImageForDevice"}.  Versions are 1000 x major + 10 x minor; driver 0: there is none.
// float32: how its products are rounded now, "exact" or "tf32", and where that was read, in "torch" or
// "python". device < 0: error is empty.
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
