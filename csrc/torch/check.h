// Host-side argument checks of the lotr operators, shared by the CPU and the CUDA front ends.
//
// Every check runs before anything is written, and every error names the operator, the argument, what was
// expected and what was got. m tokens, k in, n out, r rank, l layer.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace lotr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A plain exception instead of STD_TORCH_CHECK, whose message starts with a source file and line.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    default:
      return torch::headeronly::toString(t);  // its own name: Short, Byte, ComplexFloat
  }
}

inline const char* device_name(int32_t type) {
  return type == aoti_torch_device_type_cpu()    ? "cpu"
         : type == aoti_torch_device_type_cuda() ? "cuda"
         : type == aoti_torch_device_type_meta() ? "meta"
                                                 : "another device";
}

inline bool is_half(ScalarType t) {
  return t == ScalarType::BFloat16 || t == ScalarType::Half;
}
inline bool is_supported(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || is_half(t);
}
inline int64_t item_size(ScalarType t) {
  return t == ScalarType::Float    ? 4
         : t == ScalarType::Double ? 8
         : is_half(t)              ? 2
                                   : 1;  // of others only whether there is memory
}
// The type sums are kept in: float32, and float64 for float64.
inline ScalarType acc_dtype(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What the checks and the kernels need to know about a tensor, read once (each read is a call into libtorch).
struct Arg {
  const char* name;
  AtenTensorHandle handle;
  ScalarType dtype;
  int64_t dim;
  const int64_t* size;    // borrowed from the tensor
  const int64_t* stride;  // borrowed from the tensor, in elements
  int32_t device_type;
  int32_t device_index;

  Arg(const char* name, const Tensor& t) : name(name), handle(t.get()), dtype(t.scalar_type()), dim(t.dim()) {
    int64_t* borrowed = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &borrowed));
    size = borrowed;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &borrowed));
    stride = borrowed;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index));
  }

  std::string shape() const {
    std::ostringstream s;
    s << "[";
    for (int64_t i = 0; i < dim; ++i) s << (i ? ", " : "") << size[i];
    s << "]";
    return s.str();
  }
};

// The checks of one operator call; `op` is the name used in messages.
struct Check {
  const char* op;

