// Launches kernels/gemm_lotr.cuh: checks, tensor maps, grid.

#include "counters.h"
#include "dispatch.h"
#include "gemm_lotr.h"
#include "kernels/gemm_lotr.cuh"
#include "tensor_map.cuh"

namespace lotr::cuda {
namespace {

using kernels::Direction;

template <class Traits>
void run(const Call& call, const GemmLotr& q, const GemmLotrPlan& plan, void* workspace, void* partial) {
  using T = typename Traits::T;
  constexpr int HEIGHT = Traits::BM * Traits::CLUSTER;
  const int bands = int((q.M + HEIGHT - 1) / HEIGHT), columns = int((q.N + Traits::BN - 1) / Traits::BN);
  const int scouts = plan.scouts < bands ? plan.scouts : bands,
            steps = int((q.K + Traits::BK - 1) / Traits::BK);
  const int sums = q.Q.data ? (steps + Traits::CLUSTER - 1) / Traits::CLUSTER : 0;
  const kernels::GemmLotrParams p{
      q.y.data,
      q.bias,
      q.u.data,
      static_cast<int32_t*>(workspace),
      int(q.M),
      int(q.N),
      int(q.K),
      int(q.r),
      q.y.row,
      q.u.row,
      access_of(q.y.data, q.y.row, q.y.col, q.M, call.type, call.type) == Access::vector,
      {bands, columns, scouts, plan.band_group, sums},
      {q.Q.data ? q.u_forward.data : nullptr, q.u_forward.row, q.u_forward.access == Access::vector,
       static_cast<float*>(q.Q.data), q.Q.row, q.Q.col, q.accumulate, static_cast<float*>(partial)}};
  const int64_t tickets = scouts + int64_t(bands) * columns + sums;
  int64_t clusters = call.card.multiprocessors / Traits::CLUSTER;
  if (clusters > tickets) clusters = tickets;
  // Not early: its blocks need whole multiprocessors, and launch latency is small beside its run time.
  ptx::launch(
      {dim3(unsigned(clusters * Traits::CLUSTER)), dim3(Traits::THREADS), sizeof(typename Traits::Smem),
       static_cast<ptx::stream_t>(call.stream), dim3(Traits::CLUSTER), "gemm_lotr"},
      kernels::gemm_lotr<Traits>, tensor_map<T>(q.x, q.M, q.K, Traits::BM),
      q.backward ? tensor_map<T>(q.W, q.K, q.N, Traits::BK) : tensor_map<T>(q.W, q.N, q.K, Traits::SHARE),
      tensor_map<T>(q.At, q.r, q.K, Traits::R), tensor_map<T>(q.F, q.N, q.r, Traits::SHARE), p);
}

// How many clusters the current device holds at a time.
template <class Traits>
int resident_clusters() {
  return ptx::resident_clusters({dim3(Traits::CLUSTER), dim3(Traits::THREADS), sizeof(typename Traits::Smem),
                                 nullptr, dim3(Traits::CLUSTER)},
                                reinterpret_cast<const void*>(&kernels::gemm_lotr<Traits>));
}

// f(the traits of the instance for q and plan).
template <class F>
void with_traits(const Call& call, const GemmLotr& q, const GemmLotrPlan& plan, F f) {
  const auto directed = [&](auto rank, auto element, auto direction) {
    using T = decltype(element);
    constexpr int R = decltype(rank)::value;
    constexpr auto DIRECTION = Direction(decltype(direction)::value);
    if (plan.cluster == 1)
      f(kernels::GemmLotrTraits<T, R, DIRECTION, 1>{});
    else
      f(kernels::GemmLotrTraits<T, R, DIRECTION, 2>{});
  };
  const auto typed = [&](auto element) {
    dispatch_rank<GEMM_LOTR_MAX_RANK>(q.r, [&](auto rank) {
      if (q.backward)
        directed(rank, element, Int<int(Direction::backward)>{});
      else
        directed(rank, element, Int<int(Direction::forward)>{});
    });
  };
  dispatch_half(call.type, typed);
}

void expect(const char* name, const std::string& expected, int64_t got, bool good) {
  if (!good)
    throw std::invalid_argument(std::string("gemm_lotr: ") + name + ": expected " + expected + ", got " +
                                std::to_string(got));
}

}  // namespace

void gemm_lotr(const Call& call, const GemmLotr& q, const GemmLotrPlan& plan, void* workspace, size_t bytes,
               void* partial, size_t partial_bytes) {
  static_assert(kernels::gemm_lotr_makes_factor(GEMM_LOTR_FACTOR_RANK) &&
                !kernels::gemm_lotr_makes_factor(2 * GEMM_LOTR_FACTOR_RANK));
  const std::string refusal = gemm_lotr_refusal(call, q);
  if (!refusal.empty()) throw std::invalid_argument("gemm_lotr: " + refusal);
  expect("cluster", "1 or 2", plan.cluster, plan.cluster == 1 || plan.cluster == 2);
  expect("scouts", "1 or more", plan.scouts, plan.scouts >= 1);
  expect("band_group", "1 or more", plan.band_group, plan.band_group >= 1);
  expect("multiprocessors", "at least those of a cluster", call.card.multiprocessors,
         call.card.multiprocessors >= plan.cluster);
  const auto expect_bytes = [](const char* name, size_t needed, const void* memory, size_t given) {
    const size_t got = memory ? given : 0;
    expect(name, "at least " + std::to_string(needed) + " bytes", int64_t(got), got >= needed);
  };
  expect_bytes("workspace", gemm_lotr_workspace(q.M), workspace, bytes);
  expect_bytes("partial", gemm_lotr_partial(q, plan), partial, partial_bytes);
  if (q.M == 0 && q.Q.data && !q.accumulate) clear(q.Q.data, size_t(q.K * q.r) * sizeof(float), call.stream);
  if (q.M == 0) return;
  with_traits(call, q, plan, [&](auto traits) { run<decltype(traits)>(call, q, plan, workspace, partial); });
}

std::string gemm_lotr_obstacle(const Call& call, const GemmLotr& q, const GemmLotrPlan& plan) {
  if (call.off.fused || call.off.wgmma) return "switches: expected fused and wgmma, got LOTR_CUDA_WITHOUT";
  if (const int got = ptx::capability_of_device("gemm_lotr"); got != 90)
    return "architecture: expected compute capability 9.0, got " + std::to_string(got / 10) + "." +
           std::to_string(got % 10);
  std::string text;
  with_traits(call, q, plan, [&](auto traits) {
    using Traits = decltype(traits);
    if (!resident_clusters<Traits>())
      text = "resources: expected room for " + std::to_string(Traits::CLUSTER) + " blocks of " +
             std::to_string(sizeof(typename Traits::Smem)) + " bytes of shared memory side by side, got none";
  });
  return text;
}

}  // namespace lotr::cuda
