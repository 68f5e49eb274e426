#include "sum.cuh"

#include <cmath>

#include "harness.h"

namespace {

bool right(int M, int K, int bug) {
  std::vector<float> x(size_t(M) * K + 4), y(M, NAN), total(1, NAN);
  std::vector<int32_t> arrived(1, 0);
  harness::Numbers number{3};
  for (float& v : x) v = number();
  lotr::simt::clear_arrays();
  lotr::simt::register_array("y", y.data(), y.size() * sizeof(float));
  sum::run({y.data(), total.data(), arrived.data(), x.data(), M, K, bug});
  double all = 0;
  bool ok = arrived[0] == M;
  for (int m = 0; m < M; ++m) {
    double row = 0;
    for (int k = 0; k < K; ++k) {
      const double v = x[size_t(m) * K + k];
      row += v * v + (v > 1);
    }
    ok = ok && std::fabs(row - y[m]) < 1e-3;
    all += row;
  }
  return ok && std::fabs(all - total[0]) < 1e-2;
}

}  // namespace

int main(int argc, char** argv) {
  return harness::main(argc, argv, [](int bug) { return right(5, 332, bug) && right(3, 700, bug); });
}
