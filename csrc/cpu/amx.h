// Products in AMX tiles of 16 rows of 64 bytes: one instruction multiplies two tiles of bfloat16
// pairs and adds the products to a third tile, of float32. That replaces 256 instructions of
// block.h.
//
//   C[2 x 2 tiles] = sum over steps of A[2 tiles] B[2 tiles]
//
//   a tile of A: 16 rows of units along the summed dimension; of B: 16 units of 16 columns
//
// The units and the packed factors are block.h's; a factor's units are rounded up to full steps.
// Each sum runs in ascending order, whatever rows share its tile. Subnormal numbers count as zero,
// as in the dot products of AVX-512.
#pragma once

#include "cpu/block.h"

namespace lotr::cpu::LOTR_ISA {

// The tile registers of this thread: 0 to 3 sums, 4 and 5 of A, 6 and 7 of B. They are released at
// the end, because a thread with tiles takes longer to switch to and keeps its core out of deep
// sleep.
class Tiles {
 public:
  // rows of A and C, units of a step.
  Tiles(int64_t rows, int64_t units) {
    alignas(64) Shape shape{};
    shape.palette = 1;
    for (int t = 0; t < 8; ++t) {
      shape.bytes[t] = uint16_t(t == 4 || t == 5 ? units * 4 : kSide * 4);
      shape.rows[t] = uint8_t(t < 6 ? rows : units);
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
// `step` bytes between rows. The clobber keeps a load after the stores to what it reads.
template <int tile>
LOTR_INLINE void tile_load(const void* from, int64_t step) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(from), "r"(step) : "memory");
}
template <int tile>
LOTR_INLINE void tile_store(void* to, int64_t step) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(to), "r"(step) : "memory");
}
template <int sums, int a, int b>
LOTR_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
}

// The tiles of A or B in memory. Distances in bytes: to the next row, to the second of two tiles,
// to the next step.
struct Side {
  const char* at;
  int64_t row, second, step;
};
// Rows of a tensor that are multiplied later. Each step prefetches a line of each row.
struct Below {
  const char* at = nullptr;
  int64_t row = 0;
  int64_t rows = 0;
};

