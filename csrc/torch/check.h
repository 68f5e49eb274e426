// The checks of each operator's arguments, the same on CPU and CUDA: a table of rules per operator,
// with a dtype and a shape for each tensor. They run before anything is written.
#pragma once

#include <array>

#include "arg.h"

namespace lotr {

// What a dimension counts. LEADING: the tokens of [.., K], all leading dimensions as one.
enum Dim : uint8_t { NO_DIM, M, K, N, R, R_IN, R_OUT, L, ROWS, LEADING };
constexpr const char* DIM_NAMES[] = {"", "M", "K", "N", "r", "r_in", "r_out", "L", "rows", ".."};

// The dtype of an argument, compared with the dtype of the activations.
enum class As {
  any,  // checked elsewhere
  same,
  factor,  // the same, or float32 with bfloat16 and float16: it is rounded, as under autocast
  sums,    // float32, or float64 with float64
  int64,
  int32
};

// One row of an operator's table. Optional arguments that are absent are skipped.
struct Rule {
  const Arg& arg;
  As as = As::any;
  std::array<Dim, 3> shape{};
  bool written = false;
};
constexpr bool WRITTEN = true;

// The sizes on which an operator's arguments agree. The first argument that has a dimension defines
// its size; later arguments must match. Only M and rows may be zero.
class Sizes {
 public:
  // dtype_name: the argument that has, or is, the dtype of the activations.
  Sizes(const Check& c, const char* dtype_name, ScalarType dtype,
        std::initializer_list<Rule> rules) {
    check_memory(c, rules);
    c.supported(dtype_name, dtype);
    for (const Rule& rule : rules) {
      if (!rule.arg || rule.as == As::any) continue;
      check_dtype(c, rule, dtype);
      check_shape(c, rule);
    }
  }
  Sizes(const Check& c, const Arg& like, std::initializer_list<Rule> rules)
      : Sizes(c, like.name, like.dtype, rules) {}
  // The size of a dimension, 0 if no argument has it.
  int64_t operator[](Dim d) const { return sizes_[d].size; }

 private:
  struct Size {
    int64_t size = 0;
    const char* of = nullptr;  // the argument that has it
  };

  // Each tensor is on the device of the first, with memory for all its elements. A written tensor
  // has no element twice, and shares none with another argument.
  static void check_memory(const Check& c, std::initializer_list<Rule> rules) {
    const Arg* first = nullptr;
    for (const Rule& rule : rules) {
      if (!rule.arg) continue;
      if (!first) first = &rule.arg;
      c.device(rule.arg, *first);
    }
    std::array<Check::Bytes, 16> bytes;  // no operator has more tensors
    size_t i = 0;
    for (const Rule& rule : rules) bytes[i++] = rule.arg ? c.memory(rule.arg) : Check::Bytes{};
    i = 0;
    for (const Rule& rule : rules) {
      const Check::Bytes written_bytes = bytes[i++];
      if (!rule.arg || !rule.written) continue;
      c.writable(rule.arg);
      size_t j = 0;
      for (const Rule& other : rules)
        if (const Check::Bytes& other_bytes = bytes[j++]; &other != &rule)
          c.apart(rule.arg, written_bytes, other.arg, other_bytes);
    }
  }

  static void check_dtype(const Check& c, const Rule& rule, ScalarType like) {
    const Arg& a = rule.arg;
    switch (rule.as) {
      case As::same:
        return c.dtype(a, like);
      case As::sums:
        return c.dtype(a, acc_dtype(like));
      case As::int64:
        return c.dtype(a, ScalarType::Long);
      case As::int32:
        return c.dtype(a, ScalarType::Int);
      case As::factor:
        if (a.dtype == like || (is_half(like) && a.dtype == ScalarType::Float)) return;
        fail(c.op, ": ", a.name, ": expected dtype ", dtype_info(like).name,
             is_half(like) ? " or torch.float32" : "", ", got ", dtype_info(a.dtype).name);
      case As::any:
        return;
    }
  }

  static std::string text(const Rule& rule) {
    std::string all;
    for (const Dim d : rule.shape)
      if (d) all += (all.empty() ? "[" : ", ") + std::string(DIM_NAMES[d]);
    return all + "]";
  }

