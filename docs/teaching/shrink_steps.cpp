// Runs the five steps in the SIMT executor, compares each with float64 in three orders of the
// threads, and prints what each step reads and issues.
#include "shrink_steps.cuh"

#include <cmath>
#include <cstdio>
#include <vector>

#include "simt/api.h"

namespace {

using lotr::simt::Options;
using lotr::simt::Order;

struct Step {
  const char* name;
  void (*kernel)(steps::Params);
  int tokens, threads;  // of a block
  size_t shared;        // its bytes of shared memory
};
const Step STEPS[] = {
    {"1 naive", steps::naive, 16, 256, 0},
    {"2 wide loads", steps::wide, 8, 256, 0},
    {"3 shared tile", steps::tiled, steps::ROWS, 256, sizeof(steps::PlainSmem)},
    {"4 tensor cores", steps::tensor_cores, steps::ROWS, steps::THREADS, sizeof(steps::Stage)},
    {"5 ring of copies", steps::ring, steps::ROWS, steps::THREADS, sizeof(steps::RingSmem)},
};

// An array whose address is a multiple of 256, as cudaMalloc returns it.
template <class T>
struct Array {
  struct alignas(256) Line {
    T v[256 / sizeof(T)];
  };
  std::vector<Line> lines;
  size_t size;
  explicit Array(size_t size) : lines((size * sizeof(T) + 255) / 256), size(size) {}
  T* data() { return lines[0].v; }
  T* begin() { return data(); }
  T* end() { return data() + size; }
};

struct Problem {
  int M, K;
  Array<__nv_bfloat16> x, A;
  Array<float> u;
  Problem(int M, int K)
      : M(M), K(K), x(size_t(M) * K), A(size_t(K) * steps::R), u(size_t(M) * steps::R) {
    unsigned state = 1;
    for (auto* values : {&x, &A})
      for (auto& v : *values) {
        state = state * 1664525u + 1013904223u;
        v = __float2bfloat16(float(int(state >> 24) - 128) / 64.f);
      }
  }
  void run(const Step& step) {
    for (float& v : u) v = NAN;
    const dim3 grid((M + step.tokens - 1) / step.tokens);
    lotr::simt::launch(
        {step.name, grid, dim3(unsigned(step.threads)), /*cluster=*/dim3(1, 1, 1), step.shared,
         /*early=*/false},
        step.kernel, steps::Params{x.data(), A.data(), u.data(), M, K});
  }
  bool right() {
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < steps::R; ++j) {
        double sum = 0, size = 0;
        for (int k = 0; k < K; ++k) {
          const double term = double(__bfloat162float(x.data()[size_t(m) * K + k])) *
                              __bfloat162float(A.data()[size_t(k) * steps::R + j]);
          sum += term;
          size += std::fabs(term);
        }
        if (!(std::fabs(sum - u.data()[size_t(m) * steps::R + j]) <= 1e-6 * size + 1e-30))
          return false;
      }
    return true;
  }
};

bool right_in_all_orders(const Step& step) {
  Problem ragged(77, 192);
  for (const Order order : {Order::forward, Order::reverse, Order::random}) {
    Options options;
    options.order = order;
    options.preempt = order == Order::random ? 16 : 0;  // switches fibers at one access in 16
    lotr::simt::set_options(options);
    ragged.run(step);
    if (!ragged.right()) return false;
  }
  return true;
}

}  // namespace

int main() {
  Problem problem(128, 1024);
  const size_t x_bytes = problem.x.size * 2, A_bytes = problem.A.size * 2;
  lotr::simt::register_array("x", problem.x.data(), x_bytes);
  lotr::simt::register_array("A", problem.A.data(), A_bytes);
  std::printf("%-16s %5s %5s %8s %6s %8s %6s\n", "", "x", "A", "multiply", "shared", "conflict",
              "flight");
  for (const Step& step : STEPS) {
    if (!right_in_all_orders(step)) {
      std::printf("%s: wrong\n", step.name);
      return 1;
    }
    Options options;
    options.count_memory = true;
    lotr::simt::set_options(options);
    lotr::simt::reset_counters();
    problem.run(step);
    const lotr::simt::Counters c = lotr::simt::counters();
    // Without tensor cores, a multiply-add of a warp computes 32 of the M K R products.
    const uint64_t multiply = c.mma ? c.mma : uint64_t(problem.M) * problem.K * steps::R / 32;
    const double conflict =
        c.shared_phases ? double(c.shared_wavefronts) / double(c.shared_phases) : 0.;
    std::printf("%-16s %5.1f %5.1f %8llu %6llu %8.1f %6zu\n", step.name,
                32. * double(c.arrays[0].read_sectors) / double(x_bytes),
                32. * double(c.arrays[1].read_sectors) / double(x_bytes),
                (unsigned long long)multiply, (unsigned long long)c.shared_wavefronts, conflict,
                c.async_copies ? (steps::STAGES - 1) * sizeof(steps::Stage) : size_t{0});
  }
  return 0;
}
