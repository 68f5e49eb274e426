// Small kernels through CUDA C++, its libraries and CuTe: shared memory of a cluster's other blocks, atomics,
// named barriers, sums of a warp, and ldmatrix of two matrices.  Each function returns a cudaError_t.
#include <cooperative_groups.h>
#include <cuda/atomic>

#include "cute/tensor.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/cluster_launch.hpp"
#include "cutlass/numeric_types.h"

namespace {

constexpr int THREADS = 128, BLOCKS = 4;

__device__ float warp_sum(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffff, value, lanes);
  return value;
}

// Producer and consumer warps meet at a named barrier; the consumer, warp 0, adds the warps' sums.
__device__ float block_sum(float value) {
  __shared__ float sums[THREADS / 32];
  const int warp = threadIdx.x / 32;
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) sums[warp] = value;
  const cutlass::arch::NamedBarrier filled(THREADS, 3);
  if (warp != 0) {
    filled.arrive();
    return 0;
  }
  filled.sync();
  float sum = 0;
  for (int i = 0; i < THREADS / 32; ++i) sum += sums[i];
  return sum;
}

// out[2 b] = the sum of the cluster's inputs, which block b reads from the shared memory of all blocks; out[2
// b + 1] = the sum of the block before it, which that block wrote here.
__global__ void cluster_sums(const float* in, float* out) {
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = int(cluster.block_rank());
  __shared__ float own, given;
  const float sum = block_sum(in[blockIdx.x * THREADS + threadIdx.x]);
  if (threadIdx.x == 0) own = sum;
  cluster.sync();
  if (threadIdx.x == 0) {
    *cluster.map_shared_rank(&given, (rank + 1) % BLOCKS) = own;
    float all = 0;
    for (int r = 0; r < BLOCKS; ++r) all += *cluster.map_shared_rank(&own, r);
    out[2 * blockIdx.x] = all;
  }
  cluster.sync();
  if (threadIdx.x == 0) out[2 * blockIdx.x + 1] = given;
}

// The last block adds the sums of all, as in the CUDA programming guide's example of a memory fence.
__global__ void last_block_sums(const float* in, float* partial, unsigned* count, float* out) {
  __shared__ bool last;
  const float sum = block_sum(in[blockIdx.x * THREADS + threadIdx.x]);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    cuda::atomic_thread_fence(cuda::memory_order_acq_rel, cuda::thread_scope_device);
    last = atomicInc(count, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    cuda::atomic_thread_fence(cuda::memory_order_acq_rel, cuda::thread_scope_device);
    float all = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) all += static_cast<volatile float*>(partial)[i];
    *out = all;
  }
}

// The blocks append their sums in order: each waits for its ticket.
__global__ void ordered_sums(const float* in, int* turn, int* arrived, float* out) {
  const float sum = block_sum(in[blockIdx.x * THREADS + threadIdx.x]);
  if (threadIdx.x != 0) return;
  cuda::atomic_ref<int, cuda::thread_scope_device> now(*turn), all(*arrived);
  while (now.load(cuda::memory_order_acquire) != int(blockIdx.x)) {
  }
  out[blockIdx.x] = sum + (blockIdx.x ? out[blockIdx.x - 1] : 0.f);
  all.fetch_add(1, cuda::memory_order_acq_rel);
  now.store(int(blockIdx.x) + 1, cuda::memory_order_release);
}

// d [16, 8] = a [16, 16] b [8, 16]^T of one warp; TRANSPOSED: a [16, 16] and b [16, 8] are stored along m and
// n.
template <bool TRANSPOSED>
__global__ void one_mma(const cutlass::bfloat16_t* a, const cutlass::bfloat16_t* b, float* d) {
  using namespace cute;
  using T = cutlass::bfloat16_t;
  __shared__ alignas(16) T memory_a[256], memory_b[128];
  for (int i = threadIdx.x; i < 256; i += 32) memory_a[i] = a[i];
  for (int i = threadIdx.x; i < 128; i += 32) memory_b[i] = b[i];
  __syncwarp();
  using StrideA = std::conditional_t<TRANSPOSED, Stride<_1, _16>, Stride<_16, _1>>;
  using StrideB = std::conditional_t<TRANSPOSED, Stride<_1, _8>, Stride<_16, _1>>;
  using CopyA = Copy_Atom<std::conditional_t<TRANSPOSED, SM75_U16x8_LDSM_T, SM75_U32x4_LDSM_N>, T>;
  using CopyB = Copy_Atom<std::conditional_t<TRANSPOSED, SM75_U16x4_LDSM_T, SM75_U32x2_LDSM_N>, T>;
  auto s_a = make_tensor(make_smem_ptr(memory_a), Layout<Shape<_16, _16>, StrideA>{});
  auto s_b = make_tensor(make_smem_ptr(memory_b), Layout<Shape<_8, _16>, StrideB>{});
  auto g_d = make_tensor(make_gmem_ptr(d), Layout<Shape<_16, _8>, Stride<_8, _1>>{});
  const auto mma = make_tiled_mma(SM80_16x8x16_F32BF16BF16F32_TN{});
  const auto thread = mma.get_thread_slice(threadIdx.x);
  auto t_a = thread.partition_fragment_A(s_a);
  auto t_b = thread.partition_fragment_B(s_b);
  auto sums = thread.partition_fragment_C(g_d);
  const auto load_a = make_tiled_copy_A(CopyA{}, mma).get_thread_slice(threadIdx.x);
  const auto load_b = make_tiled_copy_B(CopyB{}, mma).get_thread_slice(threadIdx.x);
  copy(CopyA{}, load_a.partition_S(s_a), load_a.retile_D(t_a));
  copy(CopyB{}, load_b.partition_S(s_b), load_b.retile_D(t_b));
  clear(sums);
  gemm(mma, t_a, t_b, sums);
  copy(sums, thread.partition_C(g_d));
}

}  // namespace

extern "C" int cuda_cluster_sums(int clusters, const float* in, float* out) {
  const cutlass::ClusterLaunchParams where{dim3(BLOCKS * clusters), dim3(THREADS), dim3(BLOCKS), 0};
  return int(cutlass::launch_kernel_on_cluster(where, reinterpret_cast<const void*>(cluster_sums), in, out));
}
extern "C" int cuda_last_block_sums(int blocks, const float* in, float* partial, unsigned* count,
                                    float* out) {
  last_block_sums<<<blocks, THREADS>>>(in, partial, count, out);
  return int(cudaGetLastError());
}
extern "C" int cuda_ordered_sums(int blocks, const float* in, int* turn, int* arrived, float* out) {
  ordered_sums<<<blocks, THREADS>>>(in, turn, arrived, out);
  return int(cudaGetLastError());
}
extern "C" int cute_mma(bool transposed, const void* a, const void* b, float* d) {
  using T = cutlass::bfloat16_t;
  const auto kernel = transposed ? one_mma<true> : one_mma<false>;
  kernel<<<1, 32>>>(static_cast<const T*>(a), static_cast<const T*>(b), d);
  return int(cudaGetLastError());
}
