// wgmma of each width, type and operand layout that the project's kernels use, through CuTe: bulk copies of
// two-dimensional tensors, multicast in a cluster of two blocks, operands in shared memory (SS) or a in
// registers (RS, by ldmatrix).  CuTe makes the tensor maps, the descriptors, and the layouts of fragments.
#include "cute/tensor.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/cluster_launch.hpp"
#include "cutlass/numeric_types.h"

using namespace cute;

namespace calibrate {

using Bf16 = cutlass::bfloat16_t;
using Half = cutlass::half_t;
using GMMA::Major;
constexpr int BLOCK_M = 64, BLOCK_K = 64, BLOCKS = 2;

// The canonical layout whose rows are as long as the tile, at most 128 bytes.
template <class T, int MN, Major MAJOR>
auto tile() {
  const auto shape = Shape<Int<MN>, Int<BLOCK_K>>{};
  if constexpr (MAJOR == Major::K)
    return tile_to_shape(GMMA::Layout_K_SW128_Atom<T>{}, shape);
  else if constexpr (MN >= 64)
    return tile_to_shape(GMMA::Layout_MN_SW128_Atom<T>{}, shape);
  else if constexpr (MN == 32)
    return tile_to_shape(GMMA::Layout_MN_SW64_Atom<T>{}, shape);
  else
    return tile_to_shape(GMMA::Layout_MN_SW32_Atom<T>{}, shape);
}
template <class T, int MN, Major MAJOR>
using Tile = decltype(tile<T, MN, MAJOR>());

// A [mn, k], elements next to each other along k or along mn.
template <Major MAJOR, class T>
auto matrix(const void* data, int mn, int k) {
  const auto pointer = make_gmem_ptr(static_cast<const T*>(data));
  if constexpr (MAJOR == Major::K)
    return make_tensor(pointer, make_shape(mn, k), make_stride(k, _1{}));
  else
    return make_tensor(pointer, make_shape(mn, k), make_stride(_1{}, mn));
}

template <class T, class TileA, class TileB>
struct Shared {
  alignas(1024) ArrayEngine<T, cosize_v<TileA>> a;
  alignas(1024) ArrayEngine<T, cosize_v<TileB>> b;
  uint64_t full;
};

// d [m, N] row-major; a block has 64 rows.
template <class T, class Mma, bool A_IN_REGISTERS, class TileA, class TileB, class CopyA, class CopyB>
__global__ __launch_bounds__(128) void product(int m, int k, const CUTE_GRID_CONSTANT CopyA copy_a,
                                               const CUTE_GRID_CONSTANT CopyB copy_b, float* d) {
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  constexpr int N = size<0>(TileB{});
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<Shared<T, TileA, TileB>*>(memory);
  auto s_a = make_tensor(make_smem_ptr(shared.a.begin()), TileA{});
  auto s_b = make_tensor(make_smem_ptr(shared.b.begin()), TileB{});
  const auto g_a = local_tile(copy_a.get_tma_tensor(make_shape(m, k)), Shape<Int<BLOCK_M>, Int<BLOCK_K>>{},
                              make_coord(int(blockIdx.x), _));
  const auto g_b =
      local_tile(copy_b.get_tma_tensor(make_shape(N, k)), Shape<Int<N>, Int<BLOCK_K>>{}, make_coord(0, _));
  auto [from_a, to_a] =
      tma_partition(copy_a, _0{}, Layout<_1>{}, group_modes<0, 2>(s_a), group_modes<0, 2>(g_a));
  auto [from_b, to_b] = tma_partition(copy_b, int(block_rank_in_cluster()), Layout<Int<BLOCKS>>{},
                                      group_modes<0, 2>(s_b), group_modes<0, 2>(g_b));
  const bool first = threadIdx.x / 32 == 0 && elect_one_sync();
  if (first) Barrier::init(&shared.full, 1);
  cutlass::arch::fence_barrier_init();
  cluster_sync();

  Mma mma;
  const auto thread = mma.get_thread_slice(threadIdx.x);
  auto t_b = thread.make_fragment_B(thread.partition_B(s_b));
  auto g_d = make_tensor(make_gmem_ptr(d), make_shape(m, Int<N>{}), make_stride(Int<N>{}, _1{}));
  auto t_d =
      thread.partition_C(local_tile(g_d, Shape<Int<BLOCK_M>, Int<N>>{}, make_coord(int(blockIdx.x), 0)));
  auto sums = thread.make_fragment_C(t_d);
  clear(sums);
#pragma unroll 1
  for (int step = 0; step < k / BLOCK_K; ++step) {
    if (first) {
      Barrier::arrive_and_expect_tx(&shared.full, sizeof shared.a + sizeof shared.b);
      copy(copy_a.with(shared.full), from_a(_, step), to_a);
      copy(copy_b.with(shared.full, uint16_t((1 << BLOCKS) - 1)), from_b(_, step), to_b);
    }
    Barrier::wait(&shared.full, step & 1);
    if constexpr (A_IN_REGISTERS) {
      auto t_a = thread.partition_fragment_A(s_a);
      const auto load =
          make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, T>{}, mma).get_thread_slice(threadIdx.x);
      copy(Copy_Atom<SM75_U32x4_LDSM_N, T>{}, load.partition_S(s_a), load.retile_D(t_a));
      warpgroup_fence_operand(t_a);
      warpgroup_fence_operand(sums);
      warpgroup_arrive();
      gemm(mma, t_a, t_b, sums);
    } else {
      auto t_a = thread.make_fragment_A(thread.partition_A(s_a));
      warpgroup_fence_operand(sums);
      warpgroup_arrive();
      gemm(mma, t_a, t_b, sums);
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(sums);
    cluster_sync();  // before the next copies into both blocks
  }
  copy(sums, t_d);
}

template <class T, int N, Major A, Major B, bool A_IN_REGISTERS>
int launch(int m, int k, const void* a, const void* b, void* d) {
  using Shape3 = Shape<Int<BLOCK_M>, Int<N>, Int<BLOCK_K>>;
  const auto atom = [] {
    if constexpr (A_IN_REGISTERS)
      return GMMA::rs_op_selector<T, T, float, Shape3, A, B>();
    else
      return GMMA::ss_op_selector<T, T, float, Shape3, A, B>();
  };
  using Mma = decltype(make_tiled_mma(atom()));
  using TileA = Tile<T, BLOCK_M, A>;
  using TileB = Tile<T, N, B>;
  const auto copy_a = make_tma_copy(SM90_TMA_LOAD{}, matrix<A, T>(a, m, k), TileA{});
  const auto copy_b = make_tma_copy(SM90_TMA_LOAD_MULTICAST{}, matrix<B, T>(b, N, k), TileB{},
                                    Shape<Int<N>, Int<BLOCK_K>>{}, Int<BLOCKS>{});
  const auto kernel = product<T, Mma, A_IN_REGISTERS, TileA, TileB, decltype(copy_a), decltype(copy_b)>;
  const int bytes = sizeof(Shared<T, TileA, TileB>);
  if (m % (BLOCK_M * BLOCKS) || k % BLOCK_K) return -1;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return -2;
  const cutlass::ClusterLaunchParams where{dim3(m / BLOCK_M), dim3(128), dim3(BLOCKS), bytes};
  return int(cutlass::launch_kernel_on_cluster(where, reinterpret_cast<const void*>(kernel), m, k, copy_a,
                                               copy_b, static_cast<float*>(d)));
}

// d [m, n] = a b^T in float32; m a multiple of 128, k of 64.  a is [m, k] and b [n, k]; mn_a, mn_b: stored as
// [k, m] and [k, n].  registers: a comes from registers.  Returns a cutlass::Status, or a negative number for
// a form that is not here.
#define CASE(N, A, B, REGISTERS)                                                      \
  if (n == N && mn_a == (Major::A == Major::MN) && mn_b == (Major::B == Major::MN) && \
      registers == REGISTERS)                                                         \
  return launch<TYPE, N, Major::A, Major::B, REGISTERS>(m, k, a, b, d)
#define CASES(N)         \
  CASE(N, K, K, false);  \
  CASE(N, K, MN, false); \
  CASE(N, MN, MN, false)
#define PROGRAM(NAME)                                                                           \
  extern "C" int NAME(int m, int n, int k, bool mn_a, bool mn_b, bool registers, const void* a, \
                      const void* b, void* d) {                                                 \
    CASES(16);                                                                                  \
    CASES(32);                                                                                  \
    CASES(64);                                                                                  \
    CASES(128);                                                                                 \
    CASE(256, K, K, false);                                                                     \
    CASE(256, K, MN, false);                                                                    \
    CASE(64, K, MN, true);                                                                      \
    CASE(128, K, K, true);                                                                      \
    CASE(256, K, K, true);                                                                      \
    return -3;                                                                                  \
  }

#define TYPE Bf16
PROGRAM(cute_bf16)
#undef TYPE
#define TYPE Half
PROGRAM(cute_f16)

}  // namespace calibrate
