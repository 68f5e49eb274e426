// Replaces kernel<<<grid, block>>>(...): one checked launch, on a stream of the device or in the
// executor.
//
// An early launch (programmatic dependent launch, compute capability 9.0 and later) may start
// before the previous kernel of the stream has ended, which hides the launch latency. It is safe,
// in a stream and in a captured graph, for three reasons:
//
//   - Every thread calls griddepcontrol_wait before it accesses global memory, and before it exits.
//     The wait ends when all previous grids have completed and their stores are visible. So no
//     thread reads too early, and a kernel never ends before the previous ones: a wait for the last
//     kernel is a wait for all. The executor checks this rule.
//   - The previous operation may be anything. A kernel without launch_dependents, a memset or an
//     event is waited for as usual. A library's early kernels wait for ours in the same way.
//   - griddepcontrol_launch_dependents lets the next kernel start, but makes no store visible. That
//     kernel, even a library's, must call griddepcontrol_wait before it reads. A thread calls
//     launch_dependents after its last store, so that the next kernel's blocks do not take the
//     place of blocks that still have work.
#pragma once
#include "base.cuh"

#ifdef __CUDACC__
#include <algorithm>
#include <atomic>
#endif
#include <stdexcept>
#include <string>
#include <utility>

namespace lotr::ptx {

#ifdef __CUDACC__
using stream_t = cudaStream_t;
#else
using stream_t = void*;  // ignored: the executor has finished the grid when launch returns
#endif

struct LaunchArgs {
  dim3 grid, block;
  size_t smem = 0;  // bytes of dynamic shared memory, sizeof the kernel's struct
  stream_t stream = nullptr;
  dim3 cluster{1, 1, 1};
  const char* name = "kernel";  // for messages and the executor's list of launches
  bool early = false;           // see above; only with code of compute capability 9.0 or later
};

// Waits until the previous operations of the stream have ended and their stores are visible.
LOTR_DEVICE void griddepcontrol_wait(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#else
  simt::griddepcontrol_wait(site);
#endif
}

// The next kernel in the stream may start once every block has ended or called this. The first
// thread of a block that calls it does so for the block, while other threads may still store.
LOTR_DEVICE void griddepcontrol_launch_dependents(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#else
  simt::griddepcontrol_launch_dependents(site);
#endif
}

// The compute capability of the current device, times ten; 90 in the executor. If CUDA reports an
// error, throws std::runtime_error with `name`, the kernel's.
inline int capability_of_device([[maybe_unused]] const char* name) {
#ifdef __CUDACC__
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
  return 10 * major + minor;
#else
  return 90;
#endif
}

#ifdef __CUDACC__
// Allows, during its lifetime, calls that query a kernel or set its attributes. The first such
// call may load the kernel or allocate memory for its module, which a stream capture of this or
// another thread forbids by default, although it touches no stream.
class DriverQuery {
 public:
  DriverQuery() { exchange(); }
  ~DriverQuery() { exchange(); }
  DriverQuery(const DriverQuery&) = delete;
  DriverQuery& operator=(const DriverQuery&) = delete;

 private:
  void exchange() {
    if (cudaThreadExchangeStreamCaptureMode(&mode_)) cudaGetLastError();
  }
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};
#endif

// The compute capability, times ten, of the kernel's code that the current device runs: the lower
// of the virtual and the real one; 0 if there is no code for the device.
inline int capability_of_code([[maybe_unused]] const void* kernel) {
#ifdef __CUDACC__
  const DriverQuery query;
  cudaFuncAttributes code{};
  if (!cudaFuncGetAttributes(&code, kernel)) return std::min(code.ptxVersion, code.binaryVersion);
  cudaGetLastError();  // clears the error, which the next launch would report
  return 0;
#else
  return 90;
#endif
}

// How many clusters of such a launch fit on the current device at once: 0 if a block needs more
// shared memory than the device has, or if there is no code for the device.
inline int resident_clusters([[maybe_unused]] const LaunchArgs& args,
                             [[maybe_unused]] const void* kernel) {
#ifdef __CUDACC__
  const DriverQuery query;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {args.cluster.x, args.cluster.y, args.cluster.z};
  cudaLaunchConfig_t config{};
  config.gridDim = args.grid;
  config.blockDim = args.block;
  config.dynamicSmemBytes = args.smem;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int count = 0;
  if (!cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(args.smem)) &&
      !cudaOccupancyMaxActiveClusters(&count, kernel, &config))
    return count;
  cudaGetLastError();  // clears the error
  return 0;
#else
  return 1;
#endif
}

#ifdef __CUDACC__
// Raises a kernel's limit of shared memory, once per device: the call takes a microsecond.
template <auto KERNEL>
cudaError_t allow_shared_memory(size_t bytes) {
  static std::atomic<uint64_t> allowed{0};  // one bit per device
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if (allowed.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const DriverQuery query;
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(KERNEL),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (!error) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}
#endif

// A launch that fails throws std::runtime_error with the kernel's name. An error inside the kernel
// appears at a later call on the device, and here in the executor (lotr::simt::Error).
template <auto KERNEL, class... Args>
void launch(const LaunchArgs& args, Args&&... params) {
#ifdef __CUDACC__
  const auto check = [&](cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clears the error, unless it is one that ends the context
    throw std::runtime_error(std::string(args.name) + ": " + what + ": " + cudaGetErrorName(error) +
                             " (" + cudaGetErrorString(error) + ")");
  };
  if (args.smem > 48 * 1024) check(allow_shared_memory<KERNEL>(args.smem), "shared memory");
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (args.cluster.x * args.cluster.y * args.cluster.z > 1) {
    cudaLaunchAttribute& cluster = attributes[count++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {args.cluster.x, args.cluster.y, args.cluster.z};
  }
  if (args.early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = args.grid;
  config.blockDim = args.block;
  config.dynamicSmemBytes = args.smem;
  config.stream = args.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, KERNEL, std::forward<Args>(params)...), "launch");
#else
  simt::launch({args.name, args.grid, args.block, args.cluster, args.smem, args.early}, KERNEL,
               std::forward<Args>(params)...);
#endif
}

}  // namespace lotr::ptx
