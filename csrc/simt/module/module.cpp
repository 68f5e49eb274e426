// Python's view of the executor: the CUDA launchers of csrc/cuda/launch.h on numpy arrays, and the executor's
// own controls. bfloat16 travels as uint16.  Outputs are the caller's arrays, so that a test may poison, pad
// or stride them.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "cuda/counters.h"
#include "cuda/gemm_lotr.h"
#include "cuda/launch.h"
#include "cuda/launchers.h"
#include "cuda/plans.h"
#include "module_gemm_lotr.h"
#include "module_rows.h"
#include "simt/api.h"

namespace py = pybind11;

namespace lotr::simt {
namespace {

// What a block may ask for: on the smallest of the supported GPUs, and where kernels run by wgmma.
constexpr size_t SHARED_LIMIT = 101376, SHARED_LIMIT_SM90 = 232448;

struct Settings {
  plan::Card card;
  Float32 float32 = Float32::exact;
  bool wgmma = false, early = true;
  lotr::cuda::Switches off{};
  size_t shared_limit() const { return wgmma ? SHARED_LIMIT_SM90 : SHARED_LIMIT; }
} settings;

// The counters of the one stream that all calls here have.
int32_t* arrived() {
  return cuda::counters(nullptr, cuda::COUNTERS_EACH);
}

DType dtype_of(const char* name, const py::array& a) {
  if (a.itemsize() == 4 && a.dtype().kind() == 'f') return DType::float32;
  if (a.itemsize() == 2) return a.dtype().kind() == 'f' ? DType::float16 : DType::bfloat16;
  throw py::type_error(std::string(name) + ": expected float32, float16 or uint16 (bfloat16), got " +
                       std::string(py::str(a.dtype())));
}

// Registers the array under its name, so that traffic is counted for it.
void name_array(const char* name, const py::array& a) {
  if (!options().count_memory || a.size() == 0) return;
  size_t bytes = a.itemsize();
  for (int i = 0; i < a.ndim(); ++i) bytes += size_t(a.shape(i) - 1) * size_t(a.strides(i));
  register_array(name, a.data(), bytes);
}

void expect_shape(const char* name, const py::array& a, std::vector<int64_t> shape) {
  std::vector<int64_t> got(a.shape(), a.shape() + a.ndim());
  if (got != shape)
    throw py::value_error(std::string(name) + ": expected shape " + std::string(py::str(py::cast(shape))) +
                          ", got " + std::string(py::str(py::cast(got))));
}

int64_t stride(const py::array& a, int dim) {
  return a.strides(dim) / a.itemsize();
}

Matrix input(const char* name, const py::array& a, DType type, int64_t rows, int64_t cols) {
  expect_shape(name, a, {rows, cols});
  name_array(name, a);
  const int64_t row = stride(a, 0), col = stride(a, 1);
  return {a.data(), row, col, cuda::access_of(a.data(), row, col, rows, dtype_of(name, a), type)};
}

MutableMatrix output(const char* name, py::array& a, DType type, int64_t rows, int64_t cols) {
  if (dtype_of(name, a) != type)
    throw py::type_error(std::string(name) + ": expected the element type of the input");
  const Matrix m = input(name, a, type, rows, cols);
  return {a.mutable_data(), m.row, m.col, m.access};
}

float* floats(const char* name, py::array& a) {
  if (dtype_of(name, a) != DType::float32) throw py::type_error(std::string(name) + ": expected float32");
  name_array(name, a);
  return static_cast<float*>(a.mutable_data());
}

Dropout dropout(double p, const std::optional<py::array_t<int64_t>>& seed) {
  if (p == 0) return {nullptr, 0, 1.f};
  return {seed.value().data(), uint32_t(p * 4294967296.0), float(1 / (1 - p))};
}

cuda::Call call(DType type) {
  return {type, settings.float32, settings.card, nullptr, settings.early, settings.wgmma, settings.off};
}

// What torch's allocator gives on a GPU: aligned memory full of rubbish, here NaN.
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
  // Nothing was written behind it.
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
  const cuda::Prepared prepared = cuda::prepare(call, problem);
  Workspace workspace(prepared.workspace);
  cuda::run(call, problem, prepared, workspace.get());
  workspace.check();
}

// One operator call: its arrays keep their names until it ends.
struct Scope {
  Scope() { clear_arrays(); }
};

void py_shrink(py::array x, py::array A, py::array u, double p, std::optional<py::array_t<int64_t>> seed,
               double scale, std::optional<py::array> core, std::optional<py::array> h, double core_scale) {
  Scope scope;
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

void py_expand_add(py::array y, py::array u, py::array F, double p,
                   std::optional<py::array_t<int64_t>> seed) {
  Scope scope;
  const DType type = dtype_of("y", y);
  ExpandProblem params{};
  params.M = y.shape(0);
  params.N = y.shape(1);
  params.r = int32_t(F.shape(1));
  params.y = output("y", y, type, params.M, params.N);
  params.u = input("u", u, type, params.M, params.r);
  params.F = input("F", F, type, params.N, params.r);
  params.dropout = dropout(p, seed);
  run(call(type), params);
}

void py_factor_grad(py::array D, py::array x, py::array k, double p,
                    std::optional<py::array_t<int64_t>> seed) {
  Scope scope;
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
  Scope scope;
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
  Scope scope;
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
  Scope scope;
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
                      py::array u) {
  Scope scope;
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
  run(call(type), p);
}

void py_small_backward(std::optional<py::array> dx, py::array g, std::optional<py::array> x, py::array u,
                       py::array A, py::array core, py::array B, double scaling, std::optional<py::array> dA,
                       std::optional<py::array> dB, std::optional<py::array> dcore) {
  Scope scope;
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

// The kernel's address less the module's: what nm lists for its symbol.
uintptr_t offset_in_module(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info))
    throw std::runtime_error("a kernel's address: expected in this module, found elsewhere");
  return reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(info.dli_fbase);
}

py::dict counters_dict() {
  const Counters c = counters();
  py::dict arrays;
  for (const Traffic& t : c.arrays) {
    py::dict a;
    a["size"] = t.size, a["read_bytes"] = t.read_bytes, a["read_sectors"] = t.read_sectors;
    a["written_bytes"] = t.written_bytes, a["written_sectors"] = t.written_sectors;
    a["atomics"] = t.atomics, a["unwrapped"] = t.unwrapped;
    arrays[py::str(t.name)] = a;
  }
  py::list launches;
  for (const LaunchRecord& l : c.launches) {
    py::dict d;
    d["name"] = l.name, d["shared_bytes"] = l.shared_bytes, d["offset"] = offset_in_module(l.kernel);
    d["cleared"] = l.cleared, d["early"] = l.early, d["cooperative"] = l.cooperative,
    d["let_next"] = l.let_next, d["barriers"] = l.barriers, d["half_loads"] = l.half_loads,
    d["bytes"] = l.bytes;
    d["grid"] = py::make_tuple(l.grid[0], l.grid[1], l.grid[2]);
    d["cluster"] = py::make_tuple(l.cluster[0], l.cluster[1], l.cluster[2]);
    d["block"] = py::make_tuple(l.block[0], l.block[1], l.block[2]);
    launches.append(d);
  }
  py::dict d;
  d["blocks"] = c.blocks, d["threads"] = c.threads, d["switches"] = c.switches, d["barriers"] = c.barriers;
  d["warp_collectives"] = c.warp_collectives, d["mma"] = c.mma, d["wgmma"] = c.wgmma;
  d["bulk_bytes"] = c.bulk_bytes, d["multiply"] = c.multiply, d["ldmatrix"] = c.ldmatrix;
  d["async_copies"] = c.async_copies, d["async_waits"] = c.async_waits, d["late_loads"] = c.late_loads;
  d["late_bytes"] = c.late_bytes, d["late_total"] = c.late_total, d["late_stored"] = c.late_stored;
  d["last_shared"] = c.last_shared, d["last_loads"] = c.last_loads;
  d["cluster_total"] = c.cluster_total, d["sum_loads"] = c.sum_loads, d["cluster_loads"] = c.cluster_loads,
  d["cluster_bytes"] = c.cluster_bytes, d["atomics"] = c.atomics;
  d["shared_phases"] = c.shared_phases;
  d["shared_wavefronts"] = c.shared_wavefronts, d["shared_unwrapped"] = c.shared_unwrapped;
  d["launches"] = launches, d["arrays"] = arrays;
  return d;
}

void set_options_py(const std::string& order, uint64_t seed, unsigned preempt, bool count_memory,
                    std::optional<size_t> shared_limit, unsigned resident, std::optional<uint64_t> room) {
  Options o;
  const std::map<std::string, Order> orders{{"forward", Order::forward},
                                            {"reverse", Order::reverse},
                                            {"random", Order::random},
                                            {"in_turn", Order::in_turn}};
  const auto found = orders.find(order);
  if (found == orders.end())
    throw py::value_error("order: expected forward, reverse, random or in_turn, got " + order);
  o.order = found->second;
  o.seed = seed, o.preempt = preempt, o.count_memory = count_memory;
  o.shared_limit = shared_limit.value_or(settings.shared_limit());
  o.resident = resident;
  o.room = room.value_or(o.room);
  set_options(o);
}

// What takes a plan's place in Python.
py::dict dict_of(const plan::Plan& p) {
  using namespace pybind11::literals;
  return py::dict("m_blocks"_a = p.m_blocks, "n_blocks"_a = p.n_blocks, "cluster"_a = p.cluster,
                  "of_row"_a = p.of_row, "together"_a = p.together, "extra_bytes"_a = p.extra_bytes,
                  "microseconds"_a = p.microseconds, "wgmma"_a = p.wgmma, "rows"_a = p.rows,
                  "cols"_a = p.cols, "text"_a = cuda::text_of(p));
}

py::list plans_of(const std::string& kernel, int64_t M, int64_t N, int64_t r, int element,
                  int multiprocessors) {
  cuda::Call as = call(element == 2 ? DType::bfloat16 : DType::float32);
  as.card.multiprocessors = multiprocessors;
  py::list list;
  for (const plan::Plan& plan : cuda::plans_of(as, kernel, M, N, int32_t(r))) list.append(dict_of(plan));
  return list;
}

// For mutate_kernels.py: where threads synchronise, so that each place can be left out without compiling
// again.
py::list synchronisation_sites_py() {
  py::list sites;
  for (const SynchronisationSite& s : synchronisation_sites())
    sites.append(py::make_tuple(s.op, s.file, s.line, s.calls));
  return sites;
}

py::array sparse_array(std::vector<py::ssize_t> shape, const py::dtype& dtype) {
  size_t bytes = size_t(dtype.itemsize());
  for (const py::ssize_t n : shape) bytes *= size_t(n);
  void* memory = map_sparse(bytes);
  struct Map {
    void* memory;
    size_t bytes;
  };
  py::capsule owner(new Map{memory, bytes}, [](void* p) {
    std::unique_ptr<Map> map(static_cast<Map*>(p));
    unmap_sparse(map->memory, map->bytes);
  });
  return py::array(dtype, shape, memory, owner);
}

}  // namespace
}  // namespace lotr::simt

