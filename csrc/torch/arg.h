// One argument of an operator: the properties of a tensor that checks and kernels read, and the checks that
// every operator makes. An error names the operator, the argument, what was expected and what was given.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

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
// Bytes of an element, of any dtype.
inline int64_t item_size(ScalarType t) {
  return t == ScalarType::Float                             ? 4
         : t == ScalarType::Double || t == ScalarType::Long ? 8
         : is_half(t) ? 2
                      : int64_t(aoti_torch_dtype_element_size(int32_t(t)));
}
// The dtype of sums: float32, or float64 for float64.
inline ScalarType acc_dtype(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The dtype of a tensor. Unlike Tensor::scalar_type it accepts every dtype, since an error must name one that
// the operators have no kernel for.
inline ScalarType scalar_type_of(AtenTensorHandle t) {
  static const std::pair<int32_t, ScalarType> known[] = {
      {aoti_torch_dtype_float32(), ScalarType::Float}, {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
      {aoti_torch_dtype_float16(), ScalarType::Half},  {aoti_torch_dtype_float64(), ScalarType::Double},
      {aoti_torch_dtype_int64(), ScalarType::Long},    {aoti_torch_dtype_int32(), ScalarType::Int}};
  int32_t code = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &code));
  for (const auto& [of, type] : known)
    if (of == code) return type;
  return ScalarType(code);
}

// A tensor [.., cols] as a matrix [rows, cols].
struct Flat {
  int64_t rows = 1, cols = 0, row_stride = 0, col_stride = 1;
  int64_t split = -1;  // a leading dimension that does not continue the one behind it: no row_stride then
};

// One argument of an operator, read once: each read is a call into libtorch.
struct Arg {
  const char* name;
  const Tensor* tensor = nullptr;  // null: an optional argument that is not given
  AtenTensorHandle handle = nullptr;
  ScalarType dtype = ScalarType::Undefined;  // of None, which has nothing below
  int64_t dim = 0;
  const int64_t* size = nullptr;    // borrowed from the tensor
  const int64_t* stride = nullptr;  // borrowed from the tensor, in elements
  int32_t device_type = 0;
  int32_t device_index = 0;
  Flat flat;

  Arg(const char* name, const Tensor& t) : name(name) { look_at(t); }
  Arg(const char* name, const OptionalTensor& t) : name(name) {
    if (t) look_at(*t);
  }
  explicit operator bool() const { return tensor; }

  std::string shape() const {
    std::ostringstream s;
    s << "[";
    for (int64_t i = 0; i < dim; ++i) s << (i ? ", " : "") << size[i];
    s << "]";
    return s.str();
  }

 private:
  void look_at(const Tensor& t) {
    tensor = &t, handle = t.get(), dtype = scalar_type_of(handle);
    if (dtype == ScalarType::Undefined) return;
    dim = t.dim();
    int64_t* borrowed = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &borrowed));
    size = borrowed;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &borrowed));
    stride = borrowed;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index));
    if (dim) flatten();
  }
  void flatten() {
    flat.cols = size[dim - 1], flat.col_stride = stride[dim - 1];
    for (int64_t i = 0; i < dim - 1; ++i) flat.rows *= size[i];
    int64_t next = -1;  // the stride that a further dimension has to have, once one is there
    for (int64_t i = dim - 2; i >= 0 && flat.rows; --i) {
      if (size[i] == 1) continue;
      if (next < 0)
        flat.row_stride = stride[i];
      else if (stride[i] != next && flat.split < 0)
        flat.split = i;
      next = stride[i] * size[i];
    }
    if (flat.row_stride == 0 && flat.rows <= 1) flat.row_stride = flat.cols;
  }
};

// The checks of one operator call; `op` is the name used in messages.
struct Check {
  const char* op;
  int64_t max_rank = 0;  // of the kernels of a device; 0: any

