// The checks of each operator's arguments, the same on CPU and CUDA: the single products, row_core, then the
// forward and backward of a layer. They run before anything is written. m tokens, k in, n out, r rank, l
// layer.
#pragma once

#include "arg.h"

namespace lotr {

// Sizes of a checked call; 0 for those that the operator does not have.
struct Sizes {
  int64_t m = 0, k = 0, n = 0, r = 0, r_in = 0, r_out = 0;
};

inline void check_shrink(const Check& c, const Arg& x, const Arg& A, double p, const Arg& seed) {
  c.arguments({&x, &A, &seed});
  c.dims(x, 2, "[M, K]"), c.dims(A, 2, "[K, r]");
  c.supported(x), c.factor(A, x.dtype);
  c.positive(x, 1, "K"), c.rank(A, 1, "r"), c.size(A, 0, x.size[1], "K, as in x");
  c.dropout(p, seed);
}

// written: y is added to in place, and a matrix; else [.., N].
inline void check_expand(const Check& c, const Arg& y, const Arg& u, const Arg& F, bool written, double p,
                         const Arg& seed) {
  if (written)
    c.arguments({&y, &u, &F, &seed}, {&y}), c.dims(y, 2, "[M, N]");
  else
    c.arguments({&y, &u, &F, &seed});
  if (y.dim < 1) fail(c.op, ": y: expected a tensor of 1 or more dimensions, got shape ", y.shape());
  c.dims(u, 2, "[M, r]"), c.dims(F, 2, "[N, r]");
  c.supported(y), c.dtype(u, y.dtype), c.factor(F, y.dtype);
  c.positive(y, y.dim - 1, "N"), c.rank(u, 1, "r");
  c.size(u, 0, y.flat.rows, "M, as in y"), c.size(F, 0, y.flat.cols, "N, as in y");
  c.size(F, 1, u.size[1], "r, as in u");
  c.dropout(p, seed);
}

inline void check_factor_grad(const Check& c, const Arg& acc, const Arg& x, const Arg& k, double p,
                              const Arg& seed) {
  c.arguments({&acc, &x, &k, &seed}, {&acc});
  c.dims(acc, 2, "[K, r]"), c.dims(x, 2, "[M, K]"), c.dims(k, 2, "[M, r]");
  c.supported(x), c.dtype(k, x.dtype), c.dtype(acc, acc_dtype(x.dtype));
  c.positive(x, 1, "K"), c.rank(k, 1, "r"), c.size(k, 0, x.size[0], "M, as in x");
  c.size(acc, 0, x.size[1], "K, as in x"), c.size(acc, 1, k.size[1], "r, as in k");
  c.dropout(p, seed);
}

// Q: the sum that shrink_grad_ adds to.
inline Sizes check_shrink_grad(const Check& c, const Arg& Q, const Arg& g, const Arg& F, const Arg& u) {
  c.arguments({&Q, &g, &F, &u}, {&Q});
  c.dims(g, 2, "[M, N]"), c.dims(F, 2, "[N, r_in]"), c.dims(u, 2, "[M, r_in]");
  c.supported(g), c.factor(F, g.dtype), c.dtype(u, g.dtype);
  c.positive(g, 1, "N"), c.rank(F, 1, "r_in"), c.size(F, 0, g.size[1], "N, as in g");
  c.size(u, 0, g.size[0], "M, as in g"), c.size(u, 1, F.size[1], "r_in, as in F");
  c.matrix(Q, acc_dtype(g.dtype), "[N, r_in]", g.size[1], "N, as in g", F.size[1], "r_in, as in F");
  Sizes s;
  s.m = g.size[0], s.n = g.size[1], s.r = s.r_in = F.size[1];
  return s;
}

inline void check_fold(const Check& c, const Arg& B, const Arg& cores, double scaling, ScalarType dtype) {
  c.arguments({&B, &cores});
  c.dims(B, 2, "[N, r_out]"), c.dims(cores, 3, "[L, r_in, r_out]");
  if (!is_supported(dtype)) {
    fail(c.op, ": dtype: expected torch.float32, torch.bfloat16, torch.float16 or torch.float64, got ",
         dtype_name(dtype));
  }
  c.factor(B, dtype), c.factor(cores, dtype);
  c.positive(B, 0, "N"), c.rank(B, 1, "r_out"), c.positive(cores, 0, "L"), c.rank(cores, 1, "r_in");
  c.size(cores, 2, B.size[1], "r_out, as in B"), c.finite("scaling", scaling);
}

inline void check_fold_grad(const Check& c, const Arg& Q, const Arg& B, const Arg& cores, double scaling,
                            const Arg& dB) {
  c.arguments({&Q, &B, &cores, &dB}, {&dB});
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
  c.positive(Q, 0, "L"), c.positive(Q, 1, "N"), c.rank(Q, 2, "r_in"), c.rank(B, 1, "r_out");
  c.size(B, 0, Q.size[1], "N, as in Q"), c.size(cores, 0, Q.size[0], "L, as in Q");
  c.size(cores, 1, Q.size[2], "r_in, as in Q"), c.size(cores, 2, B.size[1], "r_out, as in B");
  c.finite("scaling", scaling);
  if (dB) c.matrix(dB, Q.dtype, "[N, r_out]", Q.size[1], "N, as in Q", B.size[1], "r_out, as in B");
}

// ---- row_core ----

struct RowSizes {
  int64_t rows, m, cores, r_in, r_out;
};

// Rows get a core by index, or by the ends of each core's rows (offs); tokens: the row of u that each reads.
// g: that of the backward.  The values of the indices are checked on a CPU alone, since on a GPU that would
// synchronise.
struct RowArgs {
  Arg g, u, cores, index, offs, tokens;

