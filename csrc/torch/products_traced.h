// The products of a layer as separate operators (layer.h), for a dispatch mode such as selective
// checkpointing. Such a mode may keep any operator's result, so the forward never writes into one.
#pragma once

#include <vector>

#include "composite.h"
#include "layer.h"

namespace lotr {

class TracedProducts {
 public:
  using Value = Tensor;
  static constexpr bool decomposed = true, fuses = false, folded_first = false, unfolded_first = false;
  static constexpr int64_t max_rank = 0;

  struct Output {
    Tensor value;  // y in the shape that is returned; dx [m, k]
    const Arg& like;
    OptionalTensor bias, scale;
  };
  // Q: a given sum, which is added to, or a new one.
  struct Sum {
    OptionalTensor value;
    bool given, own;
    int64_t rows, cols;

    Sum(const TracedProducts&, const Arg& given, bool own, int64_t rows, int64_t cols)
        : value(tensor(given)), given(bool(given)), own(own), rows(rows), cols(cols) {}
    explicit operator bool() const { return given || own; }
  };

  TracedProducts(const Check&, const Arg& like, double p, const Arg& seed)
      : like_(*like.tensor), dtype_(like.dtype), p_(p), seed_(tensor(seed)) {}
  static int64_t order_of(const Check&, int64_t strategy) { return strategy & ~UNFOLDED; }

  Value read(const Arg& a) const {
    return a.dim == 2 ? *a.tensor : torch::stable::reshape(*a.tensor, {-1, a.flat.cols});
  }
  Output output(const Arg& x, int64_t, const Arg& bias, const Arg& scale) const {
    return {like_, x, tensor(bias), tensor(scale)};
  }
  Output gradient(const Arg& given, const Arg& g, int64_t) const {
    return {given ? read(given) : like_, g, std::nullopt, std::nullopt};
  }
  Tensor result(Output& out) const {
    return shaped(out.scale ? scaled(out.value, *out.scale, out.bias) : out.value, out.like);
  }

  void base(Output& y, const Arg& x, const Arg& weight) const {
    y.value = shaped(one("aten::linear", read(x), *weight.tensor, y.scale ? std::nullopt : y.bias), x);
  }
  void base_onto(Output&, const Arg&, const Arg&) const {}  // not called: the base product is always first
  void base_gradient(Output& dx, const Arg& g, const Arg& weight, bool fresh) const {
    const Tensor own = one("aten::mm", read(g), *weight.tensor);
    dx.value = fresh ? own : torch::stable::copy_(dx.value, sum(dx.value, own));
  }

  Value shrink(OptionalTensor& made, const Value& x, const Arg& A, bool dropped) const {
    made = one("lotr::shrink", x, *A.tensor, dropped ? p_ : 0.0, seed_of(dropped));
    return *made;
  }
  Value fold(OptionalTensor& made, const Arg& B, const Arg& core, double scaling, ScalarType dtype) const {
    made = torch::stable::squeeze(
        one("lotr::fold", *B.tensor, torch::stable::unsqueeze(*core.tensor, 0), scaling, dtype), 0);
    return *made;
  }
  // y is new in forward, where nothing is dropped from u F^T; dx is written.
  void expand(Output& out, const Value& u, const Value& F, bool, bool dropped) const {
    if (!dropped)
      out.value = one("lotr::expand", out.value, u, F);
    else
      dispatch<0>("lotr::expand_add_", out.value, u, F, p_, seed_);
  }
  Value shrink_grad(OptionalTensor& made, Sum& Q, const Value& g, const Arg& F, const Arg& u) const {
    start(Q);
    made = one("lotr::shrink_grad_", *Q.value, g, *F.tensor, *u.tensor);
    return *made;
  }
  void add_outer(Sum& Q, const Value& g, const Arg& u) const {
    start(Q);
    dispatch<0>("lotr::factor_grad_", *Q.value, g, *u.tensor, 0.0, OptionalTensor());
  }
  void add(OptionalTensor& made, Value& k, const Arg& given) const { k = *(made = sum(k, *given.tensor)); }
  void fold_grad(Made& made, const OptionalTensor& Q, int64_t, const Arg& B, const Arg& core, double scaling,
                 const Arg& dB, bool need_B, bool need_core, ScalarType narrow) const {
    OptionalTensor total = tensor(dB);
    if (need_B && !dB) total = zeros({B.size[0], B.size[1]}, acc_dtype(dtype_));
    const Tensor cores = one("lotr::fold_grad", torch::stable::unsqueeze(*Q, 0), *B.tensor,
                             torch::stable::unsqueeze(*core.tensor, 0), scaling, total);
    if (need_core) made.dcore = in_dtype(torch::stable::squeeze(cores, 0), narrow);
    if (need_B && !dB) made.dB = in_dtype(*total, narrow);
  }
  void factor_grad(OptionalTensor& made, const Arg& given, int64_t rows, int64_t cols, ScalarType narrow,
                   const Arg& x, const Value& k) const {
    const Tensor total = given ? *given.tensor : zeros({rows, cols}, acc_dtype(dtype_));
    dispatch<0>("lotr::factor_grad_", total, read(x), k, p_, seed_);
    if (!given) made = in_dtype(total, narrow);
  }

