// The products of a layer on a CPU (layer.h): the base product by the library, the others by the kernels of
// cpu/.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>

#include "cpu/kernels.h"
#include "cpu/runtime.h"
#include "layer.h"
#include "matrix_view.h"

namespace lotr {

inline cpu::Dtype cpu_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return cpu::Dtype::f32;
    case ScalarType::Double:
      return cpu::Dtype::f64;
    case ScalarType::BFloat16:
      return cpu::Dtype::bf16;
    case ScalarType::Half:
      return cpu::Dtype::f16;
    default:
      fail("lotr: dtype ", dtype_name(t), " has no CPU kernel");
  }
}

// A contiguous CPU tensor, not initialised: the C function underneath torch::stable::empty, without its pass
// through the dispatcher. size: a std::array or std::vector of int64_t.
template <typename Size>
Tensor empty(const Size& size, ScalarType dtype) {
  Size stride = size;
  int64_t step = 1;
  for (size_t i = size.size(); i-- > 0; step *= size[i]) stride[i] = step;
  const int32_t code = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::Double   ? aoti_torch_dtype_float64()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float16();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), stride.data(),
                                                         code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
template <size_t dim>
Tensor empty_of(const std::array<int64_t, dim>& size, ScalarType dtype) {
  return empty(size, dtype);
}

// A checked argument [.., cols] as a matrix [rows, cols].
inline cpu::Mat mat_of(const Arg& a, void* data) {
  return {data, a.flat.rows, a.flat.cols, a.flat.row_stride, a.flat.col_stride, cpu_dtype(a.dtype)};
}
// The first of the matrices of a checked [l, rows, cols] or [rows, cols].
inline cpu::Mat layer_mat(const Arg& a, void* data) {
  const int64_t *size = a.size + a.dim - 2, *stride = a.stride + a.dim - 2;
  return {data, size[0], size[1], stride[0], stride[1], cpu_dtype(a.dtype)};
}
inline int64_t layers(const Arg& a) {
  return a.dim == 3 ? a.size[0] : 1;
}
inline int64_t layer_stride(const Arg& a) {
  return a.dim == 3 ? a.stride[0] : 0;
}

// A new contiguous matrix, to be written.
inline cpu::Mat make(OptionalTensor& made, int64_t rows, int64_t cols, ScalarType dtype) {
  made = empty_of<2>({rows, cols}, dtype);
  return {made->mutable_data_ptr(), rows, cols, cols, 1, cpu_dtype(dtype)};
}

class CpuProducts {
 public:
  using Value = cpu::Mat;
  static constexpr bool unfolded_first = true;
  static constexpr int64_t max_rank = 0;

  // y or dx: the tensor, the same as a matrix for the library and for the kernels, and y's bias.
  struct Output {
    Tensor tensor, matrix;
    Value mat, bias;
  };
  // Q: a given sum to add to, or new memory; with 0 rows if there is neither.
  struct Sum {
    cpu::Scratch memory;
    Value value;
    bool add;

    Sum(const CpuProducts& p, const Arg& given, bool own, int64_t rows, int64_t cols)
        : memory(own ? size_t(rows * cols * item_size(p.sums_)) : 0), add(bool(given)) {
      if (given) value = mat_of(given, written_data(given));
      if (own) value = {memory.get<void>(), rows, cols, cols, 1, cpu_dtype(p.sums_)};
    }
    explicit operator bool() const { return value.data; }
  };

  CpuProducts(const Check& c, const Arg& like, double p, const Arg& seed)
      : op_(c.op), dtype_(like.dtype), sums_(acc_dtype(like.dtype)) {
    if (p == 0.0) return;
    drop_.on = true;
    drop_.threshold = uint32_t(p * 4294967296.0);
    drop_.scale = 1.0 / (1.0 - p);
    drop_.seed = uint64_t(*static_cast<const int64_t*>(read_data(seed)));
  }
  static int64_t order_of(const Check& c, int64_t strategy) {
    const int64_t order = strategy & ~UNFOLDED;
    if (order != TWO_PASS && order != BETA)
      fail(c.op, ": strategy: expected 0 (two_pass) or 1 (beta) on a CPU, got ", strategy,
           strategy == FUSED ? " (fused)" : "");
    return order;
  }

