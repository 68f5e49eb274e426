// The lengths of the rows of W + F A^T, the c of DoRA, without a matrix of W's size.
#pragma once

#include <limits>

#include "cpu/rows.h"

namespace lotr::cpu::LOTR_ISA {

template <typename T>
struct RowNorms {
  using K = typename KindOf<typename KindOf<T>::type::Acc>::type;  // of the sums, which F, WA and FAA have
  using Acc = typename K::Acc;

  static void row_norms(const Mat& norm, const Mat& W, const Mat& square, const Mat& WA, const Mat& A,
                        const Mat& F, const Mat& FAA) {
    const int64_t r = F.cols, whole = WA.cs == 1 ? r / K::kLanes * K::kLanes : 0;
    run_rows(W.rows, 3 * W.rows * r, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const Acc *f = row<Acc>(F, n), *of_W = row<Acc>(WA, n), *of_F = row<Acc>(FAA, n);
        typename K::Vec sums{};
        for (int64_t j = 0; j < whole; j += K::kLanes)
          sums += load(f + j) * (load(of_W + j) + load(of_W + j) + load(of_F + j));
        const Acc own = static_cast<const Acc*>(square.data)[n * square.cs];
        Acc sum = own;
        for (int64_t i = 0; i < K::kLanes; ++i) sum += sums[i];
        for (int64_t j = whole; j < r; ++j) sum += f[j] * (2 * of_W[j * WA.cs] + of_F[j]);
        // Where the two parts nearly cancel, the difference of squares has lost its digits; so it has where
        // F_n A^T is far below its r terms, which with fewer columns than terms is common.
        if (sum < own / 16 || W.cols < r) sum = measured(W, A, f, n);
        constexpr Acc kTiny = std::numeric_limits<Acc>::min();
        static_cast<Acc*>(norm.data)[n] = root(sum < kTiny ? kTiny : sum);
      }
    });
  }

 private:
  template <typename S>
  static const S* row(const Mat& a, int64_t i) {
    return static_cast<const S*>(a.data) + i * a.rs;
  }
  static float root(float v) { return __builtin_sqrtf(v); }
  static double root(double v) { return __builtin_sqrt(v); }

  // |W_n + F_n A^T|^2, element by element.
  static Acc measured(const Mat& W, const Mat& A, const Acc* f, int64_t n) {
    Acc sum = 0;
    by_dtype(A.dtype, [&](auto* tag) {
      using S = typename Pointee<decltype(tag)>::type;
      for (int64_t k = 0; k < W.cols; ++k) {
        Acc v = to_float(row<T>(W, n)[k * W.cs]);
        for (int64_t j = 0; j < A.cols; ++j) v += f[j] * Acc(to_float(row<S>(A, k)[j * A.cs]));
        sum += v * v;
      }
    });
    return sum;
  }
};

}  // namespace lotr::cpu::LOTR_ISA
