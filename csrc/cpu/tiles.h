// Copies of parts of a matrix as tiles: what the inner loop (block.h) reads if it cannot read the
// tensor in place.
//
// Terms of this folder, by the example of u = x A, which sums over k:
//
//                k -->                         rank -->
//          +------+------+--           k   +--------------+
//    rows  | tile | next |             |   |  packed      |
//    of x  |  of  | tile |             v   |  factor A    |
//          |  x   |      |                 |              |
//          +------+------+--               +--------------+
//
//   K               the kind of arithmetic of T: single elements, or pairs (vec.h)
//   unit            what one lane multiplies at once: an element, or a pair
//   pair            two bfloat16 neighbors along the summed dimension
//   tile            the part of x that is multiplied at a time. It stays in L1 or L2, in place or
//                   copied. In AMX (amx.h): a tile register of 16 rows of 16 units
//   packed factor   A, or B or F, as units, padded with zeros to full vectors
//   panel           F^T for one group of columns of y: [units of the rank][columns]
//   block           rows x vectors of sums that stay in registers (block.h)
//   step            the units along the sum that are multiplied at a time (at most 16 in AMX)
//   piece           a rectangle that is prefetched while another one is multiplied (block.h)
//   cold, warm      of a tile: not prefetched, in cache already
//   fresh           sums that start at zero, instead of being added to
//   in place        read from the tensor's memory, without a copy. native: laid out for that
//   rectangle       rows and columns of a tensor that are copied or multiplied together
//   chunk           rows of x that are summed separately; the sums of chunks are added in order
//
// A tile has its units along the summed dimension, which is a row of the matrix or a column:
//   along_row      tile[i][c / pair]   = elements (i, c .. c + pair)   x of shrink, u of expand
//   down_columns   tile[i / pair][c]   = elements (i .. i + pair, c)   factors; x, v of factor_grad
#pragma once

#include "cpu/kernels.h"
#include "cpu/philox.h"
#include "cpu/vec.h"