  Value read(const Arg& a) const { return mat_of(a, read_data(a)); }
  // The first of [l, rows, cols].
  Value first(const Arg& a) const { return layer_mat(a, read_data(a)); }

  // y, new, with x's leading dimensions.
  Output output(const Arg& x, int64_t cols, const Arg& bias) const {
    Output y = new_output(x, cols);
    if (bias) y.bias = {read_data(bias), 1, bias.size[0], 0, bias.stride[0], cpu_dtype(bias.dtype)};
    return y;
  }
  // dx: the given one, or new with g's leading dimensions.
  Output gradient(const Arg& given, const Arg& g, int64_t cols) const {
    if (!given) return new_output(g, cols);
    return {*given.tensor, matrix_view(given), mat_of(given, written_data(given)), {}};
  }
  Tensor result(Output& y) const { return std::move(y.tensor); }

  // The base product. y's bias comes with the adapter's part.
  void base(Output& y, const Arg& x, const Arg& weight) const {
    mm(y.matrix, matrix_view(x), transposed_view(weight), true);
  }
  void base_onto(Output& y, const Arg& x, const Arg& weight) const {
    mm(y.matrix, matrix_view(x), transposed_view(weight), false);
  }
  void base_gradient(Output& dx, const Arg& g, const Arg& weight, bool fresh) const {
    mm(dx.matrix, matrix_view(g), *weight.tensor, fresh);
  }

  Value shrink(OptionalTensor& made, const Value& x, const Arg& A, bool dropped) const {
    const Value u = make(made, x.rows, A.size[1], dtype_);
    cpu::shrink(u, x, read(A), drop(dropped));
    return u;
  }
  // F of one core, or of all of [l, r_in, r_out].
  Value fold(OptionalTensor& made, const Arg& B, const Arg& cores, double scaling, ScalarType dtype) const {
    const int64_t n = B.size[0], r_in = cores.size[cores.dim - 2], l = layers(cores);
    made = cores.dim == 3 ? empty_of<3>({l, n, r_in}, dtype) : empty_of<2>({n, r_in}, dtype);
    const Value F{made->mutable_data_ptr(), n, r_in, r_in, 1, cpu_dtype(dtype)};
    cpu::fold(F, n * r_in, read(B), layer_mat(cores, read_data(cores)), layer_stride(cores), l, scaling);
    return F;
  }
  void expand(Output& y, const Value& u, const Value& F, bool fresh, bool dropped) const {
    cpu::expand_add(y.mat, u, F, drop(dropped), {fresh, y.bias});
  }
  Value shrink_grad(OptionalTensor& made, const Sum& Q, const Value& g, const Arg& F, const Arg& u) const {
    const Value k = make(made, g.rows, F.size[1], dtype_);
    cpu::shrink_grad(k, Q.value, g, read(F), read(u), Q.add);
    return k;
  }
  void add_outer(const Sum& Q, const Value& g, const Arg& u) const {
    cpu::factor_grad(Q.value, g, read(u), {}, Q.add);
  }
  void add(OptionalTensor&, const Value& k, const Arg& given) const { cpu::add(k, read(given)); }
  // Of one core, or of all of [l, r_in, r_out], whose Q are Q_stride apart. dB is added to where it is given.
  void fold_grad(Made& made, const Value& Q, int64_t Q_stride, const Arg& B, const Arg& cores, double scaling,
                 const Arg& dB, bool need_B, bool need_core, ScalarType narrow) const {
    const int64_t r_in = cores.size[cores.dim - 2], r_out = B.size[1], l = layers(cores);
    Value dB_mat, dcores;
    if (need_B || dB) dB_mat = sum_or_new(dB, made.dB, B.size[0], r_out, narrow);
    if (need_core) {
      made.dcore =
          cores.dim == 3 ? empty_of<3>({l, r_in, r_out}, narrow) : empty_of<2>({r_in, r_out}, narrow);
      dcores = {made.dcore->mutable_data_ptr(), r_in, r_out, r_out, 1, cpu_dtype(narrow)};
    }
    cpu::fold_grad(dB_mat, dcores, r_in * r_out, Q, Q_stride, read(B), layer_mat(cores, read_data(cores)),
                   layer_stride(cores), l, scaling, bool(dB));
  }
  // sum (+)= drop(x)^T k, into a new tensor where none is given.
  void factor_grad(OptionalTensor& made, const Arg& sum, int64_t rows, int64_t cols, ScalarType narrow,
                   const Arg& x, const Value& k) const {
    cpu::factor_grad(sum_or_new(sum, made, rows, cols, narrow), read(x), k, drop(true), bool(sum));
  }

