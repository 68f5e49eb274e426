// Stands in for the CUDA runtime, so that objects that nvcc has compiled load and launch without a GPU: each
// launch is handed to Python (launch.py), which runs the PTX of the kernel.  Device memory is host memory.
//
// Every function here has the signature and the meaning that the CUDA runtime's manual gives it.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

struct LaunchOf {
  const char* kernel;
  unsigned grid[3], block[3], cluster[3];
  size_t shared;
  int cooperative, early;
  void** parameters;
};
using Launched = int (*)(const LaunchOf*);
using Encoded = int (*)(void* map, int type, unsigned rank, void* address, const uint64_t* sizes,
                        const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                        int interleave, int swizzle, int promotion, int fill);

struct Device {
  int capability = 90, multiprocessors = 132, shared_per_block = 232448, shared_per_multiprocessor = 233472;
};

Launched launched = nullptr;
Encoded encoded = nullptr;
Device device;
struct Variable {
  std::string name;
  void* memory;
};
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> all;
  return all;
}
struct Image {  // what nvcc's host code registers: the code of one source file
  int magic, version;
  const void* data;
};
std::vector<const Image*>& images() {
  static std::vector<const Image*> all;
  return all;
}
std::map<const void*, Variable>& variables() {
  static std::map<const void*, Variable> all;
  return all;
}

// Bytes of dynamic shared memory that a kernel may have: 48 KiB unless cudaFuncSetAttribute allows more.
size_t& most_shared(const void* kernel) {
  static std::map<const void*, size_t> all;
  return all.try_emplace(kernel, 48 * 1024).first->second;
}

struct Configured {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} configured;

cudaError_t run(const void* kernel, dim3 grid, dim3 block, dim3 cluster, size_t shared, bool cooperative,
                bool early, void** parameters) {
  const auto found = kernels().find(kernel);
  if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
  if (shared > most_shared(kernel)) return cudaErrorInvalidValue;
  const LaunchOf launch{found->second.c_str(),
                        {grid.x, grid.y, grid.z},
                        {block.x, block.y, block.z},
                        {cluster.x, cluster.y, cluster.z},
                        shared,
                        cooperative,
                        early,
                        parameters};
  return launched && !launched(&launch) ? cudaSuccess : cudaErrorLaunchFailure;
}

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                      CUtensorMapFloatOOBfill fill) {
  return encoded && !encoded(map, type, rank, address, reinterpret_cast<const uint64_t*>(sizes),
                             reinterpret_cast<const uint64_t*>(strides), box, element_strides, interleave,
                             swizzle, promotion, fill)
             ? CUDA_SUCCESS
             : CUDA_ERROR_INVALID_VALUE;
}

CUresult driver_version(int* version) {
  *version = CUDART_VERSION;
  return CUDA_SUCCESS;
}

}  // namespace

// ---- for launch.py
// --------------------------------------------------------------------------------------------------

EXPORTED void interpreter_on_launch(Launched function) {
  launched = function;
}
EXPORTED void interpreter_on_encode(Encoded function) {
  encoded = function;
}
EXPORTED void interpreter_device(int capability, int multiprocessors, int shared_per_block) {
  device = {capability, multiprocessors, shared_per_block, shared_per_block + 1024};
}
// The code of the source file number `index`, a fat binary; null after the last.
EXPORTED const void* interpreter_image(size_t index) {
  return index < images().size() ? images()[index]->data : nullptr;
}
// The address of a module's variable, null if there is none of this name.
EXPORTED void* interpreter_variable(const char* name) {
  for (const auto& [host, variable] : variables())
    if (variable.name == name) return variable.memory;
  return nullptr;
}

// ---- what nvcc's host code calls
// ------------------------------------------------------------------------------------

