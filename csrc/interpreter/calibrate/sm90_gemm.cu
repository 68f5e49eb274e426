// Hopper GEMMs of CUTLASS from its collective builders, d [m, n] = a [m, k] b [k, n] in float32: bulk copies
// of tensors, mbarriers, wgmma, warp specialisation, clusters with multicast.
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

namespace calibrate {

using namespace cute;
using cutlass::gemm::KernelTmaWarpSpecialized;
using cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using Bf16 = cutlass::bfloat16_t;
using Half = cutlass::half_t;
using One = Shape<_1, _1, _1>;
using Row = cutlass::layout::RowMajor;        // a: K-major, b: N-major
using Column = cutlass::layout::ColumnMajor;  // a: M-major, b: K-major
template <int M, int N, int K>
using Dimensions = Shape<Int<M>, Int<N>, Int<K>>;

template <class T, class LayoutA, class LayoutB, class Tile, class Cluster, class Schedule>
struct Gemm {
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row, 4, float, Row, 4,
      cutlass::epilogue::NoSmemWarpSpecialized>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, LayoutA, 8, T, LayoutB, 8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCount<3>, Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // blocks: how many a persistent kernel launches. early: as a programmatic dependent launch.
  static int run(int m, int n, int k, const void* a, const void* b, void* d, int blocks, bool early) {
    cutlass::KernelHardwareInfo hardware;
    hardware.sm_count = blocks;
    hardware.max_active_clusters = blocks / int(size(Cluster{}));
    const typename Device::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {static_cast<const T*>(a), cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {m, k, 1}),
         static_cast<const T*>(b), cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {n, k, 1})},
        {{1.f, 0.f},
         nullptr,
         {},
         static_cast<float*>(d),
         cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {m, n, 1})},
        hardware};
    const auto status = Device::can_implement(arguments);
    if (status != cutlass::Status::kSuccess) return int(status);
    if (Device::get_workspace_size(arguments) != 0) return -1;
    return int(Device().run(arguments, nullptr, nullptr, nullptr, early));
  }
};

// Returns a cutlass::Status, 0 for success.
#define PROGRAM(NAME, ...)                                                                                  \
  extern "C" int NAME(int m, int n, int k, const void* a, const void* b, void* d, int blocks, bool early) { \
    return Gemm<__VA_ARGS__>::run(m, n, k, a, b, d, blocks, early);                                         \
  }

PROGRAM(sm90_bf16_tn, Bf16, Row, Column, Dimensions<64, 64, 64>, One, KernelTmaWarpSpecialized)
PROGRAM(sm90_f16_nt, Half, Column, Row, Dimensions<64, 32, 32>, One, KernelTmaWarpSpecialized)
PROGRAM(sm90_f16_tn_n256, Half, Row, Column, Dimensions<64, 256, 16>, One, KernelTmaWarpSpecialized)
PROGRAM(sm90_bf16_nn_pingpong, Bf16, Column, Column, Dimensions<64, 128, 32>, Dimensions<1, 2, 1>,
        KernelTmaWarpSpecializedPingpong)
PROGRAM(sm90_bf16_tt_cooperative, Bf16, Row, Row, Dimensions<128, 128, 64>, Dimensions<2, 1, 1>,
        KernelTmaWarpSpecializedCooperative)

}  // namespace calibrate
