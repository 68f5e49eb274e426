// The products of a layer on a CPU (layer.h): the base product by the library, the others by the
// kernels of cpu/.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <string>
#include <tuple>

#include "cpu/kernels.h"
#include "layer.h"

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
      fail("lotr: dtype ", dtype_info(t).name, " has no CPU kernel");
  }
}

// A checked argument [.., cols] as a matrix [rows, cols].
inline cpu::Mat mat_of(const Arg& a, void* data) {
  return {data, a.flat.rows, a.flat.cols, a.flat.row_stride, a.flat.col_stride, cpu_dtype(a.dtype)};
}

class CpuProducts {
 public:
  using Value = cpu::Mat;
  static constexpr bool unfolded_first = true;
  static constexpr int64_t max_rank = 0;

  CpuProducts(const Check& c, const Arg& like, double p = 0.0, const Arg& seed = Arg("seed"))
      : op_(c.op), like_(like) {
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

  // y or dx, new, with like's leading dimensions.
  Output<Value> output(const Arg& like, int64_t cols, const Arg& bias) const {
    OptionalTensor matrix;
    const Value value = make(matrix, like.flat.rows, cols, like_.dtype);
    Output<Value> y{with_leading(*matrix, like, cols), *matrix, value, {}};
    if (bias) y.bias = {read_data(bias), 1, bias.size[0], 0, bias.stride[0], cpu_dtype(bias.dtype)};
    return y;
  }
  Output<Value> onto(const Arg& given) const {
    return {*given.tensor, matrix_view(given), mat_of(given, written_data(given)), {}};
  }
  Sum<Value> sum(const Arg& given, OptionalTensor& made, int64_t rows, int64_t cols,
                 ScalarType dtype) const {
    if (given) return {mat_of(given, written_data(given)), true};
    return {make(made, rows, cols, dtype), false};
  }

  // out (fresh: =, else +=) x weight, by the library that torch's own linear layers use. y's bias
  // comes with the adapter's part.
  void base(const Output<Value>& out, const Arg& x, const Tensor& weight, bool fresh) const {
    const Tensor a = matrix_view(x);
    const AtenTensorHandle y = out.matrix.get();
    STABLE_TORCH_ERROR_CODE_CHECK(
        fresh ? aoti_torch_cpu_mm_out(y, a.get(), weight.get())
              : aoti_torch_cpu_addmm_out(y, y, a.get(), weight.get(), 1.0, 1.0));
  }
  // There is no such product on a CPU: order_of refuses it.
  template <class... Any>
  static std::string fused(const Any&...) {
    return {};
  }

  Value shrink(OptionalTensor& made, const Value& x, const Arg& A, bool dropped) const {
    const Value u = make(made, x.rows, A.size[1], like_.dtype);
    cpu::shrink(u, x, read(A), drop(dropped));
    return u;
  }
  Value fold(OptionalTensor& made, const Arg& B, const Arg& core, double scaling,
             ScalarType dtype) const {
    const Value F = make(made, B.size[0], core.size[0], dtype);
    cpu::fold(F, read(B), read(core), scaling);
    return F;
  }
  // fresh: y starts with this and its bias, whatever it holds.
  void expand(const Output<Value>& y, const Value& u, const Value& F, bool fresh,
              bool dropped) const {
    cpu::expand_add(y.value, u, F, drop(dropped), {fresh, y.bias});
  }
  Value shrink_grad(OptionalTensor& made, const Sum<Value>& Q, const Value& g, const Arg& F,
                    const Arg& u) const {
    const Value k = make(made, g.rows, F.size[1], like_.dtype);
    cpu::shrink_grad(k, Q.value, g, read(F), read(u), Q.add);
    return k;
  }
  void add(OptionalTensor&, const Value& k, const Arg& given) const { cpu::add(k, read(given)); }
  void fold_grad(const Sum<Value>& dB, const Sum<Value>& dcore, const Value& Q, const Arg& B,
                 const Arg& core, double scaling) const {
    cpu::fold_grad(dB.value, dcore.value, Q, read(B), read(core), scaling, dB.add);
  }
  // D (+)= drop(x)^T v.
  void outer(const Sum<Value>& D, const Value& x, const Value& v, bool dropped) const {
    cpu::factor_grad(D.value, x, v, drop(dropped), D.add);
  }

  void small_forward(OptionalTensor& made, const Output<Value>& y, const ForwardArgs& a,
                     const Sizes& s, double scaling, bool fresh) const {
    const Value u = make(made, s[M], s[R_IN], like_.dtype);
    cpu::small_forward(u, y.value, read(a.x), read(a.A), read(a.core), read(a.B), scaling,
                       {fresh, y.bias});
  }
  void small_backward(const BackwardOutputs<Value>& out, const BackwardArgs& a, const Sizes&,
                      double scaling, bool fresh) const {
    cpu::SmallBackward b;
    b.g = read(a.g), b.A = read(a.A), b.core = read(a.core), b.B = read(a.B), b.scaling = scaling;
    if (a.u) b.u = read(a.u);
    if (a.x) b.x = read(a.x);
    b.dx = out.dx.value, b.fresh_dx = fresh, b.dA = out.dA.value, b.fresh_dA = !out.dA.add;
    b.dB = out.dB.value, b.fresh_dB = !out.dB.add, b.dcore = out.dcore.value;
    cpu::small_backward(b);
  }

  // ---- a core a row: cpu_rows.cpp ----
  Tensor row_core(const RowArgs& a, const Sizes& s, double scaling) const;
  std::tuple<Tensor, Tensor> row_core_backward(const RowArgs& a, const Sizes& s, double scaling,
                                               bool need_u, bool need_cores) const;

 private:
  // A new contiguous matrix, to be written.
  Value make(OptionalTensor& made, int64_t rows, int64_t cols, ScalarType dtype) const {
    made = empty<2>(like_, {rows, cols}, dtype_info(dtype).code);
    return {made->mutable_data_ptr(), rows, cols, cols, 1, cpu_dtype(dtype)};
  }
  cpu::Drop drop(bool dropped) const { return dropped ? drop_ : cpu::Drop{}; }

  const char* op_;
  const Arg& like_;
  cpu::Drop drop_;
};

}  // namespace lotr
