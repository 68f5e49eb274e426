// Checks of the operators that run one direction of a whole layer (ops_layer.cpp), in the manner of check.h.
#pragma once

#include "check.h"

namespace lotr {

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

// What both directions of a layer know: the frozen weight [N, K] against the activations x [.., K] or g [..,
// N].
inline void check_weight(const Check& c, const Arg& weight, const Arg& like, int64_t n, int64_t k) {
  c.dims(weight, 2, "[N, K]"), c.dtype(weight, like.dtype), c.device(weight, like);
  c.size(weight, 0, n, "N, as in B"), c.size(weight, 1, k, "K");
}

// An output of a product that is added to: [rows, cols], in acc(T).
inline void check_sum(const Check& c, const Arg* sum, const Arg& like, int64_t rows, int64_t cols,
                      const char* what, const char* rows_what, const char* cols_what) {
  if (!sum) return;
  c.dims(*sum, 2, what), c.dtype(*sum, acc_dtype(like.dtype)), c.device(*sum, like), c.writable(*sum);
  c.size(*sum, 0, rows, rows_what), c.size(*sum, 1, cols, cols_what);
}

inline void check_folded(const Check& c, const Arg& F, const Arg& like, const Sizes& s) {
  c.dims(F, 2, "[N, r_in]"), c.factor(F, like.dtype), c.device(F, like);
  c.size(F, 0, s.n, "N, as in B"), c.size(F, 1, s.r_in, "r_in, as in core");
}

inline void check_rows(const Check& c, const Arg& a, const Arg& like, int64_t m, int64_t cols,
                       const char* what, const char* cols_what) {
  c.dims(a, 2, what), c.dtype(a, like.dtype), c.device(a, like);
  c.size(a, 0, m, "M, the tokens"), c.size(a, 1, cols, cols_what);
}

// The order of the products in a layer's operators, planner.Plan.order in Python.
constexpr int64_t TWO_PASS = 0, BETA = 1, FUSED = 2;

// Fused (the adapter inside the base product, cuda/gemm_lotr.h) is CUDA's alone.
inline void check_strategy(const Check& c, int64_t strategy) {
  if (strategy != TWO_PASS && strategy != BETA)
    fail(c.op, ": strategy: expected 0 (two_pass) or 1 (beta) on a CPU, got ", strategy,
         strategy == FUSED ? " (fused)" : "");
}

// A is there unless u is.
inline Sizes check_layer_forward(const Check& c, const Arg& x, const Arg& weight, const Arg* bias,
                                 const Arg* A, const Arg& B, const Arg& core, double scaling, const Arg* u,
                                 const Arg* F, double p, const std::optional<Tensor>& seed) {
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
    c.dims(*bias, 1, "[N]"), c.dtype(*bias, x.dtype), c.device(*bias, x), c.size(*bias, 0, s.n, "N, as in B");
  }
  if (u) check_rows(c, *u, x, s.m, s.r_in, "[M, r_in]", "r_in, as in core");
  if (F) check_folded(c, *F, x, s);
  c.dropout(p, seed, x);
  return s;
}

// x or dx [.., K] beside g [.., N].
inline void check_activations(const Check& c, const Arg& a, const Arg& g, int64_t m, int64_t k) {
  const Flat f = check_flat(c, a, "[.., K]");
  c.dtype(a, g.dtype), c.device(a, g), c.size(a, a.dim - 1, k, "K, as in A");
  if (f.rows != m) fail(c.op, ": ", a.name, ": expected ", m, " tokens, as in g, got shape ", a.shape());
}

// The arguments of a backward that may be absent.
struct BackwardArgs {
  const Arg *weight = nullptr, *x = nullptr, *u = nullptr, *A = nullptr, *F = nullptr, *k = nullptr,
            *dx = nullptr, *Q = nullptr, *dA = nullptr, *dB = nullptr;
};

inline Sizes check_layer_backward(const Check& c, const Arg& g, const BackwardArgs& b, const Arg& B,
                                  const Arg& core, double scaling, double p,
                                  const std::optional<Tensor>& seed) {
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
  if (b.dx) check_activations(c, *b.dx, g, s.m, s.k), c.writable(*b.dx);
  if (b.u) check_rows(c, *b.u, g, s.m, s.r_in, "[M, r_in]", "r_in, as in core");
  if (b.k) check_rows(c, *b.k, g, s.m, s.r_in, "[M, r_in]", "r_in, as in core");
  if (b.F) check_folded(c, *b.F, g, s);
  check_sum(c, b.Q, g, s.n, s.r_in, "[N, r_in]", "N, as in B", "r_in, as in core");
  check_sum(c, b.dA, g, s.k, s.r_in, "[K, r_in]", "K, as in A", "r_in, as in core");
  check_sum(c, b.dB, g, s.n, s.r_out, "[N, r_out]", "N, as in B", "r_out, as in B");
  c.dropout(p, seed, g);
  return s;
}

inline Sizes check_small_layer_backward(const Check& c, const Arg& g, const BackwardArgs& b, const Arg& B,
                                        const Arg& core, double scaling, bool need_u) {
  BackwardArgs folded = b;
  folded.x = folded.dA = nullptr;  // which there need F; here they are checked below
  const Sizes s = check_layer_backward(c, g, folded, B, core, scaling, 0.0, std::nullopt);
  if (need_u && !b.u) fail(c.op, ": u: expected a tensor because need_B or need_core is set, got None");
  if (b.dA && !b.x) fail(c.op, ": x: expected a tensor because dA is given, got None");
  if (b.x) check_activations(c, *b.x, g, s.m, s.k);
  check_sum(c, b.dA, g, s.k, s.r_in, "[K, r_in]", "K, as in A", "r_in, as in core");
  return s;
}

inline void check_shrink_backward(const Check& c, const Arg& k, const Arg* dx, const Arg* x, const Arg* A,
                                  const Arg* dA, double p, const std::optional<Tensor>& seed) {
  c.supported(k), c.dims(k, 2, "[M, r]");
  if (!dx != !A) fail(c.op, ": A: expected a tensor or None as dx is, got ", A ? "a tensor" : "None");
  if (dA && !x) fail(c.op, ": x: expected a tensor because dA is given, got None");
  const int64_t m = k.size[0], r = k.size[1];
  if (dx) {
    const int64_t width = dx->dim ? dx->size[dx->dim - 1] : 0;
    check_A(c, *A, k), c.size(*A, 0, width, "K, as in dx"), c.size(*A, 1, r, "r, as in k");
    check_activations(c, *dx, k, m, width), c.writable(*dx);
  }
  if (x) {
    const int64_t width = x->dim ? x->size[x->dim - 1] : 0;
    check_activations(c, *x, k, m, width);
    check_sum(c, dA, k, width, r, "[K, r]", "K, as in x", "r, as in k");
  }
  c.dropout(p, seed, k);
}

}  // namespace lotr