  // What every operator expects of its tensors and checks first: each is there, on the device of the first,
  // with memory for all its elements. A tensor that is written has no element twice, and shares none with
  // another argument: kernels read and write in no particular order.
  void arguments(std::initializer_list<const Arg*> all,
                 std::initializer_list<const Arg*> written = {}) const {
    const Arg* first = nullptr;
    for (const Arg* a : all) {
      if (!*a) continue;
      if (a->dtype == ScalarType::Undefined) fail(op, ": ", a->name, ": expected a tensor, got None");
      if (!first) first = a;
      if (a->device_type != first->device_type || a->device_index != first->device_index)
        fail(op, ": ", a->name, ": expected the device of ", first->name, " (",
             device_name(first->device_type), ", index ", first->device_index, "), got ",
             device_name(a->device_type), ", index ", a->device_index);
    }
    Bytes bytes[32];
    size_t i = 0;
    for (const Arg* a : all) bytes[i++] = *a ? memory(*a) : Bytes{};
    for (const Arg* w : written) {
      if (!*w) continue;
      writable(*w);
      const Bytes own = bytes[std::find(all.begin(), all.end(), w) - all.begin()];
      i = 0;
      for (const Arg* a : all) {
        const Bytes& other = bytes[i++];
        if (a == w || own.last <= other.first || other.last <= own.first) continue;
        if (!interleaved(*w, own, *a, other))
          fail(op, ": ", w->name, ": expected memory of its own (it is written), got memory that overlaps ",
               a->name, "; give a clone() of one of them");
      }
    }
  }
  // A dtype that the kernels exist for.
  void supported(const Arg& a) const {
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
  void finite(const char* name, double value) const {
    if (!std::isfinite(value)) fail(op, ": ", name, ": expected a finite number, got ", value);
  }
  // Dropout probability and its seed.
  void dropout(double p, const Arg& seed) const {
    if (!(p >= 0.0 && p < 1.0)) fail(op, ": p: expected a probability in [0, 1), got ", p);
    if (p == 0.0) return;
    if (!seed) fail(op, ": seed: expected an int64 tensor of one element because p = ", p, ", got None");
    dtype(seed, ScalarType::Long);
    int64_t numel = 1;
    for (int64_t i = 0; i < seed.dim; ++i) numel *= seed.size[i];
    if (numel != 1) fail(op, ": seed: expected a tensor of one element, got shape ", seed.shape());
  }
  // Leading dimensions that lie in memory as one.
  void one_matrix(const Arg& a) const {
    if (const int64_t i = a.flat.split; i >= 0)
      fail(op, ": ", a.name, ": expected leading dimensions that lie as one (call contiguous()), got stride ",
           a.stride[i], " in dimension ", i, " of shape ", a.shape());
  }

 private:
  // The addresses of a tensor's first byte and of the byte after its last; both 0 if unknown.
  struct Bytes {
    uintptr_t first = 0, last = 0;
  };
  // A storage may have been freed, as sharded training does between two uses, or be too short.
  Bytes memory(const Arg& a) const {
    int64_t reach = 1, offset = 0, bytes = 0;
    for (int64_t i = 0; i < a.dim; ++i) {
      if (a.size[i] == 0) return {};
      reach += (a.size[i] - 1) * a.stride[i];
    }
    const void* data = nullptr;
    const bool known = torch_get_const_data_ptr(a.handle, &data) == 0 &&
                       aoti_torch_get_storage_offset(a.handle, &offset) == 0 &&
                       aoti_torch_get_storage_size(a.handle, &bytes) == 0;
    const int64_t item = item_size(a.dtype);
    const bool whole = bytes >= (offset + reach) * item;
    if (!known || !whole || !data)
      fail(op, ": ", a.name, ": expected a tensor with memory for shape ", a.shape(), ", got a storage of ",
           bytes, " bytes: it was freed or made shorter");
    const auto first = reinterpret_cast<uintptr_t>(data);
    return {first, first + uintptr_t(reach * item)};
  }
  // A tensor that is written must not contain one element twice, as an expanded or overlapping one does: the
  // stride of each dimension must exceed the reach of all dimensions with smaller strides.
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
  // Whether two tensors with overlapping memory still share no element, as two sets of columns of one buffer
  // do: true if within a row of some length each has columns of its own.
  static bool interleaved(const Arg& a, const Bytes& of_a, const Arg& b, const Bytes& of_b) {
    const auto width = [](const Arg& t, int64_t row) -> int64_t {  // 0: its rows are not that far apart
      const int64_t item = item_size(t.dtype);
      int64_t bytes = item;
      for (int64_t i = 0; i < t.dim; ++i) {
        const int64_t step = t.stride[i] * item;
        if (t.size[i] <= 1) continue;
        if (step < row)
          bytes += (t.size[i] - 1) * step;
        else if (step % row)
          return 0;
      }
      return bytes;
    };
    for (int64_t i = 0; i < a.dim; ++i) {
      const int64_t row = a.stride[i] * item_size(a.dtype);
      if (a.size[i] <= 1 || row == 0) continue;
      const int64_t width_a = width(a, row), width_b = width(b, row);
      const int64_t apart = (int64_t(of_b.first - of_a.first) % row + row) % row;
      if (width_a && width_b && apart >= width_a && apart + width_b <= row) return true;
    }
    return false;
  }
};

}  // namespace lotr
