// What each operator expects of its arguments, on CPU and CUDA alike: the single products, then those of one
// direction of a whole layer. Every check runs before anything is written. m tokens, k in, n out, r rank, l
// layer.
#pragma once

#include "arg.h"

namespace lotr {

// Sizes of a checked call. What an operator does not have stays 0.
struct Sizes {
  int64_t m = 0, k = 0, n = 0, r = 0, r_in = 0, r_out = 0, l = 0;
};

inline Sizes check_shrink(const Arg& x, const Arg& A, double p, const OptionalTensor& seed) {
  Check c{"lotr::shrink"};
  const auto s_arg = optional_arg("seed", seed);
  c.arguments({&x, &A, pointer(s_arg)});
  c.dims(x, 2, "[M, K]"), c.dims(A, 2, "[K, r]");
  c.supported(x), c.factor(A, x.dtype);
  c.positive(x, 1, "K"), c.positive(A, 1, "r"), c.size(A, 0, x.size[1], "K, as in x");
  c.dropout(p, seed);
  Sizes s;
  s.m = x.size[0], s.k = x.size[1], s.r = A.size[1];
  return s;
}

// Rows of a tensor [.., cols].
inline int64_t leading(const Check& c, const Arg& a) {
  if (a.dim < 1)
    fail(c.op, ": ", a.name, ": expected a tensor of 1 or more dimensions, got shape ", a.shape());
  int64_t rows = 1;
  for (int64_t i = 0; i < a.dim - 1; ++i) rows *= a.size[i];
  return rows;
}

// written: y is added to in place, and a matrix; else [.., N].
inline Sizes check_expand(const Check& c, const Arg& y, const Arg& u, const Arg& F, bool written, double p,
                          const OptionalTensor& seed) {
  const auto s_arg = optional_arg("seed", seed);
  c.arguments({&y, &u, &F, pointer(s_arg)}, {written ? &y : nullptr});
  if (written) c.dims(y, 2, "[M, N]");
  Sizes s;
  s.m = leading(c, y), s.n = y.size[y.dim - 1];
  c.dims(u, 2, "[M, r]"), c.dims(F, 2, "[N, r]");
  c.supported(y), c.dtype(u, y.dtype), c.factor(F, y.dtype);
  c.positive(y, y.dim - 1, "N"), c.positive(u, 1, "r");
  c.size(u, 0, s.m, "M, as in y"), c.size(F, 0, s.n, "N, as in y"), c.size(F, 1, u.size[1], "r, as in u");
  c.dropout(p, seed);
  s.r = u.size[1];
  return s;
}

inline Sizes check_factor_grad(const Arg& acc, const Arg& x, const Arg& k, double p,
                               const OptionalTensor& seed) {
  Check c{"lotr::factor_grad_"};
  const auto s_arg = optional_arg("seed", seed);
  c.arguments({&acc, &x, &k, pointer(s_arg)}, {&acc});
  c.dims(acc, 2, "[K, r]"), c.dims(x, 2, "[M, K]"), c.dims(k, 2, "[M, r]");
  c.supported(x), c.dtype(k, x.dtype), c.dtype(acc, acc_dtype(x.dtype));
  c.positive(x, 1, "K"), c.positive(k, 1, "r"), c.size(k, 0, x.size[0], "M, as in x");
  c.size(acc, 0, x.size[1], "K, as in x"), c.size(acc, 1, k.size[1], "r, as in k");
  c.dropout(p, seed);
  Sizes s;
  s.m = x.size[0], s.k = x.size[1], s.r = k.size[1];
  return s;
}

// Q: the sum that shrink_grad_ adds to.
inline Sizes check_shrink_grad(const Arg* Q, const Arg& g, const Arg& F, const Arg& u) {
  Check c{Q ? "lotr::shrink_grad_" : "lotr::shrink_grad"};
  c.arguments({Q, &g, &F, &u}, {Q});
  c.dims(g, 2, "[M, N]"), c.dims(F, 2, "[N, r_in]"), c.dims(u, 2, "[M, r_in]");
  c.supported(g), c.factor(F, g.dtype), c.dtype(u, g.dtype);
  c.positive(g, 1, "N"), c.positive(F, 1, "r_in"), c.size(F, 0, g.size[1], "N, as in g");
  c.size(u, 0, g.size[0], "M, as in g"), c.size(u, 1, F.size[1], "r_in, as in F");
  if (Q) {
    c.dims(*Q, 2, "[N, r_in]"), c.dtype(*Q, acc_dtype(g.dtype));
    c.size(*Q, 0, g.size[1], "N, as in g"), c.size(*Q, 1, F.size[1], "r_in, as in F");
  }
  Sizes s;
  s.m = g.size[0], s.n = g.size[1], s.r = s.r_in = F.size[1];
  return s;
}

inline Sizes check_fold(const Arg& B, const Arg& cores, double scaling, ScalarType dtype) {
  Check c{"lotr::fold"};
  c.arguments({&B, &cores});
  c.dims(B, 2, "[N, r_out]"), c.dims(cores, 3, "[L, r_in, r_out]");
  if (!is_supported(dtype)) {
    fail(c.op, ": dtype: expected torch.float32, torch.bfloat16, torch.float16 or torch.float64, got ",
         dtype_name(dtype));
  }
  c.factor(B, dtype), c.factor(cores, dtype);
  c.positive(B, 0, "N"), c.positive(B, 1, "r_out"), c.positive(cores, 0, "L"), c.positive(cores, 1, "r_in");
  c.size(cores, 2, B.size[1], "r_out, as in B"), c.finite("scaling", scaling);
  Sizes s;
  s.n = B.size[0], s.r_out = B.size[1], s.l = cores.size[0], s.r_in = cores.size[1];
  return s;
}

inline Sizes check_fold_grad(const Arg& Q, const Arg& B, const Arg& cores, double scaling, const Arg* dB) {
  Check c{"lotr::fold_grad"};
  c.arguments({&Q, &B, &cores, dB}, {dB});
  c.dims(Q, 3, "[L, N, r_in]"), c.dims(B, 2, "[N, r_out]"), c.dims(cores, 3, "[L, r_in, r_out]");
  if (Q.dtype != ScalarType::Float && Q.dtype != ScalarType::Double) {
    fail(c.op, ": Q: expected dtype torch.float32 or torch.float64, got ", dtype_name(Q.dtype));
  }
  for (const Arg* a : {&B, &cores}) {
    c.supported(*a);
    if (acc_dtype(a->dtype) != Q.dtype) {
      fail(c.op, ": ", a->name, ": expected a dtype that is summed in Q's ", dtype_name(Q.dtype), ", got ",
           dtype_name(a->dtype));
    }
  }
  c.positive(Q, 0, "L"), c.positive(Q, 1, "N"), c.positive(Q, 2, "r_in"), c.positive(B, 1, "r_out");
  c.size(B, 0, Q.size[1], "N, as in Q"), c.size(cores, 0, Q.size[0], "L, as in Q");
  c.size(cores, 1, Q.size[2], "r_in, as in Q"), c.size(cores, 2, B.size[1], "r_out, as in B");
  c.finite("scaling", scaling);
  if (dB) {
    c.dims(*dB, 2, "[N, r_out]"), c.dtype(*dB, Q.dtype);
    c.size(*dB, 0, Q.size[1], "N, as in Q"), c.size(*dB, 1, B.size[1], "r_out, as in B");
  }
  Sizes s;
  s.n = Q.size[1], s.r_out = B.size[1], s.l = Q.size[0], s.r_in = Q.size[2];
  return s;
}

// The factors against the activations' dtype.
inline void check_A(const Check& c, const Arg& A, const Arg& like) {
  c.dims(A, 2, "[K, r_in]"), c.factor(A, like.dtype), c.positive(A, 0, "K");
}

inline Sizes check_core(const Check& c, const Arg& like, const Arg& core, const Arg& B, double scaling) {
  c.dims(core, 2, "[r_in, r_out]"), c.dims(B, 2, "[N, r_out]");
  for (const Arg* a : {&core, &B}) c.factor(*a, like.dtype);
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

// written: as in check_expand.
inline Sizes check_small_forward(const Check& c, const Arg& y, const Arg& x, const Arg& A, const Arg& core,
                                 const Arg& B, bool written, double scaling) {
  c.arguments({&y, &x, &A, &core, &B}, {written ? &y : nullptr});
  if (written) c.dims(y, 2, "[M, N]");
  const int64_t m = leading(c, y);
  c.dims(x, 2, "[M, K]"), c.supported(x), c.dtype(y, x.dtype);
  Sizes s = check_unfolded(c, x, A, core, B, scaling);
  c.size(x, 1, s.k, "K, as in A"), c.size(y, y.dim - 1, s.n, "N, as in B"), c.size(x, 0, m, "M, as in y");
  s.m = m;
  return s;
}

inline Sizes check_small_backward(const Arg* dx, const Arg& g, const Arg* x, const Arg& u, const Arg& A,
                                  const Arg& core, const Arg& B, double scaling, const Arg* dA,
                                  const Arg* dB) {
  Check c{"lotr::small_backward_"};
  c.arguments({dx, &g, x, &u, &A, &core, &B, dA, dB}, {dx, dA, dB});
  c.dims(g, 2, "[M, N]"), c.dims(u, 2, "[M, r_in]"), c.supported(g), c.dtype(u, g.dtype);
  Sizes s = check_unfolded(c, g, A, core, B, scaling);
  s.m = g.size[0];
  c.size(g, 1, s.n, "N, as in B"), c.size(u, 0, s.m, "M, as in g"), c.size(u, 1, s.r_in, "r_in, as in A");
  if (dA && !x) fail(c.op, ": x: expected a tensor [M, K] because dA is given, got None");
  if (x) {
    c.dims(*x, 2, "[M, K]"), c.dtype(*x, g.dtype);
    c.size(*x, 0, s.m, "M, as in g"), c.size(*x, 1, s.k, "K, as in A");
  }
  if (dx) {
    c.dims(*dx, 2, "[M, K]"), c.dtype(*dx, g.dtype);
    c.size(*dx, 0, s.m, "M, as in g"), c.size(*dx, 1, s.k, "K, as in A");
  }
  if (dA) {
    c.dims(*dA, 2, "[K, r_in]"), c.dtype(*dA, acc_dtype(g.dtype));
    c.size(*dA, 0, s.k, "K, as in A"), c.size(*dA, 1, s.r_in, "r_in, as in A");
  }
  if (dB) {
    c.dims(*dB, 2, "[N, r_out]"), c.dtype(*dB, acc_dtype(g.dtype));
    c.size(*dB, 0, s.n, "N, as in B"), c.size(*dB, 1, s.r_out, "r_out, as in B");
  }
  return s;
}

// ---- a direction of a layer ----

// What both directions of a layer know: the frozen weight [N, K] against the activations x [.., K] or g [..,
// N].
inline void check_weight(const Check& c, const Arg& weight, const Arg& like, int64_t n, int64_t k) {
  c.dims(weight, 2, "[N, K]"), c.dtype(weight, like.dtype);
  c.size(weight, 0, n, "N, as in B"), c.size(weight, 1, k, "K");
}

// An output of a product that is added to: [rows, cols], in acc(T).
inline void check_sum(const Check& c, const Arg* sum, const Arg& like, int64_t rows, int64_t cols,
                      const char* what, const char* rows_what, const char* cols_what) {
  if (!sum) return;
  c.dims(*sum, 2, what), c.dtype(*sum, acc_dtype(like.dtype));
  c.size(*sum, 0, rows, rows_what), c.size(*sum, 1, cols, cols_what);
}

inline void check_folded(const Check& c, const Arg& F, const Arg& like, const Sizes& s) {
  c.dims(F, 2, "[N, r_in]"), c.factor(F, like.dtype);
  c.size(F, 0, s.n, "N, as in B"), c.size(F, 1, s.r_in, "r_in, as in core");
}

inline void check_rows(const Check& c, const Arg& a, const Arg& like, int64_t m, int64_t cols,
                       const char* what, const char* cols_what) {
  c.dims(a, 2, what), c.dtype(a, like.dtype);
  c.size(a, 0, m, "M, the tokens"), c.size(a, 1, cols, cols_what);
}

// The order of the products in a layer's operators, planner.Plan.order in Python.
constexpr int64_t TWO_PASS = 0, BETA = 1, FUSED = 2;
constexpr int64_t FUSED_Q_RANK = 16;  // up to which the fused backward pass makes Q in the same launch

// Fused (the adapter inside the base product, cuda/gemm_lotr.h) is CUDA's alone.
inline void check_strategy(const Check& c, int64_t strategy) {
  if (strategy != TWO_PASS && strategy != BETA)
    fail(c.op, ": strategy: expected 0 (two_pass) or 1 (beta) on a CPU, got ", strategy,
         strategy == FUSED ? " (fused)" : "");
}

// A is there unless u is.
inline Sizes check_layer_forward(const Check& c, const Arg& x, const Arg& weight, const Arg* bias,
                                 const Arg* A, const Arg& B, const Arg& core, double scaling, const Arg* u,
                                 const Arg* F, double p, const OptionalTensor& seed) {
  const auto s_arg = optional_arg("seed", seed);
  c.arguments({&x, &weight, bias, A, &B, &core, u, F, pointer(s_arg)});
  c.supported(x);
  if (!A == !u) fail(c.op, ": A: expected a tensor or None, with u the other, got ", A ? "both" : "neither");
  Sizes s = check_core(c, x, core, B, scaling);
  const Flat f = check_flat(c, x, "[.., K]");
  s.m = f.rows, s.k = x.size[x.dim - 1];
  if (A) {
    check_A(c, *A, x), c.size(*A, 1, s.r_in, "r_in, as in core");
    c.size(x, x.dim - 1, A->size[0], "K, as in A");
  }
  check_weight(c, weight, x, s.n, s.k);
  if (bias) {
    c.dims(*bias, 1, "[N]"), c.dtype(*bias, x.dtype), c.size(*bias, 0, s.n, "N, as in B");
  }
  if (u) check_rows(c, *u, x, s.m, s.r_in, "[M, r_in]", "r_in, as in core");
  if (F) check_folded(c, *F, x, s);
  c.dropout(p, seed);
  return s;
}

// x or dx [.., K] beside g [.., N].
inline void check_activations(const Check& c, const Arg& a, const Arg& g, int64_t m, int64_t k) {
  const Flat f = check_flat(c, a, "[.., K]");
  c.dtype(a, g.dtype), c.size(a, a.dim - 1, k, "K, as in A");
  if (f.rows != m) fail(c.op, ": ", a.name, ": expected ", m, " tokens, as in g, got shape ", a.shape());
}

// The arguments of a backward that may be absent.
struct BackwardArgs {
  const Arg *weight = nullptr, *x = nullptr, *u = nullptr, *A = nullptr, *F = nullptr, *k = nullptr,
            *dx = nullptr, *Q = nullptr, *dA = nullptr, *dB = nullptr;

  void check(const Check& c, const Arg& g, const Arg& B, const Arg& core, const OptionalTensor& seed) const {
    const auto s = optional_arg("seed", seed);
    c.arguments({&g, weight, x, u, A, F, &B, &core, k, dx, Q, dA, dB, pointer(s)}, {dx, Q, dA, dB});
  }
};

inline Sizes check_backward_sizes(const Check& c, const Arg& g, const BackwardArgs& b, const Arg& B,
                                  const Arg& core, double scaling) {
  c.supported(g);
  Sizes s = check_core(c, g, core, B, scaling);
  s.m = check_flat(c, g, "[.., N]").rows;
  c.size(g, g.dim - 1, s.n, "N, as in B");
  if (b.A) check_A(c, *b.A, g), c.size(*b.A, 1, s.r_in, "r_in, as in core"), s.k = b.A->size[0];
  if (b.weight) {
    if (!b.A && b.weight->dim == 2) s.k = b.weight->size[1];
    check_weight(c, *b.weight, g, s.n, s.k);
  }
  if (b.x && !(b.A && b.F)) fail(c.op, ": x: expected None without A and F, got a tensor");
  if (b.dx && !b.weight) fail(c.op, ": weight: expected a tensor because dx is given, got None");
  if (b.dA && !b.x) fail(c.op, ": x: expected a tensor because dA is given, got None");
  if ((b.Q || b.dB) && !b.u) fail(c.op, ": u: expected a tensor because Q or dB is given, got None");
  if (b.x) check_activations(c, *b.x, g, s.m, s.k);
  if (b.dx) check_activations(c, *b.dx, g, s.m, s.k);
  if (b.u) check_rows(c, *b.u, g, s.m, s.r_in, "[M, r_in]", "r_in, as in core");
  if (b.k) check_rows(c, *b.k, g, s.m, s.r_in, "[M, r_in]", "r_in, as in core");
  if (b.F) check_folded(c, *b.F, g, s);
  check_sum(c, b.Q, g, s.n, s.r_in, "[N, r_in]", "N, as in B", "r_in, as in core");
  check_sum(c, b.dA, g, s.k, s.r_in, "[K, r_in]", "K, as in A", "r_in, as in core");
  check_sum(c, b.dB, g, s.n, s.r_out, "[N, r_out]", "N, as in B", "r_out, as in B");
  return s;
}

inline Sizes check_layer_backward(const Check& c, const Arg& g, const BackwardArgs& b, const Arg& B,
                                  const Arg& core, double scaling, double p, const OptionalTensor& seed) {
  b.check(c, g, B, core, seed);
  const Sizes s = check_backward_sizes(c, g, b, B, core, scaling);
  c.dropout(p, seed);
  return s;
}

inline Sizes check_small_layer_backward(const Check& c, const Arg& g, const BackwardArgs& b, const Arg& B,
                                        const Arg& core, double scaling, bool need_u) {
  b.check(c, g, B, core, std::nullopt);
  BackwardArgs folded = b;
  folded.x = folded.dA = nullptr;  // which there need F; here they are checked below
  const Sizes s = check_backward_sizes(c, g, folded, B, core, scaling);
  if (need_u && !b.u) fail(c.op, ": u: expected a tensor because need_B or need_core is set, got None");
  if (b.dA && !b.x) fail(c.op, ": x: expected a tensor because dA is given, got None");
  if (b.x) check_activations(c, *b.x, g, s.m, s.k);
  check_sum(c, b.dA, g, s.k, s.r_in, "[K, r_in]", "K, as in A", "r_in, as in core");
  return s;
}

inline void check_shrink_backward(const Check& c, const Arg& k, const Arg* dx, const Arg* x, const Arg* A,
                                  const Arg* dA, double p, const OptionalTensor& seed) {
  const auto s_arg = optional_arg("seed", seed);
  c.arguments({&k, dx, x, A, dA, pointer(s_arg)}, {dx, dA});
  c.supported(k), c.dims(k, 2, "[M, r]");
  if (!dx != !A) fail(c.op, ": A: expected a tensor or None as dx is, got ", A ? "a tensor" : "None");
  if (dA && !x) fail(c.op, ": x: expected a tensor because dA is given, got None");
  const int64_t m = k.size[0], r = k.size[1];
  if (dx) {
    const int64_t width = dx->dim ? dx->size[dx->dim - 1] : 0;
    check_A(c, *A, k), c.size(*A, 0, width, "K, as in dx"), c.size(*A, 1, r, "r, as in k");
    check_activations(c, *dx, k, m, width);
  }
  if (x) {
    const int64_t width = x->dim ? x->size[x->dim - 1] : 0;
    check_activations(c, *x, k, m, width);
    check_sum(c, dA, k, width, r, "[K, r]", "K, as in x", "r, as in k");
  }
  c.dropout(p, seed);
}

}  // namespace lotr
