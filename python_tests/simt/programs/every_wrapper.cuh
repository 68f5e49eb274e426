// Every wrapper of csrc/cuda/ptx and csrc/cuda/sm90 once; test_wrappers.py compiles it and looks for the
// instructions meant.  Never run.
#pragma once
#include "cuda/ptx/sm80.cuh"

#if defined(LOTR_EVERY_SM90)
#include "cuda/sm90/ptx.cuh"
#endif

namespace every {
using namespace lotr;

struct Smem {
  alignas(1024) __nv_bfloat16 tile[64][64];
  float f[64];
  uint64_t barrier;
};

struct Params {
  const __nv_bfloat16* x;
  float* y;
};

template <class Word>
LOTR_DEVICE void copy_words(Smem& s, const Params& p) {
  const auto* x = reinterpret_cast<const Word*>(p.x);
  auto* y = reinterpret_cast<Word*>(p.y);
  ptx::store(y, ptx::load(x + 1));
  auto* shared = reinterpret_cast<Word*>(s.f);
  ptx::store_shared(shared, ptx::load(x + 8));
  ptx::store(y + 9, ptx::load_shared(shared + 1));
}

__global__ void __launch_bounds__(128) sm80(Params p) {
  Smem& s = ptx::shared_storage<Smem>();
  ptx::griddepcontrol_wait();
  copy_words<uint16_t>(s, p);
  copy_words<uint32_t>(s, p);
  copy_words<uint2>(s, p);
  copy_words<uint4>(s, p);
  ptx::store_shared2(&s.tile[1][2], p.x[0], p.x[1]);

  ptx::cp_async16(&s.tile[threadIdx.x / 8][threadIdx.x % 8 * 8], p.x + threadIdx.x * 8);
  ptx::cp_async16(&s.tile[threadIdx.x / 8][threadIdx.x % 8 * 8], p.x + threadIdx.x * 8, 8);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();
  ptx::barrier_sync(1, 64);

  uint32_t a[4], b[2];
  float d[4] = {};
  ptx::ldmatrix_x4(a, &s.tile[threadIdx.x % 16][0]);
  ptx::ldmatrix_x2(b, &s.tile[threadIdx.x % 16][8]);
  ptx::mma_m16n8k16<__nv_bfloat16>(d, a, b);
  ptx::ldmatrix_x4_trans(a, &s.tile[threadIdx.x % 16][0]);
  ptx::ldmatrix_x2_trans(b, &s.tile[threadIdx.x % 16][8]);
  ptx::mma_m16n8k16<__half>(d, a, b);
  ptx::store(p.y, d[0] + d[1]);
  ptx::griddepcontrol_launch_dependents();
}

inline void run(const Params& p, ptx::stream_t stream) {
  ptx::launch<sm80>({dim3(1), dim3(128), sizeof(Smem), stream, dim3(1, 1, 1), "every"}, p);
}

#if defined(LOTR_EVERY_SM90)
template <class T>
LOTR_DEVICE void products(uint64_t k_major, uint64_t mn_major, const Params& p) {
  float d[128] = {};
  ptx::wgmma_fence();
  ptx::wgmma<T>(d, k_major, k_major);
  ptx::wgmma<T, ptx::Major::mn>(d, k_major, mn_major);
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
  ptx::wgmma_wait<0>();
  ptx::wgmma_landed(d);
  for (float v : d) ptx::store(p.y + threadIdx.x, v);
}

__global__ void __launch_bounds__(128) sm90(const __grid_constant__ ptx::TensorMap map, Params p) {
  Smem& s = ptx::shared_storage<Smem>();
  ptx::mbarrier_init(&s.barrier, 2);
  ptx::fence_mbarrier_init();
  ptx::cluster_sync();
  ptx::prefetch_tensor_map(&map);
  ptx::mbarrier_arrive_expect_tx(&s.barrier, sizeof s.tile);
  ptx::tma_load_2d(s.tile, &map, 0, 0, &s.barrier);
  ptx::tma_load_2d_multicast(s.tile, &map, 0, 0, &s.barrier, 3);
  ptx::mbarrier_wait(&s.barrier, 0);
  ptx::mbarrier_arrive_cluster(&s.barrier, 1);
  products<__nv_bfloat16>(ptx::swizzled_descriptor(s.tile), ptx::swizzled_descriptor_mn(s.tile, 8192), p);
  products<__half>(ptx::swizzled_descriptor(s.tile), ptx::swizzled_descriptor_mn(s.tile, 8192), p);
  ptx::fence_proxy_async();
  ptx::tma_store_2d(&map, 0, 0, s.tile);
  ptx::bulk_commit();
  ptx::bulk_wait_read<1>();
  ptx::bulk_wait_all();
}

inline void run90(const Params& p, ptx::stream_t stream) {
  ptx::launch<sm90>({dim3(2), dim3(128), sizeof(Smem), stream, dim3(2, 1, 1), "every"},
                    ptx::tensor_map_2d(p.x, 64, 64, 64, 64), p);
}
#endif

}  // namespace every
