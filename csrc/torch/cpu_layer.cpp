// One direction of a whole layer in one call, on a CPU: the base product by the library, the rest by the
// kernels.
//
//   layer_forward          u = drop(x) A,  F = s B G^T;   y = x W^T + bias + u F^T
//   layer_backward_        k = g F + k',   Q = g^T u;     dx = dx' + g W + drop(k A^T),  dA += drop(x)^T k,
//                                                         dB += s Q G,  dG = s Q^T B
//   small_layer_forward    the same with nothing folded, for few tokens: h = s u G;  y = x W^T + bias + h B^T
//   small_layer_backward_  h = s g B,  k = h G^T;         dx = g W + k A^T,  dA += x^T k,  dB += s g^T (u G),
//   dG = u^T h
//
// Why one call: a base product of a few milliseconds leaves nothing in cache of what Python, the dispatcher
// and autograd run between two operators, and every entry costs tens of microseconds then instead of two.
//
// beta: the adapter's part is written first, and the base product accumulates onto it (its beta = 1). torch's
// own linear starts in just this way from a copy of the bias, so the expand's pass over y replaces that copy,
// and nothing runs cold after the product. Without: the product first, then the adapter's part added to it,
// and the bias with it: the expand's pass over y adds it at no cost, where the library's bfloat16 product
// with a bias takes up to 7 % longer than the one without.  These are the values 1 (BETA) and 0 (TWO_PASS) of
// `strategy`.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/runtime.h"
#include "cpu_args.h"

namespace lotr {
namespace {

// [.., cols] as [rows, cols], for the kernels and (view) for the library.
struct Matrix {
  const Arg& arg;
  Flat flat;
  Matrix(const Check& c, const Arg& a) : arg(a), flat(check_flat(c, a, "of 1 or more dimensions")) {}

  cpu::Mat mat() const {
    return {read_data(arg), flat.rows, flat.cols, flat.row_stride, flat.col_stride, cpu_dtype(arg.dtype)};
  }
  cpu::Mat written_mat() const {
    cpu::Mat m = mat();
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(arg.handle, &m.data));
    return m;
  }
};

Tensor view(AtenTensorHandle of, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  const int64_t size[] = {rows, cols}, stride[] = {row_stride, col_stride};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(of, 2, size, stride, 0, &handle));  // from of's own offset
  return Tensor(handle);
}
// t, which `a` is of, as the library's products take it.
Tensor view(const Tensor& t, const Matrix& a) {
  if (a.arg.dim == 2) return t;
  return view(a.arg.handle, a.flat.rows, a.flat.cols, a.flat.row_stride, a.flat.col_stride);
}
Tensor transposed_view(const Arg& weight) {
  return view(weight.handle, weight.size[1], weight.size[0], weight.stride[1], weight.stride[0]);
}

// out = a b, or out += a b, by the library that torch's own linear layers use.
void product(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}
void product_onto(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

// A new tensor of like's leading dimensions and `cols` columns.
Tensor like_rows(const Arg& like, int64_t cols) {
  if (like.dim == 2) return empty<2>({like.size[0], cols}, like.dtype);  // needs no memory for the sizes
  std::vector<int64_t> size(like.size, like.size + like.dim);
  size.back() = cols;
  return empty_of(size, like.dtype);
}

cpu::Mat row_of(const Arg* bias) {
  return bias ? cpu::Mat{read_data(*bias), 1, bias->size[0], 0, bias->stride[0], cpu_dtype(bias->dtype)}
              : cpu::Mat{};
}

// y = x W^T + bias + what expand(start) adds.
template <typename Expand>
Tensor with_base(const Check& c, const Tensor& x, const Arg& ax, const Arg& aweight,
                 const std::optional<Arg>& bias, int64_t n, bool beta, Expand&& expand) {
  Tensor y = like_rows(ax, n);
  const Arg ay("y", y);
  const Matrix out(c, ay);
  const Tensor y2 = view(y, out), x2 = view(x, Matrix(c, ax)), w = transposed_view(aweight);
  if (!beta) product(y2, x2, w);
  expand(out.written_mat(), cpu::Start{beta, row_of(pointer(bias))});
  if (beta) product_onto(y2, x2, w);
  return y;
}

// dx (+)= g W; (+)= where dx is not fresh.
void base_backward(const Tensor& dx, bool fresh, const Tensor& g, const Tensor& weight) {
  if (fresh) {
    product(dx, g, weight);
  } else {
    product_onto(dx, g, weight);
  }
}

using Forward = std::tuple<Tensor, OptionalTensor, OptionalTensor>;

Forward layer_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& A, const Tensor& B, const Tensor& core, double scaling,
                      int64_t strategy, const OptionalTensor& u, const OptionalTensor& F, double p,
                      const OptionalTensor& seed) {
  const Check c{"lotr::layer_forward"};
  check_strategy(c, strategy);
  const Arg ax("x", x), aweight("weight", weight), aB("B", B), acore("core", core);
  const auto abias = optional_arg("bias", bias), aA = optional_arg("A", A), au = optional_arg("u", u),
             aF = optional_arg("F", F);
  const Sizes s = check_layer_forward(c, ax, aweight, pointer(abias), pointer(aA), aB, acore, scaling,
                                      pointer(au), pointer(aF), p, seed);
  OptionalTensor new_u, new_F;
  cpu::Mat u_mat, F_mat;
  if (au) {
    u_mat = read(*au);
  } else {
    u_mat = make(new_u, s.m, s.r_in, ax.dtype);
    cpu::shrink(u_mat, Matrix(c, ax).mat(), read(*aA), drop(p, seed));
  }
  if (aF) {
    F_mat = read(*aF);
  } else {
    F_mat = make(new_F, s.n, s.r_in, ax.dtype);
    cpu::fold(F_mat, 0, read(aB), read(acore), 0, 1, scaling);
  }
  Tensor y = with_base(
      c, x, ax, aweight, abias, s.n, strategy == BETA,
      [&](const cpu::Mat& out, const cpu::Start& start) { cpu::expand_add(out, u_mat, F_mat, {}, start); });
  return {std::move(y), std::move(new_u), std::move(new_F)};
}

