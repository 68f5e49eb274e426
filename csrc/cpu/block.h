// The inner loop of most products: a register block c[rows][vectors] += sum over units of a
// broadcast times b. AMX tiles (amx.h), S in outer.h and products of a few rows have other loops.
//
//   c[i][v] += sum_t a(i, t) * b[t * ldb + v]     a broadcast to all lanes, b along the rank or n
//
//   shrink        a = x rows (units along the row)       b = packed A             sums over k
//   expand        a = u rows                             b = packed F^T panel     sums over r
//   factor_grad   a = x columns (units down a column)    b = packed v             sums over m
//
// Each loaded b is used by all rows and each broadcast by all vectors, so a block of MR rows and RV
// vectors does MR * RV multiplications for RV + MR loads. Rows are few enough that rows whose
// distance is a multiple of 4 KiB stay within the ways of L1.
//
// Example: rank 40 in float32 with AVX-512 has 3 vectors of 16. 13 rows make blocks of 8, 4 and 1.
#pragma once

#include "cpu/tiles.h"

namespace lotr::cpu::LOTR_ISA {

// Blocks that 32 registers (AVX-512) or 16 hold: kRows[v] rows of v vectors (at most 8, for L1),
// or kColumnRows[v] rows that are columns in memory (Layout::down_columns).
#if LOTR_VB == 64
constexpr int kMaxVectors = 4;
constexpr int kRows[] = {0, 8, 8, 8, 6};
constexpr int kColumnRows[] = {0, 16, 12, 8, 6};
#else
constexpr int kMaxVectors = 2;
constexpr int kRows[] = {0, 8, 6};
constexpr int kColumnRows[] = {0, 8, 6};
#endif

// Calls f(Int<vectors>) for 1 to kMaxVectors vectors.
template <int n = 1, typename F>
LOTR_INLINE void by_vectors(int64_t vectors, F&& f) {
  if constexpr (n < kMaxVectors) {
    if (vectors > n) return by_vectors<n + 1>(vectors, f);
  }
  f(Int<n>{});
}

// A rectangle of a tensor that is prefetched while another one is multiplied. Its rows are too
// short and too far apart for the hardware's prefetcher. One line per unit, because a burst of
// prefetches would stall the loads of the multiplication.
struct Piece {
  const char* row = nullptr;  // the one that is prefetched next
  int64_t step = 0;           // bytes from one row to the next
  int64_t rows = 0;           // that are left
  int64_t bytes = 0;          // of a row
  int64_t done = 0;           // bytes of `row` that are prefetched already

  Piece() = default;
  // A rectangle may extend past the tensor: only its part inside is prefetched.
  Piece(const Rectangle& part) {
    const TensorView& a = part.a;
    if (a.col_stride != 1 || part.i0 >= a.rows || part.c0 >= a.cols) return;
    const int64_t size = element_size(a.dtype);
    row = static_cast<const char*>(a.data) + (part.i0 * a.row_stride + part.c0) * size;
    step = a.row_stride * size;
    bytes = smaller(part.cols, a.cols - part.c0) * size;
    rows = smaller(part.rows, a.rows - part.i0);
  }
  LOTR_INLINE void next() {
    if (rows <= 0) return;
    __builtin_prefetch(row + done, 0, 2);
    done += 64;
    if (done < bytes) return;
    done = 0;
    row += step;
    --rows;
  }
};

// Two pieces, one after the other.
struct Ahead {
  Piece now;
  Piece later;

  // The current one, to be kept in registers while it advances.
  LOTR_INLINE Piece take() {
    if (now.rows <= 0) {
      now = later;
      later.rows = 0;
    }
    return now;
  }
};

// Whether the summed dimension, which a's units follow, is a row or a column (tiles.h).
enum class Layout { along_row, down_columns };

// acc += the product over n units. `step` is the distance of a's rows (along_row) or of its units
// (down_columns), in bytes because a row of bf16 may start at half a unit; the other distance is
// one unit. ahead: prefetched meanwhile, one cache line per unit; null for nothing.
template <typename K, int MR, int RV, Layout layout>
LOTR_INLINE void multiply(typename K::Vec (&acc)[MR][RV], const char* a, int64_t step,
                          const typename K::Unit* b, int64_t ldb, int64_t n,
                          Piece* ahead = nullptr) {
  using Unit = typename K::Unit;
  constexpr int64_t kUnit = sizeof(Unit);
  typedef Unit Loaded __attribute__((aligned(sizeof(Unit) / 2), may_alias));  // at any element
#pragma GCC unroll 4
  for (int64_t t = 0; t < n; ++t) {
    if (ahead) ahead->next();
    decltype(load(b)) bv[RV];
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) bv[v] = load(b + t * ldb + v * K::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const typename K::Unit s = *reinterpret_cast<const Loaded*>(
          layout == Layout::along_row ? a + i * step + t * kUnit : a + t * step + i * kUnit);
#pragma GCC unroll 8
      for (int v = 0; v < RV; ++v) acc[i][v] = K::madd(acc[i][v], bv[v], s);
    }
  }
}