namespace lotr::cpu::LOTR_ISA {

constexpr int64_t element_size(DType dtype) {
  if (dtype == DType::float64) return 8;
  return dtype == DType::float32 ? 4 : 2;
}

template <typename S>
struct Type {
  using type = S;
};
// Calls f with the Type of the elements that a dtype stores.
template <typename F>
LOTR_INLINE void by_dtype(DType t, F&& f) {
  switch (t) {
    case DType::float32:
      return f(Type<float>{});
    case DType::float64:
      return f(Type<double>{});
    case DType::bfloat16:
      return f(Type<bf16>{});
    case DType::float16:
      return f(Type<f16>{});
  }
}

template <typename K>
constexpr bool pairs = K::kPair == 2;

// Whether a kind is multiplied in AMX tiles (amx.h): they have kSide rows, and a row kSide units.
template <typename K>
constexpr bool in_tiles = false;
#if defined(__AMX_BF16__)
template <>
inline constexpr bool in_tiles<BF2> = true;
#endif
constexpr int64_t kSide = 16;

// How many units n elements are. packed_units: in a packed factor, for AMX rounded to full steps.
template <typename K>
constexpr int64_t units_of(int64_t n) {
  return ceil_div(n, K::kPair);
}
constexpr int64_t units_of_step(int64_t units) {
  return larger(1, smaller(units, kSide));
}
template <typename K>
constexpr int64_t packed_units(int64_t n) {
  const int64_t units = units_of<K>(n);
  return in_tiles<K> ? round_up(units, units_of_step(units)) : units;
}

// An element in a tile or native tensor: its bits in a pair, else its value, rounded to T, as Acc.
template <typename K>
using Part = std::conditional_t<pairs<K>, uint16_t, typename K::Acc>;

template <typename K, typename T, typename S>
LOTR_INLINE Part<K> part(S s) {
  if constexpr (pairs<K>) {
    if constexpr (std::is_same_v<S, bf16>) {
      return s.bits;
    } else {
      return Narrow<bf16>::from(float(to_float(s))).bits;
    }
  } else if constexpr (std::is_same_v<S, T>) {
    return to_float(s);
  } else {
    return typename K::Acc(to_float(Narrow<T>::from(to_float(s))));
  }
}

// n elements, cs apart, as parts; those whose mask is 0 become 0 (also when they are NaN).
template <typename K, typename T, typename S>
inline void parts(Part<K>* dst, const S* src, int64_t cs, int64_t n, const uint32_t* keep) {
  int64_t j = 0;
  if (cs == 1 && !keep) {
    constexpr bool kExact = std::is_same_v<S, T> || std::is_same_v<T, float>;
    if constexpr (kExact && !pairs<K> && !std::is_same_v<S, double>) {
      for (; j + K::kLanes <= n; j += K::kLanes) store(dst + j, load(src + j));
    }
    for (; j < n; ++j) dst[j] = part<K, T>(src[j]);
  } else if (!keep) {
    for (; j < n; ++j) dst[j] = part<K, T>(src[j * cs]);
  } else if (cs == 1) {
    for (; j < n; ++j) dst[j] = keep[j] ? part<K, T>(src[j]) : Part<K>(0);
  } else {
    for (; j < n; ++j) dst[j] = keep[j] ? part<K, T>(src[j * cs]) : Part<K>(0);
  }
}

// Rows [i0, i0 + rows) and columns [c0, c0 + cols) of a tensor.
struct Rectangle {
  const TensorView& a;
  int64_t i0, rows;
  int64_t c0, cols;
};

// Row i of a rectangle, as parts. Dropped elements become zero. mask: room for cols + kMaskSlack.
template <typename K, typename T, typename S>
inline void row_parts(Part<K>* dst, const Rectangle& from, int64_t i, const Drop& drop,
                      uint32_t* mask) {
  const TensorView& a = from.a;
  const int64_t row = from.i0 + i;
  const S* src = static_cast<const S*>(a.data) + row * a.row_stride + from.c0 * a.col_stride;
  const uint32_t* keep = nullptr;
  if (drop.on) {
    const uint64_t e = uint64_t(row) * uint64_t(a.cols) + uint64_t(from.c0);
    keep = keep_mask(mask, e, from.cols, drop.seed, drop.threshold);
  }
  parts<K, T>(dst, src, a.col_stride, from.cols, keep);
}

// Copies a rectangle with units along its rows. Tile rows have `ld` units, zero past the columns.
template <typename K, typename T>
inline void tile_along_row(typename K::Unit* tile, int64_t ld, const Rectangle& from,
                           const Drop& drop = {}, uint32_t* mask = nullptr) {
  by_dtype(from.a.dtype, [&](auto stored) {
    using S = typename decltype(stored)::type;
    for (int64_t i = 0; i < from.rows; ++i) {
      Part<K>* dst = reinterpret_cast<Part<K>*>(tile + i * ld);
      row_parts<K, T, S>(dst, from, i, drop, mask);
      for (int64_t j = from.cols; j < ld * K::kPair; ++j) dst[j] = Part<K>(0);
    }
  });
}

// tile_down_columns where a unit is an element: each row of the rectangle is a row of the tile.
template <typename K, typename T, typename S>
inline void elements_down_columns(typename K::Unit* tile, int64_t ld, const Rectangle& from,
                                  const Drop& drop, uint32_t* mask) {
  if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float>) {
    // For a rank that is not a multiple of the lanes: loads elements and padding at once.
    const TensorView& a = from.a;
    if (a.col_stride == 1 && !drop.on && ld % K::kLanes == 0) {
      const float* src = static_cast<const float*>(a.data) + from.i0 * a.row_stride + from.c0;
      for (int64_t i = 0; i < from.rows; ++i, src += a.row_stride, tile += ld) {
        for (int64_t j = 0; j < ld; j += K::kLanes)
          store(tile + j, load_first(src + j, larger(0, from.cols - j)));
      }
      return;
    }
  }
  for (int64_t i = 0; i < from.rows; ++i, tile += ld) {
    row_parts<K, T, S>(tile, from, i, drop, mask);
    for (int64_t j = from.cols; j < ld; ++j) tile[j] = 0;
  }
}

// units[j] = low[j] | high[j] << 16.
template <typename K>
inline void pair_rows(typename K::Unit* units, const uint16_t* low, const uint16_t* high,
                      int64_t n) {
  constexpr int kHalves = LOTR_VB / 2;
  int64_t j = 0;
  for (; j + kHalves <= n; j += kHalves) {
    const auto a = load(low + j);
    const auto b = load(high + j);
    store(units + j, reinterpret_cast<vi>(zip<0, kHalves>(a, b)));
    store(units + j + K::kLanes, reinterpret_cast<vi>(zip<1, kHalves>(a, b)));
  }
  for (; j + K::kLanes <= n; j += K::kLanes) store(units + j, K::pair_up(low + j, high + j));
  for (; j < n; ++j) units[j] = uint32_t(low[j]) | uint32_t(high[j]) << 16;
}