// Where a gradient goes: to the given sum, or to a new tensor.
cpu::Mat sum_or_new(const std::optional<Arg>& given, OptionalTensor& made, int64_t rows, int64_t cols,
                    ScalarType dtype) {
  return given ? written(*given) : make(made, rows, cols, dtype);
}

// What new gradients of the factors are rounded to: the factors' own dtype where they have one, else that of
// sums.
ScalarType gradient_dtype(const std::optional<Arg>& A, const Arg& B, const Arg& core) {
  const bool one = B.dtype == core.dtype && (!A || A->dtype == B.dtype);
  return one ? B.dtype : acc_dtype(B.dtype);
}

// What was not asked for comes back with no element: torch.compile takes no operator that writes and returns
// "Tensor?". `.._owned_` gives None.
Tensor or_nothing(const OptionalTensor& t, ScalarType dtype) {
  return t ? *t : empty<1>({0}, dtype);
}
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // dx, k, dA, dB, dcore
using Owned = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

Owned layer_backward(const Tensor& g, const OptionalTensor& weight, const OptionalTensor& x,
                     const OptionalTensor& u, const OptionalTensor& A, const OptionalTensor& F,
                     const Tensor& B, const Tensor& core, double scaling, int64_t strategy,
                     const OptionalTensor& k, const OptionalTensor& dx, const OptionalTensor& Q,
                     const OptionalTensor& dA, const OptionalTensor& dB, bool need_B, bool need_core,
                     double p, const OptionalTensor& seed) {
  const Check c{"lotr::layer_backward_"};
  check_strategy(c, strategy);
  const Arg ag("g", g), aB("B", B), acore("core", core);
  const auto aweight = optional_arg("weight", weight), ax = optional_arg("x", x), au = optional_arg("u", u),
             aA = optional_arg("A", A), aF = optional_arg("F", F), ak = optional_arg("k", k),
             adx = optional_arg("dx", dx), aQ = optional_arg("Q", Q), adA = optional_arg("dA", dA),
             adB = optional_arg("dB", dB);
  const BackwardArgs args{pointer(aweight), pointer(ax),  pointer(au), pointer(aA),  pointer(aF),
                          pointer(ak),      pointer(adx), pointer(aQ), pointer(adA), pointer(adB)};
  const Sizes s = check_layer_backward(c, ag, args, aB, acore, scaling, p, seed);
  const ScalarType wide = acc_dtype(ag.dtype), narrow = gradient_dtype(aA, aB, acore);
  const Matrix g_matrix(c, ag);
  const cpu::Mat g_mat = g_matrix.mat();
  OptionalTensor new_k, new_dx, new_dA, new_dB, new_core;

  // k = g F and Q (+)= g^T u, from one read of g
  cpu::Mat k_mat, Q_mat;
  if (aF) k_mat = make(new_k, s.m, s.r_in, ag.dtype);
  const bool own_Q = au && !aQ;
  const cpu::Scratch Q_memory(own_Q ? size_t(s.n * s.r_in) * (wide == ScalarType::Double ? 8 : 4) : 0);
  if (au && aQ) Q_mat = written(*aQ);
  if (own_Q) Q_mat = {Q_memory.get<void>(), s.n, s.r_in, s.r_in, 1, cpu_dtype(wide)};
  if (aF && au) {
    cpu::shrink_grad(k_mat, Q_mat, g_mat, read(*aF), read(*au), bool(aQ));
  } else if (aF) {
    cpu::shrink(k_mat, g_mat, read(*aF), {});
  } else if (au) {
    cpu::factor_grad(Q_mat, g_mat, read(*au), {}, bool(aQ));
  }
  if (aF && ak) cpu::add(k_mat, read(*ak));
  if (own_Q && (need_B || need_core || adB)) {
    cpu::Mat dB_mat, core_mat;
    if (need_B || adB) dB_mat = sum_or_new(adB, new_dB, s.n, s.r_out, narrow);
    if (need_core) core_mat = sum_or_new(std::nullopt, new_core, s.r_in, s.r_out, narrow);
    cpu::fold_grad(dB_mat, core_mat, 0, Q_mat, 0, read(aB), read(acore), 0, 1, scaling, bool(adB));
  }
  if (ax) {
    cpu::factor_grad(sum_or_new(adA, new_dA, s.k, s.r_in, narrow), Matrix(c, *ax).mat(), k_mat, drop(p, seed),
                     bool(adA));
  }
  if (aweight) {
    if (!adx) new_dx = like_rows(ag, s.k);
    const Tensor& dx_tensor = adx ? *dx : *new_dx;
    const Arg out("dx", dx_tensor);
    const Matrix dx_matrix(c, out);
    const bool expands = aA && aF, expand_first = expands && strategy == BETA;
    const auto expand = [&](bool fresh) {
      cpu::expand_add(dx_matrix.written_mat(), k_mat, read(*aA), drop(p, seed), {fresh, {}});
    };
    if (expand_first) expand(!adx);
    base_backward(view(dx_tensor, dx_matrix), !adx && !expand_first, view(g, g_matrix), *weight);
    if (expands && !expand_first) expand(false);
  }
  return {std::move(new_dx), std::move(new_k), std::move(new_dA), std::move(new_dB), std::move(new_core)};
}