  // y + s ((x A) G) B^T by torch's own products: forward writes into nothing.
  void small_forward(OptionalTensor& made, Output& y, const ForwardArgs& a, const Sizes&, double scaling,
                     bool) const {
    const Tensor u = shrink(made, read(a.x), a.A, false), core = in_dtype(*a.core.tensor, dtype_),
                 B = in_dtype(*a.B.tensor, dtype_);
    const Tensor part = one("aten::mm", one("aten::mm", u, core), torch::stable::transpose(B, 0, 1));
    y.value = sum(y.value, shaped(part, a.x), scaling);
  }
  // In the dtype of sums. The scaling comes last, as in the kernels: s g B may leave the range of float16.
  void small_backward(Made& made, Output* dx, const BackwardArgs& a, const Sizes&, double scaling, bool,
                      bool need_B, bool need_core, ScalarType narrow) const {
    const auto wide = [&](const Arg& t) { return in_dtype(in_dtype(read(t), dtype_), acc_dtype(dtype_)); };
    const auto turned = [](const Tensor& t) { return torch::stable::transpose(t, 0, 1); };
    const auto mm = [](const Tensor& left, const Tensor& right) { return one("aten::mm", left, right); };
    const auto scaled = [&](const Tensor& t) {
      return sum(zeros({t.size(0), t.size(1)}, t.scalar_type()), t, scaling);
    };
    // Onto the given sum without another tensor of its size.
    const auto add = [&](OptionalTensor& made, const Arg& given, const Tensor& left, const Tensor& right) {
      const Tensor total = given ? *given.tensor : zeros({left.size(1), right.size(1)}, left.scalar_type());
      dispatch<0>("lotr::factor_grad_", total, left, scaled(right), 0.0, OptionalTensor());
      if (!given) made = in_dtype(total, narrow);
    };
    const Tensor g = wide(a.g), core = wide(a.core);
    if (need_B) add(made.dB, a.dB, g, mm(wide(a.u), core));
    if (!need_core && !a.x && !dx) return;
    const Tensor h = mm(g, wide(a.B));
    if (need_core) made.dcore = in_dtype(scaled(mm(turned(wide(a.u)), h)), narrow);
    if (!a.x && !dx) return;
    const Tensor k = mm(h, turned(core));
    if (a.x) add(made.dA, a.dA, wide(a.x), k);
    if (dx) dx->value = in_dtype(sum(dx->value, mm(k, turned(wide(a.A))), scaling), dtype_);
  }

 private:
  static OptionalTensor tensor(const Arg& a) { return a ? OptionalTensor(*a.tensor) : std::nullopt; }
  OptionalTensor seed_of(bool dropped) const { return dropped ? seed_ : std::nullopt; }
  Tensor zeros(std::vector<int64_t> size, ScalarType dtype) const {
    return torch::stable::new_zeros(like_, size, dtype);
  }
  void start(Sum& Q) const {
    if (!Q.given) Q.value = zeros({Q.rows, Q.cols}, acc_dtype(dtype_));
  }
  // a + scale b; the stable interface has the difference alone.
  static Tensor sum(const Tensor& a, const Tensor& b, double scale = 1.0) {
    return torch::stable::subtract(a, b, -scale);
  }
  // t [m, cols] in the leading dimensions of like.
  static Tensor shaped(const Tensor& t, const Arg& like) {
    if (like.dim == 2 || t.dim() != 2) return t;
    std::vector<int64_t> size(like.size, like.size + like.dim);
    size.back() = t.size(1);
    return torch::stable::view(t, size);
  }

  const Tensor& like_;
  ScalarType dtype_;
  double p_;
  OptionalTensor seed_;
};

}  // namespace lotr