// tile_down_columns where a unit is a pair, made from two rows. buffer: room for two rows of parts.
template <typename K, typename T, typename S>
inline void pairs_down_columns(typename K::Unit* tile, int64_t ld, const Rectangle& from,
                               uint16_t* buffer, const Drop& drop, uint32_t* mask) {
  const TensorView& a = from.a;
  const int64_t cols = from.cols;
  const bool bits_in_place = std::is_same_v<S, bf16> && a.col_stride == 1 && !drop.on;
  const auto* src = reinterpret_cast<const uint16_t*>(static_cast<const S*>(a.data) +
                                                      from.i0 * a.row_stride + from.c0);
  int64_t i = 0;
  if (bits_in_place && cols == ld && cols % K::kLanes == 0) {
    // Full vectors of neighboring pairs, as in a factor of rank 16.
    for (; i + 2 <= from.rows; i += 2, tile += ld) {
      const uint16_t* low = src + i * a.row_stride;
      for (int64_t j = 0; j < cols; j += K::kLanes)
        store(tile + j, K::pair_up(low + j, low + a.row_stride + j));
    }
  }
  for (; i < from.rows; i += 2, tile += ld) {
    const uint16_t* row[2] = {buffer, buffer + cols};  // each in the buffer, or in place
    for (int p = 0; p < 2; ++p) {
      if (i + p >= from.rows) {
        for (int64_t j = 0; j < cols; ++j) buffer[p * cols + j] = 0;
      } else if (bits_in_place) {
        row[p] = src + (i + p) * a.row_stride;
      } else {
        row_parts<K, T, S>(buffer + p * cols, from, i + p, drop, mask);
      }
    }
    pair_rows<K>(tile, row[0], row[1], cols);
    for (int64_t j = cols; j < ld; ++j) tile[j] = 0;
  }
}

// Copies a rectangle with units down its columns: ceil(rows / pair) tile rows of `ld` units.
template <typename K, typename T>
inline void tile_down_columns(typename K::Unit* tile, int64_t ld, const Rectangle& from,
                              [[maybe_unused]] uint16_t* buffer, const Drop& drop = {},
                              uint32_t* mask = nullptr) {
  by_dtype(from.a.dtype, [&](auto stored) {
    using S = typename decltype(stored)::type;
    if constexpr (pairs<K>) {
      pairs_down_columns<K, T, S>(tile, ld, from, buffer, drop, mask);
    } else {
      elements_down_columns<K, T, S>(tile, ld, from, drop, mask);
    }
  });
}

// Whether the tensor's memory can serve as the tile.
template <typename K, typename T>
inline bool native(const TensorView& a) {
  if (a.col_stride != 1) return false;
  if constexpr (pairs<K>) return a.dtype == DType::bfloat16;
  if constexpr (std::is_same_v<K, F64>) return a.dtype == DType::float64;
  return std::is_same_v<T, float> && a.dtype == DType::float32;
}

// Transposes rows [n0, n0 + width) of F [N, r]: panel[packed unit of r][width], zero past the end.
// `width` is a multiple of the lanes. `buffer`: kLanes rows of r, rounded up to kLanes units.
template <typename K, typename T>
inline void pack_panel(typename K::Unit* panel, int64_t width, const TensorView& F, int64_t n0,
                       typename K::Unit* buffer) {
  using Unit = typename K::Unit;
  constexpr int kLanes = K::kLanes;
  const int64_t units = units_of<K>(F.cols);
  const int64_t padded = round_up(units, kLanes);
  const bool in_place = native<K, T>(F) && F.cols % K::kPair == 0;
  const int64_t end = (F.rows - 1) * F.row_stride + F.cols;
  for (int64_t j = 0; j < width; j += kLanes) {
    const int64_t rows = larger(0, smaller(kLanes, F.rows - n0 - j));
    // Full vectors are loaded: past the end of a short row they read the next rows, if these exist.
    const bool direct = in_place && rows == kLanes &&
                        (n0 + j + kLanes - 1) * F.row_stride + padded * K::kPair <= end;
    const char* src = reinterpret_cast<const char*>(buffer);
    int64_t step = padded * int64_t(sizeof(Unit));
    if (direct) {
      src = reinterpret_cast<const char*>(static_cast<const Part<K>*>(F.data) +
                                          (n0 + j) * F.row_stride);
      step = F.row_stride * int64_t(sizeof(Part<K>));
    } else {
      tile_along_row<K, T>(buffer, padded, {F, n0 + j, rows, 0, F.cols});
      for (int64_t i = rows * padded; i < kLanes * padded; ++i) buffer[i] = 0;
    }
    for (int64_t t = 0; t < units; t += kLanes) {
      decltype(load(panel)) block[kLanes];
      for (int i = 0; i < kLanes; ++i)
        block[i] = load(reinterpret_cast<const Unit*>(src + i * step) + t);
      transpose<kLanes>(block);
      const int64_t stored = smaller(kLanes, units - t);
      for (int64_t i = 0; i < stored; ++i) store(panel + (t + i) * width + j, block[i]);
    }
  }
  for (int64_t i = units * width; i < packed_units<K>(F.cols) * width; ++i) panel[i] = 0;
}

inline TensorView transposed(const TensorView& a) {
  return {a.data, a.cols, a.rows, a.col_stride, a.row_stride, a.dtype};
}

}  // namespace lotr::cpu::LOTR_ISA
