// What a call on CUDA tensors needs besides its operands: the stream, workspaces, new outputs, matrices for
// the launchers of cuda/launch.h.
//
// Nothing here synchronises, and all memory comes from torch's allocator on the current stream, so a CUDA
// graph may capture a call.
#pragma once
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <mutex>

#include "check.h"
#include "cuda/launch.h"
#include "cuda/plans.h"
#include "cuda/probe.h"
#include "matrix_view.h"

namespace lotr {

// The functions of libtorch_cuda, looked up by name at their first use: the module must load under a torch
// without CUDA.  They do not pass through the dispatcher, whose stable interface has no product with alpha
// and beta.
struct TorchCuda {
  int32_t (*current_stream)(int32_t, void**);
  int32_t (*mm_out)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle);
  int32_t (*addmm_out)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double,
                       double);

  static const TorchCuda& functions() {
    static const TorchCuda found;
    return found;
  }

 private:
  TorchCuda() {
    // the library that torch has loaded; RTLD_DEFAULT would not see it
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    const auto find = [&](auto& function, const char* name) {
      function = library ? reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name)) : nullptr;
      if (!function)
        fail("lotr: expected a torch built with CUDA, got one whose libtorch_cuda.so has no ", name);
    };
    find(current_stream, "aoti_torch_get_current_cuda_stream");
    find(mm_out, "aoti_torch_cuda_mm_out");
    find(addmm_out, "aoti_torch_cuda_addmm_out");
  }
};

// What launches need to know of a device.
struct Device {
  cuda::Card card;
  bool early;  // as in Call
};

// This module has a CUDA runtime of its own beside torch's, and torch's device guard sets the device of
// torch's.  The two agree where the thread has a current context, which both follow.
inline cudaError_t make_current(int32_t device) {
  int current = -1;
  const cudaError_t error = cudaGetDevice(&current);
  return error || current == device ? error : cudaSetDevice(device);
}

// The driver's answers for the current device, which has index `device`.
inline Device ask_driver(const char* op, int32_t device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    if (const cudaError_t error = cudaDeviceGetAttribute(&value, which, device))
      fail(op, ": device ", device, ": ", cudaGetErrorString(error));
    return value;
  };
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  if (major < 8) {
    fail(op, ": device ", device, ": expected a GPU of compute capability 8.0 or later, got ", major, ".",
         attribute(cudaDevAttrComputeCapabilityMinor), "; torch's own products run everywhere");
  }
  int driver = 0;
  if (const cudaError_t error = cudaDriverGetVersion(&driver))
    fail(op, ": device ", device, ": ", cudaGetErrorString(error));
  // Graphs hold early launches since CUDA 12.3. An older driver gets none, since any call may be captured.
  const bool early = cuda::waits_in_kernels() && driver >= 12030 && cuda::early_launches();
  return {{attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)},
          early};
}

// The same, asked once per device.
inline const Device& device_of(const char* op, int32_t device) {
  constexpr int32_t MOST = 64;
  static std::array<Device, MOST> known;
  static std::array<std::once_flag, MOST> asked;
  if (device >= MOST) fail(op, ": device: expected an index below ", MOST, ", got ", device);
  std::call_once(asked[size_t(device)], [&] { known[size_t(device)] = ask_driver(op, device); });
  return known[size_t(device)];
}

inline DType dtype_of(const char* op, const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      fail(op, ": ", name, ": expected dtype torch.float32, torch.bfloat16 or torch.float16 on CUDA, got ",
           dtype_name(dtype), "; torch's own products take it");
  }
}
inline DType dtype_of(const char* op, const Arg& a) {
  return dtype_of(op, a.name, a.dtype);
}

// Everything a call needs besides its operands.  Its device is current during its lifetime.
class Context {
 public:
  Context(const char* op, const Arg& like) : op_(op), device_(like.device_index), guard_(like.device_index) {
    const DType type = dtype_of(op, like);
    if (const cudaError_t error = make_current(device_))
      fail(op, ": device ", device_, ": ", cudaGetErrorString(error));
    const Device& device = device_of(op, device_);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(TorchCuda::functions().current_stream(device_, &stream));
    call_ = {type, device.card, stream, device.early};
  }
  const cuda::Call& call() const { return call_; }
  const char* op() const { return op_; }

  // Not initialised; contiguous, except that rows start at multiples of `pad` elements.
  template <size_t dim>
  Tensor empty(const std::array<int64_t, dim>& size, int32_t dtype, int64_t pad = 1) const {
    std::array<int64_t, dim> stride;
    int64_t step = 1;
    for (size_t i = dim; i-- > 0;) {
      stride[i] = step;
      step *= i + 1 == dim ? (size[i] + pad - 1) / pad * pad : size[i];
    }
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(dim), size.data(), stride.data(), dtype,
                                                           aoti_torch_device_type_cuda(), device_, &handle));
    return Tensor(handle);
  }
  template <size_t dim>
  Tensor empty(const std::array<int64_t, dim>& size) const {
    return empty(size, code(call_.type));
  }
  // Of the rank (u, k, h, F): rows are padded to 16 bytes, so that kernels copy them whole whatever the rank
  // is.
  template <size_t dim>
  Tensor empty_rows(const std::array<int64_t, dim>& size, DType type) const {
    return empty(size, code(type), cuda::row_elements(type));
  }
  template <size_t dim>
  Tensor empty_rows(const std::array<int64_t, dim>& size) const {
    return empty_rows(size, call_.type);
  }
  template <size_t dim>
  Tensor empty_float(const std::array<int64_t, dim>& size) const {
    return empty(size, aoti_torch_dtype_float32());
  }
  static int32_t code(DType t) {
    return t == DType::float32    ? aoti_torch_dtype_float32()
           : t == DType::bfloat16 ? aoti_torch_dtype_bfloat16()
                                  : aoti_torch_dtype_float16();
  }

  // Runs f(workspace) with `bytes` of memory, freed afterwards in stream order.
  template <class F>
  void with_workspace(size_t bytes, F f) const {
    if (bytes == 0) return f(nullptr);
    Tensor memory = empty<1>({int64_t(bytes)}, aoti_torch_dtype_uint8());
    f(memory.mutable_data_ptr());
  }

  // Runs an operator of cuda/launch.h.
  template <class Problem>
  void run(const Problem& problem) const {
    with_workspace(cuda::workspace(call_, problem),
                   [&](void* workspace) { cuda::run(call_, problem, workspace); });
  }

  Matrix read(const Arg& a) const {
    const void* data = read_data(a);
    const int64_t row = a.stride[a.dim - 2], col = a.stride[a.dim - 1];
    return {data, row, col, cuda::access_of(data, row, col, a.size[a.dim - 2], dtype_of(op_, a), call_.type)};
  }
  MutableMatrix written(const Arg& a) const {
    const Matrix m = read(a);
    return {written_data(a), m.row, m.col, m.access};
  }

 private:
  const char* op_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Call call_;
};

inline Dropout dropout(double p, const Arg& seed) {
  if (p == 0.0) return {nullptr, 0, 1.f};
  return {static_cast<const int64_t*>(read_data(seed)), uint32_t(p * 4294967296.0), float(1.0 / (1.0 - p))};
}

}  // namespace lotr
