// One argument of an operator: what the checks and the kernels need to know of a tensor, and what can be
// asked of it. An error names the operator, the argument, what was expected and what was got.
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
using OptionalTensor = std::optional<Tensor>;

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

inline std::optional<Arg> optional_arg(const char* name, const OptionalTensor& t) {
  return t ? std::optional<Arg>(std::in_place, name, *t) : std::nullopt;
}
inline const Arg* pointer(const std::optional<Arg>& a) {
  return a ? &*a : nullptr;
}

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
  void dropout(double p, const OptionalTensor& seed, const Arg& like) const {
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

// A tensor [..., cols] seen as a matrix [rows, cols]: what its leading dimensions amount to.
struct Flat {
  int64_t rows = 1, cols = 0, row_stride = 0, col_stride = 1;
};

// Fails where the leading dimensions do not lie in memory as one would.
inline Flat check_flat(const Check& c, const Arg& a, const char* what) {
  if (a.dim < 1) fail(c.op, ": ", a.name, ": expected a tensor ", what, ", got shape ", a.shape());
  Flat f;
  f.cols = a.size[a.dim - 1], f.col_stride = a.stride[a.dim - 1];
  for (int64_t i = 0; i < a.dim - 1; ++i) f.rows *= a.size[i];
  int64_t next = -1;  // the stride that a further dimension has to have, once one is there
  for (int64_t i = a.dim - 2; i >= 0 && f.rows; --i) {
    if (a.size[i] == 1) continue;
    if (next < 0) {
      f.row_stride = a.stride[i];
    } else if (a.stride[i] != next) {
      fail(c.op, ": ", a.name,
           ": expected leading dimensions that lie as one (call contiguous()), got stride ", a.stride[i],
           " in dimension ", i, " of shape ", a.shape());
    }
    next = a.stride[i] * a.size[i];
  }
  if (f.row_stride == 0 && f.rows <= 1) f.row_stride = f.cols;
  return f;
}

}  // namespace lotr