  RowSizes check(const Check& c, double scaling) const {
    c.arguments({&g, &u, &cores, &index, &offs, &tokens});
    c.dims(u, 2, "[m, r_in]"), c.dims(cores, 3, "[c, r_in, r_out]");
    c.supported(u), c.factor(cores, u.dtype);
    c.positive(u, 1, "r_in"), c.positive(cores, 0, "c"), c.rank(cores, 2, "r_out");
    c.size(cores, 1, u.size[1], "r_in, as in u"), c.rank(cores, 1, "r_in"), c.finite("scaling", scaling);
    if (bool(index) == bool(offs))
      fail(c.op, ": index, offs: expected exactly one of them, got ", index ? "both" : "none");
    const RowSizes s{tokens && tokens.dim == 1 ? tokens.size[0] : u.size[0], u.size[0], cores.size[0],
                     cores.size[1], cores.size[2]};
    const auto integers = [&](const Arg& a, ScalarType dtype, int64_t size, const char* what) {
      if (a) c.dims(a, 1, what), c.dtype(a, dtype), c.size(a, 0, size, what);
    };
    integers(tokens, ScalarType::Long, s.rows, "rows");
    integers(index, ScalarType::Long, s.rows, tokens ? "rows, as in tokens" : "rows, as in u");
    integers(offs, ScalarType::Int, s.cores, "one end a core");
    if (g) c.matrix(g, u.dtype, "[rows, r_out]", s.rows, "rows", s.r_out, "r_out, as in cores");
    return s;
  }
};

// ---- a direction of a layer ----

// The factors against the activations' dtype.
inline void check_A(const Check& c, const Arg& A, const Arg& like) {
  c.dims(A, 2, "[K, r_in]"), c.factor(A, like.dtype), c.positive(A, 0, "K");
}

inline Sizes check_core(const Check& c, const Arg& like, const Arg& core, const Arg& B, double scaling) {
  c.dims(core, 2, "[r_in, r_out]"), c.dims(B, 2, "[N, r_out]");
  for (const Arg* a : {&core, &B}) c.factor(*a, like.dtype);
  c.positive(B, 0, "N"), c.rank(B, 1, "r_out"), c.rank(core, 0, "r_in");
  c.size(core, 1, B.size[1], "r_out, as in B"), c.finite("scaling", scaling);
  Sizes s;
  s.n = B.size[0], s.r_in = core.size[0], s.r_out = B.size[1];
  return s;
}

// Sums of the gradients of A and B, each where it is given.
inline void check_sums(const Check& c, const Arg& like, const Sizes& s, const Arg& dA, const Arg& dB) {
  const ScalarType wide = acc_dtype(like.dtype);
  if (dA) c.matrix(dA, wide, "[K, r_in]", s.k, "K, as in A", s.r_in, "r_in, as in A");
  if (dB) c.matrix(dB, wide, "[N, r_out]", s.n, "N, as in B", s.r_out, "r_out, as in B");
}

// The order of the products in a layer's operators, planner.Plan.order in Python: the base product first, the
// adapter's first, or both in one launch. UNFOLDED is added to the first two: the core is multiplied with the
// tokens.
constexpr int64_t TWO_PASS = 0, BETA = 1, FUSED = 2, UNFOLDED = 4;

// The frozen weight [N, K] against the activations x [.., K] or g [.., N].
inline void check_weight(const Check& c, const Arg& weight, const Arg& like, int64_t n, int64_t k) {
  c.matrix(weight, like.dtype, "[N, K]", n, "N, as in B", k, "K");
}
// u or k.
inline void check_rank_rows(const Check& c, const Arg& a, const Arg& like, const Sizes& s) {
  c.matrix(a, like.dtype, "[M, r_in]", s.m, "M, the tokens", s.r_in, "r_in, as in core");
}
inline void check_folded(const Check& c, const Arg& F, const Arg& like, const Sizes& s) {
  c.dims(F, 2, "[N, r_in]"), c.factor(F, like.dtype);
  c.size(F, 0, s.n, "N, as in B"), c.size(F, 1, s.r_in, "r_in, as in core");
}
// x or dx [.., K] beside g or k.
inline void check_activations(const Check& c, const Arg& a, const Arg& g, int64_t m, int64_t k,
                              const char* shape = "[.., K]", const char* what = "K, as in A") {
  const int64_t rows = c.rows(a, shape);
  c.dtype(a, g.dtype), c.size(a, a.dim - 1, k, what);
  if (rows != m) fail(c.op, ": ", a.name, ": expected ", m, " tokens, as in g, got shape ", a.shape());
}

// The bias and the scale of W's rows, [N] each, for activations `like`.
inline void check_bias_and_scale(const Check& c, const Arg& bias, const Arg& scale, const Arg& like,
                                 int64_t n, const char* what) {
  if (bias) c.dims(bias, 1, "[N]"), c.dtype(bias, like.dtype), c.size(bias, 0, n, what);
  if (scale) c.dims(scale, 1, "[N]"), c.dtype(scale, acc_dtype(like.dtype)), c.size(scale, 0, n, what);
}

inline void check_scale_backward(const Check& c, const Arg& g, const Arg& y, const Arg& bias,
                                 const Arg& scale) {
  c.arguments({&g, &y, &bias, &scale});
  c.supported(g);
  const int64_t m = c.rows(g, "[.., N]");
  c.positive(g, g.dim - 1, "N");
  check_activations(c, y, g, m, g.flat.cols, "[.., N]", "N, as in g");
  check_bias_and_scale(c, bias, scale, g, g.flat.cols, "N, as in g");
}

inline Sizes check_row_norms(const Check& c, const Arg& weight, const Arg& square, const Arg& WA,
                             const Arg& A, const Arg& B, const Arg& core, double scaling) {
  c.arguments({&weight, &square, &WA, &A, &B, &core});
  c.dims(weight, 2, "[N, K]"), c.supported(weight);
  Sizes s = check_core(c, weight, core, B, scaling);
  check_A(c, A, weight), c.size(A, 1, s.r_in, "r_in, as in core"), s.k = A.size[0];
  check_weight(c, weight, weight, s.n, s.k);
  c.dims(square, 1, "[N]"), c.dtype(square, acc_dtype(weight.dtype)), c.size(square, 0, s.n, "N, as in B");
  if (WA) c.matrix(WA, acc_dtype(weight.dtype), "[N, r_in]", s.n, "N, as in B", s.r_in, "r_in, as in core");
  return s;
}

struct ForwardArgs {
  Arg x, weight, bias, A, B, core, u, F, seed, scale;

