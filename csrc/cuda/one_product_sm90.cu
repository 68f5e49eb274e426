// Launches kernels/one_product_wgmma.cuh: tensor maps and grid.
#include "one_product_sm90.h"

#include "dispatch.h"
#include "kernels/one_product_wgmma.cuh"
#include "tensor_map.cuh"

namespace lotr::cuda {
namespace {

// f(the traits of the type and rank)
template <bool DOWN, class F>
void dispatch(const Call& call, int64_t r, F f) {
  dispatch_rank<kernels::ONE_PRODUCT_WGMMA_RANK>(r, [&](auto rank) {
    constexpr int R = decltype(rank)::value;
    if (call.type == DType::bfloat16)
      f(kernels::OneProductTraits<__nv_bfloat16, R, DOWN>{});
    else
      f(kernels::OneProductTraits<__half, R, DOWN>{});
  });
}

template <class Traits>
ptx::LaunchArgs args(const Call& call, const plan::Plan& plan, const char* name) {
  return {dim3(unsigned(plan.m_blocks)),
          dim3(Traits::THREADS),
          sizeof(typename Traits::Smem),
          static_cast<ptx::stream_t>(call.stream),
          dim3(unsigned(Traits::CLUSTER)),
          name,
          call.early};
}

}  // namespace

void shrink_wgmma(const Call& call, const ShrinkParams& p, const plan::Plan& plan) {
  dispatch<false>(call, p.r, [&](auto traits) {
    using Traits = decltype(traits);
    using T = typename Traits::T;
    ptx::launch(args<Traits>(call, plan, "shrink"), kernels::shrink_wgmma<Traits>,
                tensor_map<T>(p.x, p.M, p.K, Traits::ROWS), tensor_map<T>(p.A, p.K, p.r, Traits::SHARE), p);
  });
}

void factor_grad_wgmma(const Call& call, const FactorGradParams& p, const plan::Plan& plan) {
  dispatch<true>(call, p.r, [&](auto traits) {
    using Traits = decltype(traits);
    using T = typename Traits::T;
    ptx::launch(args<Traits>(call, plan, "factor_grad"), kernels::factor_grad_wgmma<Traits>,
                tensor_map<T>(p.x, p.M, p.K, Traits::ROWS), tensor_map<T>(p.v, p.M, p.r, Traits::SHARE), p);
  });
}

}  // namespace lotr::cuda
