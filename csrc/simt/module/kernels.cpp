// The table of kernels that run() accepts: their names, and how arguments become the problems of
// csrc/cuda.  Outputs are the caller's arrays, so that a test can poison, pad or stride them.
#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>

#include "cuda/launch.h"
#include "cuda/sm90/gemm_lotr.h"
#include "given.h"

namespace lotr::simt {
namespace {

cuda::Call call_of(DType type) {
  return {type, device.card, nullptr, device.early};
}

template <class Problem>
void launch(const cuda::Call& call, const Problem& problem) {
  Memory memory("workspace", cuda::workspace(call, problem));
  cuda::run(call, problem, memory.as<void>());
  memory.check();
}
template <class Problem>
void launch(DType type, const Problem& problem) {
  launch(call_of(type), problem);
}

int32_t rank(const Given& given, const char* name, int dim) {
  return int32_t(given.extent(name, dim));
}

void shrink(const Given& given) {
  const DType type = given.type("x");
  ShrinkProblem q{};
  q.M = given.extent("x", 0);
  q.K = given.extent("x", 1);
  q.r = rank(given, "A", 1);
  q.x = given.input("x", type, q.M, q.K);
  q.A = given.input("A", type, q.K, q.r);
  q.u = given.output("u", type, q.M, q.r);
  q.scale = float(given.number("scale"));
  q.dropout = given.dropout();
  if (given.has("core")) {
    const int32_t r_core = rank(given, "core", 1);
    q.core_product = {given.input("core", type, q.r, r_core), given.output("h", type, q.M, r_core),
                      r_core, float(given.number("core_scale"))};
  }
  launch(type, q);
}

// y starts from `start`; without it from its values (fresh=0) or from the bias (fresh=1).
void expand_add(const Given& given) {
  const DType type = given.type("y");
  ExpandProblem q{};
  q.M = given.extent("y", 0);
  q.N = given.extent("y", 1);
  q.r = rank(given, "F", 1);
  q.y = given.output("y", type, q.M, q.N);
  if (given.has("start"))
    q.start = given.output("start", type, q.M, q.N);
  else if (given.number("fresh") == 0)
    q.start = q.y;
  q.u = given.input("u", type, q.M, q.r);
  q.F = given.input("F", type, q.N, q.r);
  q.dropout = given.dropout();
  q.bias = given.line("bias", type, q.N);
  q.bias_stride = given.stride("bias", 0);
  launch(type, q);
}

void factor_grad(const Given& given) {
  const DType type = given.type("x");
  FactorGradProblem q{};
  q.M = given.extent("x", 0);
  q.K = given.extent("x", 1);
  q.r = rank(given, "v", 1);
  q.x = given.input("x", type, q.M, q.K);
  q.v = given.input("v", type, q.M, q.r);
  q.D = given.sum("D", q.K, q.r, given.number("accumulate") != 0);
  q.dropout = given.dropout();
  launch(type, q);
}

void shrink_grad(const Given& given) {
  const DType type = given.type("g");
  ShrinkGradProblem q{};
  q.M = given.extent("g", 0);
  q.N = given.extent("g", 1);
  q.r = rank(given, "F", 1);
  q.r_u = rank(given, "u", 1);
  q.g = given.input("g", type, q.M, q.N);
  q.F = given.input("F", type, q.N, q.r);
  q.u = given.input("u", type, q.M, q.r_u);
  q.k = given.output("k", type, q.M, q.r);
  q.Q = given.sum("Q", q.N, q.r_u, given.number("accumulate") != 0);
  launch(type, q);
}

void fold(const Given& given) {
  FoldProblem q{};
  q.N = given.extent("B", 0);
  q.r_out = rank(given, "B", 1);
  q.r_in = rank(given, "core", 0);
  q.B_type = given.type("B");
  q.core_type = given.type("core");
  q.F_type = given.type("F");
  q.B = given.input("B", q.B_type, q.N, q.r_out);
  q.core = given.input("core", q.core_type, q.r_in, q.r_out);
  q.F = given.output("F", q.F_type, q.N, q.r_in);
  q.scale = float(given.number("scale"));
  launch(q.F_type, q);
}

void fold_grad(const Given& given) {
  FoldGradProblem q{};
  q.N = given.extent("B", 0);
  q.r_out = rank(given, "B", 1);
  q.r_in = rank(given, "core", 0);
  q.B_type = given.type("B");
  q.core_type = given.type("core");
  q.Q = given.input("Q", DType::float32, q.N, q.r_in);
  q.B = given.input("B", q.B_type, q.N, q.r_out);
  q.core = given.input("core", q.core_type, q.r_in, q.r_out);
  q.dB = given.sum("dB", q.N, q.r_out, given.number("accumulate") != 0);
  q.dcore = given.floats("dcore", {q.r_in, q.r_out});
  q.scale = float(given.number("scale"));
  launch(DType::float32, q);
}

void small_forward(const Given& given) {
  const DType type = given.type("x");
  SmallForwardProblem q{};
  q.M = given.extent("x", 0);
  q.K = given.extent("A", 0);
  q.N = given.extent("B", 0);
  q.r_in = rank(given, "A", 1);
  q.r_out = rank(given, "B", 1);
  q.y = given.output("y", type, q.M, q.N);
  q.x = given.input("x", type, q.M, q.K);
  q.A = given.input("A", type, q.K, q.r_in);
  q.core = given.input("core", type, q.r_in, q.r_out);
  q.B = given.input("B", type, q.N, q.r_out);
  q.u = given.output("u", type, q.M, q.r_in);
  q.scale = float(given.number("scale"));
  launch(type, q);
}

void small_backward(const Given& given) {
  const DType type = given.type("g");
  const bool add = given.number("accumulate") != 0;
  SmallBackwardProblem q{};
  q.M = given.extent("g", 0);
  q.K = given.extent("A", 0);
  q.N = given.extent("B", 0);
  q.r_in = rank(given, "A", 1);
  q.r_out = rank(given, "B", 1);
  q.dx = given.output("dx", type, q.M, q.K);
  q.g = given.input("g", type, q.M, q.N);
  q.x = given.input("x", type, q.M, q.K);
  q.u = given.input("u", type, q.M, q.r_in);
  q.A = given.input("A", type, q.K, q.r_in);
  q.core = given.input("core", type, q.r_in, q.r_out);
  q.B = given.input("B", type, q.N, q.r_out);
  q.dA = given.sum("dA", q.K, q.r_in, add);
  q.dB = given.sum("dB", q.N, q.r_out, add);
  q.dcore = given.floats("dcore", {q.r_in, q.r_out});
  q.scale = float(given.number("scale"));
  launch(type, q);
}

void pack(const Given& given) {
  const DType type = given.type("to");
  const int64_t rows = given.extent("to", 0);
  const int64_t cols = given.extent("to", 1);
  launch(type, PackProblem{given.input("from", type, rows, cols),
                           given.output("to", type, rows, cols), rows, cols});
}

// ---- row_core: csrc/torch sorts the rows with torch; std::stable_sort replaces it ----

RowIndex index_of(const Given& given, int64_t rows) {
  const int64_t cores = given.extent("cores", 0);
  const int64_t tokens = given.extent("u", 0);
  return {given.integers<int64_t>("index"),
          given.integers<int32_t>("offs"),
          given.integers<int64_t>("tokens"),
          rows,
          tokens,
          cores};
}

// A matrix with its type and extents.
Matrix matrix(const Given& given, const char* name) {
  return given.input(name, given.type(name), given.extent(name, 0), given.extent(name, 1));
}

// h = scale a G by rows; transposed: a G^T.
void product(const Given& given, const RowIndex& index, Matrix a, DType a_type, Matrix h,
             DType h_type, bool transposed, float missing) {
  const Given::Stack cores = given.stack("cores", given.extent("cores", 0),
                                         given.extent("cores", 1), given.extent("cores", 2));
  RowCoreProblem q{};
  q.index = index;
  q.a = a;
  q.cores = cores.matrix;
  q.core_stride = cores.next;
  q.r_in = rank(given, "cores", 1);
  q.r_out = rank(given, "cores", 2);
  if (transposed) {
    std::swap(q.cores.row, q.cores.col);
    std::swap(q.r_in, q.r_out);
  }
  q.h = h;
  q.a_type = a_type;
  q.core_type = given.type("cores");
  q.h_type = h_type;
  q.scale = float(given.number("scale"));
  q.missing = missing;
  launch(given.type("u"), q);
}

void row_core(const Given& given) {
  product(given, index_of(given, given.extent("h", 0)), matrix(given, "u"), given.type("u"),
          matrix(given, "h"), given.type("h"), false, std::numeric_limits<float>::quiet_NaN());
}

// Rows sorted by a key, and the ends of the rows of each key.
struct Sorted {
  Memory order, keys, ends;