  void small_forward(OptionalTensor& made, Output& y, const ForwardArgs& a, const Sizes& s, double scaling,
                     bool fresh) const {
    const Value u = make(made, s[M], s[R_IN], dtype_);
    cpu::small_forward(u, y.mat, read(a.x), read(a.A), read(a.core), read(a.B), scaling, {fresh, y.bias});
  }
  // dx: null, or the output that is written (fresh) or added to.
  void small_backward(Made& made, Output* dx, const BackwardArgs& a, const Sizes& s, double scaling,
                      bool fresh, bool need_B, bool need_core, ScalarType narrow) const {
    cpu::SmallBackward b;
    b.g = read(a.g), b.A = read(a.A), b.core = read(a.core), b.B = read(a.B), b.scaling = scaling;
    if (dx) b.dx = dx->mat, b.fresh_dx = fresh;
    if (a.u) b.u = read(a.u);
    if (a.x) {
      b.x = read(a.x), b.fresh_dA = !a.dA;
      b.dA = sum_or_new(a.dA, made.dA, s[K], s[R_IN], narrow);
    }
    if (need_B) b.fresh_dB = !a.dB, b.dB = sum_or_new(a.dB, made.dB, s[N], s[R_OUT], narrow);
    if (need_core) b.dcore = make(made.dcore, s[R_IN], s[R_OUT], narrow);
    cpu::small_backward(b);
  }

  // There is no fused product on a CPU: order_of refuses it.
  template <class... Any>
  static bool fuses(const Any&...) {
    return false;
  }
  template <class... Any>
  static void fused(const Any&...) {}

  // ---- a core a row: cpu_rows.cpp ----
  Tensor row_core(const RowArgs& a, const Sizes& s, double scaling) const;
  std::tuple<Tensor, Tensor> row_core_backward(const RowArgs& a, const Sizes& s, double scaling, bool need_u,
                                               bool need_cores) const;

 private:
  Output new_output(const Arg& like, int64_t cols) const {
    const int64_t rows = like.flat.rows;
    const bool flat = like.dim == 2;  // then sizes need no heap memory
    Tensor t = flat ? empty_of<2>({rows, cols}, dtype_) : empty(size_like(like, cols), dtype_);
    Tensor matrix = flat ? t : matrix_view(t.get(), rows, cols, cols, 1);
    const Value mat{t.mutable_data_ptr(), rows, cols, cols, 1, cpu_dtype(dtype_)};
    return {std::move(t), std::move(matrix), mat, {}};
  }
  static Value sum_or_new(const Arg& given, OptionalTensor& made, int64_t rows, int64_t cols,
                          ScalarType dtype) {
    return given ? mat_of(given, written_data(given)) : make(made, rows, cols, dtype);
  }
  // out (fresh: =, else +=) a b, by the library that torch's own linear layers use.
  static void mm(const Tensor& out, const Tensor& a, const Tensor& b, bool fresh) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        fresh ? aoti_torch_cpu_mm_out(out.get(), a.get(), b.get())
              : aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  }
  cpu::Drop drop(bool dropped) const { return dropped ? drop_ : cpu::Drop{}; }

  const char* op_;
  ScalarType dtype_, sums_;
  cpu::Drop drop_;
};

}  // namespace lotr