PYBIND11_MODULE(lotr_simt, m) {
  using namespace lotr;
  using namespace lotr::simt;
  using namespace pybind11::literals;
  m.doc() = "The CUDA kernels of lotr_ext, run on the CPU by the SIMT executor.  Test builds only.";
  py::register_exception<Error>(m, "Error", PyExc_RuntimeError);
  m.def("synchronisation_sites", &synchronisation_sites_py,
        "(op, file, line, calls) of every barrier, commit, wait and fence since reset_counters");
  m.def(
      "skip_synchronisation",
      [](const std::string& file, int line) {
        std::fill_n(arrived(), cuda::COUNTERS_EACH, 0);  // what an earlier line's absence has left
        skip_synchronisation({file, line});
      },
      "file"_a, "line"_a,
      "Such calls at this line do nothing from now on, as if it were deleted; ('', 0) ends it");
  m.def(
      "arrivals", [] { return std::accumulate(arrived(), arrived() + cuda::COUNTERS_EACH, int64_t(0)); },
      "Of blocks that were counted in and not taken back: 0 between launches");
  m.def("shrink", &py_shrink, "x"_a, "A"_a, "u"_a, py::kw_only(), "p"_a = 0.0, "seed"_a = py::none(),
        "scale"_a = 1.0, "core"_a = py::none(), "h"_a = py::none(), "core_scale"_a = 1.0);
  m.def("expand_add_", &py_expand_add, "y"_a, "u"_a, "F"_a, py::kw_only(), "p"_a = 0.0,
        "seed"_a = py::none());
  m.def("factor_grad_", &py_factor_grad, "acc"_a, "x"_a, "k"_a, py::kw_only(), "p"_a = 0.0,
        "seed"_a = py::none());
  m.def("shrink_grad", &py_shrink_grad, "g"_a, "F"_a, "u"_a, "k"_a, "Q"_a, "accumulate"_a = false);
  m.def("fold", &py_fold, "B"_a, "cores"_a, "scaling"_a, "F"_a);
  m.def("fold_grad", &py_fold_grad, "Q"_a, "B"_a, "cores"_a, "scaling"_a, "dB"_a, "dcores"_a);
  m.def("small_forward_", &py_small_forward, "y"_a, "x"_a, "A"_a, "core"_a, "B"_a, "scaling"_a, "u"_a);
  m.def("small_backward_", &py_small_backward, "dx"_a, "g"_a, "x"_a, "u"_a, "A"_a, "core"_a, "B"_a,
        "scaling"_a, "dA"_a, "dB"_a, "dcore"_a);
  m.def(
      "set_device",
      [](int multiprocessors, const std::string& float32, int shared, bool wgmma, bool early,
         const std::string& without, float clock, float memory) {
        if (multiprocessors < 1) throw py::value_error("multiprocessors: expected at least 1");
        if (shared < 101376) throw py::value_error("shared: expected at least the 101376 bytes of sm_86");
        if (float32 != "exact" && float32 != "tf32")
          throw py::value_error("float32: expected exact or tf32, got " + float32);
        settings = {{multiprocessors, shared, clock, memory},
                    float32 == "tf32" ? Float32::tf32 : Float32::exact,
                    wgmma,
                    early,
                    cuda::switches_of(without)};
        Options o = options();
        o.shared_limit = settings.shared_limit();
        set_options(o);
      },
      py::kw_only(), "multiprocessors"_a = 132, "float32"_a = "exact", "shared"_a = 233472, "wgmma"_a = false,
      "early"_a = true, "without"_a = "", "clock"_a = plan::Card{}.clock, "memory"_a = plan::Card{}.memory,
      "without: as LOTR_CUDA_WITHOUT; early: a GPU with early launches and clusters, of compute capability "
      "9.0 or later");
  m.def("set_options", &set_options_py, py::kw_only(), "order"_a = "forward", "seed"_a = 1, "preempt"_a = 0,
        "count_memory"_a = false, "shared_limit"_a = py::none(), "resident"_a = 1, "room"_a = py::none());
  define_gemm_lotr(m);
  define_rows(m);
  m.def("counters", &counters_dict);
  m.def("reset_counters", &reset_counters);
  m.def("product_layouts", [] { return product_layouts; });
  m.def("sparse_array", &sparse_array, "shape"_a, "dtype"_a);
  m.def("write_coverage", &write_coverage);
  m.def("build_mode", [] { return std::string(build_mode()); });
  m.def(
      "constants",
      [] {
        return std::map<std::string, int>{
            {"GEMM_LOTR_FACTOR_RANK", cuda::GEMM_LOTR_FACTOR_RANK},
            {"MOST_RESIDENT", MOST_RESIDENT},
            {"ONE_PRODUCT_WGMMA_COLS", kernels::ONE_PRODUCT_WGMMA_COLS},
            {"ONE_PRODUCT_WGMMA_ROWS", kernels::ONE_PRODUCT_WGMMA_ROWS},
            {"SHRINK_GRAD_MAX_RANK", cuda::SHRINK_GRAD_MAX_RANK},
            {"SHRINK_GRAD_ROWS", kernels::SHRINK_GRAD_ROWS},
            {"SHRINK_GRAD_ROW_BYTES", kernels::SHRINK_GRAD_ROW_BYTES},
            {"SHRINK_GRAD_WGMMA_COLS", kernels::SHRINK_GRAD_WGMMA_COLS},
            {"SHRINK_GRAD_WGMMA_ROWS", kernels::SHRINK_GRAD_WGMMA_ROWS},
            {"SHRINK_GRAD_WGMMA_STAGES", kernels::SHRINK_GRAD_WGMMA_STAGES},
        };
      },
      "Those of the sources that bench/projection needs");
  m.def(
      "plan",
      [](const std::string& kernel, int64_t M, int64_t N, int64_t r, int element, int multiprocessors)
          -> py::object { return plans_of(kernel, M, N, r, element, multiprocessors)[0]; },
      "kernel"_a, "M"_a, "N"_a, "r"_a, "element"_a = 2, "multiprocessors"_a = 132,
      "How a kernel would cut the large matrix [M, N], and the bytes it moves besides that matrix.");
  m.def("plans", &plans_of, "kernel"_a, "M"_a, "N"_a, "r"_a, "element"_a = 2, "multiprocessors"_a = 132,
        "That plan, then the others, the fastest first.");
  m.def(
      "set_rules",
      [](const std::string& forced, const std::string& measured) {
        cuda::set_rules(cuda::Rules::forced, forced), cuda::set_rules(cuda::Rules::measured, measured);
      },
      py::kw_only(), "forced"_a = "", "measured"_a = "", "Rules of csrc/cuda/plans.h");
  m.def("remembered", [] { return cuda::remembered().size(); }, "How many problems' choices are remembered");
  m.def("forget", [] { cuda::remembered().forget(); });
}
