// The launchers of csrc/cuda/gemm_lotr.h in Python.
#include "cuda/gemm_lotr.h"
#include "cuda/kernels/gemm_lotr_traits.cuh"
#include "cuda/plans.h"
#include "module.h"

namespace lotr::simt {
namespace {

Matrix matrix(const char* name, const py::array& a, DType type) {
  if (a.ndim() != 2 || dtype_of(name, a) != type)
    throw py::type_error(std::string(name) + ": expected a matrix of x's type");
  return input(name, a, type, a.shape(0), a.shape(1));
}

MutableMatrix output(const char* name, py::array& a, DType type) {
  const Matrix m = matrix(name, a, type);
  return {a.mutable_data(), m.row, m.col, m.access};
}

void gemm_lotr(py::array y, py::array x, py::array W, py::array At, py::array F, py::array u,
               py::array_t<int32_t> workspace, std::optional<py::array> bias, bool backward,
               int multiprocessors, std::optional<int> cluster, std::optional<int> scouts,
               std::optional<int> band_group, std::optional<py::array> u_forward, std::optional<py::array> Q,
               bool accumulate, std::optional<size_t> partial_bytes) {
  clear_arrays();
  const DType type = dtype_of("x", x);
  cuda::Call call{};
  call.type = type, call.card.multiprocessors = multiprocessors, call.early = true;
  cuda::GemmLotr q{};
  q.backward = backward;
  q.M = x.shape(0), q.K = x.shape(1), q.N = y.shape(1), q.r = int32_t(At.shape(0));
  q.y = output("y", y, type), q.x = matrix("x", x, type), q.W = matrix("W", W, type);
  q.At = matrix("At", At, type), q.F = matrix("F", F, type), q.u = output("u", u, type);
  if (bias) q.bias = bias->data();
  if (Q) {
    q.u_forward = matrix("u_forward", u_forward.value(), type);
    q.Q = output("Q", *Q, DType::float32), q.accumulate = accumulate;
  }
  cuda::GemmLotrPlan plan = cuda::gemm_lotr_plan(call, q.M, q.N, q.r);
  plan.cluster = cluster.value_or(plan.cluster);
  plan.scouts = scouts.value_or(plan.scouts);
  plan.band_group = band_group.value_or(plan.band_group);
  // memory as torch's allocator gives it on a GPU: aligned, of unknown content (here NaN)
  const size_t bytes = partial_bytes.value_or(cuda::gemm_lotr_partial(q, plan));
  std::vector<uint32_t> memory(bytes / 4 + 64, 0xFFFFFFFFu);
  void* partial = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) % 256) / 4;
  if (options().count_memory && bytes) register_array("partial", partial, bytes);
  cuda::gemm_lotr(call, q, plan, workspace.mutable_data(), size_t(workspace.nbytes()),
                  bytes ? partial : nullptr, bytes);
}

// fold of one layer, with the transposes that gemm_lotr reads.
void fold_transposed(py::array B, py::array core, py::array A, double scaling, py::array F, py::array Ft,
                     py::array At) {
  clear_arrays();
  FoldProblem p{};
  p.B_type = dtype_of("B", B), p.core_type = dtype_of("core", core), p.A_type = dtype_of("A", A),
  p.F_type = dtype_of("F", F);
  p.B = matrix("B", B, p.B_type), p.cores = matrix("core", core, p.core_type);
  p.A = matrix("A", A, p.A_type);
  const MutableMatrix F_out = output("F", F, p.F_type);
  p.F = F_out.data, p.F_row = F_out.row;
  p.Ft = output("Ft", Ft, p.F_type), p.At = output("At", At, p.F_type);
  p.L = 1, p.N = B.shape(0), p.K = A.shape(0);
  p.r_in = int32_t(core.shape(0)), p.r_out = int32_t(core.shape(1)), p.scale = float(scaling);
  const cuda::Call on = call(p.F_type);
  cuda::run(on, p, cuda::prepare(on, p), nullptr);
}

// The piece of work of each ticket, in order: (ticket, band, column), column -1 for a scout, -2 for Q's sums.
py::list tickets(int bands, int columns, int scouts, int band_group, int sums) {
  const kernels::GemmLotrTickets t{bands, columns, scouts, band_group, sums};
  py::list list;
  for (int ticket = 0; ticket < t.count(); ++ticket)
    for (int piece = t.first(ticket); piece >= 0; piece = t.after(piece)) {
      const kernels::GemmLotrWork work = t.work(piece);
      list.append(py::make_tuple(ticket, work.band, work.column));
    }
  return list;
}

}  // namespace

void define_gemm_lotr(py::module_& m) {
  using namespace pybind11::literals;
  m.def("gemm_lotr", &gemm_lotr, "y"_a, "x"_a, "W"_a, "At"_a, "F"_a, "u"_a, "workspace"_a, py::kw_only(),
        "bias"_a = py::none(), "backward"_a = false, "multiprocessors"_a = 132, "cluster"_a = py::none(),
        "scouts"_a = py::none(), "band_group"_a = py::none(), "u_forward"_a = py::none(), "Q"_a = py::none(),
        "accumulate"_a = false, "partial_bytes"_a = py::none());
  m.def("fold_transposed", &fold_transposed, "B"_a, "core"_a, "A"_a, "scaling"_a, "F"_a, "Ft"_a, "At"_a);
  m.def("gemm_lotr_partial", [](int64_t M, int64_t K, int r, int cluster, int scouts) {
    float any = 0;
    cuda::GemmLotr q{};
    q.M = M, q.K = K, q.r = r, q.Q.data = &any;
    return cuda::gemm_lotr_partial(q, {cluster, scouts, 1});
  });
  m.def("gemm_lotr_workspace", &cuda::gemm_lotr_workspace, "M"_a);
  m.def("gemm_lotr_plan", [](int64_t M, int64_t N, int r, int multiprocessors) {
    cuda::Call call{};
    call.card.multiprocessors = multiprocessors;
    const cuda::GemmLotrPlan plan = cuda::gemm_lotr_plan(call, M, N, r);
    return py::make_tuple(plan.cluster, plan.scouts, plan.band_group);
  });
  m.def("gemm_lotr_workspace_of", [](uintptr_t stream, size_t bytes) {
    return reinterpret_cast<uintptr_t>(cuda::gemm_lotr_workspace_of(reinterpret_cast<void*>(stream), bytes));
  });
  m.def("gemm_lotr_tickets", &tickets, "bands"_a, "columns"_a, "scouts"_a, "band_group"_a, "sums"_a = 0);
}

}  // namespace lotr::simt