// The sums of RA x RB tiles (1 or 2 each).
template <int RA, int RB>
LOTR_INLINE void zero_tiles() {
  tile_zero<0>();
  if constexpr (RB == 2) tile_zero<1>();
  if constexpr (RA == 2) tile_zero<2>();
  if constexpr (RA == 2 && RB == 2) tile_zero<3>();
}
template <int RA, int RB>
LOTR_INLINE void multiply_tiles(const Side& a, const Side& b, int64_t steps,
                                const Below& below = {}) {
  const char* at_a = a.at;
  const char* at_b = b.at;
  const char* prefetched = below.at;
  for (int64_t t = 0; t < steps; ++t, at_a += a.step, at_b += b.step, prefetched += a.step) {
    tile_load<4>(at_a, a.row);
    tile_load<6>(at_b, b.row);
    tile_multiply<0, 4, 6>();
    if constexpr (RB == 2) {
      tile_load<7>(at_b + b.second, b.row);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (RA == 2) {
      tile_load<5>(at_a + a.second, a.row);
      tile_multiply<2, 5, 6>();
    }
    if constexpr (RA == 2 && RB == 2) tile_multiply<3, 5, 7>();
    for (int64_t i = 0; i < below.rows; ++i) __builtin_prefetch(prefetched + i * below.row, 0, 2);
  }
}
// To c, whose rows are ldc apart.
template <int RA, int RB>
LOTR_INLINE void store_tiles(float* c, int64_t ldc) {
  const int64_t row = ldc * int64_t(sizeof(float));
  tile_store<0>(c, row);
  if constexpr (RB == 2) tile_store<1>(c + kSide, row);
  if constexpr (RA == 2) tile_store<2>(c + kSide * ldc, row);
  if constexpr (RA == 2 && RB == 2) tile_store<3>(c + kSide * ldc + kSide, row);
}

// f(RA, i, rows) for `rows` rows in blocks of two tiles, of one, and of one that is cut short.
template <typename F>
LOTR_INLINE void tile_rows_of(int64_t rows, int64_t units, F&& f) {
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
// f(RB, v) for `vectors` columns of tiles, two by two.
template <typename F>
LOTR_INLINE void tile_columns_of(int64_t vectors, F&& f) {
  int64_t v = 0;
  for (; v + 2 <= vectors; v += 2) f(Int<2>{}, v);
  if (v < vectors) f(Int<1>{}, v);
}

// c[rows][ldc] = x[i0 .. i0 + rows, :] b, as shrink_tile (products.h), x as pairs in place.
// below: whether to prefetch the rows below. edge: room for two tiles of what a row has beyond
// full steps.
template <typename K, typename T>
inline void shrink_in_tiles(float* c, int64_t ldc, const TensorView& x, const Factor<K>& b,
                            int64_t i0, int64_t rows, bool below, typename K::Unit* edge) {
  constexpr int64_t kUnit = sizeof(typename K::Unit);
  const int64_t units = units_of_step(units_of<K>(x.cols));
  const int64_t steps = x.cols / (K::kPair * units);
  const int64_t first_left = steps * units * K::kPair;
  const int64_t row = x.row_stride * int64_t(sizeof(T));
  const auto* data = static_cast<const T*>(x.data);
  tile_rows_of(rows, units, [&](auto ra, int64_t i, int64_t n) {
    constexpr int RA = decltype(ra)::value;
    const Side a{reinterpret_cast<const char*>(data + (i0 + i) * x.row_stride), row, kSide * row,
                 units * kUnit};
    const Side rest{reinterpret_cast<const char*>(edge), units * kUnit, kSide * units * kUnit, 0};
    if (first_left < x.cols)
      tile_along_row<K, T>(edge, units, {x, i0 + i, n, first_left, x.cols - first_left});
    const int64_t next = i0 + i + n;
    const int64_t prefetched = below || i + n < rows ? smaller(n, x.rows - next) : 0;
    tile_columns_of(b.vectors, [&](auto rb, int64_t v) {
      constexpr int RB = decltype(rb)::value;
      Side packed{reinterpret_cast<const char*>(b.data + v * kSide), b.ld * kUnit, kSide * kUnit,
                  units * b.ld * kUnit};
      Below later;
      if (v == 0) later = {a.at + n * row, row, prefetched};
      zero_tiles<RA, RB>();
      multiply_tiles<RA, RB>(a, packed, steps, later);
      packed.at += steps * packed.step;
      if (first_left < x.cols) multiply_tiles<RA, RB>(rest, packed, 1);
      store_tiles<RA, RB>(c + i * ldc + v * kSide, ldc);
    });
  });
}

// Rows of y[rows][64] = start_of(from, bias) (block.h) + u f, in full vectors of neighbors, as
// expand_full_rows (products.h). `units` of u and f are full steps.
template <typename K, typename T, Form form>
inline void expand_in_tiles(T* y, int64_t ldy, const T* from, int64_t ldfrom, int64_t rows,
                            const Broadcast& u, const typename K::Unit* panel, int64_t units,
                            const float* bias) {
  constexpr int64_t kUnit = sizeof(typename K::Unit);
  constexpr int64_t kWidth = kMaxVectors * K::kLanes;
  const int64_t of_step = units_of_step(units);
  const int64_t steps = units / of_step;
  alignas(64) float sums[2 * kSide * kWidth];
  tile_rows_of(rows, of_step, [&](auto ra, int64_t i, int64_t n) {
    constexpr int RA = decltype(ra)::value;
    const Side a{u.data + i * u.step, u.step, kSide * u.step, of_step * kUnit};
    for (int64_t v = 0; v < kMaxVectors; v += 2) {
      const Side b{reinterpret_cast<const char*>(panel + v * kSide), kWidth * kUnit, kSide * kUnit,
                   of_step * kWidth * kUnit};
      zero_tiles<RA, 2>();
      multiply_tiles<RA, 2>(a, b, steps);
      store_tiles<RA, 2>(sums + v * kSide, kWidth);
    }
    // Down this panel, then from the top of the next one.
    const bool below = i + n < rows;
    const T* from_ahead = from + (below ? (i + n) * ldfrom : kWidth);
    const T* y_ahead = y + (below ? (i + n) * ldy : kWidth);
    for (int64_t j = 0; j < n; ++j) {
      T* const to = y + (i + j) * ldy;
      const T* const start = from + (i + j) * ldfrom;
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

// v [units][ldv] as tiles of A, of units rounded up: to[vectors][steps][16 of the rank][16 units],
// zero padded.
template <typename K>
inline void turn_units(typename K::Unit* to, typename K::Unit* v, int64_t ldv, int64_t units,
                       int64_t vectors) {
  static_assert(K::kLanes == kSide);
  const int64_t steps = ceil_div(units, kSide);
  for (int64_t i = units * ldv; i < steps * kSide * ldv; ++i) v[i] = 0;
  for (int64_t j = 0; j < vectors; ++j) {
    for (int64_t t = 0; t < steps; ++t, to += kSide * kSide) {
      decltype(load(v)) square[K::kLanes];
      for (int64_t i = 0; i < K::kLanes; ++i)
        square[i] = load(v + (t * kSide + i) * ldv + j * kSide);
      transpose<K::kLanes>(square);
      for (int64_t i = 0; i < K::kLanes; ++i) store(to + i * kSide, square[i]);
    }
  }
}

// S[r][32] (+)= v^T x for 32 columns of a tile of x, as outer_columns (outer_pairs.h). turned: v;
// x_units: room for the units of these columns. prefetch: whether to prefetch the columns to the
// right.
template <typename K>
inline void outer_in_tiles(const Sums<K>& S, const Rectangle& x, const typename K::Unit* turned,
                           int64_t r, typename K::Unit* x_units, bool prefetch) {
  constexpr int64_t kUnit = sizeof(typename K::Unit);
  constexpr int64_t kTile = kSide * kSide;
  const int64_t row = x.a.row_stride;
  const int64_t steps = ceil_div(x.rows, K::kPair * kSide);
  const auto* columns = static_cast<const uint16_t*>(x.a.data) + x.i0 * row + x.c0;
  // The two tiles of a step, from 32 rows of 32 columns.
  const auto make = [&](int64_t t) {
    typename K::Unit* to = x_units + t * 2 * kTile;
    const uint16_t* low = columns + 2 * kSide * t * row;
    const int64_t left = smaller(2 * kSide, x.rows - 2 * kSide * t);
    for (int64_t i = 0; i < 2 * kSide; i += 2, low += 2 * row, to += kSide) {
      auto a = decltype(load(low)){};
      auto b = a;
      if (i < left) a = load(low);
      if (i + 1 < left) b = load(low + row);
      if (prefetch) {
        __builtin_prefetch(low + 2 * kSide, 0, 2);
        __builtin_prefetch(low + row + 2 * kSide, 0, 2);
      }
      store(to, pairs_of<0>(a, b));
      store(to + kTile, pairs_of<1>(a, b));
    }
  };
  alignas(64) float sums[4 * kTile];
  const Tiles full(kSide, kSide);
  tile_columns_of(ceil_div(r, kSide), [&](auto ra, int64_t v) {
    constexpr int RA = decltype(ra)::value;
    Side a{reinterpret_cast<const char*>(turned + v * steps * kTile), kSide * kUnit,
           steps * kTile * kUnit, kTile * kUnit};
    Side b{reinterpret_cast<const char*>(x_units), kSide * kUnit, kTile * kUnit, 2 * kTile * kUnit};
    zero_tiles<RA, 2>();
    if (v == 0) {
      // A step is made while the one before it is multiplied: a tile cannot be loaded from stores
      // that are still under way.
      make(0);
      for (int64_t t = 0; t < steps; ++t, a.at += a.step, b.at += b.step) {
        if (t + 1 < steps) make(t + 1);
        multiply_tiles<RA, 2>(a, b, 1);
      }
    } else {
      multiply_tiles<RA, 2>(a, b, steps);
    }
    store_tiles<RA, 2>(sums, 2 * kSide);
    const int64_t n = smaller(RA * kSide, r - v * kSide);
    for (int64_t j = 0; j < n; ++j) {
      float* at = S.data + (v * kSide + j) * S.ld;
      for (int64_t part = 0; part < 2 * kSide; part += K::kLanes) {
        const auto sum = load(sums + j * 2 * kSide + part);
        store(at + part, S.fresh ? sum : load(at + part) + sum);
      }
    }
  });
}

}  // namespace lotr::cpu::LOTR_ISA