EXPORTED void** __cudaRegisterFatBinary(void* image) {
  static void* handle = nullptr;
  images().push_back(static_cast<const Image*>(image));
  return &handle;
}
EXPORTED void __cudaRegisterFatBinaryEnd(void**) {}
EXPORTED void __cudaUnregisterFatBinary(void**) {}
EXPORTED char __cudaInitModule(void**) {
  return 1;
}
EXPORTED void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                                     dim3*, dim3*, int*) {
  kernels()[host] = name;
}
EXPORTED void __cudaRegisterVar(void**, char* host, char*, const char* name, int, size_t size, int, int) {
  variables()[host] = {name, std::calloc(1, size)};
}
EXPORTED cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
EXPORTED cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** parameters,
                                        size_t shared, cudaStream_t) {
  return run(kernel, grid, block, dim3(1, 1, 1), shared, false, false, parameters);
}
EXPORTED unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                              struct CUstream_st* stream) {
  configured = {grid, block, shared, stream};
  return 0;
}
EXPORTED cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configured.grid, *block = configured.block, *shared = configured.shared;
  *static_cast<cudaStream_t*>(stream) = configured.stream;
  return cudaSuccess;
}

// ---- the runtime
// ----------------------------------------------------------------------------------------------------

EXPORTED cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** parameters,
                                      size_t shared, cudaStream_t) {
  return run(kernel, grid, block, dim3(1, 1, 1), shared, false, false, parameters);
}
EXPORTED cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                         void** parameters) {
  dim3 cluster(1, 1, 1);
  bool cooperative = false, early = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension)
      cluster = dim3(a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z);
    else if (a.id == cudaLaunchAttributeCooperative)
      cooperative = a.val.cooperative;
    else if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      early = a.val.programmaticStreamSerializationAllowed;
    else
      return cudaErrorNotSupported;
  }
  return run(kernel, config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes, cooperative, early,
             parameters);
}
EXPORTED cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
EXPORTED cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.capability % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_per_block;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
EXPORTED cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > device.shared_per_block) return cudaErrorInvalidValue;
  most_shared(kernel) = size_t(value);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->ptxVersion = attributes->binaryVersion = device.capability;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int threads,
                                                                   size_t shared) {
  const int by_shared = int(device.shared_per_multiprocessor / (shared + 1024)), by_threads = 2048 / threads;
  *count = by_shared < by_threads ? by_shared : by_threads;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void* kernel,
                                                                            int threads, size_t shared,
                                                                            unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(count, kernel, threads, shared);
}
EXPORTED cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*,
                                                    const cudaLaunchConfig_t* config) {
  const dim3 c = config->attrs[0].val.clusterDim.x
                     ? dim3(config->attrs[0].val.clusterDim.x, config->attrs[0].val.clusterDim.y,
                            config->attrs[0].val.clusterDim.z)
                     : dim3(1, 1, 1);
  *count = device.multiprocessors / int(c.x * c.y * c.z);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGetSymbolAddress(void** memory, const void* symbol) {
  const auto found = variables().find(symbol);
  if (found == variables().end()) return cudaErrorInvalidSymbol;
  *memory = found->second.memory;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                              unsigned long long*, cudaGraph_t*, const cudaGraphNode_t**,
                                              const cudaGraphEdgeData**, size_t*) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                      unsigned long long,
                                                      cudaDriverEntryPointQueryResult* result) {
  *function = nullptr;
  if (!std::strcmp(name, "cuTensorMapEncodeTiled")) *function = reinterpret_cast<void*>(&encode_tiled);
  if (!std::strcmp(name, "cuDriverGetVersion")) *function = reinterpret_cast<void*>(&driver_version);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function ? cudaSuccess : cudaErrorNotSupported;
}
EXPORTED cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
EXPORTED cudaError_t cudaPeekAtLastError() {
  return cudaSuccess;
}
EXPORTED const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "the interpreter stopped the kernel" : "an error";
}
EXPORTED const char* cudaGetErrorName(cudaError_t) {
  return "an error";
}
