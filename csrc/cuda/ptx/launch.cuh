// In place of kernel<<<grid, block>>>(...): one checked launch, on a stream of the device or in the executor.
//
// An early launch (programmatic dependent launch, compute capability 9.0 and later) may begin before the
// previous kernel of the stream has ended, which hides the launch latency.  It is safe, in a stream and in a
// captured graph, for these reasons:
//
//   - Every thread calls griddepcontrol_wait before it reads or writes global memory, and before it exits. So
//     no thread reads too early, and a kernel never ends before all previous ones: a wait for the last one is
//     a wait for all.  The executor checks it.
//   - griddepcontrol_launch_dependents comes after that wait, so at most two kernels run at a time.
//   - The previous operation may be anything: a kernel without launch_dependents, a memset or an event is
//     waited for as usual, and a library's early kernels wait for theirs as these do.
//
// Early blocks run where blocks of the kernel ahead have ended.  So a kernel that fills the multiprocessors
// lets the next one begin after its last product, when nearly all multiprocessors are free and the next one's
// blocks spread evenly.  A small kernel leaves room and lets the next one begin at once.
//
// A cooperative launch begins when all of its blocks fit on the device, so that they may wait for each other.
// Under MPS or in a green context fewer blocks may fit than on the whole device: then nothing is launched.
// How many clusters fit depends on the device's GPCs. So the driver is queried, once per kernel and shape,
// and before the launch: one that fails would end the capture of a graph.
#pragma once
#include "base.cuh"

#ifdef __CUDACC__
#include <algorithm>
#include <map>
#include <mutex>
#endif
#include <stdexcept>
#include <string>
#include <tuple>
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
  bool early = false;           // see above; the device must have code of compute capability 9.0 or later
  bool cooperative = false;     // see above
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

// The next kernel in the stream may begin once every block has ended or called this: the first of a block's
// threads to call it does so for the block, while others may still be at work.  So nothing that the next
// kernel does before its griddepcontrol_wait may touch what they use.
LOTR_DEVICE void griddepcontrol_launch_dependents(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#else
  simt::griddepcontrol_launch_dependents(site);
#endif
}

// The compute capability of the current device, times ten; the executor runs code for 9.0.  Throws
// std::runtime_error that begins with the kernel's name.
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
// Queries of the driver while it lives: a query may load a kernel or allocate the module's memory, which a
// capture by this or another thread could forbid. Neither touches a stream.
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

// Loads a kernel on the current device without a launch.  Returns the cudaError_t, 0 if the driver can.
inline int load_code([[maybe_unused]] const void* kernel) {
#ifdef __CUDACC__
  const DriverQuery query;
  cudaFuncAttributes code{};
  return cudaFuncGetAttributes(&code, kernel);
#else
  return 0;
#endif
}

// The compute capability, times ten, of the kernel's code that the current device runs: the lower of the
// virtual and the real one.  0 if there is no code for the device.
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

#ifdef __CUDACC__
// The same as resident_clusters, from the driver.
inline cudaError_t count_resident(const LaunchArgs& args, const void* kernel, int device, int& count) {
  const DriverQuery query;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(args.smem)))
    return error;
  if (args.cluster.x * args.cluster.y * args.cluster.z > 1) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = args.cluster.x, cluster.val.clusterDim.y = args.cluster.y,
    cluster.val.clusterDim.z = args.cluster.z;
    cudaLaunchConfig_t config{};
    config.gridDim = args.grid, config.blockDim = args.block, config.dynamicSmemBytes = args.smem;
    config.attrs = &cluster, config.numAttrs = 1;
    return cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  }
  int multiprocessors = 0, each = 0;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device))
    return error;
  const cudaError_t error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, int(args.block.x), args.smem);
  count = multiprocessors * each;
  return error;
}
#endif

// How many clusters, or blocks where a cluster is one, of such a launch the current device holds at a time: 0
// if a block needs more than the device has, there is no code for the device, or it has no cooperative
// launches and this is one (some virtual GPUs).
inline int resident_clusters([[maybe_unused]] const LaunchArgs& args, [[maybe_unused]] const void* kernel) {
#ifdef __CUDACC__
  using Key = std::tuple<int, const void*, unsigned, unsigned, unsigned, unsigned, size_t, bool>;
  static std::map<Key, int> known;  // the query takes microseconds
  static std::mutex mutex;
  int device = 0;
  if (cudaGetDevice(&device)) return 0;
  const Key key{device,         kernel,       args.cluster.x, args.cluster.y,
                args.cluster.z, args.block.x, args.smem,      args.cooperative};
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  int count = 0, cooperative = 1;
  cudaError_t error = cudaSuccess;
  if (args.cooperative) error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  if (!error) error = count_resident(args, kernel, device, count);
  if (error) cudaGetLastError();  // clears the error
  return known[key] = error || !cooperative ? 0 : count;
#else
  return 1;
#endif
}

// False if the blocks of a cooperative launch do not fit: nothing was launched.  Throws std::runtime_error
// naming the kernel.  Errors inside the kernel show at a later call on the device, and here under the
// executor (lotr::simt::Error).
template <class... Params, class... Args>
bool launch(const LaunchArgs& args, void (*kernel)(Params...), Args&&... params) {
#ifdef __CUDACC__
  const auto check = [&](cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clears the error, unless it is one that ends the context
    throw std::runtime_error(std::string(args.name) + ": " + what + ": " + cudaGetErrorString(error));
  };
  if (args.smem > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(args.smem)),
          "shared memory");
  cudaLaunchAttribute attributes[3];
  unsigned count = 0;
  const unsigned blocks = args.cluster.x * args.cluster.y * args.cluster.z;
  if (args.cooperative) {
    const int64_t clusters = int64_t(args.grid.x) * args.grid.y * args.grid.z / blocks;
    if (resident_clusters(args, reinterpret_cast<const void*>(kernel)) < clusters) return false;
  }
  if (blocks > 1) {
    cudaLaunchAttribute& cluster = attributes[count++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = args.cluster.x;
    cluster.val.clusterDim.y = args.cluster.y;
    cluster.val.clusterDim.z = args.cluster.z;
  }
  if (args.early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (args.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = args.grid;
  config.blockDim = args.block;
  config.dynamicSmemBytes = args.smem;
  config.stream = args.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(params)...);
  // although the query found room: the driver may count less of it at the launch
  if (args.cooperative && (error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported)) {
    cudaGetLastError();  // clears the error
    return false;
  }
  check(error, "launch");
  return true;
#else
  return simt::launch(
      {args.name, args.grid, args.block, args.cluster, args.smem, args.early, args.cooperative}, kernel,
      std::forward<Args>(params)...);
#endif
}

}  // namespace lotr::ptx
