// The checks of each operator's arguments, the same on CPU and CUDA: individual checks, and a table
// of rules per operator, with a dtype and a shape for each tensor. They run before anything is
// written. An error names the operator, the argument, what was expected and what was given.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "arg.h"

namespace lotr {

// The checks of one operator call; `op` is the name used in messages.
struct Check {
  const char* op;
  int64_t max_rank = 0;  // of the kernels of a device; 0: any

  void dtype(const Arg& arg, ScalarType expected) const {
    if (arg.dtype != expected)
      fail(op, ": ", arg.name, ": expected dtype ", dtype_info(expected).name, ", got ",
           dtype_info(arg.dtype).name);
  }
  // Kernels exist for the dtype of the argument `name`.
  void supported(const char* name, ScalarType dtype) const {
    if (!is_supported(dtype))
      fail(op, ": ", name,
           ": expected a dtype of torch.float32, torch.bfloat16, torch.float16 or torch.float64, "
           "got ",
           dtype_info(dtype).name);
  }
  void finite(const char* name, double value) const {
    if (!std::isfinite(value)) fail(op, ": ", name, ": expected a finite number, got ", value);
  }
  void absent(const Arg& arg, const char* when) const {
    if (arg) fail(op, ": ", arg.name, ": expected None ", when, ", got a tensor");
  }
  void present(const Arg& arg, const char* why) const {
    if (!arg) fail(op, ": ", arg.name, ": expected a tensor ", why, ", got None");
  }
  // Dropout probability and its seed.
  void dropout(double p, const Arg& seed) const {
    if (!(p >= 0.0 && p < 1.0)) fail(op, ": p: expected a probability in [0, 1), got ", p);
    if (p == 0.0) return;
    present(seed, "of one int64 because p is not 0");
    dtype(seed, ScalarType::Long);
    int64_t numel = 1;
    for (int64_t i = 0; i < seed.dim; ++i) numel *= seed.size[i];
    if (numel != 1) fail(op, ": seed: expected a tensor of one element, got shape ", seed.shape());
  }
  // The leading dimensions form one dimension, with one stride.
  void one_matrix(const Arg& arg) const {
    if (arg.split < 0) return;
    fail(op, ": ", arg.name,
         ": expected leading dimensions that form one dimension (call contiguous()), got stride ",
         arg.stride[arg.split], " in dimension ", arg.split, " of shape ", arg.shape());
  }
  // On the device of the first argument, and not None.
  void device(const Arg& arg, const Arg& first) const {
    if (arg.dtype == ScalarType::Undefined)
      fail(op, ": ", arg.name, ": expected a tensor, got None");
    if (arg.device_type != first.device_type || arg.device_index != first.device_index)
      fail(op, ": ", arg.name, ": expected the device of ", first.name, " (",
           device_name(first.device_type), ", index ", first.device_index, "), got ",
           device_name(arg.device_type), ", index ", arg.device_index);
  }
  // The addresses of a tensor's first byte and of the byte after its last one; both 0 if it has no
  // elements.
  struct Bytes {
    uintptr_t first = 0;
    uintptr_t end = 0;
  };
  // Fails if the storage was freed, as sharded training does between two uses, or is too short.
  Bytes memory(const Arg& arg) const {
    int64_t reach = 1;
    int64_t offset = 0;
    int64_t bytes = 0;
    for (int64_t i = 0; i < arg.dim; ++i) {
      if (arg.size[i] == 0) return {};
      reach += (arg.size[i] - 1) * arg.stride[i];
    }
    const void* data = nullptr;
    const bool readable = torch_get_const_data_ptr(arg.handle, &data) == 0 &&
                          aoti_torch_get_storage_offset(arg.handle, &offset) == 0 &&
                          aoti_torch_get_storage_size(arg.handle, &bytes) == 0;
    const int64_t item = dtype_info(arg.dtype).bytes;
    if (!readable || !data || bytes < (offset + reach) * item)
      fail(op, ": ", arg.name, ": expected a tensor with memory for shape ", arg.shape(),
           ", got a storage of ", bytes, " bytes: it was freed or made shorter");
    const auto first = reinterpret_cast<uintptr_t>(data);
    return {first, first + uintptr_t(reach * item)};
  }
  // A tensor that is written must not contain one element twice, as an expanded or overlapping one
  // does: the stride of each dimension must exceed the reach of all dimensions with smaller
  // strides.
  void writable(const Arg& arg) const {
    std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
    for (int64_t i = 0; i < arg.dim; ++i) {
      if (arg.size[i] == 0) return;
      if (arg.size[i] > 1) dims.emplace_back(arg.stride[i], arg.size[i]);
    }
    std::sort(dims.begin(), dims.end());
    int64_t reach = 0;
    for (const auto& [stride, size] : dims) {
      if (stride <= reach)
        fail(op, ": ", arg.name,
             ": expected a tensor without repeated elements (it is written in place), got stride ",
             stride, " in shape ", arg.shape(), "; pass a clone() of it");
      reach += (size - 1) * stride;
    }
  }
  // Kernels read and write in no particular order, so a written tensor and another argument must
  // not overlap. Interleaved ones (columns of one buffer) count as overlapping.
  void apart(const Arg& written, const Bytes& written_bytes, const Arg& other,
             const Bytes& other_bytes) const {
    if (written_bytes.first < other_bytes.end && other_bytes.first < written_bytes.end)
      fail(op, ": ", written.name,
           ": expected memory of its own (it is written), got memory that overlaps ", other.name,
           "; pass a clone() of one of them");
  }
};

// What a dimension counts. L: cores. LEADING: the tokens of [.., K], all leading dimensions as one.
enum Dim : uint8_t { NO_DIM, M, K, N, R, R_IN, R_OUT, L, ROWS, LEADING };
constexpr const char* DIM_NAMES[] = {"", "M", "K", "N", "r", "r_in", "r_out", "L", "rows", ".."};

// Which dtype an argument must have.
enum class Type {
  unchecked,   // checked elsewhere
  activation,  // the operator's dtype
  factor,      // the operator's, or float32 with a half type, rounded to it as under autocast
  sum,         // float32, or float64 with float64
  int64,
  int32
};

// One row of an operator's table. Optional arguments that are absent are skipped.
struct Rule {
  const Arg& arg;
  Type type = Type::unchecked;
  std::array<Dim, 3> shape{};
  bool written = false;
};
constexpr bool WRITTEN = true;

// The sizes on which an operator's arguments agree. The constructor checks all arguments and throws
// if one is wrong. The first argument that has a dimension defines its size; later arguments must
// match. Only M and rows may be zero.
class Sizes {
 public:
  // dtype: the operator's, shared by all activations. dtype_name: the argument that has it.
  Sizes(const Check& check, const char* dtype_name, ScalarType dtype,
        std::initializer_list<Rule> rules) {
    check_memory(check, rules);
    check.supported(dtype_name, dtype);
    for (const Rule& rule : rules) {
      if (!rule.arg || rule.type == Type::unchecked) continue;
      check_dtype(check, rule, dtype);
      check_shape(check, rule);
    }
  }
  Sizes(const Check& check, const Arg& like, std::initializer_list<Rule> rules)
      : Sizes(check, like.name, like.dtype, rules) {}
  // The size of a dimension, 0 if no argument has it.
  int64_t operator[](Dim d) const { return sizes_[d].size; }

