// The checks of each operator's arguments, the same on CPU and CUDA: a table of rules an operator, a dtype
// and a shape for each tensor. They run before anything is written.
#pragma once

#include <array>

#include "arg.h"

namespace lotr {

// What a dimension counts. LEADING: the tokens of [.., K], all leading dimensions as one.
enum Dim : uint8_t { NO_DIM, M, K, N, R, R_IN, R_OUT, L, ROWS, LEADING };
constexpr const char* DIM_NAMES[] = {"", "M", "K", "N", "r", "r_in", "r_out", "L", "rows", ".."};

// A dtype against that of the activations.
enum class As {
  same,
  factor,  // the same, or float32 beside bfloat16 and float16: it is rounded, as autocast would
  sums,    // float32, or float64 beside float64
  summed,  // any dtype that is summed in this one
  int64,
  int32
};

// One row of an operator's table; not looked at where the argument is not given.
struct Rule {
  const Arg& arg;
  As as;
  std::array<Dim, 3> shape;
};

// The sizes that an operator's arguments agree on. The first argument with a dimension says its size, a later
// one must have the same. Only M and rows may be zero.
class Sizes {
 public:
  Sizes(const Check& c, ScalarType like, std::initializer_list<Rule> rules) {
    for (const Rule& rule : rules) {
      if (!rule.arg) continue;
      check_dtype(c, rule, like);
      check_shape(c, rule);
    }
  }
  // 0: no argument that is given has it
  int64_t operator[](Dim d) const { return sizes_[d].size; }

 private:
  struct Size {
    int64_t size = 0;
    const char* of = nullptr;  // the argument that has it
  };

  static void check_dtype(const Check& c, const Rule& rule, ScalarType like) {
    const Arg& a = rule.arg;
    switch (rule.as) {
      case As::same:
        return c.dtype(a, like);
      case As::sums:
        return c.dtype(a, acc_dtype(like));
      case As::int64:
        return c.dtype(a, ScalarType::Long);
      case As::int32:
        return c.dtype(a, ScalarType::Int);
      case As::summed:
        c.supported(a);
        if (acc_dtype(a.dtype) == like) return;
        fail(c.op, ": ", a.name, ": expected a dtype that is summed in ", dtype_name(like), ", got ",
             dtype_name(a.dtype));
      case As::factor:
        if (a.dtype == like || (is_half(like) && a.dtype == ScalarType::Float)) return;
        fail(c.op, ": ", a.name, ": expected dtype ", dtype_name(like),
             is_half(like) ? " or torch.float32" : "", ", got ", dtype_name(a.dtype));
    }
  }

  static std::string text(const Rule& rule) {
    std::string all;
    for (const Dim d : rule.shape)
      if (d) all += (all.empty() ? "[" : ", ") + std::string(DIM_NAMES[d]);
    return all + "]";
  }

  void check_shape(const Check& c, const Rule& rule) {
    const Arg& a = rule.arg;
    if (rule.shape[0] == LEADING) {
      if (a.dim < 1) fail(c.op, ": ", a.name, ": expected a tensor ", text(rule), ", got shape ", a.shape());
      c.one_matrix(a);
      Size& tokens = sizes_[M];
      if (tokens.of && a.flat.rows != tokens.size)
        fail(c.op, ": ", a.name, ": expected ", tokens.size, " tokens, as in ", tokens.of, ", got shape ",
             a.shape());
      tokens = {a.flat.rows, tokens.of ? tokens.of : a.name};
      return check_size(c, a, a.dim - 1, rule.shape[1]);
    }
    const int64_t dims = rule.shape[2] ? 3 : rule.shape[1] ? 2 : 1;
    if (a.dim != dims)
      fail(c.op, ": ", a.name, ": expected a ", dims, "-D tensor ", text(rule), ", got shape ", a.shape());
    for (int64_t i = 0; i < dims; ++i) check_size(c, a, i, rule.shape[size_t(i)]);
  }