  void check_shape(const Check& c, const Rule& rule) {
    const Arg& a = rule.arg;
    if (rule.shape[0] == LEADING) {
      if (a.dim < 1)
        fail(c.op, ": ", a.name, ": expected a tensor ", text(rule), ", got shape ", a.shape());
      c.one_matrix(a);
      Size& tokens = sizes_[M];
      if (tokens.of && a.matrix.rows != tokens.size)
        fail(c.op, ": ", a.name, ": expected ", tokens.size, " tokens, as in ", tokens.of,
             ", got shape ", a.shape());
      tokens = {a.matrix.rows, tokens.of ? tokens.of : a.name};
      return check_size(c, a, a.dim - 1, rule.shape[1]);
    }
    int64_t dims = 0;
    for (const Dim d : rule.shape) dims += d != NO_DIM;
    if (a.dim != dims)
      fail(c.op, ": ", a.name, ": expected a ", dims, "-D tensor ", text(rule), ", got shape ",
           a.shape());
    for (int64_t i = 0; i < dims; ++i) check_size(c, a, i, rule.shape[size_t(i)]);
  }

  void check_size(const Check& c, const Arg& a, int64_t axis, Dim d) {
    Size& known = sizes_[d];
    const int64_t size = a.size[axis];
    if (known.of) {
      if (size != known.size)
        fail(c.op, ": ", a.name, ": expected size ", known.size, " in dimension ", axis, " (",
             DIM_NAMES[d], ", as in ", known.of, "), got shape ", a.shape());
      return;
    }
    known = {size, a.name};
    if (size < 1 && d != M && d != ROWS)
      fail(c.op, ": ", a.name, ": expected at least 1 in dimension ", axis, " (", DIM_NAMES[d],
           "), got shape ", a.shape());
    if (c.max_rank && size > c.max_rank && (d == R || d == R_IN || d == R_OUT))
      fail(c.op, ": ", a.name, ": expected a rank of at most ", c.max_rank, " in dimension ", axis,
           ", got shape ", a.shape(), "; the PyTorch fallback supports it");
  }

  std::array<Size, LEADING + 1> sizes_{};
};

// ---- row_core ----

// A row's core is given by an index, or by the ends of each core's rows (offs); tokens: the row of
// u that each row reads. g: only in the backward. The values of the indices are checked only on a
// CPU, because on a GPU that would synchronize.
struct RowArgs {
  Arg g{"g"}, u, cores, index, offs, tokens;

  RowArgs(const Tensor& u, const Tensor& cores, const OptionalTensor& index,
          const OptionalTensor& offs, const OptionalTensor& tokens)
      : u("u", u),
        cores("cores", cores),
        index("index", index),
        offs("offs", offs),
        tokens("tokens", tokens) {}
  Sizes check(const Check& c, double scaling) const {
    // without tokens there is a row for each token
    const Dim row = tokens ? ROWS : M;
    const Sizes s(c, u,
                  {{u, As::same, {M, R_IN}},
                   {cores, As::factor, {L, R_IN, R_OUT}},
                   {tokens, As::int64, {ROWS}},
                   {index, As::int64, {row}},
                   {offs, As::int32, {L}},
                   {g, As::same, {row, R_OUT}}});
    if (bool(index) == bool(offs))
      fail(c.op, ": index, offs: expected exactly one of them, got ", index ? "both" : "none");
    c.finite("scaling", scaling);
    return s;
  }
};

// ---- layers ----

// When the adapter's product is computed; see layer.h.
enum class Strategy : int64_t { two_pass = 0, beta = 1, fused = 2 };

// The arguments of layer_forward, layer_forward_few_tokens and layer_forward_projected. All have
// those of the constructor. Others are absent unless an operator sets them.
struct ForwardArgs {
  Arg x, weight, bias, A{"A"}, u{"u"}, B, core, seed{"seed"};

