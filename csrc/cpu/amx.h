// Products in AMX tiles. A tile register has 16 rows of 64 bytes. One instruction multiplies a tile
// of A with a tile of B, of bfloat16 pairs, and adds the products to a tile C of float32. That
// replaces 256 instructions of block.h. The eight tile registers of a thread:
//
//                     tmm6   tmm7    B: 16 units down, 16 columns across
//              tmm4   tmm0   tmm1    C [RA x RB tiles] += A B, with RA and RB 1 or 2
//              tmm5   tmm2   tmm3    A: 16 rows down, 16 units across
//
// One such product, of up to 16 units, is a step. A packed factor is rounded up to full steps.
// Subnormal numbers count as zero, as in the dot products of AVX-512.
//
// Example: u [100, 32] = x [100, 80] A. Rows: three times RA = 2, then a tile of 4 rows. Columns:
// RB = 2. A row of x has 40 units: two steps in place, then 8 units that are copied and padded.
#pragma once

#include "cpu/block.h"

namespace lotr::cpu::LOTR_ISA {

// The shapes of this thread's tile registers. They are released at the end, because a thread with
// tiles takes longer to switch to and keeps its core out of deep sleep.
class Tiles {
 public:
  // rows of A and C; units of a step.
  Tiles(int64_t rows, int64_t units) {
    alignas(64) Shape shape{};
    shape.palette = 1;
    for (int t = 0; t < 8; ++t) {
      const bool of_A = t == 4 || t == 5;
      const bool of_B = t >= 6;
      shape.bytes[t] = uint16_t(4 * (of_A ? units : kSide));
      shape.rows[t] = uint8_t(of_B ? units : rows);
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct Shape {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];  // of a row
    uint8_t rows[16];
  };
};

template <int tile>
LOTR_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// Rows are `row_bytes` apart. The clobber: a load must come after the stores to what it reads.
template <int tile>
LOTR_INLINE void tile_load(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(from), "r"(row_bytes) : "memory");
}
template <int tile>
LOTR_INLINE void tile_store(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(to), "r"(row_bytes) : "memory");
}
template <int sums, int a, int b>
LOTR_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
}

// The tiles of A or B in memory.
struct Operand {
  const char* first;        // the first tile
  int64_t row, tile, step;  // bytes to the next row, to the second of two tiles, to the next step

  // Of an array, with the distances in its elements.
  template <typename E>
  static Operand of(const E* first, int64_t row, int64_t tile, int64_t step) {
    constexpr int64_t kBytes = sizeof(E);
    return {reinterpret_cast<const char*>(first), row * kBytes, tile * kBytes, step * kBytes};
  }
};