Backward layer_backward_(const Tensor& g, const OptionalTensor& weight, const OptionalTensor& x,
                         const OptionalTensor& u, const OptionalTensor& A, const OptionalTensor& F,
                         const Tensor& B, const Tensor& core, double scaling, int64_t strategy,
                         const OptionalTensor& k, const OptionalTensor& dx, const OptionalTensor& Q,
                         const OptionalTensor& dA, const OptionalTensor& dB, bool need_B, bool need_core,
                         double p, const OptionalTensor& seed) {
  const auto [new_dx, new_k, new_dA, new_dB, new_core] = layer_backward(
      g, weight, x, u, A, F, B, core, scaling, strategy, k, dx, Q, dA, dB, need_B, need_core, p, seed);
  const ScalarType narrow = gradient_dtype(optional_arg("A", A), Arg("B", B), Arg("core", core));
  return {or_nothing(new_dx, g.scalar_type()), or_nothing(new_k, g.scalar_type()), or_nothing(new_dA, narrow),
          or_nothing(new_dB, narrow), or_nothing(new_core, narrow)};
}

std::tuple<Tensor, Tensor> small_layer_forward(const Tensor& x, const Tensor& weight,
                                               const OptionalTensor& bias, const Tensor& A, const Tensor& B,
                                               const Tensor& core, double scaling, bool beta) {
  const Check c{"lotr::small_layer_forward"};
  const Arg ax("x", x), aweight("weight", weight), aA("A", A), aB("B", B), acore("core", core);
  const auto abias = optional_arg("bias", bias);
  const Sizes s = check_layer_forward(c, ax, aweight, pointer(abias), &aA, aB, acore, scaling, nullptr,
                                      nullptr, 0.0, std::nullopt);
  OptionalTensor u;
  const cpu::Mat u_mat = make(u, s.m, s.r_in, ax.dtype), x_mat = Matrix(c, ax).mat();
  Tensor y =
      with_base(c, x, ax, aweight, abias, s.n, beta, [&](const cpu::Mat& out, const cpu::Start& start) {
        cpu::small_forward(u_mat, out, x_mat, read(aA), read(acore), read(aB), scaling, start);
      });
  return {std::move(y), std::move(*u)};
}