  ForwardArgs(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& B,
              const Tensor& core)
      : x("x", x), weight("weight", weight), bias("bias", bias), B("B", B), core("core", core) {}
  Sizes check(const Check& c, double scaling, double p) const {
    const Sizes s(c, x,
                  {{B, As::factor, {N, R_OUT}},
                   {core, As::factor, {R_IN, R_OUT}},
                   {x, As::same, {LEADING, K}},
                   {weight, As::same, {N, K}},
                   {bias, As::same, {N}},
                   {A, As::factor, {K, R_IN}},
                   {u, As::same, {M, R_IN}},
                   {seed}});
    c.finite("scaling", scaling);
    c.dropout(p, seed);
    return s;
  }
};

// The arguments of layer_backward_, layer_backward_few_tokens_ and layer_backward_projected_, set
// as those of ForwardArgs.
struct BackwardArgs {
  Arg g, weight, x{"x"}, u, A{"A"}, F{"F"}, B, core, du{"du"}, dx{"dx"}, dA{"dA"}, dB, seed{"seed"};

  BackwardArgs(const Tensor& g, const OptionalTensor& weight, const Tensor& u, const Tensor& B,
               const Tensor& core, const OptionalTensor& dB)
      : g("g", g),
        weight("weight", weight),
        u("u", u),
        B("B", B),
        core("core", core),
        dB("dB", dB) {}
  Sizes check(const Check& c, double scaling, double p, bool need_B) const {
    const Sizes s(c, g,
                  {{B, As::factor, {N, R_OUT}},
                   {core, As::factor, {R_IN, R_OUT}},
                   {g, As::same, {LEADING, N}},
                   {A, As::factor, {K, R_IN}},
                   {weight, As::same, {N, K}},
                   {x, As::same, {LEADING, K}},
                   {dx, As::same, {LEADING, K}, WRITTEN},
                   {u, As::same, {M, R_IN}},
                   {du, As::same, {M, R_IN}},
                   {F, As::factor, {N, R_IN}},
                   {dA, As::sums, {K, R_IN}, WRITTEN},
                   {dB, As::sums, {N, R_OUT}, WRITTEN},
                   {seed}});
    c.finite("scaling", scaling);
    c.dropout(p, seed);
    if (dx) c.present(weight, "because dx is given");
    if (du) c.present(F, "because du is given");
    if (dA) c.present(x, "because dA is given");
    if (!need_B) c.absent(dB, "without need_B");
    return s;
  }
};

struct RowsForwardArgs {
  Arg x{"x"}, weight{"weight"}, bias{"bias"}, h{"h"}, B{"B"};

  Sizes check(const Check& c) const {
    return Sizes(c, x,
                 {{B, As::factor, {N, R}},
                  {x, As::same, {LEADING, K}},
                  {weight, As::same, {N, K}},
                  {bias, As::same, {N}},
                  {h, As::same, {M, R}}});
  }
};

struct RowsBackwardArgs {
  Arg g{"g"}, weight{"weight"}, h{"h"}, B{"B"}, dx{"dx"}, dB{"dB"};

  Sizes check(const Check& c, bool need_B) const {
    const Sizes s(c, g,
                  {{B, As::factor, {N, R}},
                   {g, As::same, {LEADING, N}},
                   {weight, As::same, {N, K}},
                   {h, As::same, {M, R}},
                   {dx, As::same, {LEADING, K}, WRITTEN},
                   {dB, As::sums, {N, R}, WRITTEN}});
    if (dx) c.present(weight, "because dx is given");
    if (!need_B) c.absent(dB, "without need_B");
    return s;
  }
};

struct ShrinkBackwardArgs {
  Arg du{"du"}, dx{"dx"}, x{"x"}, A{"A"}, dA{"dA"}, seed{"seed"};

  Sizes check(const Check& c, double p) const {
    const Sizes s(c, du,
                  {{du, As::same, {M, R}},
                   {dx, As::same, {LEADING, K}, WRITTEN},
                   {A, As::factor, {K, R}},
                   {x, As::same, {LEADING, K}},
                   {dA, As::sums, {K, R}, WRITTEN},
                   {seed}});
    if (bool(dx) != bool(A))
      fail(c.op, ": A: expected a tensor or None as dx is, got ", A ? "a tensor" : "None");
    if (dA) c.present(x, "because dA is given");
    c.dropout(p, seed);
    return s;
  }
};

}  // namespace lotr
