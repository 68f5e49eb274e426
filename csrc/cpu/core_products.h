// The products around the core: fold, fold_grad, and the few-token form.
#pragma once

#include "cpu/operators.h"

namespace lotr::cpu::LOTR_ISA {

// F = scaling B G^T, a shrink of B. T is F's dtype if both operands have it, and otherwise the type
// of sums: factors are widened, never rounded.
template <typename T>
inline void fold_as(const TensorView& F, const TensorView& B, const TensorView& core,
                    double scaling) {
  Operators<T>::shrink(F, B, transposed(core), scaled_by(scaling));
}

// dG = scaling Q^T B; dB (+)= scaling Q G. Products of the core are summed from unrounded operands,
// so factors of any dtype are widened to Acc, float or double.
template <typename Acc>
void fold_grad(const TensorView& dB, const TensorView& dcore, const TensorView& Q,
               const TensorView& B, const TensorView& core, double scaling, bool add) {
  if (dcore.data) Operators<Acc>::factor_grad(dcore, Q, B, scaled_by(scaling), /*add=*/false);
  if (dB.data) Operators<Acc>::product(dB, Q, core, scaled_by(scaling), add);
}

// For the table of T: Q is float32 or float64, so the tables of other types have none.
template <typename T>
constexpr decltype(Table::fold_grad) fold_grad_of = nullptr;
template <>
inline constexpr decltype(Table::fold_grad) fold_grad_of<float> = &fold_grad<float>;
template <>
inline constexpr decltype(Table::fold_grad) fold_grad_of<double> = &fold_grad<double>;

// Few tokens: the core is multiplied with the tokens. Folding it into B would take N r_in r_out
// multiplications, more than the rest of the adapter. Intermediate results are kept in Acc, and
// rounded to T only as operands of expand and factor_grad.
template <typename T>
struct FewTokens {
  using Ops = Operators<T>;
  using K = typename KindOf<T>::type;
  using Acc = typename K::Acc;

  static TensorView dense(void* data, int64_t rows, int64_t cols, DType dtype) {
    return {data, rows, cols, cols, 1, dtype};
  }

  // out[n] += v row[n]. Without __restrict the compiler checks for overlap in each row.
  static void add_scaled(Acc* __restrict out, Acc v, const Acc* __restrict row, int64_t n) {
    for (int64_t b = 0; b < n; ++b) out[b] += v * row[b];
  }

  // out [m, r_out] = scale * in [m, r_in] core. core [r_in, r_out] is rounded to T.
  static void times_core(Acc* out, const Acc* in, int64_t m, const TensorView& core, Acc scale) {
    const int64_t r_in = core.rows;
    const int64_t r_out = core.cols;
    for (int64_t i = 0; i < m * r_out; ++i) out[i] = 0;
    by_dtype(core.dtype, [&](auto stored) {
      using S = typename decltype(stored)::type;
      Scratch row_memory(size_t(r_out) * sizeof(Acc));
      Acc* row = row_memory.get<Acc>();
      for (int64_t a = 0; a < r_in; ++a) {
        const S* src = static_cast<const S*>(core.data) + a * core.row_stride;
        parts<Plain<Acc>, T>(row, src, core.col_stride, r_out, /*keep=*/nullptr);
        for (int64_t i = 0; i < m; ++i)
          add_scaled(out + i * r_out, in[i * r_in + a] * scale, row, r_out);
      }
    });
  }

  static void widen(Acc* out, const TensorView& a) {
    const T* row = static_cast<const T*>(a.data);
    for (int64_t i = 0; i < a.rows; ++i, out += a.cols, row += a.row_stride)
      parts<Plain<Acc>, T>(out, row, a.col_stride, a.cols, /*keep=*/nullptr);
  }
  static void narrow(T* out, const Acc* in, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = Narrow<T>::from(in[i]);
  }

