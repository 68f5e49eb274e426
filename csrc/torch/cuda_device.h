// What a call on CUDA tensors needs from libtorch_cuda and from the driver.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <array>
#include <mutex>
#include <type_traits>

#include "check.h"
#include "cuda/launch.h"
#include "cuda/plans.h"

namespace lotr {

// The functions of libtorch_cuda, looked up by name at their first use: the module must load under
// a torch without CUDA. They do not pass through the dispatcher, whose stable interface has no
// product with alpha and beta.
struct TorchCuda {
  int32_t (*current_stream)(int32_t, void**);
  int32_t (*mm_out)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle);
  int32_t (*addmm_out)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle,
                       double, double);

  static const TorchCuda& functions() {
    static const TorchCuda functions;
    return functions;
  }

 private:
  TorchCuda() {
    // the library that torch has loaded; RTLD_DEFAULT would not see it
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    const auto find = [&](auto& function, const char* name) {
      function = library ? reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name))
                         : nullptr;
      if (!function)
        fail("lotr: expected a torch built with CUDA, got one whose libtorch_cuda.so has no ",
             name);
    };
    find(current_stream, "aoti_torch_get_current_cuda_stream");
    find(mm_out, "aoti_torch_cuda_mm_out");
    find(addmm_out, "aoti_torch_cuda_addmm_out");
  }
};

// The properties of a device that launches depend on.
struct Device {
  cuda::Card card;
  bool early;  // its kernels may be launched early (Call in cuda/launch.h)
};

// Makes the device current, and reads its properties from the driver once.
//
// This module links its own CUDA runtime; torch's device guard sets the device of torch's runtime.
// Both follow the context that is current in the thread. A thread without one gets the device here.
inline const Device& device_of(const char* op, int32_t device) {
  constexpr int32_t MAX_DEVICES = 64;
  static std::array<Device, MAX_DEVICES> devices;
  static std::array<std::once_flag, MAX_DEVICES> is_read;
  if (device >= MAX_DEVICES)
    fail(op, ": device: expected an index below ", MAX_DEVICES, ", got ", device);
  const auto check = [&](cudaError_t error) {
    if (error)
      fail(op, ": device ", device, ": ", cudaGetErrorName(error), " (", cudaGetErrorString(error),
           ")");
  };
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  int current = -1;
  check(cudaGetDevice(&current));
  if (current != device) check(cudaSetDevice(device));
  std::call_once(is_read[size_t(device)], [&] {
    int driver = 0;
    check(cudaDriverGetVersion(&driver));
    // CUDA graphs support early launches since 12.3. With an older driver no kernel is launched
    // early, because any call may be captured.
    const bool early = cuda::waits_in_kernels() && driver >= 12030 && cuda::early_launches();
    devices[size_t(device)] = {{attribute(cudaDevAttrMultiProcessorCount),
                                attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)},
                               early};
  });
  return devices[size_t(device)];
}

inline DType cuda_dtype(const char* op, const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      fail(op, ": ", name,
           ": expected dtype torch.float32, torch.bfloat16 or torch.float16 on CUDA, got ",
           dtype_info(dtype).name, "; the PyTorch fallback supports it");
  }
}

}  // namespace lotr