  // Of an operator's first argument: a dtype that the kernels exist for, and memory.
  void supported(const Arg& a) const {
    memory(a);
    if (!is_supported(a.dtype)) {
      fail(op, ": ", a.name,
           ": expected a dtype of torch.float32, torch.bfloat16, torch.float16 or torch.float64, got ",
           dtype_name(a.dtype));
    }
  }
  void dtype(const Arg& a, ScalarType expected) const {
    if (a.dtype != expected) {
      fail(op, ": ", a.name, ": expected dtype ", dtype_name(expected), ", got ", dtype_name(a.dtype));
    }
  }
  // A factor: in the activations' dtype, or float32 beside bfloat16 and float16 activations (it is rounded,
  // as autocast would).
  void factor(const Arg& a, ScalarType activations) const {
    if (a.dtype == activations || (is_half(activations) && a.dtype == ScalarType::Float)) return;
    fail(op, ": ", a.name, ": expected dtype ", dtype_name(activations),
         is_half(activations) ? " or torch.float32" : "", ", got ", dtype_name(a.dtype));
  }
  void device(const Arg& a, const Arg& like) const {
    if (a.device_type != like.device_type || a.device_index != like.device_index) {
      fail(op, ": ", a.name, ": expected the device of ", like.name, " (", device_name(like.device_type),
           ", index ", like.device_index, "), got ", device_name(a.device_type), ", index ", a.device_index);
    }
    memory(a);
  }
  // A storage may have been freed, as sharded training does between two uses.
  void memory(const Arg& a) const {
    int64_t elements = 1, reach = 1, offset = 0, bytes = 0;
    for (int64_t i = 0; i < a.dim; ++i) elements *= a.size[i], reach += (a.size[i] - 1) * a.stride[i];
    if (elements == 0) return;
    const void* data = nullptr;
    const bool known = torch_get_const_data_ptr(a.handle, &data) == 0 &&
                       aoti_torch_get_storage_offset(a.handle, &offset) == 0 &&
                       aoti_torch_get_storage_size(a.handle, &bytes) == 0;
    if (!known || !data || bytes < (offset + reach) * item_size(a.dtype))
      fail(op, ": ", a.name, ": expected a tensor with memory, got one whose memory is gone, of shape ",
           a.shape());
  }
  void dims(const Arg& a, int64_t dim, const char* what) const {
    if (a.dim != dim)
      fail(op, ": ", a.name, ": expected a ", dim, "-D tensor ", what, ", got shape ", a.shape());
  }
  void size(const Arg& a, int64_t axis, int64_t expected, const char* what) const {
    if (a.size[axis] != expected) {
      fail(op, ": ", a.name, ": expected size ", expected, " in dimension ", axis, " (", what,
           "), got shape ", a.shape());
    }
  }
  // K, N and r are at least one; only M may be zero.
  void positive(const Arg& a, int64_t axis, const char* what) const {
    if (a.size[axis] < 1) {
      fail(op, ": ", a.name, ": expected at least 1 in dimension ", axis, " (", what, "), got shape ",
           a.shape());
    }
  }
  // A tensor that is written must not visit one element twice, as an expanded or overlapping one does: each
  // dimension has to step over all that the ones with smaller strides reach.
  void writable(const Arg& a) const {
    int64_t reach = 0, last = 0;
    for (int64_t i = 0; i < a.dim; ++i)
      if (a.size[i] == 0) return;
    for (int64_t done = 0; done < a.dim; ++done) {
      int64_t next = -1;  // the smallest stride that is left; a handful of dimensions
      for (int64_t i = 0; i < a.dim; ++i) {
        const bool left = a.size[i] > 1 && (a.stride[i] > last || (a.stride[i] == 0 && done == 0));
        if (left && (next < 0 || a.stride[i] < a.stride[next])) next = i;
      }
      if (next < 0) break;
      int64_t same = 0;
      for (int64_t i = 0; i < a.dim; ++i) same += a.size[i] > 1 && a.stride[i] == a.stride[next];
      if (a.stride[next] <= reach || same > 1) {
        fail(op, ": ", a.name,
             ": expected a tensor without repeated elements (it is written in place), got stride ",
             a.stride[next], " in dimension ", next, " of shape ", a.shape());
      }
      last = a.stride[next], reach += (a.size[next] - 1) * last;
    }
  }
  void finite(const char* name, double value) const {
    if (!std::isfinite(value)) fail(op, ": ", name, ": expected a finite number, got ", value);
  }
  // Dropout probability and its seed.
  void dropout(double p, const std::optional<Tensor>& seed, const Arg& like) const {
    if (!(p >= 0.0 && p < 1.0)) fail(op, ": p: expected a probability in [0, 1), got ", p);
    if (p == 0.0) return;
    if (!seed) fail(op, ": seed: expected an int64 tensor of one element because p = ", p, ", got None");
    Arg s("seed", *seed);
    dtype(s, ScalarType::Long);
    int64_t numel = 1;
    for (int64_t i = 0; i < s.dim; ++i) numel *= s.size[i];
    if (numel != 1) fail(op, ": seed: expected a tensor of one element, got shape ", s.shape());
    device(s, like);
  }
};

// Sizes of a checked call. What an operator does not have stays 0.
struct Sizes {
  int64_t m = 0, k = 0, n = 0, r = 0, r_in = 0, r_out = 0, l = 0;
};

inline Sizes check_shrink(const Arg& x, const Arg& A, double p, const std::optional<Tensor>& seed) {
  Check c{"lotr::shrink"};
  c.dims(x, 2, "[M, K]"), c.dims(A, 2, "[K, r]");
  c.supported(x), c.factor(A, x.dtype), c.device(A, x);
  c.positive(x, 1, "K"), c.positive(A, 1, "r"), c.size(A, 0, x.size[1], "K, as in x");
  c.dropout(p, seed, x);
  Sizes s;
  s.m = x.size[0], s.k = x.size[1], s.r = A.size[1];
  return s;
}

inline Sizes check_expand_add(const Arg& y, const Arg& u, const Arg& F, double p,
                              const std::optional<Tensor>& seed) {
  Check c{"lotr::expand_add_"};
  c.dims(y, 2, "[M, N]"), c.dims(u, 2, "[M, r]"), c.dims(F, 2, "[N, r]");
  c.supported(y), c.dtype(u, y.dtype), c.factor(F, y.dtype), c.device(u, y), c.device(F, y);
  c.positive(y, 1, "N"), c.positive(u, 1, "r");
  c.size(u, 0, y.size[0], "M, as in y"), c.size(F, 0, y.size[1], "N, as in y"),
      c.size(F, 1, u.size[1], "r, as in u");
  c.writable(y), c.dropout(p, seed, y);
  Sizes s;
  s.m = y.size[0], s.n = y.size[1], s.r = u.size[1];
  return s;
}

