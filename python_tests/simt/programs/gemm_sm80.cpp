#include "gemm_sm80.cuh"

#include <cmath>

#include "harness.h"

namespace {

using gemm80::bf16;

bool right(int M, int N, int K, int bug) {
  harness::Numbers number{7};
  std::vector<bf16> A(size_t(M) * K), B(size_t(K) * N), C(size_t(M) * N, __float2bfloat16(NAN));
  for (bf16& x : A) x = __float2bfloat16(number());
  for (bf16& x : B) x = __float2bfloat16(number());
  gemm80::run({C.data(), A.data(), B.data(), M, N, K, bug});
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      double sum = 0, size = 0;
      for (int k = 0; k < K; ++k) {
        const double x =
            double(__bfloat162float(A[size_t(m) * K + k])) * __bfloat162float(B[size_t(k) * N + n]);
        sum += x;
        size += std::fabs(x);
      }
      const double error = std::fabs(double(__bfloat162float(C[size_t(m) * N + n])) - sum);
      if (!(error <= std::fabs(sum) * 0x1p-8 + size * 0x1p-20)) return false;
    }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  return harness::main(argc, argv,
                       [](int bug) { return right(64, 64, 160, bug) && right(72, 136, 104, bug); });
}
