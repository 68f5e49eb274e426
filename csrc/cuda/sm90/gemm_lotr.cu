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

// Coordinates of a bulk copy are 32-bit, and the last tiles' coordinates pass the extent.
constexpr int64_t MOST = int64_t(1) << 30;  // rows and columns

// f(the traits of the problem's instance).
template <class F>
void with_traits(const Call& call, const GemmLotr& q, F f) {
  dispatch_half(call.type, [&](auto element) {
    using T = decltype(element);
    if (q.backward)
      f(kernels::GemmLotrTraits<T, true>{});
    else
      f(kernels::GemmLotrTraits<T, false>{});
  });
}

// Returns why a tensor map cannot describe m [rows, cols], or an empty string.
std::string refuse(const char* name, const Matrix& m, int64_t rows, int64_t cols) {
  const std::string what = std::string(name) + ": expected ";
  if (m.col != 1) return what + "a column stride of 1, got " + std::to_string(m.col);
  if (reinterpret_cast<uintptr_t>(m.data) % 16) return what + "an address divisible by 16";
  if (rows > 1 && (m.row % 8 || m.row < cols || m.row > MOST))
    return what + "a row stride that is a multiple of 8 and at least " + std::to_string(cols) +
           ", got " + std::to_string(m.row);
  return {};
}

std::string refuse_extent(const char* name, int64_t least, int64_t extent) {
  if (extent >= least && extent <= MOST) return {};
  return std::string(name) + ": expected " + std::to_string(least) + " to 2^30, got " +
         std::to_string(extent);
}

std::string refuse_layout(const GemmLotr& q) {
  const std::string extents[] = {refuse_extent("M", 0, q.M), refuse_extent("N", 1, q.N),
                                 refuse_extent("K", 1, q.K)};
  for (const std::string& text : extents)
    if (!text.empty()) return text;
  if (q.M * q.N > int64_t(1) << 44)
    return "M x N: expected at most 2^44, got " + std::to_string(q.M * q.N);
  const int64_t W_rows = q.backward ? q.K : q.N;
  const int64_t W_cols = q.backward ? q.N : q.K;
  const std::string matrices[] = {refuse("x", q.x, q.M, q.K), refuse("W", q.W, W_rows, W_cols),
                                  refuse("u", q.u, q.M, q.r), refuse("F", q.F, q.N, q.r),
                                  refuse("y", q.y, q.M, q.N)};
  for (const std::string& text : matrices)
    if (!text.empty()) return text;
  return {};
}

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
// no room for it. Queries the driver once per device and thread.
template <class Traits>
std::string refuse_device(const Call& call) {
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

template <class Traits>
void run(const Call& call, const GemmLotr& q) {
  using T = typename Traits::T;
  constexpr int HEIGHT = Traits::PAIR * Traits::BM;
  const int64_t bands = (q.M + HEIGHT - 1) / HEIGHT;
  const int64_t columns = (q.N + Traits::BN - 1) / Traits::BN;
  const kernels::GemmLotrParams p{q.bias,   q.bias_stride, int(q.N),
                                  int(q.K), q.r,           {int(bands), int(columns)}};
  const int64_t pairs =
      std::clamp<int64_t>(call.card.multiprocessors / Traits::PAIR, 1, bands * columns);
  ptx::launch<kernels::gemm_lotr<Traits>>(
      launch_args<Traits>(call, pairs), tensor_map<T>(q.x, q.M, q.K, Traits::BM),
      q.backward ? tensor_map<T>(q.W, q.K, q.N, Traits::BK)
                 : tensor_map<T>(q.W, q.N, q.K, Traits::SHARE),
      tensor_map<T>(q.u, q.M, q.r, Traits::BM), tensor_map<T>(q.F, q.N, q.r, Traits::SHARE),
      tensor_map<T>(q.y, q.M, q.N, 64), p);
}

}  // namespace

std::string gemm_lotr_refusal(const Call& call, const GemmLotr& q) {
  if (call.type == DType::float32) return "dtype: expected bfloat16 or float16, got float32";
  if (q.r < 1 || q.r > GEMM_LOTR_MAX_RANK)
    return "r: expected 1 to " + std::to_string(GEMM_LOTR_MAX_RANK) + ", got " +
           std::to_string(q.r);
  std::string text = refuse_layout(q);
  if (text.empty())
    with_traits(call, q, [&](auto traits) { text = refuse_device<decltype(traits)>(call); });
  return text;
}

void gemm_lotr(const Call& call, const GemmLotr& q) {
  if (const std::string refusal = gemm_lotr_refusal(call, q); !refusal.empty())
    throw std::invalid_argument("gemm_lotr: " + refusal);
  if (q.M > 0) with_traits(call, q, [&](auto traits) { run<decltype(traits)>(call, q); });
}

}  // namespace lotr::cuda
