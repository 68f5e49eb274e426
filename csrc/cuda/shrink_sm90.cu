// Launches kernels/shrink_wgmma.cuh: tensor maps and grid.
#include "shrink_sm90.h"

#include "dispatch.h"
#include "kernels/shrink_wgmma.cuh"
#include "tensor_map.cuh"

namespace lotr::cuda {
namespace {

template <class T, int R>
void run(const Call& call, const ShrinkParams& p, const plan::Plan& plan) {
  using Traits = kernels::ShrinkWgmmaTraits<T, R>;
  ptx::launch(
      {dim3(unsigned(plan.m_blocks)), dim3(Traits::THREADS), sizeof(typename Traits::Smem),
       static_cast<ptx::stream_t>(call.stream), dim3(unsigned(Traits::CLUSTER)), "shrink", call.early},
      kernels::shrink_wgmma<Traits>, tensor_map<T>(p.x, p.M, p.K, Traits::ROWS),
      tensor_map<T>(p.A, p.K, p.r, Traits::SHARE), p);
}

}  // namespace

void shrink_wgmma(const Call& call, const ShrinkParams& p, const plan::Plan& plan) {
  dispatch_rank<kernels::SHRINK_WGMMA_RANK>(p.r, [&](auto rank) {
    constexpr int R = decltype(rank)::value;
    if (call.type == DType::bfloat16)
      run<__nv_bfloat16, R>(call, p, plan);
    else
      run<__half, R>(call, p, plan);
  });
}

}  // namespace lotr::cuda
