// One direction of a whole layer (cpu_layer.cpp has the equations) as the products that it is made of, in two
// uses:
//
//   CUDA        what layer_forward and its kind run there: our operators around the library's products
//   decomposed  what a dispatch mode is shown (OpOverload.decompose): each product by the dispatcher. Forward
//               nothing is written that an operator gave, for selective checkpointing keeps what it likes
//
// Calls go through the dispatcher, one or two microseconds each; the products on CUDA by the C functions
// underneath, since the dispatcher's stable interface takes no alpha and beta.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"

namespace lotr {
namespace {

using torch::stable::detail::from;

enum class Use { cuda, decomposed };

// Calls an operator; returns its results as they lie on the stack.
template <size_t results, typename... Args>
std::array<StableIValue, (sizeof...(Args) > results ? sizeof...(Args) : results)> dispatch(
    const char* op, const Args&... args) {
  std::array<StableIValue, (sizeof...(Args) > results ? sizeof...(Args) : results)> stack{from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}
template <typename... Args>
Tensor one(const char* op, const Args&... args) {
  return torch::stable::detail::to<Tensor>(dispatch<1>(op, args...)[0]);
}

Tensor shrink(const Tensor& x, const Tensor& A, double p = 0.0, const OptionalTensor& seed = std::nullopt) {
  return one("lotr::shrink", x, A, p, seed);
}
void expand_add(const Tensor& y, const Tensor& u, const Tensor& F, double p = 0.0,
                const OptionalTensor& seed = std::nullopt) {
  dispatch<0>("lotr::expand_add_", y, u, F, p, seed);
}
void factor_grad(const Tensor& acc, const Tensor& x, const Tensor& k, double p = 0.0,
                 const OptionalTensor& seed = std::nullopt) {
  dispatch<0>("lotr::factor_grad_", acc, x, k, p, seed);
}
Tensor product(const Tensor& a, const Tensor& b) {
  return one("aten::mm", a, b);
}
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias = std::nullopt) {
  return one("aten::linear", x, weight, bias);
}
Tensor zeros(const Tensor& like, std::vector<int64_t> size, ScalarType dtype) {
  return torch::stable::new_zeros(like, size, dtype);
}
Tensor nothing(const Tensor& like, ScalarType dtype) {
  return zeros(like, {0}, dtype);
}
Tensor rows(const Tensor& t) {
  return t.dim() == 2 ? t : torch::stable::reshape(t, {-1, t.size(t.dim() - 1)});
}
// t [m, cols] in the leading dimensions of like.
template <Use use>
Tensor shaped(const Tensor& t, const Tensor& like) {
  if (like.dim() == 2) return t;
  std::vector<int64_t> size;
  for (int64_t i = 0; i < like.dim() - 1; ++i) size.push_back(like.size(i));
  size.push_back(t.size(1));
  if (use == Use::decomposed) return torch::stable::view(t, size);
  // no view to autograd, which would let nobody write into a layer's output
  std::vector<int64_t> stride(size.size(), 1);
  for (size_t i = size.size() - 1; i-- > 0;) stride[i] = stride[i + 1] * size[i + 1];
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), int64_t(size.size()), size.data(), stride.data(), 0, &handle));
  return Tensor(handle);
}
Tensor in(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// out += a b, by the library.
void product_onto(const Tensor& out, const Tensor& a, const Tensor& b) {
  using Addmm =
      int32_t (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, double);
  static const Addmm addmm = [] {
    // the library that torch has loaded; RTLD_DEFAULT would not see it
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Addmm>(dlsym(library, "aoti_torch_cuda_addmm_out")) : nullptr;
  }();
  if (!addmm) fail("lotr: expected a torch built with CUDA, got one without libtorch_cuda.so");
  STABLE_TORCH_ERROR_CODE_CHECK(addmm(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

using Forward = std::tuple<Tensor, OptionalTensor, OptionalTensor>;

// ---- the adapter inside the base product (cuda/gemm_lotr.h) ----

// t [rows, cols] in dtype and with rows at multiples of 16 bytes, as that kernel's tensor maps want them; t
// itself where it is so already.
Tensor in_rows(const Tensor& t, ScalarType dtype) {
  const int64_t n = t.size(0), cols = t.size(1);
  if (t.scalar_type() == dtype && t.stride(1) == 1 && t.stride(0) % 8 == 0 && t.stride(0) >= cols &&
      reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0)
    return t;
  Tensor padded = torch::stable::new_empty(t, {n, (cols + 7) / 8 * 8}, dtype);
  Tensor own = torch::stable::narrow(padded, 1, 0, cols);
  return torch::stable::copy_(own, t);
}
Tensor transposed(const Tensor& t) {
  return torch::stable::transpose(t, 0, 1);
}

// y and u in one launch; F comes back as the transpose of what the backward pass reads, F^T with its rows.
Forward fused_forward(const Tensor& x, const Tensor& flat, const Tensor& weight, const OptionalTensor& bias,
                      const Tensor& A, const Tensor& B, const Tensor& core, double scaling) {
  const auto operands = dispatch<3>("lotr::fold_transposed", B, core, A, scaling, x.scalar_type());
  const Tensor F = torch::stable::detail::to<Tensor>(operands[0]),
               Ft = torch::stable::detail::to<Tensor>(operands[1]),
               At = torch::stable::detail::to<Tensor>(operands[2]);
  const auto made = dispatch<2>("lotr::gemm_lotr", flat, weight, bias, At, F, false, OptionalTensor(),
                                OptionalTensor(), false);
  const Tensor y = torch::stable::detail::to<Tensor>(made[0]), u = torch::stable::detail::to<Tensor>(made[1]);
  return {shaped<Use::cuda>(y, x), u, transposed(Ft)};
}

// Whether dx and k come from one launch: asked of each g, whose rows may lie as they like.
bool fused_backward_runs(const Tensor& g, const Tensor& weight, int64_t r) {
  const auto stack = dispatch<1>("lotr::gemm_lotr_refusal", g, weight, r, true);
  return torch::stable::detail::to<std::string>(stack[0]).empty();
}

template <Use use>
Forward layer_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& A, const Tensor& B, const Tensor& core, double scaling,
                      int64_t strategy, const OptionalTensor& given_u, const OptionalTensor& given_F,
                      double p, const OptionalTensor& seed) {
  {  // first of all: the operators called say less, and the library's products look at no memory
    const Arg ax("x", x), aweight("weight", weight), aB("B", B), acore("core", core);
    const auto abias = optional_arg("bias", bias), aA = optional_arg("A", A), au = optional_arg("u", given_u),
               aF = optional_arg("F", given_F);
    check_layer_forward({"lotr::layer_forward", use == Use::decomposed}, ax, aweight, pointer(abias),
                        pointer(aA), aB, acore, scaling, pointer(au), pointer(aF), p, seed);
  }
  const Tensor flat = rows(x);
  if (use == Use::cuda && strategy == FUSED) {
    if (given_u || given_F || p != 0.0)
      fail("lotr::layer_forward: strategy: expected 0 (two_pass) or 1 (beta) where ",
           given_u   ? "u is given"
           : given_F ? "F is given"
                     : "there is dropout",
           ", got 2 (fused)");
    return fused_forward(x, flat, weight, bias, *A, B, core, scaling);
  }
  OptionalTensor u, F;
  if (!given_u) u = shrink(flat, *A, p, seed);
  if (!given_F)
    F = torch::stable::squeeze(
        one("lotr::fold", B, torch::stable::unsqueeze(core, 0), scaling, x.scalar_type()), 0);
  const Tensor &u_in = u ? *u : *given_u, &F_in = F ? *F : *given_F;
  if (use == Use::cuda && strategy == BETA) {
    Tensor y = linear(u_in, F_in, bias);
    product_onto(y, flat, torch::stable::transpose(weight, 0, 1));
    return {shaped<use>(y, x), u, F};
  }
  const Tensor y = linear(flat, weight, bias);
  if (use == Use::decomposed) return {one("lotr::expand", shaped<use>(y, x), u_in, F_in), u, F};
  expand_add(y, u_in, F_in);
  return {shaped<use>(y, x), u, F};
}

// Q of a new tensor or added to a given one, and k, each as its operands are there.
struct ReadOfG {
  OptionalTensor k, Q;
};
ReadOfG read_g(const Tensor& g, const OptionalTensor& F, const OptionalTensor& u, const OptionalTensor& Q,
               ScalarType wide) {
  if (F && u && Q) return {one("lotr::shrink_grad_", *Q, g, *F, *u), Q};
  if (F && u) {
    const auto stack = dispatch<2>("lotr::shrink_grad", g, *F, *u);
    return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
  }
  if (F) return {shrink(g, *F), std::nullopt};
  if (!u) return {};
  const Tensor sum = Q ? *Q : zeros(g, {g.size(1), u->size(1)}, wide);
  factor_grad(sum, g, *u);
  return {std::nullopt, sum};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What new gradients of the factors are rounded to: their own dtype where they have one in common.
ScalarType gradient_dtype(const OptionalTensor& A, const Tensor& B, const Tensor& core) {
  const ScalarType own = B.scalar_type();
  return own == core.scalar_type() && (!A || A->scalar_type() == own) ? own : acc_dtype(own);
}

// a + b; the stable interface has the difference alone.
Tensor sum(const Tensor& a, const Tensor& b) {
  return torch::stable::subtract(a, b, -1.0);
}

// dx (+)= g W and, expanding, drop(k A^T): that first, where the base product can accumulate onto it.
template <Use use>
Tensor input_gradient(const Tensor& g, const Tensor& weight, const OptionalTensor& given, bool expands,
                      int64_t strategy, const OptionalTensor& k, const OptionalTensor& A, double p,
                      const OptionalTensor& seed) {
  if (use == Use::cuda && expands && strategy != TWO_PASS) {
    Tensor dx = given      ? rows(*given)
                : p == 0.0 ? linear(*k, in(*A, g.scalar_type()))
                           : zeros(g, {g.size(0), weight.size(1)}, g.scalar_type());
    if (given || p != 0.0) expand_add(dx, *k, *A, p, seed);
    product_onto(dx, g, weight);
    return dx;
  }
  Tensor dx;
  if (given && use == Use::cuda) {
    dx = rows(*given);
    product_onto(dx, g, weight);
  } else {
    dx = product(g, weight);
    if (given) {
      Tensor total = rows(*given);
      dx = torch::stable::copy_(total, sum(total, dx));
    }
  }
  if (expands) expand_add(dx, *k, *A, p, seed);
  return dx;
}

template <Use use>
Backward layer_backward_(const Tensor& g, const OptionalTensor& weight, const OptionalTensor& x,
                         const OptionalTensor& u, const OptionalTensor& A, const OptionalTensor& F,
                         const Tensor& B, const Tensor& core, double scaling, int64_t strategy,
                         const OptionalTensor& k, const OptionalTensor& dx, const OptionalTensor& Q,
                         const OptionalTensor& dA, const OptionalTensor& dB, bool need_B, bool need_core,
                         double p, const OptionalTensor& seed) {
  {
    const Arg ag("g", g), aB("B", B), acore("core", core);
    const auto aweight = optional_arg("weight", weight), ax = optional_arg("x", x), au = optional_arg("u", u),
               aA = optional_arg("A", A), aF = optional_arg("F", F), ak = optional_arg("k", k),
               adx = optional_arg("dx", dx), aQ = optional_arg("Q", Q), adA = optional_arg("dA", dA),
               adB = optional_arg("dB", dB);
    const BackwardArgs args{pointer(aweight), pointer(ax),  pointer(au), pointer(aA),  pointer(aF),
                            pointer(ak),      pointer(adx), pointer(aQ), pointer(adA), pointer(adB)};
    check_layer_backward({"lotr::layer_backward_", use == Use::decomposed}, ag, args, aB, acore, scaling, p,
                         seed);
  }
  const ScalarType type = g.scalar_type(), wide = acc_dtype(type), narrow = gradient_dtype(A, B, core);
  const Tensor flat = rows(g);
  const bool fold = u && !Q && (need_B || need_core || dB);
  const OptionalTensor u_read = Q || fold ? u : std::nullopt;
  // beta where something else has a part in k or dx
  const bool fused = use == Use::cuda && strategy == FUSED && weight && A && F && !k && !dx && p == 0.0 &&
                     fused_backward_runs(flat, *weight, F->size(1));
  OptionalTensor fused_dx;
  ReadOfG found;
  if (fused) {
    // Q by the same launch, or by one more read of g
    const bool with_Q = u_read && F->size(1) <= FUSED_Q_RANK && u->stride(1) == 1;
    if (with_Q)
      found.Q = Q ? *Q : torch::stable::new_empty(g, {flat.size(1), u->size(1)}, wide);
    else
      found = read_g(flat, std::nullopt, u_read, Q, wide);
    const OptionalTensor made_here = with_Q ? found.Q : std::nullopt, u_here = with_Q ? u_read : std::nullopt;
    const auto made =
        dispatch<2>("lotr::gemm_lotr", flat, *weight, OptionalTensor(), in_rows(transposed(*F), type),
                    in_rows(*A, type), true, u_here, made_here, with_Q && Q);
    fused_dx = torch::stable::detail::to<Tensor>(made[0]),
    found.k = torch::stable::detail::to<Tensor>(made[1]);
  } else {
    found = read_g(flat, F, u_read, Q, wide);
  }
  if (found.k && k) found.k = sum(*found.k, *k);
  Tensor new_dx = nothing(g, type), new_dA = nothing(g, narrow), new_dB = nothing(g, narrow),
         new_core = nothing(g, narrow);
  if (fold) {
    OptionalTensor total = dB;
    if (need_B && !dB) total = zeros(B, {B.size(0), B.size(1)}, wide);
    const Tensor cores = one("lotr::fold_grad", torch::stable::unsqueeze(*found.Q, 0), B,
                             torch::stable::unsqueeze(core, 0), scaling, total);
    if (need_core) new_core = in(torch::stable::squeeze(cores, 0), narrow);
    if (need_B && !dB) new_dB = in(*total, narrow);
  }
  if (x) {
    const Tensor total = dA ? *dA : zeros(*A, {A->size(0), A->size(1)}, wide);
    factor_grad(total, rows(*x), *found.k, p, seed);
    if (!dA) new_dA = in(total, narrow);
  }
  if (weight) {
    const Tensor out =
        fused ? *fused_dx : input_gradient<use>(flat, *weight, dx, A && F, strategy, found.k, A, p, seed);
    if (!dx) new_dx = shaped<use>(out, g);
  }
  return {new_dx, found.k ? *found.k : nothing(g, type), new_dA, new_dB, new_core};
}

template <Use use>
std::tuple<Tensor, Tensor> small_layer_forward(const Tensor& x, const Tensor& weight,
                                               const OptionalTensor& bias, const Tensor& A, const Tensor& B,
                                               const Tensor& core, double scaling, bool) {
  {
    const Arg ax("x", x), aweight("weight", weight), aA("A", A), aB("B", B), acore("core", core);
    const auto abias = optional_arg("bias", bias);
    check_layer_forward({"lotr::small_layer_forward", use == Use::decomposed}, ax, aweight, pointer(abias),
                        &aA, aB, acore, scaling, nullptr, nullptr, 0.0, std::nullopt);
  }
  const Tensor flat = rows(x);
  const Tensor y = linear(flat, weight, bias);
  if (use == Use::decomposed) {
    const auto found = dispatch<2>("lotr::small_forward", shaped<use>(y, x), flat, A, core, B, scaling);
    return {torch::stable::detail::to<Tensor>(found[0]), torch::stable::detail::to<Tensor>(found[1])};
  }
  return {shaped<use>(y, x), one("lotr::small_forward_", y, flat, A, core, B, scaling)};
}

template <Use use>
std::tuple<Tensor, Tensor, Tensor, Tensor> small_layer_backward_(
    const Tensor& g, const OptionalTensor& weight, const OptionalTensor& x, const OptionalTensor& u,
    const Tensor& A, const Tensor& B, const Tensor& core, double scaling, bool, const OptionalTensor& dA,
    const OptionalTensor& dB, bool need_B, bool need_core) {
  {
    const Arg ag("g", g), aA("A", A), aB("B", B), acore("core", core);
    const auto aweight = optional_arg("weight", weight), ax = optional_arg("x", x), au = optional_arg("u", u),
               adA = optional_arg("dA", dA), adB = optional_arg("dB", dB);
    BackwardArgs args;
    args.weight = pointer(aweight), args.x = pointer(ax), args.u = pointer(au), args.A = &aA;
    args.dA = pointer(adA), args.dB = pointer(adB);
    check_small_layer_backward({"lotr::small_layer_backward_", use == Use::decomposed}, ag, args, aB, acore,
                               scaling, need_B || need_core);
  }
  const ScalarType type = g.scalar_type(), wide = acc_dtype(type), narrow = gradient_dtype(A, B, core);
  const Tensor flat = rows(g);
  OptionalTensor out, flat_x, sum_A = dA, sum_B = dB;
  if (weight) out = product(flat, *weight);
  if (x) flat_x = rows(*x);
  if (x && !dA) sum_A = zeros(A, {A.size(0), A.size(1)}, wide);
  if (need_B && !dB) sum_B = zeros(B, {B.size(0), B.size(1)}, wide);
  const Tensor u_in = u ? *u : zeros(g, {flat.size(0), A.size(1)}, type);  // which only dB and dG read
  const Tensor dcore =
      one("lotr::small_backward_", out, flat, flat_x, u_in, A, core, B, scaling, sum_A, sum_B, need_core);
  return {out ? shaped<use>(*out, g) : nothing(g, type), x && !dA ? in(*sum_A, narrow) : nothing(g, narrow),
          need_B && !dB ? in(*sum_B, narrow) : nothing(g, narrow),
          need_core ? in(dcore, narrow) : nothing(g, narrow)};
}

template <Use use>
Tensor shrink_backward_(const Tensor& k, const OptionalTensor& dx, const OptionalTensor& x,
                        const OptionalTensor& A, const OptionalTensor& dA, double p,
                        const OptionalTensor& seed) {
  {
    const Arg ak("k", k);
    const auto adx = optional_arg("dx", dx), ax = optional_arg("x", x), aA = optional_arg("A", A),
               adA = optional_arg("dA", dA);
    check_shrink_backward({"lotr::shrink_backward_", use == Use::decomposed}, ak, pointer(adx), pointer(ax),
                          pointer(aA), pointer(adA), p, seed);
  }
  const ScalarType wide = acc_dtype(k.scalar_type());
  Tensor total = dA ? *dA : x ? zeros(*x, {x->size(x->dim() - 1), k.size(1)}, wide) : nothing(k, wide);
  if (x) factor_grad(total, rows(*x), k, p, seed);
  if (dx) expand_add(rows(*dx), k, *A, p, seed);
  return x && !dA ? total : nothing(k, wide);
}

// The operators that add to y, onto a new tensor: y's maker may need y, and users may write into what comes
// out.
Tensor own_copy(const Tensor& y) {
  Tensor out = torch::stable::empty_like(torch::stable::contiguous(y));
  return torch::stable::copy_(out, y);
}
Tensor expand(const Tensor& y, const Tensor& u, const Tensor& F) {
  check_expand({"lotr::expand"}, {"y", y}, {"u", u}, {"F", F}, false, 0.0, std::nullopt);
  const Tensor out = own_copy(y);
  expand_add(rows(out), u, F);
  return out;
}
std::tuple<Tensor, Tensor> small_forward(const Tensor& y, const Tensor& x, const Tensor& A,
                                         const Tensor& core, const Tensor& B, double scaling) {
  check_small_forward({"lotr::small_forward"}, {"y", y}, {"x", x}, {"A", A}, {"core", core}, {"B", B}, false,
                      scaling);
  const Tensor out = own_copy(y);
  return {out, one("lotr::small_forward_", rows(out), x, A, core, B, scaling)};
}

}  // namespace
}  // namespace lotr

STABLE_TORCH_LIBRARY_FRAGMENT(lotr, m) {
  m.def("expand(Tensor y, Tensor u, Tensor F) -> Tensor");
  m.def(
      "small_forward(Tensor y, Tensor x, Tensor A, Tensor core, Tensor B, float scaling) "
      "-> (Tensor y, Tensor u)");
}

STABLE_TORCH_LIBRARY_IMPL(lotr, CPU, m)
{
  m.impl("expand", TORCH_BOX(&lotr::expand));
  m.impl("small_forward", TORCH_BOX(&lotr::small_forward));
}

STABLE_TORCH_LIBRARY_IMPL(lotr, CUDA, m)
{
  using lotr::Use;
  m.impl("layer_forward", TORCH_BOX(&lotr::layer_forward<Use::cuda>));
  m.impl("layer_backward_", TORCH_BOX(&lotr::layer_backward_<Use::cuda>));
  m.impl("small_layer_forward", TORCH_BOX(&lotr::small_layer_forward<Use::cuda>));
  m.impl("small_layer_backward_", TORCH_BOX(&lotr::small_layer_backward_<Use::cuda>));
  m.impl("shrink_backward_", TORCH_BOX(&lotr::shrink_backward_<Use::cuda>));
  m.impl("expand", TORCH_BOX(&lotr::expand));
  m.impl("small_forward", TORCH_BOX(&lotr::small_forward));
}

STABLE_TORCH_LIBRARY_IMPL(lotr, CompositeImplicitAutograd, m)
{
  using lotr::Use;
  m.impl("layer_forward.products", TORCH_BOX(&lotr::layer_forward<Use::decomposed>));
  m.impl("layer_backward_.products", TORCH_BOX(&lotr::layer_backward_<Use::decomposed>));
  m.impl("small_layer_forward", TORCH_BOX(&lotr::small_layer_forward<Use::decomposed>));
  m.impl("small_layer_backward_", TORCH_BOX(&lotr::small_layer_backward_<Use::decomposed>));
  m.impl("shrink_backward_.products", TORCH_BOX(&lotr::shrink_backward_<Use::decomposed>));
}
