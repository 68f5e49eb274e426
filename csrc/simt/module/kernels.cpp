// The table of kernels that run() accepts: their names, and how arguments become the problems of
// csrc/cuda. Outputs are the caller's arrays, so that a test can poison, pad or stride them.
#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>

#include "arguments.h"
#include "cuda/launch.h"
#include "cuda/sm90/gemm_lotr.h"

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

int32_t rank(const Arguments& args, const char* name, int dim) {
  return int32_t(args.extent(name, dim));
}

void shrink(const Arguments& args) {
  const DType type = args.type("x");
  ShrinkProblem problem{};
  problem.M = args.extent("x", 0);
  problem.K = args.extent("x", 1);
  problem.r = rank(args, "A", 1);
  problem.x = args.input("x", type, problem.M, problem.K);
  problem.A = args.input("A", type, problem.K, problem.r);
  problem.u = args.output("u", type, problem.M, problem.r);
  problem.scale = float(args.number("scale"));
  problem.dropout = args.dropout();
  if (args.has("core")) {
    const int32_t r_core = rank(args, "core", 1);
    problem.core_product = {args.input("core", type, problem.r, r_core),
                            args.output("h", type, problem.M, r_core), r_core,
                            float(args.number("core_scale"))};
  }
  launch(type, problem);
}

// y starts from `start`. Without it, y starts from the values that it has (from_bias=0) or from the
// bias (from_bias=1).
void expand_add(const Arguments& args) {
  const DType type = args.type("y");
  ExpandProblem problem{};
  problem.M = args.extent("y", 0);
  problem.N = args.extent("y", 1);
  problem.r = rank(args, "F", 1);
  problem.y = args.output("y", type, problem.M, problem.N);
  if (args.has("start"))
    problem.start = args.output("start", type, problem.M, problem.N);  // must have y's type
  else if (args.number("from_bias") == 0)
    problem.start = problem.y;
  problem.u = args.input("u", type, problem.M, problem.r);
  problem.F = args.input("F", type, problem.N, problem.r);
  problem.dropout = args.dropout();
  problem.bias = args.vector("bias", type, problem.N);
  problem.bias_stride = args.stride("bias", 0);
  launch(type, problem);
}

void factor_grad(const Arguments& args) {
  const DType type = args.type("x");
  FactorGradProblem problem{};
  problem.M = args.extent("x", 0);
  problem.K = args.extent("x", 1);
  problem.r = rank(args, "v", 1);
  problem.x = args.input("x", type, problem.M, problem.K);
  problem.v = args.input("v", type, problem.M, problem.r);
  problem.D = args.sum("D", problem.K, problem.r, args.number("accumulate") != 0);
  problem.dropout = args.dropout();
  launch(type, problem);
}

void shrink_grad(const Arguments& args) {
  const DType type = args.type("g");
  ShrinkGradProblem problem{};
  problem.M = args.extent("g", 0);
  problem.N = args.extent("g", 1);
  problem.r = rank(args, "F", 1);
  problem.r_u = rank(args, "u", 1);
  problem.g = args.input("g", type, problem.M, problem.N);
  problem.F = args.input("F", type, problem.N, problem.r);
  problem.u = args.input("u", type, problem.M, problem.r_u);
  problem.du = args.output("du", type, problem.M, problem.r);
  problem.Q = args.sum("Q", problem.N, problem.r_u, args.number("accumulate") != 0);
  launch(type, problem);
}

void fold(const Arguments& args) {
  FoldProblem problem{};
  problem.N = args.extent("B", 0);
  problem.r_out = rank(args, "B", 1);
  problem.r_in = rank(args, "core", 0);
  problem.B_type = args.type("B");
  problem.core_type = args.type("core");
  problem.F_type = args.type("F");
  problem.B = args.input("B", problem.B_type, problem.N, problem.r_out);
  problem.core = args.input("core", problem.core_type, problem.r_in, problem.r_out);
  problem.F = args.output("F", problem.F_type, problem.N, problem.r_in);
  problem.scale = float(args.number("scale"));
  launch(problem.F_type, problem);
}

void fold_grad(const Arguments& args) {
  FoldGradProblem problem{};
  problem.N = args.extent("B", 0);
  problem.r_out = rank(args, "B", 1);
  problem.r_in = rank(args, "core", 0);
  problem.B_type = args.type("B");
  problem.core_type = args.type("core");
  problem.Q = args.input("Q", DType::float32, problem.N, problem.r_in);
  problem.B = args.input("B", problem.B_type, problem.N, problem.r_out);
  problem.core = args.input("core", problem.core_type, problem.r_in, problem.r_out);
  problem.dB = args.sum("dB", problem.N, problem.r_out, args.number("accumulate") != 0);
  problem.dcore = args.floats("dcore", {problem.r_in, problem.r_out});
  problem.scale = float(args.number("scale"));
  launch(DType::float32, problem);
}