inline Sizes check_factor_grad(const Arg& acc, const Arg& x, const Arg& k, double p,
                               const std::optional<Tensor>& seed) {
  Check c{"lotr::factor_grad_"};
  c.dims(acc, 2, "[K, r]"), c.dims(x, 2, "[M, K]"), c.dims(k, 2, "[M, r]");
  c.supported(x), c.dtype(k, x.dtype), c.dtype(acc, acc_dtype(x.dtype)), c.device(k, x), c.device(acc, x);
  c.positive(x, 1, "K"), c.positive(k, 1, "r"), c.size(k, 0, x.size[0], "M, as in x");
  c.size(acc, 0, x.size[1], "K, as in x"), c.size(acc, 1, k.size[1], "r, as in k");
  c.writable(acc), c.dropout(p, seed, x);
  Sizes s;
  s.m = x.size[0], s.k = x.size[1], s.r = k.size[1];
  return s;
}

inline Sizes check_shrink_grad(const Arg& g, const Arg& F, const Arg& u) {
  Check c{"lotr::shrink_grad"};
  c.dims(g, 2, "[M, N]"), c.dims(F, 2, "[N, r_in]"), c.dims(u, 2, "[M, r_in]");
  c.supported(g), c.factor(F, g.dtype), c.dtype(u, g.dtype), c.device(F, g), c.device(u, g);
  c.positive(g, 1, "N"), c.positive(F, 1, "r_in"), c.size(F, 0, g.size[1], "N, as in g");
  c.size(u, 0, g.size[0], "M, as in g"), c.size(u, 1, F.size[1], "r_in, as in F");
  Sizes s;
  s.m = g.size[0], s.n = g.size[1], s.r = s.r_in = F.size[1];
  return s;
}

inline Sizes check_shrink_grad_add(const Arg& Q, const Arg& g, const Arg& F, const Arg& u) {
  const Sizes s = check_shrink_grad(g, F, u);
  Check c{"lotr::shrink_grad_"};
  c.dims(Q, 2, "[N, r_in]"), c.dtype(Q, acc_dtype(g.dtype)), c.device(Q, g), c.writable(Q);
  c.size(Q, 0, g.size[1], "N, as in g"), c.size(Q, 1, F.size[1], "r_in, as in F");
  return s;
}

inline Sizes check_fold(const Arg& B, const Arg& cores, double scaling, ScalarType dtype) {
  Check c{"lotr::fold"};
  c.dims(B, 2, "[N, r_out]"), c.dims(cores, 3, "[L, r_in, r_out]");
  if (!is_supported(dtype)) {
    fail(c.op, ": dtype: expected torch.float32, torch.bfloat16, torch.float16 or torch.float64, got ",
         dtype_name(dtype));
  }
  c.memory(B), c.factor(B, dtype), c.factor(cores, dtype), c.device(cores, B);
  c.positive(B, 0, "N"), c.positive(B, 1, "r_out"), c.positive(cores, 0, "L"), c.positive(cores, 1, "r_in");
  c.size(cores, 2, B.size[1], "r_out, as in B"), c.finite("scaling", scaling);
  Sizes s;
  s.n = B.size[0], s.r_out = B.size[1], s.l = cores.size[0], s.r_in = cores.size[1];
  return s;
}

inline Sizes check_fold_grad(const Arg& Q, const Arg& B, const Arg& cores, double scaling, const Arg* dB) {
  Check c{"lotr::fold_grad"};
  c.dims(Q, 3, "[L, N, r_in]"), c.dims(B, 2, "[N, r_out]"), c.dims(cores, 3, "[L, r_in, r_out]");
  c.memory(Q);
  if (Q.dtype != ScalarType::Float && Q.dtype != ScalarType::Double) {
    fail(c.op, ": Q: expected dtype torch.float32 or torch.float64, got ", dtype_name(Q.dtype));
  }
  for (const Arg* a : {&B, &cores}) {
    c.supported(*a);
    if (acc_dtype(a->dtype) != Q.dtype) {
      fail(c.op, ": ", a->name, ": expected a dtype that is summed in Q's ", dtype_name(Q.dtype), ", got ",
           dtype_name(a->dtype));
    }
    c.device(*a, Q);
  }
  c.positive(Q, 0, "L"), c.positive(Q, 1, "N"), c.positive(Q, 2, "r_in"), c.positive(B, 1, "r_out");
  c.size(B, 0, Q.size[1], "N, as in Q"), c.size(cores, 0, Q.size[0], "L, as in Q");
  c.size(cores, 1, Q.size[2], "r_in, as in Q"), c.size(cores, 2, B.size[1], "r_out, as in B");
  c.finite("scaling", scaling);
  if (dB) {
    c.dims(*dB, 2, "[N, r_out]"), c.dtype(*dB, Q.dtype), c.device(*dB, Q);
    c.size(*dB, 0, Q.size[1], "N, as in Q"), c.size(*dB, 1, B.size[1], "r_out, as in B"), c.writable(*dB);
  }
  Sizes s;
  s.n = Q.size[1], s.r_out = B.size[1], s.l = Q.size[0], s.r_in = Q.size[2];
  return s;
}

