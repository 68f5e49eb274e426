// Launches kernels/gemm_lotr.cuh: checks, tensor maps, grid.
#include "dispatch.h"
#include "gemm_lotr.h"
#include "kernels/gemm_lotr.cuh"

namespace lotr::cuda {
namespace {

using kernels::Direction;

template <class Traits>
void run(const Call& call, const GemmLotr& q, const GemmLotrPlan& plan, void* workspace) {
  using T = typename Traits::T;
  const auto map = [](const Matrix& m, int64_t rows, int64_t cols, int box_rows) {
    return ptx::tensor_map_2d(static_cast<const T*>(m.data), uint32_t(rows), uint32_t(cols), uint32_t(m.row),
                              uint32_t(box_rows));
  };
  constexpr int HEIGHT = Traits::BM * Traits::CLUSTER;
  const int bands = int((q.M + HEIGHT - 1) / HEIGHT), columns = int((q.N + Traits::BN - 1) / Traits::BN);
  const int scouts = plan.scouts < bands ? plan.scouts : bands;
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
      {bands, columns, scouts, plan.band_group}};
  const int64_t tickets = scouts + int64_t(bands) * columns;
  int64_t clusters = call.multiprocessors / Traits::CLUSTER;
  if (clusters > tickets) clusters = tickets;
  ptx::launch(
      {dim3(unsigned(clusters * Traits::CLUSTER)), dim3(Traits::THREADS), sizeof(typename Traits::Smem),
       static_cast<ptx::stream_t>(call.stream), dim3(Traits::CLUSTER), "gemm_lotr"},
      kernels::gemm_lotr<Traits>, map(q.x, q.M, q.K, Traits::BM),
      q.backward ? map(q.W, q.K, q.N, Traits::BK) : map(q.W, q.N, q.K, Traits::SHARE),
      map(q.At, q.r, q.K, Traits::R), map(q.F, q.N, q.r, Traits::SHARE), p);
}

template <class T, int R, Direction DIRECTION>
void run_cluster(const Call& call, const GemmLotr& q, const GemmLotrPlan& plan, void* workspace) {
  if (plan.cluster == 1)
    run<kernels::GemmLotrTraits<T, R, DIRECTION, 1>>(call, q, plan, workspace);
  else
    run<kernels::GemmLotrTraits<T, R, DIRECTION, 2>>(call, q, plan, workspace);
}

template <class T>
void run_type(const Call& call, const GemmLotr& q, const GemmLotrPlan& plan, void* workspace) {
  dispatch_rank<GEMM_LOTR_MAX_RANK>(q.r, [&](auto rank) {
    constexpr int R = decltype(rank)::value;
    if (q.backward)
      run_cluster<T, R, Direction::backward>(call, q, plan, workspace);
    else
      run_cluster<T, R, Direction::forward>(call, q, plan, workspace);
  });
}

void expect(const char* name, const std::string& expected, int64_t got, bool good) {
  if (!good)
    throw std::invalid_argument(std::string("gemm_lotr: ") + name + ": expected " + expected + ", got " +
                                std::to_string(got));
}

}  // namespace

void gemm_lotr(const Call& call, const GemmLotr& q, const GemmLotrPlan& plan, void* workspace, size_t bytes) {
  const std::string refusal = gemm_lotr_refusal(call, q);
  if (!refusal.empty()) throw std::invalid_argument("gemm_lotr: " + refusal);
  expect("cluster", "1 or 2", plan.cluster, plan.cluster == 1 || plan.cluster == 2);
  expect("scouts", "1 or more", plan.scouts, plan.scouts >= 1);
  expect("band_group", "1 or more", plan.band_group, plan.band_group >= 1);
  expect("multiprocessors", "at least those of a cluster", call.multiprocessors,
         call.multiprocessors >= plan.cluster);
  const size_t needed = gemm_lotr_workspace(q.M);
  expect("workspace", "at least " + std::to_string(needed) + " bytes", int64_t(bytes),
         workspace && bytes >= needed);
  if (q.M == 0) return;
  if (call.type == DType::bfloat16)
    run_type<__nv_bfloat16>(call, q, plan, workspace);
  else
    run_type<__half>(call, q, plan, workspace);
}

}  // namespace lotr::cuda
