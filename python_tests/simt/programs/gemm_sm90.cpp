#include "gemm_sm90.cuh"

#include <cmath>
#include <memory>

#include "harness.h"

namespace {

using gemm90::bf16;

// 16-byte aligned, as the allocator of a GPU is
std::unique_ptr<bf16[], decltype(&free)> matrix(size_t n, harness::Numbers& number) {
  auto* p = static_cast<bf16*>(aligned_alloc(16, (n * sizeof(bf16) + 15) / 16 * 16));
  for (size_t i = 0; i < n; ++i) p[i] = __float2bfloat16(number());
  return {p, free};
}

bool right(int M, int N, int K, int bug) {
  harness::Numbers number{7};
  const auto A = matrix(size_t(M) * K, number), B = matrix(size_t(N) * K, number);
  std::vector<bf16> C(size_t(M) * N, __float2bfloat16(NAN));
  gemm90::run(A.get(), B.get(), {C.data(), M, N, K, bug});
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      double sum = 0, size = 0;
      for (int k = 0; k < K; ++k) {
        const double x =
            double(__bfloat162float(A[size_t(m) * K + k])) * __bfloat162float(B[size_t(n) * K + k]);
        sum += x;
        size += std::fabs(x);
      }
      const double error = std::fabs(double(__bfloat162float(C[size_t(m) * N + n])) - sum);
      if (!(error <= std::fabs(sum) * 0x1p-8 + size * 0x1p-20)) return false;
    }
  return true;
}

bool ring_right(int bug) {
  std::vector<int> out(128, -1);
  gemm90::run_ring(out.data(), bug);
  for (int b = 0; b < 4; ++b)
    for (int t = 0; t < 32; ++t)
      if (out[size_t(b) * 32 + t] != (b ^ 1) * 100 + t) return false;
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  return harness::main(argc, argv, [](int bug) {
    if (bug == gemm90::no_cluster_sync || bug == gemm90::relaxed_sync) return ring_right(bug);
    return right(64, 64, 384, bug) && right(40, 72, 136, bug) && (bug || ring_right(bug));
  });
}