  void check_size(const Check& c, const Arg& a, int64_t axis, Dim d) {
    Size& known = sizes_[d];
    const int64_t size = a.size[axis];
    if (known.of) {
      if (size != known.size)
        fail(c.op, ": ", a.name, ": expected size ", known.size, " in dimension ", axis, " (", DIM_NAMES[d],
             ", as in ", known.of, "), got shape ", a.shape());
      return;
    }
    known = {size, a.name};
    if (size < 1 && d != M && d != ROWS)
      fail(c.op, ": ", a.name, ": expected at least 1 in dimension ", axis, " (", DIM_NAMES[d],
           "), got shape ", a.shape());
    if (c.max_rank && size > c.max_rank && (d == R || d == R_IN || d == R_OUT))
      fail(c.op, ": ", a.name, ": expected a rank of at most ", c.max_rank, " in dimension ", axis,
           ", got shape ", a.shape(), "; the composite path takes it");
  }

  std::array<Size, LEADING + 1> sizes_{};
};

// ---- the single products ----

inline void check_shrink(const Check& c, const Arg& x, const Arg& A, double p, const Arg& seed) {
  c.arguments({&x, &A, &seed});
  c.supported(x);
  Sizes(c, x.dtype, {{x, As::same, {M, K}}, {A, As::factor, {K, R}}});
  c.dropout(p, seed);
}

// y: [M, N], or where it is not written [.., N].
inline void check_expand(const Check& c, const Arg& y, const Arg& u, const Arg& F, bool written, double p,
                         const Arg& seed) {
  if (written)
    c.arguments({&y, &u, &F, &seed}, {&y});
  else
    c.arguments({&y, &u, &F, &seed});
  c.supported(y);
  Sizes(c, y.dtype,
        {{y, As::same, {written ? M : LEADING, N}}, {u, As::same, {M, R}}, {F, As::factor, {N, R}}});
  c.dropout(p, seed);
}

inline void check_factor_grad(const Check& c, const Arg& acc, const Arg& x, const Arg& k, double p,
                              const Arg& seed) {
  c.arguments({&acc, &x, &k, &seed}, {&acc});
  c.supported(x);
  Sizes(c, x.dtype, {{x, As::same, {M, K}}, {k, As::same, {M, R}}, {acc, As::sums, {K, R}}});
  c.dropout(p, seed);
}

inline Sizes check_shrink_grad(const Check& c, const Arg& Q, const Arg& g, const Arg& F, const Arg& u) {
  c.arguments({&Q, &g, &F, &u}, {&Q});
  c.supported(g);
  return {c,
          g.dtype,
          {{g, As::same, {M, N}},
           {F, As::factor, {N, R_IN}},
           {u, As::same, {M, R_IN}},
           {Q, As::sums, {N, R_IN}}}};
}

inline void check_fold(const Check& c, const Arg& B, const Arg& cores, double scaling, ScalarType dtype) {
  c.arguments({&B, &cores});
  if (!is_supported(dtype)) {
    fail(c.op, ": dtype: expected torch.float32, torch.bfloat16, torch.float16 or torch.float64, got ",
         dtype_name(dtype));
  }
  Sizes(c, dtype, {{B, As::factor, {N, R_OUT}}, {cores, As::factor, {L, R_IN, R_OUT}}});
  c.finite("scaling", scaling);
}

inline void check_fold_grad(const Check& c, const Arg& Q, const Arg& B, const Arg& cores, double scaling,
                            const Arg& dB) {
  c.arguments({&Q, &B, &cores, &dB}, {&dB});
  if (Q.dtype != ScalarType::Float && Q.dtype != ScalarType::Double)
    fail(c.op, ": Q: expected dtype torch.float32 or torch.float64, got ", dtype_name(Q.dtype));
  Sizes(c, Q.dtype,
        {{Q, As::same, {L, N, R_IN}},
         {B, As::summed, {N, R_OUT}},
         {cores, As::summed, {L, R_IN, R_OUT}},
         {dB, As::same, {N, R_OUT}}});
  c.finite("scaling", scaling);
}

// ---- row_core ----

// Rows get a core by index, or by the ends of each core's rows (offs); tokens: the row of u that each reads.
// g: that of the backward.  The values of the indices are checked on a CPU alone, since on a GPU that would
// synchronise.
struct RowArgs {
  Arg g, u, cores, index, offs, tokens;

