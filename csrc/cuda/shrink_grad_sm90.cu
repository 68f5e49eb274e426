// Launches kernels/shrink_grad_wgmma.cuh: tensor maps, grid, workspace.
#include "shrink_grad_sm90.h"

#include "dispatch.h"
#include "kernels/shrink_grad_wgmma.cuh"
#include "launchers.h"
#include "tensor_map.cuh"

namespace lotr::cuda {
namespace {

// Counters and partial sums: two of k's for each row tile and block along N, one of Q for each block.
struct Sums {
  int64_t counters, k, Q;
  Sums(const plan::Plan& plan, int64_t r) {
    const int64_t R = plan::padded_rank(r);
    counters = 2 * plan.m_tiles;
    k = plan.m_tiles * plan.n_blocks * plan.rows * R;
    Q = plan.m_blocks * plan.n_blocks * kernels::SHRINK_GRAD_WGMMA_SUBS * plan.cols * R;
  }
};

template <class T, int R>
void run(const Call& call, const ShrinkGradParams& p) {
  using Traits = kernels::ShrinkGradWgmmaTraits<T, R>;
  ptx::launch(
      {dim3(unsigned(p.m_splits), unsigned(p.n_splits)), dim3(Traits::THREADS), sizeof(typename Traits::Smem),
       static_cast<ptx::stream_t>(call.stream), dim3(unsigned(p.m_splits)), "shrink_grad", call.early},
      kernels::shrink_grad_wgmma<Traits>, tensor_map<T>(p.g, p.M, p.N, Traits::ROWS),
      tensor_map<T>(p.F, p.N, p.r, Traits::ROWS), tensor_map<T>(p.u, p.M, p.r, Traits::ROWS), p);
}

}  // namespace

bool runs_wgmma() {
#ifdef __CUDACC__
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error) throw std::runtime_error(std::string("shrink_grad: ") + cudaGetErrorString(error));
  if (major != 9 || minor != 0) return false;
#endif
  using Traits = kernels::ShrinkGradWgmmaTraits<__nv_bfloat16, kernels::SHRINK_GRAD_WGMMA_RANK>;
  constexpr unsigned MOST = MOST_OF_CLUSTER;
  return ptx::resident_clusters(
             {dim3(MOST), dim3(Traits::THREADS), sizeof(typename Traits::Smem), nullptr, dim3(MOST)},
             reinterpret_cast<const void*>(&kernels::shrink_grad_wgmma<Traits>)) > 0;
}

size_t shrink_grad_wgmma_workspace(const plan::Plan& plan, int64_t r) {
  const Sums sums(plan, r);
  return Workspace::bytes(sums.counters, sums.k) + Workspace::bytes(0, sums.Q);
}

void shrink_grad_wgmma(const Call& call, ShrinkGradParams p, const plan::Plan& plan, void* workspace) {
  const Sums sums(plan, p.r);
  p.m_pieces = plan.m_pieces();
  p.n_pieces = plan.n_pieces();
  p.m_splits = int(plan.m_blocks);
  p.n_splits = int(plan.n_blocks);
  Workspace memory(call, workspace, sums.counters);
  p.sum_k = memory.take(sums.counters, sums.k);
  p.sum_Q = memory.take(0, sums.Q);
  dispatch_rank<kernels::SHRINK_GRAD_WGMMA_RANK>(p.r, [&](auto rank) {
    constexpr int R = decltype(rank)::value;
    if (call.type == DType::bfloat16)
      run<__nv_bfloat16, R>(call, p);
    else
      run<__half, R>(call, p);
  });
}

}  // namespace lotr::cuda
