// The operators on CUDA tensors, operators.h and layer.h over products_cuda.h, and the operators
// that describe the CUDA kernels of this build.
#include <string>
#include <tuple>

#include "operators.h"
#include "products_cuda.h"

namespace lotr {
namespace {

// 1000 x major + 10 x minor of the CUDA version that built this module, and of the latest version
// that the driver supports, 0 without a driver.
std::tuple<int64_t, int64_t> cuda_versions() {
  int runtime = 0;
  int driver = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver)) driver = 0;
  return {runtime, driver};
}

// The plan of a kernel in bfloat16, as one line. The meaning of M, N and r depends on the kernel:
// see plan_text in cuda/plans.h. device < 0: for an H100.
std::string cuda_plans(std::string op, int64_t M, int64_t N, int64_t r, int64_t device) {
  constexpr const char* name = "lotr::cuda_plans";
  if (M < 1 || N < 1) fail(name, ": M, N: expected at least 1, got ", M, " and ", N);
  if (r < 1 || r > cuda::MAX_RANK)
    fail(name, ": r: expected a rank from 1 to ", cuda::MAX_RANK, ", got ", r);
  cuda::Call call{};
  call.type = DType::bfloat16;
  if (device >= 0) {
    const torch::stable::accelerator::DeviceGuard guard{int32_t(device)};
    call.card = device_of(name, int32_t(device)).card;
  }
  return cuda::plan_text(call, op, M, N, int32_t(r), int32_t(r));
}

// Why gemm_lotr cannot compute a layer [K] -> [N] whose tensors are contiguous, or "".
#ifdef LOTR_SM90A
std::string gemm_lotr_refusal(int64_t K, int64_t N, int64_t r, ScalarType dtype, int64_t device) {
  constexpr const char* name = "lotr::gemm_lotr_refusal";
  const torch::stable::accelerator::DeviceGuard guard{int32_t(device)};
  cuda::Call call{};
  call.type = cuda_dtype(name, "dtype", dtype);
  call.card = device_of(name, int32_t(device)).card;
  void* const aligned = reinterpret_cast<void*>(uintptr_t(256));  // never read
  const int64_t pad = cuda::row_elements(call.type);
  const int64_t padded_rank = (r + pad - 1) / pad * pad;  // the row stride of u and F
  cuda::GemmLotr problem{};
  problem.y = {aligned, N, 1, Access::vector};
  problem.x = {aligned, K, 1, Access::vector};
  problem.W = {aligned, K, 1, Access::vector};
  problem.u = {aligned, padded_rank, 1, Access::vector};
  problem.F = {aligned, padded_rank, 1, Access::vector};
  problem.M = 2;  // with one row its stride would not be checked
  problem.N = N;
  problem.K = K;
  problem.r = int32_t(r);
  return cuda::gemm_lotr_refusal(call, problem);
}
#else
std::string gemm_lotr_refusal(int64_t, int64_t, int64_t, ScalarType, int64_t) {
  return "the build has no kernels for sm_90a";
}
#endif

}  // namespace
}  // namespace lotr

STABLE_TORCH_LIBRARY_IMPL(lotr, CUDA, m)
{
  lotr::implement_operators<lotr::CudaProducts>(m);
}

// No tensor argument, so no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(lotr, CompositeExplicitAutograd, m)
{
  m.impl("cuda_versions", TORCH_BOX(&lotr::cuda_versions));
  m.impl("cuda_plans", TORCH_BOX(&lotr::cuda_plans));
  m.impl("gemm_lotr_refusal", TORCH_BOX(&lotr::gemm_lotr_refusal));
}