  Sizes check(const Check& c, double scaling) const {
    c.arguments({&g, &u, &cores, &index, &offs, &tokens});
    c.supported(u);
    if (bool(index) == bool(offs))
      fail(c.op, ": index, offs: expected exactly one of them, got ", index ? "both" : "none");
    c.finite("scaling", scaling);
    // without tokens there is a row for each token
    const Dim row = tokens ? ROWS : M;
    return {c,
            u.dtype,
            {{u, As::same, {M, R_IN}},
             {cores, As::factor, {L, R_IN, R_OUT}},
             {tokens, As::int64, {ROWS}},
             {index, As::int64, {row}},
             {offs, As::int32, {L}},
             {g, As::same, {row, R_OUT}}}};
  }
};

// ---- a direction of a layer ----

// The order of the products in a layer's operators: the base product first, the adapter's first, or both in
// one launch. UNFOLDED is added to the first two: the core is multiplied with the tokens.
constexpr int64_t TWO_PASS = 0, BETA = 1, FUSED = 2, UNFOLDED = 4;

struct ForwardArgs {
  Arg x, weight, bias, A, B, core, u, F, seed;

  Sizes check(const Check& c, double scaling, double p, bool unfolded) const {
    c.arguments({&x, &weight, &bias, &A, &B, &core, &u, &F, &seed});
    c.supported(x);
    if (bool(A) == bool(u))
      fail(c.op, ": A: expected a tensor or None, with u the other, got ", A ? "both" : "neither");
    c.finite("scaling", scaling);
    const Sizes s(c, x.dtype,
                  {{B, As::factor, {N, R_OUT}},
                   {core, As::factor, {R_IN, R_OUT}},
                   {x, As::same, {LEADING, K}},
                   {A, As::factor, {K, R_IN}},
                   {weight, As::same, {N, K}},
                   {bias, As::same, {N}},
                   {u, As::same, {M, R_IN}},
                   {F, As::factor, {N, R_IN}}});
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
    c.finite("scaling", scaling);
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
    c.dropout(p, seed);
    return {c,
            g.dtype,
            {{B, As::factor, {N, R_OUT}},
             {core, As::factor, {R_IN, R_OUT}},
             {g, As::same, {LEADING, N}},
             {A, As::factor, {K, R_IN}},
             {weight, As::same, {N, K}},
             {x, As::same, {LEADING, K}},
             {dx, As::same, {LEADING, K}},
             {u, As::same, {M, R_IN}},
             {k, As::same, {M, R_IN}},
             {F, As::factor, {N, R_IN}},
             {Q, As::sums, {N, R_IN}},
             {dA, As::sums, {K, R_IN}},
             {dB, As::sums, {N, R_OUT}}}};
  }
};

struct ShrinkBackwardArgs {
  Arg k, dx, x, A, dA, seed;

  Sizes check(const Check& c, double p) const {
    c.arguments({&k, &dx, &x, &A, &dA, &seed}, {&dx, &dA});
    c.supported(k);
    if (bool(dx) != bool(A))
      fail(c.op, ": A: expected a tensor or None as dx is, got ", A ? "a tensor" : "None");
    if (dA && !x) fail(c.op, ": x: expected a tensor because dA is given, got None");
    c.dropout(p, seed);
    return {c,
            k.dtype,
            {{k, As::same, {M, R}},
             {dx, As::same, {LEADING, K}},
             {A, As::factor, {K, R}},
             {x, As::same, {LEADING, K}},
             {dA, As::sums, {K, R}}}};
  }
};

}  // namespace lotr
