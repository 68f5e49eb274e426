// In place of kernel<<<grid, block>>>(...): one checked launch, on a stream of the device or in the executor.
#pragma once
#include "base.cuh"

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
};

// Throws std::runtime_error naming the kernel.  Errors inside the kernel: on the device at a later call,
// under the executor (lotr::simt::Error) here.
template <class... Params, class... Args>
void launch(const LaunchArgs& args, void (*kernel)(Params...), Args&&... params) {
#ifdef __CUDACC__
  const auto check = [&](cudaError_t error, const char* what) {
    if (error != cudaSuccess)
      throw std::runtime_error(std::string(args.name) + ": " + what + ": " + cudaGetErrorString(error));
  };
  if (args.smem > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(args.smem)),
          "shared memory");
  cudaLaunchAttribute cluster[1];
  cluster[0].id = cudaLaunchAttributeClusterDimension;
  cluster[0].val.clusterDim.x = args.cluster.x;
  cluster[0].val.clusterDim.y = args.cluster.y;
  cluster[0].val.clusterDim.z = args.cluster.z;
  cudaLaunchConfig_t config{};
  config.gridDim = args.grid;
  config.blockDim = args.block;
  config.dynamicSmemBytes = args.smem;
  config.stream = args.stream;
  config.attrs = cluster;
  config.numAttrs = args.cluster.x * args.cluster.y * args.cluster.z > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(params)...), "launch");
#else
  std::tuple<std::decay_t<Params>...> copies(std::forward<Args>(params)...);
  auto thread = [&] { std::apply(kernel, copies); };
  simt::run_grid(
      {args.name, args.grid, args.block, args.cluster, args.smem},
      [](void* context) { (*static_cast<decltype(thread)*>(context))(); }, &thread);
#endif
}

}  // namespace lotr::ptx