  Sorted(const cuda::Call& call, const int64_t* key, int64_t rows, int64_t bound)
      : order(nullptr, size_t(rows) * 8),
        keys(nullptr, size_t(rows) * 8),
        ends(nullptr, size_t(bound + 1) * 4) {
    auto* places = order.as<int64_t>();
    std::iota(places, places + rows, 0);
    std::stable_sort(places, places + rows, [&](int64_t a, int64_t b) { return key[a] < key[b]; });
    for (int64_t i = 0; i < rows; ++i) keys.as<int64_t>()[i] = key[places[i]];
    launch(call, RowEndsProblem{keys.as<int64_t>(), ends.as<int32_t>(), rows, bound});
  }
  Segments segments() { return {order.as<int64_t>(), ends.as<int32_t>(), 0}; }
};

void sum_over_rows(const Given& given, const cuda::Call& call, const RowIndex& by_core,
                   int64_t rows, Matrix g) {
  const int64_t r_in = given.extent("cores", 1);
  const int64_t tokens = given.extent("u", 0);
  Sorted by_token(call, given.integers<int64_t>("tokens"), rows, tokens);
  Memory k(nullptr, size_t(rows * r_in) * 4);
  product(given, by_core, g, given.type("g"), {k.as<float>(), r_in, 1, Access::element},
          DType::float32, true, 0.f);
  SumRowsProblem q{};
  q.of_token = by_token.segments();
  q.k = k.as<float>();
  q.tokens = tokens;
  q.r = int32_t(r_in);
  q.du = matrix(given, "du");
  q.du_type = given.type("du");
  launch(call, q);
}

void row_core_backward(const Given& given) {
  const cuda::Call call = call_of(given.type("u"));
  const int64_t rows = given.extent("g", 0);
  const RowIndex index = index_of(given, rows);
  RowIndex by_core = index;
  by_core.token = nullptr;
  by_core.tokens = rows;
  const Matrix g = matrix(given, "g");
  if (given.has("tokens"))
    sum_over_rows(given, call, by_core, rows, g);
  else
    product(given, by_core, g, given.type("g"), matrix(given, "du"), given.type("du"), true, 0.f);
  std::optional<Sorted> by_index;
  if (index.core) by_index.emplace(call, index.core, rows, index.cores);
  RowCoreGradProblem q{};
  q.of_core = by_index ? by_index->segments() : Segments{nullptr, index.ends, 1};
  q.token = index.token;
  q.u = matrix(given, "u");
  q.g = g;
  q.type = given.type("u");
  q.rows = rows;
  q.tokens = index.tokens;
  q.cores = index.cores;
  q.r_in = rank(given, "cores", 1);
  q.r_out = rank(given, "cores", 2);
  q.dcores = given.floats("dcores", {index.cores, q.r_in, q.r_out});
  q.scale = float(given.number("scale"));
  launch(call, q);
}

// In the backward pass x, W, u, F and y are g, W, k, A and dx.
void gemm_lotr(const Given& given) {
  const DType type = given.type("x");
  cuda::GemmLotr q{};
  q.backward = given.number("backward") != 0;
  q.M = given.extent("x", 0);
  q.K = given.extent("x", 1);
  q.N = given.extent("F", 0);
  q.r = rank(given, "F", 1);
  q.x = given.input("x", type, q.M, q.K);
  q.y = given.output("y", type, q.M, q.N);
  q.W = q.backward ? given.input("W", type, q.K, q.N) : given.input("W", type, q.N, q.K);
  q.u = given.input("u", type, q.M, q.r);
  q.F = given.input("F", type, q.N, q.r);
  if (given.has("bias")) {
    const Matrix bias = given.input("bias", type, 1, q.N);
    q.bias = bias.data;
    q.bias_stride = bias.col;
  }
  cuda::gemm_lotr(call_of(type), q);
}

}  // namespace

const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> table = {
      {"shrink", "x A u [ seed core h ]", "p=0 scale=1 core_scale=1", shrink},
      {"expand_add", "y u F [ seed start bias ]", "p=0 fresh=0", expand_add},
      {"factor_grad", "D x v [ seed ]", "p=0 accumulate=1", factor_grad},
      {"shrink_grad", "g F u k Q", "accumulate=0", shrink_grad},
      {"fold", "B core F", "scale=1", fold},
      {"fold_grad", "Q B core [ dB dcore ]", "scale=1 accumulate=1", fold_grad},
      {"small_forward", "y x A core B u", "scale=1", small_forward},
      {"small_backward", "g u A core B [ x dx dA dB dcore ]", "scale=1 accumulate=1",
       small_backward},
      {"pack", "from to", "", pack},
      {"gemm_lotr", "x W u F y [ bias ]", "backward=0", gemm_lotr},
      {"row_core", "u cores h [ index offs tokens ]", "scale=1", row_core},
      {"row_core_backward", "g u cores du dcores [ index offs tokens ]", "scale=1",
       row_core_backward},
  };
  return table;
}

}  // namespace lotr::simt
