#include "pair_sm90.cuh"

#include <cmath>
#include <memory>

#include "harness.h"

namespace {

using pair::bf16;
using Matrix = std::unique_ptr<bf16[], decltype(&free)>;

// 16-byte aligned, as the allocator of a GPU is
Matrix matrix(size_t n, harness::Numbers& number) {
  auto* p = static_cast<bf16*>(aligned_alloc(16, (n * sizeof(bf16) + 15) / 16 * 16));
  for (size_t i = 0; i < n; ++i) p[i] = __float2bfloat16(number());
  return {p, free};
}

bool right(int M, int N, int K, int bug) {
  harness::Numbers number{11};
  const Matrix x = matrix(size_t(M) * K, number), W = matrix(size_t(K) * N, number),
               F = matrix(size_t(N) * pair::R, number), u = matrix(size_t(M) * pair::R, number);
  std::vector<bf16> y(size_t(M) * N, __float2bfloat16(NAN));
  pair::run(x.get(), W.get(), F.get(), {y.data(), reinterpret_cast<const uint32_t*>(u.get()), M, N, K, bug});
  const auto at = [](const Matrix& a, int cols, int i, int j) {
    return double(__bfloat162float(a[size_t(i) * cols + j]));
  };
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      double sum = 0, size = 0;
      const auto add = [&](double v) { sum += v, size += std::fabs(v); };
      for (int k = 0; k < K; ++k) add(at(x, K, m, k) * at(W, N, k, n));
      for (int j = 0; j < pair::R; ++j) add(at(u, pair::R, m, j) * at(F, pair::R, n, j));
      const double error = std::fabs(double(__bfloat162float(y[size_t(m) * N + n])) - sum);
      if (!(error <= std::fabs(sum) * 0x1p-8 + size * 0x1p-20)) return false;
    }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  return harness::main(
      argc, argv, [](int bug) { return right(150, 72, 200, bug) && (bug || right(40, 136, 64, bug)); }, 2);
}