  Sizes check(const Check& c, double scaling, double p, bool unfolded) const {
    c.arguments({&x, &weight, &bias, &A, &B, &core, &u, &F, &seed, &scale});
    c.supported(x);
    if (bool(A) == bool(u))
      fail(c.op, ": A: expected a tensor or None, with u the other, got ", A ? "both" : "neither");
    Sizes s = check_core(c, x, core, B, scaling);
    s.m = c.rows(x, "[.., K]"), s.k = x.flat.cols;
    if (A) {
      check_A(c, A, x), c.size(A, 1, s.r_in, "r_in, as in core");
      c.size(x, x.dim - 1, A.size[0], "K, as in A");
    }
    check_weight(c, weight, x, s.n, s.k);
    check_bias_and_scale(c, bias, scale, x, s.n, "N, as in B");
    if (u) check_rank_rows(c, u, x, s);
    if (F) check_folded(c, F, x, s);
    c.dropout(p, seed);
    for (const Arg* a : {&u, &F})
      if (unfolded && *a) fail(c.op, ": ", a->name, ": expected None unfolded, got a tensor");
    if (unfolded && p != 0.0) fail(c.op, ": p: expected 0 unfolded, got ", p);
    return s;
  }
};

struct BackwardArgs {
  Arg g, weight, x, u, A, F, B, core, k, dx, Q, dA, dB, seed;

