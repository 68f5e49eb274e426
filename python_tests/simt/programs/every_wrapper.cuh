// Every wrapper of csrc/cuda/ptx once; test_wrappers.py compiles it and looks for the instructions meant.
// Never run.
#pragma once
#include "cuda/ptx/sm80.cuh"

#if defined(LOTR_EVERY_SM90)
#include "cuda/ptx/sm90.cuh"
#endif

namespace every {
using namespace lotr;

struct Smem {
  alignas(1024) __nv_bfloat16 tile[64][64];
  float f[64];
  uint64_t barrier;
  int32_t word;
};

struct Params {
  const __nv_bfloat16* x;
  float* y;
  int32_t* n;
};

template <class Word>
LOTR_DEVICE void copy_words(Smem& s, const Params& p) {
  const auto* x = reinterpret_cast<const Word*>(p.x);
  auto* y = reinterpret_cast<Word*>(p.y);
  ptx::store(y, ptx::load(x + 1));
  ptx::store(y + 2, ptx::load_nc(x + 3));
  ptx::store(y + 6, ptx::load_cg(x + 7));
  auto* shared = reinterpret_cast<Word*>(s.f);
  ptx::store_shared(shared, ptx::load(x + 8));
  ptx::store(y + 9, ptx::load_shared(shared + 1));
}

__global__ void __launch_bounds__(128) sm80(Params p) {
  Smem& s = ptx::shared_storage<Smem>();
  ptx::griddepcontrol_wait();
  ptx::store(reinterpret_cast<float4*>(p.y),
             ptx::load_cg_if(p.n != nullptr, reinterpret_cast<const float4*>(p.x)));
  ptx::griddepcontrol_launch_dependents();
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
  ptx::barrier_arrive(2, 64);

  uint32_t a[4], b[2];
  float d[4] = {};
  ptx::ldmatrix_x4(a, &s.tile[threadIdx.x % 16][0]);
  ptx::ldmatrix_x2(b, &s.tile[threadIdx.x % 16][8]);
  ptx::mma_m16n8k16<__nv_bfloat16>(d, a, b);
  ptx::ldmatrix_x4_trans(a, &s.tile[threadIdx.x % 16][0]);
  ptx::ldmatrix_x2_trans(b, &s.tile[threadIdx.x % 16][8]);
  ptx::mma_m16n8k16<__half>(d, a, b);
  ptx::mma_m16n8k8_tf32(d, a, b);
  d[1] += float(ptx::movmatrix_trans(a[0]));
  d[0] += ptx::shfl_xor(d[1], 16) + ptx::as_float(ptx::to_tf32(d[3])) + ptx::shfl(d[1], 3);

  ptx::fence_device();
  ptx::store(p.y, d[0] + float(ptx::atomic_add(p.n, 1)) + ptx::atomic_add(p.y + 1, 1.f) +
                      float(ptx::atomic_add_acq_rel(p.n, 1)) + float(ptx::atomic_wrap(p.n, 7)));
  ptx::store_release(p.n, 2);
  ptx::wait_equal(p.n, 2);
  if (d[0] > 1e30f) ptx::trap("never");
}

inline void run(const Params& p, ptx::stream_t stream) {
  ptx::launch({dim3(1), dim3(128), sizeof(Smem), stream, dim3(1, 1, 1), "every"}, sm80, p);
}

#if defined(LOTR_EVERY_SM90)
template <class T, int N>
LOTR_DEVICE void products(uint64_t k_major, uint64_t mn_major, const uint32_t (&a)[4], const Params& p) {
  float d[N / 2] = {};
  ptx::wgmma_fence();
  ptx::wgmma<T, N>(d, k_major, k_major, true);
  ptx::wgmma<T, N, ptx::Major::mn>(d, k_major, mn_major, true);
  ptx::wgmma<T, N, ptx::Major::mn, ptx::Major::mn>(d, mn_major, mn_major, true);
  ptx::wgmma<T, N>(d, a, k_major, true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
  ptx::wgmma_wait<0>();
  ptx::wgmma_landed(d);
  for (float v : d) ptx::store(p.y + threadIdx.x, v);
}

template <class T>
LOTR_DEVICE void all_products(uint64_t k_major, uint64_t mn_major, const uint32_t (&a)[4], const Params& p) {
  products<T, 16>(k_major, mn_major, a, p);
  products<T, 32>(k_major, mn_major, a, p);
  products<T, 64>(k_major, mn_major, a, p);
  products<T, 128>(k_major, mn_major, a, p);
  products<T, 256>(k_major, mn_major, a, p);
}

__global__ void __launch_bounds__(128) sm90(const __grid_constant__ ptx::TensorMap map, Params p) {
  Smem& s = ptx::shared_storage<Smem>();
  ptx::mbarrier_init(&s.barrier, 2);
  ptx::fence_mbarrier_init();
  ptx::cluster_sync();
  ptx::cluster_sync_relaxed();
  ptx::prefetch_tensor_map(&map);
  ptx::mbarrier_arrive(&s.barrier);
  ptx::mbarrier_arrive_expect_tx(&s.barrier, sizeof s.tile);
  ptx::tma_load_2d(s.tile, &map, 0, 0, &s.barrier);
  ptx::mbarrier_wait(&s.barrier, 0);
  ptx::tma_load_2d_multicast(s.tile, &map, 0, 0, &s.barrier, 3);
  ptx::mbarrier_arrive_cluster(&s.barrier, 1);
  ptx::mbarrier_give_back(&s.barrier, 1);
  ptx::mbarrier_wait_cluster(&s.barrier, 1);
  ptx::store_cluster(&s.word, 1, 7);
  ptx::registers_fewer<40>();
  ptx::registers_more<232>();
  const uint32_t a[4] = {1, 2, 3, threadIdx.x};
  const uint64_t k_major = ptx::swizzled_descriptor(s.tile),
                 mn_major = ptx::swizzled_descriptor_mn(s.tile, 8192);
  all_products<__nv_bfloat16>(k_major, mn_major, a, p);
  all_products<__half>(k_major, mn_major, a, p);
  ptx::store(reinterpret_cast<float4*>(p.y),
             ptx::load_cluster_if(p.n != nullptr, reinterpret_cast<float4*>(s.f), 1));
  ptx::store(p.y, *ptx::cluster_map(&s.f[0], ptx::cluster_rank() ^ 1));
}

inline void run90(const Params& p, ptx::stream_t stream) {
  ptx::launch({dim3(2), dim3(128), sizeof(Smem), stream, dim3(2, 1, 1), "every"}, sm90,
              ptx::tensor_map_2d(p.x, 64, 64, 64, 64), p);
}
#endif

}  // namespace every