// Sums of RA x RB tiles (1 or 2 each), from zero.
template <int RA, int RB>
LOTR_INLINE void zero_tiles() {
  tile_zero<0>();
  if constexpr (RB == 2) tile_zero<1>();
  if constexpr (RA == 2) tile_zero<2>();
  if constexpr (RA == 2 && RB == 2) tile_zero<3>();
}
// Adds the products of `steps` steps. Each prefetches a line per row: `rows_below` from `below` on.
template <int RA, int RB>
LOTR_INLINE void multiply_tiles(Operand a, Operand b, int64_t steps, const char* below = nullptr,
                                int64_t rows_below = 0) {
  for (int64_t t = 0; t < steps; ++t) {
    tile_load<4>(a.first, a.row);
    tile_load<6>(b.first, b.row);
    tile_multiply<0, 4, 6>();
    if constexpr (RB == 2) {
      tile_load<7>(b.first + b.tile, b.row);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (RA == 2) {
      tile_load<5>(a.first + a.tile, a.row);
      tile_multiply<2, 5, 6>();
    }
    if constexpr (RA == 2 && RB == 2) tile_multiply<3, 5, 7>();
    for (int64_t i = 0; i < rows_below; ++i)
      __builtin_prefetch(below + t * a.step + i * a.row, 0, 2);
    a.first += a.step;
    b.first += b.step;
  }
}
// Stores the sums in c, whose rows are ldc apart.
template <int RA, int RB>
LOTR_INLINE void store_tiles(float* c, int64_t ldc) {
  const int64_t row = ldc * int64_t(sizeof(float));
  tile_store<0>(c, row);
  if constexpr (RB == 2) tile_store<1>(c + kSide, row);
  if constexpr (RA == 2) tile_store<2>(c + kSide * ldc, row);
  if constexpr (RA == 2 && RB == 2) tile_store<3>(c + kSide * ldc + kSide, row);
}

// Calls f(RA, i, n) for the n rows from i on: two tiles, one, or one that is cut short.
template <typename F>
LOTR_INLINE void each_row_block(int64_t rows, int64_t units, F&& f) {
  int64_t i = 0;
  if (rows >= kSide) {
    const Tiles full(kSide, units);
    for (; i + 2 * kSide <= rows; i += 2 * kSide) f(Int<2>{}, i, 2 * kSide);
    if (i + kSide <= rows) {
      f(Int<1>{}, i, kSide);
      i += kSide;
    }
  }
  if (i < rows) {
    const Tiles cut(rows - i, units);
    f(Int<1>{}, i, rows - i);
  }
}
// Calls f(RB, v) for `vectors` tiles of columns: two from v on, or the last one.
template <typename F>
LOTR_INLINE void each_column_block(int64_t vectors, F&& f) {
  int64_t v = 0;
  for (; v + 2 <= vectors; v += 2) f(Int<2>{}, v);
  if (v < vectors) f(Int<1>{}, v);
}

// c[rows][ldc] = x[i0 .. i0 + rows, :] A, like shrink_tile (products.h), with the pairs of x in
// place. edge: room for two tiles of what a row has beyond full steps.
template <typename K, typename T>
inline void shrink_in_tiles(float* c, int64_t ldc, const TensorView& x, const Factor<K>& A,
                            int64_t i0, int64_t rows, bool prefetch_below, typename K::Unit* edge) {
  const int64_t units = units_of_step(units_of<K>(x.cols));
  const int64_t steps = x.cols / (K::kPair * units);
  const int64_t c0 = steps * units * K::kPair;  // the first column beyond full steps
  const auto* data = static_cast<const T*>(x.data) + i0 * x.row_stride;
  each_row_block(rows, units, [&](auto ra, int64_t i, int64_t n) {
    constexpr int RA = decltype(ra)::value;
    const auto a =
        Operand::of(data + i * x.row_stride, x.row_stride, kSide * x.row_stride, units * K::kPair);
    const auto rest = Operand::of(edge, units, kSide * units, 0);
    if (c0 < x.cols) tile_along_row<K, T>(edge, units, {x, i0 + i, n, c0, x.cols - c0});
    const bool has_below = prefetch_below || i + n < rows;
    const int64_t prefetched = has_below ? smaller(n, x.rows - (i0 + i + n)) : 0;
    each_column_block(A.vectors, [&](auto rb, int64_t v) {
      constexpr int RB = decltype(rb)::value;
      auto b = Operand::of(A.data + v * kSide, A.ld, kSide, units * A.ld);
      zero_tiles<RA, RB>();
      multiply_tiles<RA, RB>(a, b, steps, a.first + n * a.row, v == 0 ? prefetched : 0);
      b.first += steps * b.step;
      if (c0 < x.cols) multiply_tiles<RA, RB>(rest, b, 1);
      store_tiles<RA, RB>(c + i * ldc + v * kSide, ldc);
    });
  });
}

// y[rows][64] = start_of(from, bias) (block.h) + u f, with contiguous columns. Like
// expand_full_rows (products.h). `units` of u and of the panel f are full steps.
template <typename K, typename T, Form form>
inline void expand_in_tiles(T* y, int64_t ldy, const T* from, int64_t ldfrom, int64_t rows,
                            const Broadcast& u, const typename K::Unit* f, int64_t units,
                            const float* bias) {
  constexpr int64_t kUnit = sizeof(typename K::Unit);
  constexpr int64_t kWidth = kMaxVectors * K::kLanes;
  const int64_t step_units = units_of_step(units);
  const int64_t steps = units / step_units;
  alignas(64) float sums[2 * kSide * kWidth];
  each_row_block(rows, step_units, [&](auto ra, int64_t i, int64_t n) {
    constexpr int RA = decltype(ra)::value;
    const Operand a{u.data + i * u.step, u.step, kSide * u.step, step_units * kUnit};
    for (int64_t v = 0; v < kMaxVectors; v += 2) {
      const auto b = Operand::of(f + v * kSide, kWidth, kSide, step_units * kWidth);
      zero_tiles<RA, 2>();
      multiply_tiles<RA, 2>(a, b, steps);
      store_tiles<RA, 2>(sums + v * kSide, kWidth);
    }
    // Prefetches down this panel, then from the top of the next one.
    const bool below = i + n < rows;
    const T* from_ahead = from + (below ? (i + n) * ldfrom : kWidth);
    const T* y_ahead = y + (below ? (i + n) * ldy : kWidth);
    for (int64_t j = 0; j < n; ++j) {
      T* const to = y + (i + j) * ldy;
      const T* const start = from + (i + j) * ldfrom;
      // Written out: with prefetch_row and named sums it takes 1.03 to 1.17 times as long.
      for (int64_t c = 0; c < kWidth * int64_t(sizeof(T)); c += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(from_ahead + j * ldfrom) + c, 1, 2);
        if (y != from)
          __builtin_prefetch(reinterpret_cast<const char*>(y_ahead + j * ldy) + c, 1, 2);
      }
#pragma GCC unroll 4
      for (int64_t v = 0; v < kWidth; v += 2 * K::kLanes) {
        const float* product = sums + j * kWidth + v;
        const auto sum = [&](int64_t w) {
          return start_of<form>(start + v + w, bias + v + w) + load(product + w);
        };
        store(to + v, sum(0), sum(K::kLanes));
      }
    }
  });
}