 private:
  struct Size {
    int64_t size = 0;
    const char* argument = nullptr;  // the first one that has it
  };

  // Each tensor is on the device of the first, with memory for all its elements. A written tensor
  // has no element twice, and shares none with another argument.
  static void check_memory(const Check& check, std::initializer_list<Rule> rules) {
    const Arg* first = nullptr;
    for (const Rule& rule : rules) {
      if (!rule.arg) continue;
      if (!first) first = &rule.arg;
      check.device(rule.arg, *first);
    }
    const Rule* const rule = rules.begin();
    std::array<Check::Bytes, 16> bytes;  // no operator has more tensors
    for (size_t i = 0; i < rules.size(); ++i)
      if (rule[i].arg) bytes[i] = check.memory(rule[i].arg);
    for (size_t i = 0; i < rules.size(); ++i) {
      if (!rule[i].arg || !rule[i].written) continue;
      check.writable(rule[i].arg);
      for (size_t j = 0; j < rules.size(); ++j)
        if (j != i) check.apart(rule[i].arg, bytes[i], rule[j].arg, bytes[j]);
    }
  }

  static void check_dtype(const Check& check, const Rule& rule, ScalarType like) {
    const Arg& arg = rule.arg;
    switch (rule.type) {
      case Type::activation:
        return check.dtype(arg, like);
      case Type::sum:
        return check.dtype(arg, acc_dtype(like));
      case Type::int64:
        return check.dtype(arg, ScalarType::Long);
      case Type::int32:
        return check.dtype(arg, ScalarType::Int);
      case Type::factor:
        if (arg.dtype == like || (is_half(like) && arg.dtype == ScalarType::Float)) return;
        fail(check.op, ": ", arg.name, ": expected dtype ", dtype_info(like).name,
             is_half(like) ? " or torch.float32" : "", ", got ", dtype_info(arg.dtype).name);
      case Type::unchecked:
        return;
    }
  }