  // need_u: whether a gradient that depends on u is needed.
  Sizes check(const Check& c, double scaling, double p, bool unfolded, bool need_u) const {
    c.arguments({&g, &weight, &x, &u, &A, &F, &B, &core, &k, &dx, &Q, &dA, &dB, &seed}, {&dx, &Q, &dA, &dB});
    c.supported(g);
    Sizes s = check_core(c, g, core, B, scaling);
    s.m = c.rows(g, "[.., N]");
    c.size(g, g.dim - 1, s.n, "N, as in B");
    if (A) check_A(c, A, g), c.size(A, 1, s.r_in, "r_in, as in core"), s.k = A.size[0];
    if (weight) {
      if (!A && weight.dim == 2) s.k = weight.size[1];
      check_weight(c, weight, g, s.n, s.k);
    }
    if (unfolded) {
      if (!A) fail(c.op, ": A: expected a tensor, got None");
      for (const Arg* a : {&F, &k, &dx, &Q})
        if (*a) fail(c.op, ": ", a->name, ": expected None unfolded, got a tensor");
      if (p != 0.0) fail(c.op, ": p: expected 0 unfolded, got ", p);
      if (need_u && !u) fail(c.op, ": u: expected a tensor because need_B or need_core is set, got None");
    } else if (x && !(A && F)) {
      fail(c.op, ": x: expected None without A and F, got a tensor");
    }
    if (dx && !weight) fail(c.op, ": weight: expected a tensor because dx is given, got None");
    if (dA && !x) fail(c.op, ": x: expected a tensor because dA is given, got None");
    if ((Q || dB) && !u) fail(c.op, ": u: expected a tensor because Q or dB is given, got None");
    for (const Arg* a : {&x, &dx})
      if (*a) check_activations(c, *a, g, s.m, s.k);
    for (const Arg* a : {&u, &k})
      if (*a) check_rank_rows(c, *a, g, s);
    if (F) check_folded(c, F, g, s);
    if (Q) c.matrix(Q, acc_dtype(g.dtype), "[N, r_in]", s.n, "N, as in B", s.r_in, "r_in, as in core");
    check_sums(c, g, s, dA, dB);
    c.dropout(p, seed);
    return s;
  }
};

struct ShrinkBackwardArgs {
  Arg k, dx, x, A, dA, seed;

  // [K] of x; 0 where there is none.
  Sizes check(const Check& c, double p) const {
    c.arguments({&k, &dx, &x, &A, &dA, &seed}, {&dx, &dA});
    c.supported(k), c.dims(k, 2, "[M, r]"), c.rank(k, 1, "r");
    if (bool(dx) != bool(A))
      fail(c.op, ": A: expected a tensor or None as dx is, got ", A ? "a tensor" : "None");
    if (dA && !x) fail(c.op, ": x: expected a tensor because dA is given, got None");
    Sizes s;
    s.m = k.size[0], s.r = k.size[1];
    if (dx) {
      check_A(c, A, k), c.size(A, 0, dx.flat.cols, "K, as in dx"), c.size(A, 1, s.r, "r, as in k");
      check_activations(c, dx, k, s.m, dx.flat.cols);
    }
    if (x) {
      s.k = x.flat.cols;
      check_activations(c, x, k, s.m, s.k);
      if (dA) c.matrix(dA, acc_dtype(k.dtype), "[K, r]", s.k, "K, as in x", s.r, "r, as in k");
    }
    c.dropout(p, seed);
    return s;
  }
};

}  // namespace lotr
