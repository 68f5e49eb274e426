// The kernels of row_core in Python.  csrc/torch sorts the rows with torch; here std::stable_sort does.
#include <algorithm>
#include <limits>
#include <new>
#include <numeric>

#include "cuda/rows.h"
#include "module.h"

namespace lotr::simt {
namespace {

using Indices = std::optional<py::array_t<int64_t>>;
using Ends = std::optional<py::array_t<int32_t>>;

// Aligned as by torch's allocator on a GPU: an array's start decides how many sectors it takes.
template <class T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(256))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(256)); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
template <class T>
using Array = std::vector<T, Aligned<T>>;

// The last two dimensions, strides in elements.
Matrix view(const py::array& a) {
  const auto last = a.ndim() - 1;
  return {a.data(), a.strides(last - 1) / a.itemsize(), a.strides(last) / a.itemsize(), Access::element};
}
Matrix matrix(const char* name, const py::array& a) {
  name_array(name, a);
  return view(a);
}
MutableMatrix output(const char* name, py::array& a) {
  const Matrix m = matrix(name, a);
  return {a.mutable_data(), m.row, m.col, m.access};
}

struct Problem {
  cuda::Call call;
  RowIndex index{};

  Problem(const py::array& u, const py::array& cores, const Indices& core, const Ends& offs,
          const Indices& tokens, int64_t rows, int multiprocessors)
      : call{dtype_of("u", u), Float32::exact, {multiprocessors}, nullptr, settings.early} {
    if (core) index.core = core->data(), name_array("index", *core);
    if (offs) index.ends = offs->data(), name_array("offs", *offs);
    if (tokens) index.token = tokens->data(), name_array("tokens", *tokens);
    index.rows = rows, index.tokens = u.shape(0), index.cores = cores.shape(0);
  }
};

void product(const Problem& problem, const RowIndex& index, MutableMatrix h, DType h_type, const char* name,
             const py::array& a, const py::array& cores, bool transposed, double scaling, float missing) {
  RowCoreParams q{};
  q.index = index, q.a = matrix(name, a), q.cores = matrix("cores", cores);
  q.core_stride = cores.strides(0) / cores.itemsize();
  q.r_in = int32_t(cores.shape(1)), q.r_out = int32_t(cores.shape(2));
  if (transposed) std::swap(q.cores.row, q.cores.col), std::swap(q.r_in, q.r_out);
  q.h = h, q.a_type = dtype_of(name, a), q.core_type = dtype_of("cores", cores), q.h_type = h_type;
  q.scale = float(scaling), q.missing = missing;
  cuda::row_core(problem.call, q);
}

void row_core(py::array u, py::array cores, Indices index, Ends offs, Indices tokens, double scaling,
              py::array h, int multiprocessors) {
  clear_arrays();
  const Problem problem(u, cores, index, offs, tokens, h.shape(0), multiprocessors);
  product(problem, problem.index, output("h", h), dtype_of("h", h), "u", u, cores, false, scaling,
          std::numeric_limits<float>::quiet_NaN());
}

// Rows sorted by a key, and where those of each key end.
struct Sorted {
  Array<int64_t> order, keys;
  Array<int32_t> ends;

  Sorted(const Problem& problem, const py::array_t<int64_t>& key, int64_t bound)
      : order(size_t(key.size())), keys(order.size()), ends(size_t(bound + 1)) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return key.data()[a] < key.data()[b]; });
    for (size_t i = 0; i < order.size(); ++i) keys[i] = key.data()[order[i]];
    const RowEndsParams q{keys.data(), ends.data(), int64_t(keys.size()), bound};
    cuda::row_ends(problem.call, q);
  }
  Segments segments() const { return {order.data(), ends.data(), 0}; }
};

void row_core_backward(py::array g, py::array u, py::array cores, Indices index, Ends offs, Indices tokens,
                       double scaling, py::array du, py::array dcores, int multiprocessors) {
  clear_arrays();
  const Problem problem(u, cores, index, offs, tokens, g.shape(0), multiprocessors);
  const int64_t rows = g.shape(0), r_in = cores.shape(1);
  RowIndex by_core = problem.index;
  by_core.token = nullptr, by_core.tokens = rows;
  if (!tokens) {
    product(problem, by_core, output("du", du), dtype_of("du", du), "g", g, cores, true, scaling, 0.f);
  } else {
    const Sorted by_token(problem, *tokens, u.shape(0));
    Array<float> k(size_t(rows * r_in) + 1, std::numeric_limits<float>::quiet_NaN());
    product(problem, by_core, {k.data(), r_in, 1, Access::element}, DType::float32, "g", g, cores, true,
            scaling, 0.f);
    SumRowsParams q{};
    q.of_token = by_token.segments(), q.k = k.data();
    q.du = output("du", du), q.du_type = dtype_of("du", du), q.tokens = u.shape(0), q.r = int32_t(r_in);
    cuda::sum_rows(problem.call, q);
  }
  std::optional<Sorted> sorted;
  if (index) sorted.emplace(problem, *index, cores.shape(0));
  RowCoreGradParams q{};
  q.of_core = sorted ? sorted->segments() : Segments{nullptr, problem.index.ends, 1};
  q.token = problem.index.token, q.u = matrix("u", u), q.g = view(g), q.type = dtype_of("u", u);
  name_array("dcores", dcores);
  q.dcores = static_cast<float*>(dcores.mutable_data());
  q.tokens = u.shape(0), q.cores = cores.shape(0), q.r_in = int32_t(r_in);
  q.r_out = int32_t(cores.shape(2)), q.scale = float(scaling);
  const auto prepared = cuda::prepare_row_core_grad(problem.call, q, rows);
  const size_t bytes = prepared.workspace;
  Array<uint32_t> workspace(bytes / 4 + 1, 0xFFFFFFFFu);
  if (options().count_memory && bytes) register_array("workspace", workspace.data(), bytes);
  cuda::row_core_grad(problem.call, q, prepared, workspace.data());
}

}  // namespace

void define_rows(py::module_& m) {
  using namespace pybind11::literals;
  m.def("row_core", &row_core, "u"_a, "cores"_a, "index"_a, "offs"_a, "tokens"_a, "scaling"_a, "h"_a,
        py::kw_only(), "multiprocessors"_a = 132);
  m.def("row_core_backward", &row_core_backward, "g"_a, "u"_a, "cores"_a, "index"_a, "offs"_a, "tokens"_a,
        "scaling"_a, "du"_a, "dcores"_a, py::kw_only(), "multiprocessors"_a = 132);
}

}  // namespace lotr::simt