// c: rows of sums, `ld` apart. fresh: they start at zero, instead of being added to.
template <typename K>
struct Sums {
  typename K::Acc* data;
  int64_t ld;
  bool fresh;
};

// a: its rows (along_row) or its units (down_columns) are `step` bytes apart.
struct Broadcast {
  const char* data;
  int64_t step;

  // Of an array whose rows or units are `step` of its elements apart.
  template <typename E>
  static Broadcast of(const E* data, int64_t step) {
    return {reinterpret_cast<const char*>(data), step * int64_t(sizeof(E))};
  }
};

// b: a packed factor or a tile of v. Each unit has a row of `vectors` vectors, `ld` units apart.
template <typename K>
struct Factor {
  const typename K::Unit* data;
  int64_t ld;
  int64_t vectors;

  Factor from_unit(int64_t t) const { return {data + t * ld, ld, vectors}; }
};

// One block of sums. Its n products are summed first: a long sum made of short ones rounds less.
// c is a copy: stores could change a referenced one, and float32 at rank 64 would take 14 % longer.
template <typename K, int MR, int RV, Layout layout>
inline void sum_block(Sums<K> c, Broadcast a, const typename K::Unit* b, int64_t ldb, int64_t n,
                      Ahead& ahead) {
  typename K::Vec acc[MR][RV] = {};
  Piece piece = ahead.take();
  multiply<K, MR, RV, layout>(acc, a.data, a.step, b, ldb, n, &piece);
  ahead.now = piece;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) {
      typename K::Acc* at = c.data + i * c.ld + v * K::kLanes;
      store(at, c.fresh ? acc[i][v] : load(at) + acc[i][v]);
    }
  }
}

template <int MR, typename F>
LOTR_INLINE void last_block(int64_t rows, int64_t& i, F& f) {
  if (i + MR > rows) return;
  f(Int<MR>{}, i);
  i += MR;
}
// Calls f(Int<MR>, first row) for blocks of kMost rows, then 8, 4, 2, 1 for what is left.
template <int kMost, typename F>
LOTR_INLINE void row_blocks(int64_t rows, F&& f) {
  int64_t i = 0;
  for (; i + kMost <= rows; i += kMost) f(Int<kMost>{}, i);
  if constexpr (kMost > 8) last_block<8>(rows, i, f);
  if constexpr (kMost > 4) last_block<4>(rows, i, f);
  last_block<2>(rows, i, f);
  last_block<1>(rows, i, f);
}

// c[rows][rank vectors] (+)= product over n units, in groups of at most kMaxVectors vectors.
template <typename K, Layout layout>
inline void sum_tile(const Sums<K>& c, const Broadcast& a, int64_t rows, const Factor<K>& b,
                     int64_t n, Ahead& ahead) {
  constexpr bool kAlongRow = layout == Layout::along_row;
  // Bytes from one row of a to the next.
  const int64_t next_row = kAlongRow ? a.step : int64_t(sizeof(typename K::Unit));
  for (int64_t v = 0; v < b.vectors;) {
    // Groups of about equal size: 5 vectors are 3 + 2, not 4 + 1.
    const int64_t left = b.vectors - v;
    const int64_t groups = ceil_div(left, kMaxVectors);
    const int64_t group = ceil_div(left, groups);
    by_vectors(group, [&](auto rv) {
      constexpr int RV = decltype(rv)::value;
      constexpr int kMost = kAlongRow ? kRows[RV] : kColumnRows[RV];
      row_blocks<kMost>(rows, [&](auto mr, int64_t i) {
        constexpr int MR = decltype(mr)::value;
        sum_block<K, MR, RV, layout>({c.data + i * c.ld + v * K::kLanes, c.ld, c.fresh},
                                     {a.data + i * next_row, a.step}, b.data + v * K::kLanes, b.ld,
                                     n, ahead);
      });
    });
    v += group;
  }
}

// What an expand adds u f to: a matrix, the bias (a row that all tokens share), or both.
enum class Form { matrix, bias, matrix_and_bias };

template <Form form, typename A, typename T>
LOTR_INLINE auto start_of(const T* from, const A* bias) {
  if constexpr (form == Form::matrix) return load(from);
  if constexpr (form == Form::bias) return load(bias);
  return load(from) + load(bias);
}

