// What this build does on a device: cuda_probe tells whether it runs there, cuda_plans how a kernel is cut
// into blocks. Neither launches a kernel of ours.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <sstream>
#include <string>

#include "cuda_args.h"

namespace lotr {
namespace {

// "" if the products of libtorch_cuda that the operators call by name do what they are called for. These
// functions are no part of torch's stable interface: a later torch may change them.
std::string torch_error(int device) {
  const TorchCuda& torch = TorchCuda::functions();
  const auto matrix = [&](double value) {
    const int64_t size[] = {2, 2}, stride[] = {2, 1};
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, size, stride, aoti_torch_dtype_float32(),
                                                           aoti_torch_device_type_cuda(), device, &handle));
    Tensor made(handle);
    torch::stable::fill_(made, value);
    return made;
  };
  const auto first = [](const Tensor& t) {
    AtenTensorHandle element = nullptr;
    float value = NAN;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 0, nullptr, nullptr, 0, &element));
    const Tensor owner(element);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_item_float32(element, &value));
    return value;
  };
  const Tensor two = matrix(2), three = matrix(3), out = matrix(0);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch.current_stream(device, &stream));
  STABLE_TORCH_ERROR_CODE_CHECK(torch.mm_out(out.get(), two.get(), three.get()));
  if (first(out) != 12) return "aoti_torch_cuda_mm_out: expected a product";
  STABLE_TORCH_ERROR_CODE_CHECK(torch.addmm_out(out.get(), out.get(), two.get(), three.get(), 1.0, 1.0));
  return first(out) == 24 ? "" : "aoti_torch_cuda_addmm_out: expected a sum in place";
}

// "" if the operators run on the device, else what fails.
std::string device_error(int device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (!error && device >= count) error = cudaErrorInvalidDevice;
  if (error) {
    cudaGetLastError();  // clears the error
    return cudaGetErrorName(error);
  }
  // Torch's guard and not cudaSetDevice, which would make a context, of some hundred megabytes, also on the
  // device that was current before.
  const torch::stable::accelerator::DeviceGuard guard{device};
  error = make_current(device);
  if (!error) error = static_cast<cudaError_t>(cuda::load_probe());
  if (error) {
    cudaGetLastError();
    return cudaGetErrorName(error);
  }
  try {
    return torch_error(device);
  } catch (const std::exception& failed) {
    return failed.what();
  }
}

// JSON: {"runtime": 13000, "driver": 12080, "error": "cudaErrorNoKernelImageForDevice"}. Versions are
// 1000 x major + 10 x minor; driver 0: there is none. error: "" if the operators run; device < 0: not asked.
std::string cuda_probe(int64_t device) {
  std::string error = device < 0 ? "" : device_error(int(device));
  error = error.substr(0, error.find_first_of("\"\n"));  // what JSON takes in a string
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver)) driver = 0;
  std::ostringstream s;
  s << "{\"runtime\": " << runtime << ", \"driver\": " << driver << ", \"error\": \"" << error << "\"}";
  return s.str();
}

// One line for a kernel on a large matrix [M, N] at rank r (cuda/plans.h); device < 0: of an H100.
std::string cuda_plans(std::string op, int64_t M, int64_t N, int64_t r, int64_t r_out, ScalarType dtype,
                       int64_t device) {
  constexpr const char* name = "lotr::cuda_plans";
  if (M < 1 || N < 1) fail(name, ": M, N: expected at least 1, got ", M, " and ", N);
  for (const int64_t rank : {r, r_out})
    if (rank < 1 || rank > cuda::MAX_RANK)
      fail(name, ": r, r_out: expected ranks from 1 to ", cuda::MAX_RANK, ", got ", rank);
  cuda::Call call{};
  call.type = dtype_of(name, "dtype", dtype);
  if (device >= 0) {
    const torch::stable::accelerator::DeviceGuard guard{int32_t(device)};
    if (const cudaError_t error = make_current(int32_t(device)))
      fail(name, ": device ", device, ": ", cudaGetErrorString(error));
    call.card = device_of(name, int32_t(device)).card;
  }
  return cuda::plan_text(call, op, M, N, int32_t(r), int32_t(r_out));
}

}  // namespace
}  // namespace lotr

// No tensor argument, so no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(lotr, CompositeExplicitAutograd, m)
{
  m.impl("cuda_probe", TORCH_BOX(&lotr::cuda_probe));
  m.impl("cuda_plans", TORCH_BOX(&lotr::cuda_plans));
}