  static std::string shape_text(const Rule& rule) {
    std::string text;
    for (const Dim d : rule.shape)
      if (d) text += (text.empty() ? "[" : ", ") + std::string(DIM_NAMES[d]);
    return text + "]";
  }

  void check_shape(const Check& check, const Rule& rule) {
    const Arg& arg = rule.arg;
    if (rule.shape[0] == LEADING) {
      if (arg.dim < 1)
        fail(check.op, ": ", arg.name, ": expected a tensor ", shape_text(rule), ", got shape ",
             arg.shape());
      check.one_matrix(arg);
      Size& tokens = sizes_[M];
      if (tokens.argument && arg.matrix.rows != tokens.size)
        fail(check.op, ": ", arg.name, ": expected ", tokens.size, " tokens, as in ",
             tokens.argument, ", got shape ", arg.shape());
      tokens = {arg.matrix.rows, tokens.argument ? tokens.argument : arg.name};
      return check_size(check, arg, arg.dim - 1, rule.shape[1]);
    }
    int64_t dims = 0;
    for (const Dim d : rule.shape) dims += d != NO_DIM;
    if (arg.dim != dims)
      fail(check.op, ": ", arg.name, ": expected a ", dims, "-D tensor ", shape_text(rule),
           ", got shape ", arg.shape());
    for (int64_t i = 0; i < dims; ++i) check_size(check, arg, i, rule.shape[size_t(i)]);
  }

  void check_size(const Check& check, const Arg& arg, int64_t axis, Dim d) {
    Size& agreed = sizes_[d];
    const int64_t size = arg.size[axis];
    if (agreed.argument) {
      if (size != agreed.size)
        fail(check.op, ": ", arg.name, ": expected size ", agreed.size, " in dimension ", axis,
             " (", DIM_NAMES[d], ", as in ", agreed.argument, "), got shape ", arg.shape());
      return;
    }
    agreed = {size, arg.name};
    if (size < 1 && d != M && d != ROWS)
      fail(check.op, ": ", arg.name, ": expected at least 1 in dimension ", axis, " (",
           DIM_NAMES[d], "), got shape ", arg.shape());
    if (check.max_rank && size > check.max_rank && (d == R || d == R_IN || d == R_OUT))
      fail(check.op, ": ", arg.name, ": expected a rank of at most ", check.max_rank,
           " in dimension ", axis, ", got shape ", arg.shape(),
           "; the PyTorch fallback supports it");
  }

  std::array<Size, LEADING + 1> sizes_{};
};

// ---- row_core ----

// The arguments of row_core and its backward, which also sets g. Either `index` has the core of
// each row, or `offs` the end of each core's rows. `tokens` has the row of u that each row reads.
// The values of these indices are checked only on a CPU, because on a GPU that would synchronize.
struct RowArgs {
  Arg g{"g"}, u, cores, index, offs, tokens;

  RowArgs(const Tensor& u, const Tensor& cores, const OptionalTensor& index,
          const OptionalTensor& offs, const OptionalTensor& tokens)
      : u("u", u),
        cores("cores", cores),
        index("index", index),
        offs("offs", offs),
        tokens("tokens", tokens) {}
  Sizes check(const Check& check, double scaling) const {
    // Without tokens there is one row for each token.
    const Dim row = tokens ? ROWS : M;
    const Sizes sizes(check, u,
                      {{u, Type::activation, {M, R_IN}},
                       {cores, Type::factor, {L, R_IN, R_OUT}},
                       {tokens, Type::int64, {ROWS}},
                       {index, Type::int64, {row}},
                       {offs, Type::int32, {L}},
                       {g, Type::activation, {row, R_OUT}}});
    if (bool(index) == bool(offs))
      fail(check.op, ": index, offs: expected exactly one of them, got ", index ? "both" : "none");
    check.finite("scaling", scaling);
    return sizes;
  }
};

// ---- layers ----

// When the adapter's product is computed; see layer.h.
enum class Strategy : int64_t { two_pass = 0, beta = 1, fused = 2 };

// The arguments of layer_forward, layer_forward_few_tokens and layer_forward_projected. All three
// have the constructor's arguments; the others are absent unless an operator sets them.
struct ForwardArgs {
  Arg x, weight, bias, A{"A"}, u{"u"}, B, core, seed{"seed"};