void few_tokens_forward(const Arguments& args) {
  const DType type = args.type("x");
  FewTokensForwardProblem problem{};
  problem.M = args.extent("x", 0);
  problem.K = args.extent("A", 0);
  problem.N = args.extent("B", 0);
  problem.r_in = rank(args, "A", 1);
  problem.r_out = rank(args, "B", 1);
  problem.y = args.output("y", type, problem.M, problem.N);
  problem.x = args.input("x", type, problem.M, problem.K);
  problem.A = args.input("A", type, problem.K, problem.r_in);
  problem.core = args.input("core", type, problem.r_in, problem.r_out);
  problem.B = args.input("B", type, problem.N, problem.r_out);
  problem.u = args.output("u", type, problem.M, problem.r_in);
  problem.scale = float(args.number("scale"));
  launch(type, problem);
}

void few_tokens_backward(const Arguments& args) {
  const DType type = args.type("g");
  const bool add = args.number("accumulate") != 0;
  FewTokensBackwardProblem problem{};
  problem.M = args.extent("g", 0);
  problem.K = args.extent("A", 0);
  problem.N = args.extent("B", 0);
  problem.r_in = rank(args, "A", 1);
  problem.r_out = rank(args, "B", 1);
  problem.dx = args.output("dx", type, problem.M, problem.K);
  problem.g = args.input("g", type, problem.M, problem.N);
  problem.x = args.input("x", type, problem.M, problem.K);
  problem.u = args.input("u", type, problem.M, problem.r_in);
  problem.A = args.input("A", type, problem.K, problem.r_in);
  problem.core = args.input("core", type, problem.r_in, problem.r_out);
  problem.B = args.input("B", type, problem.N, problem.r_out);
  problem.dA = args.sum("dA", problem.K, problem.r_in, add);
  problem.dB = args.sum("dB", problem.N, problem.r_out, add);
  problem.dcore = args.floats("dcore", {problem.r_in, problem.r_out});
  problem.scale = float(args.number("scale"));
  launch(type, problem);
}

void pack(const Arguments& args) {
  const DType type = args.type("to");
  const int64_t rows = args.extent("to", 0);
  const int64_t cols = args.extent("to", 1);
  launch(type, PackProblem{args.input("from", type, rows, cols),
                           args.output("to", type, rows, cols), rows, cols});
}

// ---- row_core: csrc/torch sorts the rows by torch's sort, this file by std::stable_sort ----

RowIndex index_of(const Arguments& args, int64_t rows) {
  const int64_t cores = args.extent("cores", 0);
  const int64_t tokens = args.extent("u", 0);
  return {args.integers<int64_t>("index"),
          args.integers<int32_t>("offs"),
          args.integers<int64_t>("tokens"),
          rows,
          tokens,
          cores};
}

struct TypedMatrix {
  Matrix matrix;
  DType type;
};
TypedMatrix typed_matrix(const Arguments& args, const char* name) {
  const DType type = args.type(name);
  return {args.input(name, type, args.extent(name, 0), args.extent(name, 1)), type};
}

// h_i = scale a_t(i) G_c(i).
RowCoreProblem row_core_problem(const Arguments& args, const RowIndex& index, const TypedMatrix& a,
                                const TypedMatrix& h) {
  const Arguments::Stack cores = args.stack("cores", args.extent("cores", 0),
                                            args.extent("cores", 1), args.extent("cores", 2));
  RowCoreProblem problem{};
  problem.index = index;
  problem.a = a.matrix;
  problem.cores = cores.first;
  problem.core_stride = cores.stride;
  problem.h = h.matrix;
  problem.a_type = a.type;
  problem.core_type = args.type("cores");
  problem.h_type = h.type;
  problem.r_in = rank(args, "cores", 1);
  problem.r_out = rank(args, "cores", 2);
  problem.scale = float(args.number("scale"));
  problem.missing = std::numeric_limits<float>::quiet_NaN();
  return problem;
}

// row_du_i = scale g_i G_c(i)^T, 0 for a row without a core. Row i reads row i of g, not a token's.
RowCoreProblem row_du_problem(const Arguments& args, RowIndex index, const TypedMatrix& row_du) {
  index.token = nullptr;
  index.tokens = index.rows;
  RowCoreProblem problem = row_core_problem(args, index, typed_matrix(args, "g"), row_du);
  std::swap(problem.cores.row, problem.cores.col);
  std::swap(problem.r_in, problem.r_out);
  problem.missing = 0.f;
  return problem;
}

void row_core(const Arguments& args) {
  const RowIndex index = index_of(args, args.extent("h", 0));
  launch(args.type("u"),
         row_core_problem(args, index, typed_matrix(args, "u"), typed_matrix(args, "h")));
}

// Rows sorted by a key, and the ends of the rows of each key, which the kernel row_ends computes.
struct SortedRows {
  Memory order, keys, ends;