// Zero fills v [units][ldv] to full steps, and transposes it: to[vectors of r][steps] tiles of A.
template <typename K>
inline void transpose_units(typename K::Unit* to, typename K::Unit* v, int64_t ldv, int64_t units,
                            int64_t r) {
  static_assert(K::kLanes == kSide);
  const int64_t steps = ceil_div(units, kSide);
  for (int64_t i = units * ldv; i < steps * kSide * ldv; ++i) v[i] = 0;
  for (int64_t j = 0; j < ceil_div(r, kSide); ++j) {
    for (int64_t t = 0; t < steps; ++t, to += kSide * kSide) {
      decltype(load(v)) square[K::kLanes];
      for (int64_t i = 0; i < K::kLanes; ++i)
        square[i] = load(v + (t * kSide + i) * ldv + j * kSide);
      transpose<K::kLanes>(square);
      for (int64_t i = 0; i < K::kLanes; ++i) store(to + i * kSide, square[i]);
    }
  }
}

// Two tiles of B, next to each other in `to`: 16 pairs of rows of 32 columns. `rows` counts the
// rows that x has from there on; the others are zero. prefetch: also the 32 columns to the right.
template <typename K>
inline void pair_tiles(typename K::Unit* to, const uint16_t* x, int64_t row_stride, int64_t rows,
                       bool prefetch) {
  for (int64_t i = 0; i < 2 * kSide; i += 2, x += 2 * row_stride, to += kSide) {
    auto low = decltype(load(x)){};
    auto high = low;
    if (i < rows) low = load(x);
    if (i + 1 < rows) high = load(x + row_stride);
    if (prefetch) {
      __builtin_prefetch(x + 2 * kSide, 0, 2);
      __builtin_prefetch(x + row_stride + 2 * kSide, 0, 2);
    }
    store(to, pairs_of<0>(low, high));
    store(to + kSide * kSide, pairs_of<1>(low, high));
  }
}

// S[r][32] (+)= v^T x for 32 columns of a tile of x, like outer_columns (outer.h). transposed_v:
// from transpose_units. x_units: room for the columns' units. prefetch: also those to the right.
template <typename K>
inline void outer_in_tiles(Sums<K> S, const Rectangle& x, const typename K::Unit* transposed_v,
                           int64_t r, typename K::Unit* x_units, bool prefetch) {
  constexpr int64_t kTile = kSide * kSide;
  const int64_t row = x.a.row_stride;
  const int64_t steps = ceil_div(x.rows, K::kPair * kSide);
  const auto* columns = static_cast<const uint16_t*>(x.a.data) + x.i0 * row + x.c0;
  const auto make_step = [&](int64_t t) {
    const int64_t i = 2 * kSide * t;
    pair_tiles<K>(x_units + t * 2 * kTile, columns + i * row, row, x.rows - i, prefetch);
  };
  alignas(64) float sums[4 * kTile];
  const Tiles full(kSide, kSide);
  each_column_block(ceil_div(r, kSide), [&](auto ra, int64_t v) {  // of v: the rows of S
    constexpr int RA = decltype(ra)::value;
    auto a = Operand::of(transposed_v + v * steps * kTile, kSide, steps * kTile, kTile);
    auto b = Operand::of(x_units, kSide, kTile, 2 * kTile);
    zero_tiles<RA, 2>();
    if (v == 0) {
      // A step is made while the one before is multiplied, so its stores end before it is loaded.
      make_step(0);
      for (int64_t t = 0; t < steps; ++t, a.first += a.step, b.first += b.step) {
        if (t + 1 < steps) make_step(t + 1);
        multiply_tiles<RA, 2>(a, b, 1);
      }
    } else {
      multiply_tiles<RA, 2>(a, b, steps);
    }
    store_tiles<RA, 2>(sums, 2 * kSide);
    const int64_t n = smaller(RA * kSide, r - v * kSide);
    for (int64_t j = 0; j < n; ++j) {
      float* to = S.data + (v * kSide + j) * S.ld;
      for (int64_t c = 0; c < 2 * kSide; c += K::kLanes) {
        const auto sum = load(sums + j * 2 * kSide + c);
        store(to + c, S.fresh ? sum : load(to + c) + sum);
      }
    }
  });
}

}  // namespace lotr::cpu::LOTR_ISA