  // out = scaling u core, rounded to T. If that exceeds float16's range, out = u core. The scale of
  // the returned Drop is what is left to be applied last: 1, or the scaling as in s ((x A) G) B^T.
  static Drop scaled_core(T* out, Acc* h, const Acc* u, int64_t m, const TensorView& core,
                          double scaling) {
    Drop last;
    times_core(h, u, m, core, Acc(scaling));
    if constexpr (std::is_same_v<T, f16>) {
      bool inside = true;
      for (int64_t i = 0; i < m * core.cols; ++i)
        inside = inside && h[i] < Acc(65504) && h[i] > Acc(-65504);
      if (!inside) {
        times_core(h, u, m, core, Acc(1));
        last.scale = scaling;
      }
    }
    narrow(out, h, m * core.cols);
    return last;
  }

  static void forward(const TensorView& u, const TensorView& y, const TensorView& x,
                      const TensorView& A, const TensorView& core, const TensorView& B,
                      double scaling, const Start& start) {
    const int64_t m = x.rows;
    const int64_t r_in = core.rows;
    const int64_t r_out = core.cols;
    Ops::shrink(u, x, A, Drop{});
    Scratch memory(size_t(m * (r_in + r_out)) * sizeof(Acc) + size_t(m * r_out) * sizeof(T));
    Acc* wide = memory.get<Acc>();
    Acc* h = wide + m * r_in;
    T* h_t = reinterpret_cast<T*>(h + m * r_out);  // h rounded to T
    widen(wide, u);
    const Drop last = scaled_core(h_t, h, wide, m, core, scaling);
    Ops::expand(y, dense(h_t, m, r_out, x.dtype), B, last, start);
  }

  static void backward(const FewTokensBackward& args) {
    const int64_t m = args.g.rows;
    const int64_t r_in = args.core.rows;
    const int64_t r_out = args.core.cols;
    const DType dtype = args.g.dtype;
    const DType acc = dtype == DType::float64 ? DType::float64 : DType::float32;
    Scratch memory(size_t(2 * m * (r_in + r_out)) * sizeof(Acc) +
                   size_t(m * (r_in + r_out)) * sizeof(T));
    Acc* scaled_dh = memory.get<Acc>();                  // scaling g B, never rounded
    Acc* du = scaled_dh + m * r_out;                     // scaled_dh core^T
    Acc* u = du + m * r_in;                              // the given u
    Acc* u_core = u + m * r_in;                          // scaling u core
    T* du_t = reinterpret_cast<T*>(u_core + m * r_out);  // du rounded to T
    T* u_core_t = du_t + m * r_in;                       // u_core rounded to T
    if (args.dx.data || args.dA.data || args.dcore.data)
      Ops::shrink(dense(scaled_dh, m, r_out, acc), args.g, args.B, scaled_by(args.scaling));
    if (args.dx.data || args.dA.data) {
      times_core(du, scaled_dh, m, transposed(args.core), Acc(1));
      narrow(du_t, du, m * r_in);
      const TensorView du_view = dense(du_t, m, r_in, dtype);
      if (args.dx.data)
        Ops::expand(args.dx, du_view, args.A, Drop{}, {args.fresh_dx ? TensorView{} : args.dx, {}});
      if (args.dA.data) Ops::factor_grad(args.dA, args.x, du_view, Drop{}, !args.fresh_dA);
    }
    if (args.dB.data || args.dcore.data) widen(u, args.u);
    if (args.dB.data) {
      const Drop last = scaled_core(u_core_t, u_core, u, m, args.core, args.scaling);
      Ops::factor_grad(args.dB, args.g, dense(u_core_t, m, r_out, dtype), last, !args.fresh_dB);
    }
    if (args.dcore.data) {
      Scratch sums(size_t(r_in * r_out) * sizeof(Acc));
      Acc* out = sums.get<Acc>();
      for (int64_t i = 0; i < r_in * r_out; ++i) out[i] = 0;
      for (int64_t i = 0; i < m; ++i)
        for (int64_t a = 0; a < r_in; ++a)
          add_scaled(out + a * r_out, u[i * r_in + a], scaled_dh + i * r_out, r_out);
      write_rows<K>(args.dcore, 0, r_in, out, r_out, /*scale=*/1.0, /*add=*/false);
    }
  }
};

}  // namespace lotr::cpu::LOTR_ISA
