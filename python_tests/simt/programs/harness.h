// A test program runs one kernel, with or without a planted bug, under several schedules and prints a verdict
// for each:
//   program [bug] [schedules]
// schedules: "one" (forward; for the sanitizers) or "all" (forward, reverse, 20 random ones with preemption).
// A verdict is "ok", "wrong" or "caught: <message>"; the program goes on after it.
#pragma once
#include <cuda_bf16.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "simt/api.h"

namespace harness {

using lotr::simt::Options;
using lotr::simt::Order;

// run(bug) launches and returns whether the result is right.
template <class Run>
int main(int argc, char** argv, Run run) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const int bug = argc > 1 ? atoi(argv[1]) : 0;
  std::vector<Options> schedules(argc > 2 && !strcmp(argv[2], "all") ? 22 : 1);
  for (size_t i = 1; i < schedules.size(); ++i) {
    schedules[i].order = i == 1 ? Order::reverse : Order::random;
    schedules[i].seed = i, schedules[i].preempt = i == 1 ? 0 : 16;
  }
  for (const Options& options : schedules) {
    lotr::simt::set_options(options);
    try {
      printf("%s\n", run(bug) ? "ok" : "wrong");
    } catch (const lotr::simt::Error& error) {
      printf("caught: ");
      for (const char* c = error.what(); *c; ++c) putchar(*c == '\n' ? ';' : *c);
      putchar('\n');
    }
  }
  return 0;
}

// Numbers that need few bits, the same on every run.
struct Numbers {
  unsigned state;
  float operator()() {
    state = state * 1664525u + 1013904223u;
    return float(int(state >> 24) - 128) / 64.f;
  }
};

// Numbers at an address divisible by 64, as from the allocator of a GPU.
template <class T>
class Matrix {
 public:
  Matrix(size_t size, Numbers& number)
      : data_(static_cast<T*>(aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64))) {
    for (size_t i = 0; i < size; ++i)
      if constexpr (sizeof(T) == 4)
        data_.get()[i] = number();
      else
        data_.get()[i] = __float2bfloat16(number());
  }
  T* data() const { return data_.get(); }
  float operator[](size_t i) const { return float(data_.get()[i]); }

 private:
  struct Free {
    void operator()(T* p) { free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// Whether C = A B within the rounding of bfloat16 and of sums in another order.
inline bool is_product(const __nv_bfloat16* C, const Matrix<__nv_bfloat16>& A, const Matrix<__nv_bfloat16>& B,
                       int M, int N, int K) {
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      double sum = 0, size = 0;
      for (int k = 0; k < K; ++k) {
        const double x = double(A[size_t(m) * K + k]) * B[size_t(k) * N + n];
        sum += x, size += std::fabs(x);
      }
      const double error = std::fabs(double(__bfloat162float(C[size_t(m) * N + n])) - sum);
      if (!(error <= std::fabs(sum) * 0x1p-8 + size * 0x1p-20)) return false;
    }
  return true;
}

}  // namespace harness