  ForwardArgs(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& B,
              const Tensor& core)
      : x("x", x), weight("weight", weight), bias("bias", bias), B("B", B), core("core", core) {}
  Sizes check(const Check& check, double scaling, double p) const {
    const Sizes sizes(check, x,
                      {{B, Type::factor, {N, R_OUT}},
                       {core, Type::factor, {R_IN, R_OUT}},
                       {x, Type::activation, {LEADING, K}},
                       {weight, Type::activation, {N, K}},
                       {bias, Type::activation, {N}},
                       {A, Type::factor, {K, R_IN}},
                       {u, Type::activation, {M, R_IN}},
                       {seed}});
    check.finite("scaling", scaling);
    check.dropout(p, seed);
    return sizes;
  }
};

// The arguments of layer_backward_, layer_backward_few_tokens_ and layer_backward_projected_. All
// three have the constructor's arguments; the others are absent unless an operator sets them.
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
  Sizes check(const Check& check, double scaling, double p, bool need_B) const {
    const Sizes sizes(check, g,
                      {{B, Type::factor, {N, R_OUT}},
                       {core, Type::factor, {R_IN, R_OUT}},
                       {g, Type::activation, {LEADING, N}},
                       {A, Type::factor, {K, R_IN}},
                       {weight, Type::activation, {N, K}},
                       {x, Type::activation, {LEADING, K}},
                       {dx, Type::activation, {LEADING, K}, WRITTEN},
                       {u, Type::activation, {M, R_IN}},
                       {du, Type::activation, {M, R_IN}},
                       {F, Type::factor, {N, R_IN}},
                       {dA, Type::sum, {K, R_IN}, WRITTEN},
                       {dB, Type::sum, {N, R_OUT}, WRITTEN},
                       {seed}});
    check.finite("scaling", scaling);
    check.dropout(p, seed);
    if (dx) check.present(weight, "because dx is given");
    if (du) check.present(F, "because du is given");
    if (dA) check.present(x, "because dA is given");
    if (!need_B) check.absent(dB, "without need_B");
    return sizes;
  }
};

struct RowsForwardArgs {
  Arg x, weight, bias, h, B;

  Sizes check(const Check& check) const {
    return Sizes(check, x,
                 {{B, Type::factor, {N, R}},
                  {x, Type::activation, {LEADING, K}},
                  {weight, Type::activation, {N, K}},
                  {bias, Type::activation, {N}},
                  {h, Type::activation, {M, R}}});
  }
};

struct RowsBackwardArgs {
  Arg g, weight, h, B, dx, dB;

  Sizes check(const Check& check, bool need_B) const {
    const Sizes sizes(check, g,
                      {{B, Type::factor, {N, R}},
                       {g, Type::activation, {LEADING, N}},
                       {weight, Type::activation, {N, K}},
                       {h, Type::activation, {M, R}},
                       {dx, Type::activation, {LEADING, K}, WRITTEN},
                       {dB, Type::sum, {N, R}, WRITTEN}});
    if (dx) check.present(weight, "because dx is given");
    if (!need_B) check.absent(dB, "without need_B");
    return sizes;
  }
};

struct ShrinkBackwardArgs {
  Arg du, dx, x, A, dA, seed;

  Sizes check(const Check& check, double p) const {
    const Sizes sizes(check, du,
                      {{du, Type::activation, {M, R}},
                       {dx, Type::activation, {LEADING, K}, WRITTEN},
                       {A, Type::factor, {K, R}},
                       {x, Type::activation, {LEADING, K}},
                       {dA, Type::sum, {K, R}, WRITTEN},
                       {seed}});
    if (bool(dx) != bool(A))
      fail(check.op, ": A: expected a tensor or None, like dx, got ", A ? "a tensor" : "None");
    if (dA) check.present(x, "because dA is given");
    check.dropout(p, seed);
    return sizes;
  }
};

}  // namespace lotr