  SortedRows(const cuda::Call& call, const int64_t* key, int64_t rows, int64_t bound)
      : order(nullptr, size_t(rows) * 8),
        keys(nullptr, size_t(rows) * 8),
        ends(nullptr, size_t(bound + 1) * 4) {
    auto* places = order.as<int64_t>();
    std::iota(places, places + rows, 0);
    std::stable_sort(places, places + rows, [&](int64_t a, int64_t b) { return key[a] < key[b]; });
    for (int64_t i = 0; i < rows; ++i) keys.as<int64_t>()[i] = key[places[i]];
    launch(call, RowEndsProblem{keys.as<int64_t>(), ends.as<int32_t>(), rows, bound});
  }
  Segments segments() { return {order.as<int64_t>(), ends.as<int32_t>(), /*from_zero=*/0}; }
};

// du_t, the sum of row_du over the rows of each token.
void sum_over_rows(const Arguments& args, const cuda::Call& call, const RowIndex& index) {
  const int64_t r_in = args.extent("cores", 1);
  SortedRows by_token(call, index.token, index.rows, index.tokens);
  Memory row_du(nullptr, size_t(index.rows * r_in) * 4);
  const Matrix row_du_matrix{row_du.as<float>(), r_in, 1, Access::element};
  launch(call, row_du_problem(args, index, {row_du_matrix, DType::float32}));
  const TypedMatrix du = typed_matrix(args, "du");
  SumRowsProblem problem{};
  problem.of_token = by_token.segments();
  problem.row_du = row_du.as<float>();
  problem.du = du.matrix;
  problem.du_type = du.type;
  problem.tokens = index.tokens;
  problem.r = int32_t(r_in);
  launch(call, problem);
}

// Without tokens, row i is token i, and row_du is du.
void row_core_backward(const Arguments& args) {
  const cuda::Call call = call_of(args.type("u"));
  const RowIndex index = index_of(args, args.extent("g", 0));
  if (index.token)
    sum_over_rows(args, call, index);
  else
    launch(call, row_du_problem(args, index, typed_matrix(args, "du")));
  std::optional<SortedRows> by_core;
  if (index.core) by_core.emplace(call, index.core, index.rows, index.cores);
  const TypedMatrix u = typed_matrix(args, "u");
  RowCoreGradProblem problem{};
  problem.of_core = by_core ? by_core->segments() : Segments{nullptr, index.ends, /*from_zero=*/1};
  problem.token = index.token;
  problem.u = u.matrix;
  problem.g = typed_matrix(args, "g").matrix;
  problem.type = u.type;
  problem.rows = index.rows;
  problem.tokens = index.tokens;
  problem.cores = index.cores;
  problem.r_in = rank(args, "cores", 1);
  problem.r_out = rank(args, "cores", 2);
  problem.dcores = args.floats("dcores", {index.cores, problem.r_in, problem.r_out});
  problem.scale = float(args.number("scale"));
  launch(call, problem);
}

// In the backward pass x, W, u, F and y are g, W, du, A and dx.
void gemm_lotr(const Arguments& args) {
  const DType type = args.type("x");
  cuda::GemmLotr problem{};
  problem.backward = args.number("backward") != 0;
  problem.M = args.extent("x", 0);
  problem.K = args.extent("x", 1);
  problem.N = args.extent("F", 0);
  problem.r = rank(args, "F", 1);
  problem.x = args.input("x", type, problem.M, problem.K);
  problem.y = args.output("y", type, problem.M, problem.N);
  problem.W = problem.backward ? args.input("W", type, problem.K, problem.N)
                               : args.input("W", type, problem.N, problem.K);
  problem.u = args.input("u", type, problem.M, problem.r);
  problem.F = args.input("F", type, problem.N, problem.r);
  if (args.has("bias")) {
    const Matrix bias = args.input("bias", type, 1, problem.N);
    problem.bias = bias.data;
    problem.bias_stride = bias.col;
  }
  cuda::gemm_lotr(call_of(type), problem);
}

}  // namespace

const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> table = {
      {"shrink", "x A u [ seed core h ]", "p=0 scale=1 core_scale=1", shrink},
      {"expand_add", "y u F [ seed start bias ]", "p=0 from_bias=0", expand_add},
      {"factor_grad", "D x v [ seed ]", "p=0 accumulate=1", factor_grad},
      {"shrink_grad", "g F u du Q", "accumulate=0", shrink_grad},
      {"fold", "B core F", "scale=1", fold},
      {"fold_grad", "Q B core [ dB dcore ]", "scale=1 accumulate=1", fold_grad},
      {"few_tokens_forward", "y x A core B u", "scale=1", few_tokens_forward},
      {"few_tokens_backward", "g u A core B [ x dx dA dB dcore ]", "scale=1 accumulate=1",
       few_tokens_backward},
      {"pack", "from to", "", pack},
      {"gemm_lotr", "x W u F y [ bias ]", "backward=0", gemm_lotr},
      {"row_core", "u cores h [ index offs tokens ]", "scale=1", row_core},
      {"row_core_backward", "g u cores du dcores [ index offs tokens ]", "scale=1",
       row_core_backward},
  };
  return table;
}

}  // namespace lotr::simt