using SmallBackward = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dx, dA, dB, dcore
using SmallOwned = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

SmallOwned small_layer_backward(const Tensor& g, const OptionalTensor& weight, const OptionalTensor& x,
                                const OptionalTensor& u, const Tensor& A, const Tensor& B, const Tensor& core,
                                double scaling, bool beta, const OptionalTensor& dA, const OptionalTensor& dB,
                                bool need_B, bool need_core) {
  const Check c{"lotr::small_layer_backward_"};
  const Arg ag("g", g), aA("A", A), aB("B", B), acore("core", core);
  const auto aweight = optional_arg("weight", weight), ax = optional_arg("x", x), au = optional_arg("u", u),
             adA = optional_arg("dA", dA), adB = optional_arg("dB", dB);
  BackwardArgs args;
  args.weight = pointer(aweight), args.x = pointer(ax), args.u = pointer(au), args.A = &aA, args.F = nullptr;
  args.dA = pointer(adA), args.dB = pointer(adB);
  const Sizes s = check_small_layer_backward(c, ag, args, aB, acore, scaling, need_B || need_core);
  const ScalarType narrow = gradient_dtype(aA, aB, acore);
  const Matrix g_matrix(c, ag);
  OptionalTensor new_dx, new_dA, new_dB, new_core;
  cpu::SmallBackward b;
  b.g = g_matrix.mat(), b.A = read(aA), b.core = read(acore), b.B = read(aB), b.scaling = scaling;
  if (au) b.u = read(*au);
  if (ax) {
    b.x = Matrix(c, *ax).mat(), b.fresh_dA = !adA;
    b.dA = sum_or_new(adA, new_dA, s.k, s.r_in, narrow);
  }
  if (need_B) b.fresh_dB = !adB, b.dB = sum_or_new(adB, new_dB, s.n, s.r_out, narrow);
  if (need_core) b.dcore = sum_or_new(std::nullopt, new_core, s.r_in, s.r_out, narrow);
  if (aweight) {
    new_dx = like_rows(ag, s.k);
    const Arg out("dx", *new_dx);
    const Matrix dx_matrix(c, out);
    const Tensor dx2 = view(*new_dx, dx_matrix), g2 = view(g, g_matrix);
    if (!beta) product(dx2, g2, *weight);
    b.dx = dx_matrix.written_mat(), b.fresh_dx = beta;
    cpu::small_backward(b);
    if (beta) product_onto(dx2, g2, *weight);
  } else {
    cpu::small_backward(b);
  }
  return {std::move(new_dx), std::move(new_dA), std::move(new_dB), std::move(new_core)};
}

SmallBackward small_layer_backward_(const Tensor& g, const OptionalTensor& weight, const OptionalTensor& x,
                                    const OptionalTensor& u, const Tensor& A, const Tensor& B,
                                    const Tensor& core, double scaling, bool beta, const OptionalTensor& dA,
                                    const OptionalTensor& dB, bool need_B, bool need_core) {
  const auto [new_dx, new_dA, new_dB, new_core] =
      small_layer_backward(g, weight, x, u, A, B, core, scaling, beta, dA, dB, need_B, need_core);
  const ScalarType narrow = gradient_dtype(Arg("A", A), Arg("B", B), Arg("core", core));
  return {or_nothing(new_dx, g.scalar_type()), or_nothing(new_dA, narrow), or_nothing(new_dB, narrow),
          or_nothing(new_core, narrow)};
}

OptionalTensor shrink_backward(const Tensor& k, const OptionalTensor& dx, const OptionalTensor& x,
                               const OptionalTensor& A, const OptionalTensor& dA, double p,
                               const OptionalTensor& seed) {
  const Check c{"lotr::shrink_backward_"};
  const Arg ak("k", k);
  const auto adx = optional_arg("dx", dx), ax = optional_arg("x", x), aA = optional_arg("A", A),
             adA = optional_arg("dA", dA);
  check_shrink_backward(c, ak, pointer(adx), pointer(ax), pointer(aA), pointer(adA), p, seed);
  OptionalTensor made;
  if (ax) {
    const Matrix x_matrix(c, *ax);
    cpu::factor_grad(sum_or_new(adA, made, x_matrix.flat.cols, ak.size[1], acc_dtype(ak.dtype)),
                     x_matrix.mat(), read(ak), drop(p, seed), bool(adA));
  }
  if (adx) cpu::expand_add(Matrix(c, *adx).written_mat(), read(ak), read(*aA), drop(p, seed), {});
  return made;
}

