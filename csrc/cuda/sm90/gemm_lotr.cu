// Implements gemm_lotr.h: checks, tensor maps, grid.
#include "gemm_lotr.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <vector>

#include "../dispatch.h"
#include "gemm_lotr.cuh"

namespace lotr::cuda {
namespace {

// The most rows and columns. Coordinates of a bulk copy are 32-bit, and the last tiles extend past
// the matrix.
constexpr int64_t MAX_EXTENT = int64_t(1) << 30;

// Calls f with the traits of the problem's instance.
template <class F>
void with_traits(const Call& call, const GemmLotr& problem, F f) {
  dispatch_half(call.type, [&](auto element) {
    using T = decltype(element);
    if (problem.backward)
      f(kernels::GemmLotrTraits<T, true>{});
    else
      f(kernels::GemmLotrTraits<T, false>{});
  });
}

// Returns why a tensor map cannot describe m [rows, cols], or an empty string.
std::string matrix_refusal(const char* name, const Matrix& m, int64_t rows, int64_t cols) {
  const std::string what = std::string(name) + ": expected ";
  if (m.col != 1) return what + "a column stride of 1, got " + std::to_string(m.col);
  if (const uintptr_t remainder = reinterpret_cast<uintptr_t>(m.data) % 16)
    return what + "an address divisible by 16, got a remainder of " + std::to_string(remainder);
  if (rows > 1 && (m.row % 8 || m.row < cols || m.row > MAX_EXTENT))
    return what + "a row stride that is a multiple of 8, at least " + std::to_string(cols) +
           " and at most 2^30, got " + std::to_string(m.row);
  return {};
}

// Returns why an extent of the problem is out of range, or an empty string.
std::string extent_refusal(const char* name, int64_t least, int64_t extent) {
  if (extent >= least && extent <= MAX_EXTENT) return {};
  return std::string(name) + ": expected " + std::to_string(least) + " to 2^30, got " +
         std::to_string(extent);
}

// Returns the first reason of all extents and matrices of the problem, or an empty string.
std::string layout_refusal(const GemmLotr& problem) {
  const std::string extents[] = {extent_refusal("M", 0, problem.M),
                                 extent_refusal("N", 1, problem.N),
                                 extent_refusal("K", 1, problem.K)};
  for (const std::string& text : extents)
    if (!text.empty()) return text;
  if (problem.M * problem.N > int64_t(1) << 44)  // GemmLotrTiles counts tiles in int
    return "M x N: expected at most 2^44, got " + std::to_string(problem.M * problem.N);
  const int64_t W_rows = problem.backward ? problem.K : problem.N;
  const int64_t W_cols = problem.backward ? problem.N : problem.K;
  const std::string matrices[] = {matrix_refusal("x", problem.x, problem.M, problem.K),
                                  matrix_refusal("W", problem.W, W_rows, W_cols),
                                  matrix_refusal("u", problem.u, problem.M, problem.r),
                                  matrix_refusal("F", problem.F, problem.N, problem.r),
                                  matrix_refusal("y", problem.y, problem.M, problem.N)};
  for (const std::string& text : matrices)
    if (!text.empty()) return text;
  return {};
}

// A launch of `pairs` clusters.
template <class Traits>
ptx::LaunchArgs launch_args(const Call& call, int64_t pairs) {
  ptx::LaunchArgs args{dim3(unsigned(pairs * Traits::PAIR)), dim3(Traits::THREADS),
                       sizeof(typename Traits::Smem), static_cast<ptx::stream_t>(call.stream)};
  args.cluster = dim3(Traits::PAIR);
  args.name = "gemm_lotr";
  args.early = call.early;
  return args;
}

// Returns why the current device cannot run the instance, or an empty string. A MIG slice may have
// no room for it. Each thread remembers the devices that can.
template <class Traits>
std::string device_refusal(const Call& call) {
  thread_local std::array<bool, 64> runs{};  // devices that run it
  const auto device = size_t(ptx::current_device());
  if (device < runs.size() && runs[device]) return {};
  const int capability = ptx::capability_of_device("gemm_lotr");
  if (capability != 90)
    return "device: expected compute capability 9.0, got " + std::to_string(capability / 10) + "." +
           std::to_string(capability % 10);
  if (!ptx::resident_clusters(launch_args<Traits>(call, 1),
                              reinterpret_cast<const void*>(&kernels::gemm_lotr<Traits>)))
    return "device: expected room for a pair of blocks of " +
           std::to_string(sizeof(typename Traits::Smem)) + " bytes of shared memory, got none";
  if (device < runs.size()) runs[device] = true;
  return {};
}

// The tensor map of m [rows, cols] in boxes of box_rows, from this thread's cache, which needs no
// lock. A map contains only an address and sizes, so it stays valid for other memory at the same
// address. In training the addresses repeat: weights keep theirs, and torch's allocator returns
// the same blocks in each step.
template <class T>
ptx::TensorMap tensor_map(const Matrix& m, int64_t rows, int64_t cols, int box_rows) {
  using Key = std::array<uint64_t, 5>;
  struct Entry {
    Key key{};
    ptx::TensorMap map;
  };
  static thread_local std::vector<Entry> cache(1024);  // 10 bits of the hash
  // The stride of a single row may be anything.
  const int64_t row = rows > 1 ? m.row : (cols + 7) / 8 * 8;
  const Key key{reinterpret_cast<uintptr_t>(m.data), uint64_t(rows), uint64_t(cols), uint64_t(row),
                uint64_t(box_rows)};
  uint64_t hash = 0;
  for (const uint64_t part : key) hash = (hash ^ part) * 0x9E3779B97F4A7C15;
  Entry& entry = cache[hash >> 54];
  if (entry.key != key)
    entry = {key, ptx::tensor_map_2d(static_cast<const T*>(m.data), uint32_t(rows), uint32_t(cols),
                                     uint32_t(row), uint32_t(box_rows))};
  return entry.map;
}

// Launches one instance for a problem that gemm_lotr_refusal accepts.
template <class Traits>
void run(const Call& call, const GemmLotr& problem) {
  using T = typename Traits::T;
  constexpr int HEIGHT = Traits::PAIR * Traits::BM;
  const int64_t bands = (problem.M + HEIGHT - 1) / HEIGHT;
  const int64_t columns = (problem.N + Traits::BN - 1) / Traits::BN;
  const kernels::GemmLotrParams p{problem.bias,   problem.bias_stride, int(problem.N),
                                  int(problem.K), problem.r,           {int(bands), int(columns)}};
  const int64_t pairs =
      std::clamp<int64_t>(call.card.multiprocessors / Traits::PAIR, 1, bands * columns);
  ptx::launch<kernels::gemm_lotr<Traits>>(
      launch_args<Traits>(call, pairs), tensor_map<T>(problem.x, problem.M, problem.K, Traits::BM),
      problem.backward ? tensor_map<T>(problem.W, problem.K, problem.N, Traits::BK)
                       : tensor_map<T>(problem.W, problem.N, problem.K, Traits::SHARE),
      tensor_map<T>(problem.u, problem.M, problem.r, Traits::BM),
      tensor_map<T>(problem.F, problem.N, problem.r, Traits::SHARE),
      tensor_map<T>(problem.y, problem.M, problem.N, Traits::GROUP_ROWS), p);
}

}  // namespace

std::string gemm_lotr_refusal(const Call& call, const GemmLotr& problem) {
  if (call.type == DType::float32) return "dtype: expected bfloat16 or float16, got float32";
  if (problem.r < 1 || problem.r > GEMM_LOTR_MAX_RANK)
    return "r: expected 1 to " + std::to_string(GEMM_LOTR_MAX_RANK) + ", got " +
           std::to_string(problem.r);
  std::string text = layout_refusal(problem);
  if (text.empty())
    with_traits(call, problem, [&](auto traits) { text = device_refusal<decltype(traits)>(call); });
  return text;
}

void gemm_lotr(const Call& call, const GemmLotr& problem) {
  if (const std::string refusal = gemm_lotr_refusal(call, problem); !refusal.empty())
    throw std::invalid_argument("gemm_lotr: " + refusal);
  if (problem.M > 0)
    with_traits(call, problem, [&](auto traits) { run<decltype(traits)>(call, problem); });
}

}  // namespace lotr::cuda