// The factors against the activations' dtype.
inline void check_A(const Check& c, const Arg& A, const Arg& like) {
  c.dims(A, 2, "[K, r_in]"), c.factor(A, like.dtype), c.device(A, like), c.positive(A, 0, "K");
}

inline Sizes check_core(const Check& c, const Arg& like, const Arg& core, const Arg& B, double scaling) {
  c.dims(core, 2, "[r_in, r_out]"), c.dims(B, 2, "[N, r_out]");
  for (const Arg* a : {&core, &B}) c.factor(*a, like.dtype), c.device(*a, like);
  c.positive(B, 0, "N"), c.positive(B, 1, "r_out"), c.positive(core, 0, "r_in");
  c.size(core, 1, B.size[1], "r_out, as in B"), c.finite("scaling", scaling);
  Sizes s;
  s.n = B.size[0], s.r_in = core.size[0], s.r_out = B.size[1];
  return s;
}

inline Sizes check_unfolded(const Check& c, const Arg& like, const Arg& A, const Arg& core, const Arg& B,
                            double scaling) {
  Sizes s = check_core(c, like, core, B, scaling);
  check_A(c, A, like), c.size(core, 0, A.size[1], "r_in, as in A"), s.k = A.size[0];
  return s;
}

inline Sizes check_small_forward(const Arg& y, const Arg& x, const Arg& A, const Arg& core, const Arg& B,
                                 double scaling) {
  Check c{"lotr::small_forward_"};
  c.dims(y, 2, "[M, N]"), c.dims(x, 2, "[M, K]"), c.supported(x), c.dtype(y, x.dtype), c.device(y, x);
  Sizes s = check_unfolded(c, x, A, core, B, scaling);
  c.size(x, 1, s.k, "K, as in A"), c.size(y, 1, s.n, "N, as in B"), c.size(y, 0, x.size[0], "M, as in x"),
      c.writable(y);
  s.m = x.size[0];
  return s;
}

inline Sizes check_small_backward(const Arg* dx, const Arg& g, const Arg* x, const Arg& u, const Arg& A,
                                  const Arg& core, const Arg& B, double scaling, const Arg* dA,
                                  const Arg* dB) {
  Check c{"lotr::small_backward_"};
  c.dims(g, 2, "[M, N]"), c.dims(u, 2, "[M, r_in]"), c.supported(g), c.dtype(u, g.dtype), c.device(u, g);
  Sizes s = check_unfolded(c, g, A, core, B, scaling);
  s.m = g.size[0];
  c.size(g, 1, s.n, "N, as in B"), c.size(u, 0, s.m, "M, as in g"), c.size(u, 1, s.r_in, "r_in, as in A");
  if (dA && !x) fail(c.op, ": x: expected a tensor [M, K] because dA is given, got None");
  if (x) {
    c.dims(*x, 2, "[M, K]"), c.dtype(*x, g.dtype), c.device(*x, g);
    c.size(*x, 0, s.m, "M, as in g"), c.size(*x, 1, s.k, "K, as in A");
  }
  if (dx) {
    c.dims(*dx, 2, "[M, K]"), c.dtype(*dx, g.dtype), c.device(*dx, g);
    c.size(*dx, 0, s.m, "M, as in g"), c.size(*dx, 1, s.k, "K, as in A"), c.writable(*dx);
  }
  if (dA) {
    c.dims(*dA, 2, "[K, r_in]"), c.dtype(*dA, acc_dtype(g.dtype)), c.device(*dA, g);
    c.size(*dA, 0, s.k, "K, as in A"), c.size(*dA, 1, s.r_in, "r_in, as in A"), c.writable(*dA);
  }
  if (dB) {
    c.dims(*dB, 2, "[N, r_out]"), c.dtype(*dB, acc_dtype(g.dtype)), c.device(*dB, g);
    c.size(*dB, 0, s.n, "N, as in B"), c.size(*dB, 1, s.r_out, "r_out, as in B"), c.writable(*dB);
  }
  return s;
}

}  // namespace lotr
