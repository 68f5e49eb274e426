// csrc/torch/cuda.cpp and cuda_rows.cpp on a CPU: linked with this file and the executor, they take CPU
// tensors for CUDA tensors of one H100 and launch the kernels under the executor. Each function below
// replaces one of the CUDA runtime or of libtorch, and is hidden, so that only this library uses it.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>

#define LOTR_HIDDEN extern "C" __attribute__((visibility("hidden")))

using TensorHandle = struct AtenTensorOpaque*;
extern "C" int32_t aoti_torch__reinterpret_tensor(TensorHandle, int64_t, const int64_t*, const int64_t*,
                                                  int64_t, TensorHandle*);
extern "C" int32_t aoti_torch_delete_tensor_object(TensorHandle);
extern "C" int32_t aoti_torch_cpu_mm_out(TensorHandle, TensorHandle, TensorHandle);
extern "C" int32_t aoti_torch_cpu_addmm_out(TensorHandle, TensorHandle, TensorHandle, TensorHandle, double,
                                            double);
extern "C" int32_t aoti_torch_cpu_add_Tensor(TensorHandle, TensorHandle, double, TensorHandle*);

// ---- the device ----

LOTR_HIDDEN int32_t aoti_torch_device_type_cuda() {
  return 0;  // the CPU's
}
LOTR_HIDDEN int32_t aoti_torch_get_device_index(TensorHandle, int32_t* index) {
  return *index = 0;
}
LOTR_HIDDEN int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  static int any;
  *guard = &any;
  return 0;
}
LOTR_HIDDEN int32_t aoti_torch_delete_device_guard(void*) {
  return 0;
}
LOTR_HIDDEN cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
LOTR_HIDDEN cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
LOTR_HIDDEN cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
LOTR_HIDDEN cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrComputeCapabilityMajor             ? 9
           : which == cudaDevAttrMultiProcessorCount              ? 132
           : which == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? 233472
                                                                  : 0;
  return cudaSuccess;
}
LOTR_HIDDEN const char* cudaGetErrorString(cudaError_t) {
  return "none";
}

// As torch's allocator on a GPU gives memory in whole 512 bytes, so kernels may write the padding behind a
// last row.
extern "C" int32_t __real_aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t,
                                                   int32_t, TensorHandle*);
LOTR_HIDDEN int32_t __wrap_aoti_torch_empty_strided(int64_t dim, const int64_t* size, const int64_t* stride,
                                                    int32_t dtype, int32_t device, int32_t index,
                                                    TensorHandle* made) {
  int64_t whole = 512;
  for (int64_t i = 0; i < dim; ++i) whole += (size[i] > 0 ? size[i] - 1 : 0) * stride[i];
  const int64_t one = 1;
  TensorHandle memory = nullptr;
  const int32_t failed = __real_aoti_torch_empty_strided(1, &whole, &one, dtype, device, index, &memory);
  return failed ? failed
                : aoti_torch__reinterpret_tensor(memory, dim, size, stride, 0, made) |
                      aoti_torch_delete_tensor_object(memory);
}

// ---- what is found in libtorch_cuda.so by name ----

static int32_t no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
LOTR_HIDDEN void* dlopen(const char* name, int) {
  return std::strcmp(name, "libtorch_cuda.so") == 0 ? const_cast<char*>(name) : nullptr;
}
LOTR_HIDDEN void* dlsym(void*, const char* name) {
  const struct {
    const char* name;
    void* function;
  } known[] = {{"aoti_torch_cuda_mm_out", reinterpret_cast<void*>(&aoti_torch_cpu_mm_out)},
               {"aoti_torch_cuda_addmm_out", reinterpret_cast<void*>(&aoti_torch_cpu_addmm_out)},
               {"aoti_torch_cuda_add_Tensor", reinterpret_cast<void*>(&aoti_torch_cpu_add_Tensor)},
               {"aoti_torch_get_current_cuda_stream", reinterpret_cast<void*>(&no_stream)}};
  for (const auto& one : known)
    if (std::strcmp(name, one.name) == 0) return one.function;
  return nullptr;
}

// ---- registration: at a key that no other library of this process has kernels for ----

extern "C" int32_t __real_aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                                       void**);
LOTR_HIDDEN int32_t __wrap_aoti_torch_library_init_impl(const char* library, const char*, const char* file,
                                                        uint32_t line, void** made) {
  return __real_aoti_torch_library_init_impl(library, "PrivateUse1", file, line, made);
}