Tensor shrink_backward_(const Tensor& k, const OptionalTensor& dx, const OptionalTensor& x,
                        const OptionalTensor& A, const OptionalTensor& dA, double p,
                        const OptionalTensor& seed) {
  const OptionalTensor made = shrink_backward(k, dx, x, A, dA, p, seed);  // k is checked there
  return or_nothing(made, acc_dtype(k.scalar_type()));
}

}  // namespace
}  // namespace lotr

STABLE_TORCH_LIBRARY_FRAGMENT(lotr, m) {
  // `products`: the same by the products that it is made of, for who is to see them (layer_products.cpp).
  // `.._owned_`: the same on a CPU for a caller who alone has the tensors that are written. No layer of
  // Python's moves their version counters (ops/library.py), so none has to be kept out, and what was not
  // asked for is None: 1 us less a call. Names of their own: torch's registry mixes up overloads that differ
  // in results. `.graph`: the same on a CPU in a compiled graph, whose own tensors are written: no layer of
  // Python's is entered, which takes 20 us a call, and over 100 us where the caches are cold.
  for (const char* name : {"layer_forward", "layer_forward.products"})
    m.def((std::string(name) +
           "(Tensor x, Tensor weight, Tensor? bias, Tensor? A, Tensor B, Tensor core, float scaling, "
           "int strategy, Tensor? u=None, Tensor? F=None, float p=0.0, Tensor? seed=None) "
           "-> (Tensor y, Tensor? u, Tensor? F)")
              .c_str());
  const std::string layer_backward =
      "(Tensor g, Tensor? weight, Tensor? x, Tensor? u, Tensor? A, Tensor? F, Tensor B, Tensor core, "
      "float scaling, int strategy, Tensor? k, Tensor(a!)? dx, Tensor(b!)? Q, Tensor(c!)? dA, Tensor(d!)? "
      "dB, bool need_B, bool need_core, float p=0.0, Tensor? seed=None) -> ";
  for (const char* name : {"layer_backward_", "layer_backward_.products", "layer_backward_.graph"})
    m.def((name + layer_backward + "(Tensor dx, Tensor k, Tensor dA, Tensor dB, Tensor dcore)").c_str());
  m.def(("layer_backward_owned_" + layer_backward +
         "(Tensor? dx, Tensor? k, Tensor? dA, Tensor? dB, Tensor? dcore)")
            .c_str());
  m.def(
      "small_layer_forward(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor core, "
      "float scaling, bool beta) -> (Tensor y, Tensor u)");
  const std::string small_layer_backward =
      "(Tensor g, Tensor? weight, Tensor? x, Tensor? u, Tensor A, Tensor B, Tensor core, float scaling, "
      "bool beta, Tensor(a!)? dA, Tensor(b!)? dB, bool need_B, bool need_core) -> ";
  m.def(("small_layer_backward_" + small_layer_backward + "(Tensor dx, Tensor dA, Tensor dB, Tensor dcore)")
            .c_str());
  m.def(("small_layer_backward_owned_" + small_layer_backward +
         "(Tensor? dx, Tensor? dA, Tensor? dB, Tensor? dcore)")
            .c_str());
  const std::string shrink_backward =
      "(Tensor k, Tensor(a!)? dx, Tensor? x, Tensor? A, Tensor(b!)? dA, float p=0.0, Tensor? seed=None) -> ";
  for (const char* name : {"shrink_backward_", "shrink_backward_.products", "shrink_backward_.graph"})
    m.def((name + shrink_backward + "Tensor dA").c_str());
  m.def(("shrink_backward_owned_" + shrink_backward + "Tensor? dA").c_str());
}

STABLE_TORCH_LIBRARY_IMPL(lotr, CPU, m)
{
  m.impl("layer_forward", TORCH_BOX(&lotr::layer_forward));
  m.impl("small_layer_forward", TORCH_BOX(&lotr::small_layer_forward));
  m.impl("layer_backward_", TORCH_BOX(&lotr::layer_backward_));
  m.impl("layer_backward_.graph", TORCH_BOX(&lotr::layer_backward_));
  m.impl("layer_backward_owned_", TORCH_BOX(&lotr::layer_backward));
  m.impl("small_layer_backward_", TORCH_BOX(&lotr::small_layer_backward_));
  m.impl("small_layer_backward_owned_", TORCH_BOX(&lotr::small_layer_backward));
  m.impl("shrink_backward_", TORCH_BOX(&lotr::shrink_backward_));
  m.impl("shrink_backward_.graph", TORCH_BOX(&lotr::shrink_backward_));
  m.impl("shrink_backward_owned_", TORCH_BOX(&lotr::shrink_backward));
}