// Prefetches `bytes` of a row that will be written.
template <int64_t bytes>
LOTR_INLINE void prefetch_row(const void* row) {
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(row) + i, 1, 2);
}

// y[MR][RV vectors] = start_of(from, bias) + u f, with contiguous columns. Rows of y are `ldy`
// apart, rows of `from` `ldfrom`; `from` is y, or does not overlap it. f: [n units][RV vectors].
template <typename K, typename T, int MR, int RV, Form form>
LOTR_INLINE void expand_full_block(T* y, int64_t ldy, const T* from, int64_t ldfrom,
                                   const Broadcast& u, const typename K::Unit* f, int64_t n,
                                   const T* from_ahead, const T* y_ahead,
                                   const typename K::Acc* bias) {
  constexpr int kLanes = K::kLanes;
  constexpr int kPanel = RV * kLanes;
  // Sums start at a half-precision `from`, because its rounding error exceeds theirs; a wide one is
  // added at the end.
  constexpr bool kStartsAtFrom = sizeof(T) < sizeof(typename K::Acc);
  typename K::Vec acc[MR][RV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    // A later block of `from`, and of y if that is another matrix: the rows of a block are too
    // short for the hardware's prefetcher.
    prefetch_row<kPanel * sizeof(T)>(from_ahead + i * ldfrom);
    if (y_ahead) prefetch_row<kPanel * sizeof(T)>(y_ahead + i * ldy);
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) {
      if constexpr (kStartsAtFrom) {
        acc[i][v] = start_of<form>(from + i * ldfrom + v * kLanes, bias + v * kLanes);
      } else {
        acc[i][v] = typename K::Vec{};
      }
    }
  }
  multiply<K, MR, RV, Layout::along_row>(acc, u.data, u.step, f, kPanel, n);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < RV; ++v) {
      T* at = y + i * ldy + v * kLanes;
      if constexpr (kStartsAtFrom && RV % 2 == 0) {
        if (v % 2 == 0) store(at, acc[i][v], acc[i][v + 1]);
      } else if constexpr (kStartsAtFrom) {
        store(at, acc[i][v]);
      } else {
        store(at, start_of<form>(from + i * ldfrom + v * kLanes, bias + v * kLanes) + acc[i][v]);
      }
    }
  }
}

// y[MR][cols] = from + bias + scale * (mask applied to u f) for any other panel: cut short, with
// strided columns, a scale or dropout. f: [n][RV vectors]. `from` and `bias` count as zero if null;
// `keep` (row stride RV vectors) is null without dropout.
template <typename K, typename T, int MR, int RV>
inline void expand_ragged_block(T* y, int64_t ldy, int64_t y_step, const T* from, int64_t ldfrom,
                                int64_t from_step, int64_t cols, const Broadcast& u,
                                const typename K::Unit* f, int64_t n, const uint32_t* keep,
                                typename K::Acc scale, const typename K::Acc* bias) {
  constexpr int kLanes = K::kLanes;
  constexpr int kPanel = RV * kLanes;
  // With `= {}`, GCC 12 keeps acc in memory: 21 us in place of 12 for 1024 x 32 at rank 8.
  typename K::Vec acc[MR][RV];
  for (auto& row : acc)
    for (typename K::Vec& sum : row) sum = typename K::Vec{};
  multiply<K, MR, RV, Layout::along_row>(acc, u.data, u.step, f, kPanel, n);
  typename K::Acc sums[kPanel];
  for (int i = 0; i < MR; ++i) {
    for (int v = 0; v < RV; ++v) store(sums + v * kLanes, acc[i][v]);
    T* row = y + i * ldy;
    if (keep) {
      for (int64_t j = 0; j < cols; ++j)
        sums[j] = keep[i * kPanel + j] ? sums[j] * scale : typename K::Acc(0);
    } else if (scale != 1) {
      for (int64_t j = 0; j < cols; ++j) sums[j] *= scale;
    }
    if (bias) {
      for (int64_t j = 0; j < cols; ++j) sums[j] += bias[j];
    }
    if (!from) {
      for (int64_t j = 0; j < cols; ++j) row[j * y_step] = Narrow<T>::from(sums[j]);
      continue;
    }
    const T* start = from + i * ldfrom;
    // `start` is `row` or does not overlap it. GCC would check, and take 5 % longer per block.
#pragma GCC ivdep
    for (int64_t j = 0; j < cols; ++j)
      row[j * y_step] = Narrow<T>::from(to_float(start[j * from_step]) + sums[j]);
  }
}

}  // namespace lotr::cpu::LOTR_ISA
