// The launchers of csrc/cuda/launch.h in Python.  Outputs are the caller's arrays, so that a test may poison,
// pad or stride them.
#include "cuda/launchers.h"
#include "module.h"

namespace lotr::simt {
namespace {

// Memory as torch's allocator gives it on a GPU: aligned, of unknown content (here NaN).
class Workspace {
 public:
  explicit Workspace(size_t bytes) : memory_(bytes / 4 + 1024, 0xFFFFFFFFu) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    base_ = reinterpret_cast<void*>((address + 255) / 256 * 256);
    behind_ = static_cast<uint32_t*>(base_) + (bytes + 3) / 4;
    if (!options().count_memory || !bytes) return;
    register_array("workspace", base_, bytes);
    watch(base_, bytes);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { watch(nullptr, 0); }
  void* get() { return base_; }
  // Throws if a kernel wrote behind it.
  void check() const {
    for (const uint32_t* word = behind_; word < memory_.data() + memory_.size(); ++word)
      if (*word != 0xFFFFFFFFu) throw std::runtime_error("workspace: a kernel has written behind its end");
  }

 private:
  std::vector<uint32_t> memory_;
  void* base_;
  const uint32_t* behind_;
};

template <class Problem>
void run(const cuda::Call& call, const Problem& problem) {
  const auto prepared = cuda::prepare(call, problem);
  Workspace workspace(prepared.workspace);
  cuda::run(call, problem, prepared, workspace.get());
  workspace.check();
}

void py_shrink(py::array x, py::array A, py::array u, double p, std::optional<py::array_t<int64_t>> seed,
               double scale, std::optional<py::array> core, std::optional<py::array> h, double core_scale) {
  clear_arrays();
  const DType type = dtype_of("x", x);
  ShrinkProblem params{};
  params.M = x.shape(0);
  params.K = x.shape(1);
  params.r = int32_t(A.shape(1));
  params.x = input("x", x, type, params.M, params.K);
  params.A = input("A", A, type, params.K, params.r);
  params.u = output("u", u, type, params.M, params.r);
  params.scale = float(scale);
  params.dropout = dropout(p, seed);
  if (core) {
    params.r_core = int32_t(core->shape(1));
    params.core = input("core", *core, type, params.r, params.r_core);
    params.h = output("h", h.value(), type, params.M, params.r_core);
    params.core_scale = float(core_scale);
  }
  run(call(type), params);
}

// scale: float32 [N]; bias: [N] of `type`, any strides.
RowScale of_rows(const std::optional<py::array>& scale, const std::optional<py::array>& bias, DType type,
                 int64_t N) {
  RowScale row{};
  if (!scale) return row;
  expect_shape("scale", *scale, {N});
  name_array("scale", *scale);
  row.scale = static_cast<const float*>(scale->data()), row.scale_stride = stride(*scale, 0);
  if (!bias) return row;
  expect_shape("bias", *bias, {N});
  name_array("bias", *bias);
  if (dtype_of("bias", *bias) != type) throw py::type_error("bias: expected the element type of y");
  row.bias = bias->data(), row.bias_stride = stride(*bias, 0);
  return row;
}

void py_expand_add(py::array y, py::array u, py::array F, double p, std::optional<py::array_t<int64_t>> seed,
                   std::optional<py::array> scale, std::optional<py::array> bias) {
  clear_arrays();
  const DType type = dtype_of("y", y);
  ExpandProblem params{};
  params.M = y.shape(0);
  params.N = y.shape(1);
  params.r = int32_t(F.shape(1));
  params.y = output("y", y, type, params.M, params.N);
  params.u = input("u", u, type, params.M, params.r);
  params.F = input("F", F, type, params.N, params.r);
  params.dropout = dropout(p, seed);
  params.of_rows = of_rows(scale, bias, type, params.N);
  run(call(type), params);
}

void py_scale_backward(py::array g, py::array y, std::optional<py::array> bias, py::array scale, py::array g0,
                       py::array dscale) {
  clear_arrays();
  const DType type = dtype_of("g", g);
  ScaleBackwardProblem params{};
  params.M = g.shape(0);
  params.N = g.shape(1);
  params.g = input("g", g, type, params.M, params.N);
  params.y = input("y", y, type, params.M, params.N);
  params.g0 = output("g0", g0, type, params.M, params.N);
  params.of_rows = of_rows(scale, bias, type, params.N);
  expect_shape("dscale", dscale, {params.N});
  params.dscale = floats("dscale", dscale);
  run(call(type), params);
}

void py_factor_grad(py::array D, py::array x, py::array k, double p,
                    std::optional<py::array_t<int64_t>> seed) {
  clear_arrays();
  const DType type = dtype_of("x", x);
  FactorGradProblem params{};
  params.M = x.shape(0);
  params.K = x.shape(1);
  params.r = int32_t(k.shape(1));
  params.x = input("x", x, type, params.M, params.K);
  params.v = input("k", k, type, params.M, params.r);
  expect_shape("acc", D, {params.K, params.r});
  params.D = floats("acc", D);
  params.D_row = stride(D, 0);
  params.D_col = stride(D, 1);
  params.accumulate = 1;
  params.dropout = dropout(p, seed);
  run(call(type), params);
}

void py_shrink_grad(py::array g, py::array F, py::array u, py::array k, py::array Q, bool accumulate) {
  clear_arrays();
  const DType type = dtype_of("g", g);
  ShrinkGradProblem params{};
  params.M = g.shape(0);
  params.N = g.shape(1);
  params.r = int32_t(F.shape(1));
  params.g = input("g", g, type, params.M, params.N);
  params.F = input("F", F, type, params.N, params.r);
  params.u = input("u", u, type, params.M, params.r);
  params.k = output("k", k, type, params.M, params.r);
  expect_shape("Q", Q, {params.N, params.r});
  params.Q = floats("Q", Q);
  params.Q_row = stride(Q, 0);
  params.Q_col = stride(Q, 1);
  params.accumulate = accumulate;
  run(call(type), params);
}

void py_fold(py::array B, py::array cores, double scaling, py::array F) {
  clear_arrays();
  FoldProblem params{};
  params.N = B.shape(0);
  params.r_out = int32_t(B.shape(1));
  params.L = int32_t(cores.shape(0));
  params.r_in = int32_t(cores.shape(1));
  params.B_type = dtype_of("B", B);
  params.core_type = dtype_of("cores", cores);
  params.F_type = dtype_of("F", F);
  params.B = input("B", B, params.B_type, params.N, params.r_out);
  expect_shape("cores", cores, {params.L, params.r_in, params.r_out});
  name_array("cores", cores);
  params.cores = {cores.data(), stride(cores, 1), stride(cores, 2), Access::element};
  params.core_stride = stride(cores, 0);
  expect_shape("F", F, {params.L, params.N, params.r_in});
  name_array("F", F);
  params.F = F.mutable_data();
  params.F_layer = stride(F, 0), params.F_row = stride(F, 1);
  params.scale = float(scaling);
  run(call(params.F_type), params);
}

void py_fold_grad(py::array Q, py::array B, py::array cores, double scaling, std::optional<py::array> dB,
                  py::array dcores) {
  clear_arrays();
  FoldGradProblem params{};
  params.N = B.shape(0);
  params.r_out = int32_t(B.shape(1));
  params.L = int32_t(cores.shape(0));
  params.r_in = int32_t(cores.shape(1));
  params.B_type = dtype_of("B", B);
  params.core_type = dtype_of("cores", cores);
  expect_shape("Q", Q, {params.L, params.N, params.r_in});
  params.Q = {floats("Q", Q), stride(Q, 1), stride(Q, 2), Access::element};
  params.Q_stride = stride(Q, 0);
  params.B = input("B", B, params.B_type, params.N, params.r_out);
  name_array("cores", cores);
  params.cores = {cores.data(), stride(cores, 1), stride(cores, 2), Access::element};
  params.core_stride = stride(cores, 0);
  if (dB) {
    expect_shape("dB", *dB, {params.N, params.r_out});
    params.dB = floats("dB", *dB);
    params.dB_row = stride(*dB, 0);
    params.dB_col = stride(*dB, 1);
  }
  expect_shape("dcores", dcores, {params.L, params.r_in, params.r_out});
  params.dcores = floats("dcores", dcores);
  params.scale = float(scaling);
  run(call(DType::float32), params);
}

void py_small_forward(py::array y, py::array x, py::array A, py::array core, py::array B, double scaling,
                      py::array u, std::optional<py::array> scale, std::optional<py::array> bias) {
  clear_arrays();
  const DType type = dtype_of("x", x);
  SmallForwardProblem p{};
  p.M = x.shape(0), p.K = A.shape(0), p.N = B.shape(0);
  p.r_in = int32_t(A.shape(1)), p.r_out = int32_t(B.shape(1));
  p.y = output("y", y, type, p.M, p.N);
  p.x = input("x", x, type, p.M, p.K);
  p.A = input("A", A, type, p.K, p.r_in);
  p.core = input("core", core, type, p.r_in, p.r_out);
  p.B = input("B", B, type, p.N, p.r_out);
  p.u = output("u", u, type, p.M, p.r_in);
  p.scale = float(scaling);
  p.of_rows = of_rows(scale, bias, type, p.N);
  run(call(type), p);
}

void py_small_backward(std::optional<py::array> dx, py::array g, std::optional<py::array> x, py::array u,
                       py::array A, py::array core, py::array B, double scaling, std::optional<py::array> dA,
                       std::optional<py::array> dB, std::optional<py::array> dcore) {
  clear_arrays();
  const DType type = dtype_of("g", g);
  SmallBackwardProblem p{};
  p.M = g.shape(0), p.K = A.shape(0), p.N = B.shape(0);
  p.r_in = int32_t(A.shape(1)), p.r_out = int32_t(B.shape(1));
  if (dx) p.dx = output("dx", *dx, type, p.M, p.K);
  p.g = input("g", g, type, p.M, p.N);
  if (x) p.x = input("x", *x, type, p.M, p.K);
  p.u = input("u", u, type, p.M, p.r_in);
  p.A = input("A", A, type, p.K, p.r_in);
  p.core = input("core", core, type, p.r_in, p.r_out);
  p.B = input("B", B, type, p.N, p.r_out);
  if (dA) p.dA = floats("dA", *dA), p.dA_row = stride(*dA, 0), p.dA_col = stride(*dA, 1);
  if (dB) p.dB = floats("dB", *dB), p.dB_row = stride(*dB, 0), p.dB_col = stride(*dB, 1);
  if (dcore) p.dcore = floats("dcore", *dcore);
  p.scale = float(scaling);
  run(call(type), p);
}

}  // namespace

void define_operators(py::module_& m) {
  using namespace pybind11::literals;
  m.def("shrink", &py_shrink, "x"_a, "A"_a, "u"_a, py::kw_only(), "p"_a = 0.0, "seed"_a = py::none(),
        "scale"_a = 1.0, "core"_a = py::none(), "h"_a = py::none(), "core_scale"_a = 1.0);
  m.def("expand_add_", &py_expand_add, "y"_a, "u"_a, "F"_a, py::kw_only(), "p"_a = 0.0, "seed"_a = py::none(),
        "scale"_a = py::none(), "bias"_a = py::none());
  m.def("scale_backward", &py_scale_backward, "g"_a, "y"_a, "bias"_a, "scale"_a, "g0"_a, "dscale"_a);
  m.def("factor_grad_", &py_factor_grad, "acc"_a, "x"_a, "k"_a, py::kw_only(), "p"_a = 0.0,
        "seed"_a = py::none());
  m.def("shrink_grad", &py_shrink_grad, "g"_a, "F"_a, "u"_a, "k"_a, "Q"_a, "accumulate"_a = false);
  m.def("fold", &py_fold, "B"_a, "cores"_a, "scaling"_a, "F"_a);
  m.def("fold_grad", &py_fold_grad, "Q"_a, "B"_a, "cores"_a, "scaling"_a, "dB"_a, "dcores"_a);
  m.def("small_forward_", &py_small_forward, "y"_a, "x"_a, "A"_a, "core"_a, "B"_a, "scaling"_a, "u"_a,
        py::kw_only(), "scale"_a = py::none(), "bias"_a = py::none());
  m.def("small_backward_", &py_small_backward, "dx"_a, "g"_a, "x"_a, "u"_a, "A"_a, "core"_a, "B"_a,
        "scaling"_a, "dA"_a, "dB"_a, "dcore"_a);
}

}  // namespace lotr::simt
