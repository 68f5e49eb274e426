// Copies of parts of a matrix as tiles: what the inner loop (block.h) reads if it cannot read the
// tensor in place.
//
// Words of this folder, by the example of u = x A, which sums over k:
//
//                k -->                         rank -->
//          +------+------+--           k   +--------------+
//    rows  | tile | next |             |   |  packed      |
//    of x  |  of  | tile |             v   |  factor A    |
//          |  x   |      |                 |              |
//          +------+------+--               +--------------+
//
//   unit            what one lane multiplies at once: an element, or a pair
//   pair            two bfloat16 neighbors along the summed dimension
//   tile            the part of x that is multiplied at a time. It stays in L1 or L2, in place or
//                   copied. In AMX (amx.h): a tile register of 16 rows of 16 units
//   packed factor   A, or B or F, as units, padded with zeros to full vectors
//   panel           F^T for one group of columns of y: [units of the rank][columns]
//   block           rows x vectors of sums that stay in registers (block.h)
//   piece           a rectangle of a tensor that is prefetched while another one is multiplied
//                   (prefetch.h). cold: a tile that was not prefetched; warm: one in cache already
//   fresh           sums that start at zero, instead of being added to
//   in place        read from the tensor's memory, without a copy. native: of such a layout
//   turned          a tile transposed for AMX
//   chunk           the rows of x whose sums one task computes; sums of chunks are added in order
//
// A tile has its units along the summed dimension, which is a row of the matrix or a column:
//   along_row      tile[i][c / pair]   = elements (i, c .. c + pair)       x of shrink, u of expand
//   down_columns   tile[i / pair][c]   = elements (i .. i + pair, c)       x and k of factor_grad,
//                                                                          the factors
#pragma once

#include "cpu/kernels.h"
#include "cpu/philox.h"
#include "cpu/vec.h"

namespace lotr::cpu::LOTR_ISA {

constexpr int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 8;
    case DType::float32:
      return 4;
    case DType::bfloat16:
    case DType::float16:
      break;
  }
  return 2;
}

// Calls f with a null pointer whose type points to the storage type of a runtime dtype.
template <typename F>
LOTR_INLINE void by_dtype(DType t, F&& f) {
  switch (t) {
    case DType::float32:
      return f(static_cast<float*>(nullptr));
    case DType::float64:
      return f(static_cast<double*>(nullptr));
    case DType::bfloat16:
      return f(static_cast<bf16*>(nullptr));
    case DType::float16:
      return f(static_cast<f16*>(nullptr));
  }
}
template <typename P>
struct Pointee;
template <typename S>
struct Pointee<S*> {
  using type = S;
};
template <typename A, typename B>
constexpr bool same = __is_same(A, B);

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

// How many units n elements are. packed_units: as a packed factor has them, for AMX tiles rounded
// up to full steps of units_of_step.
template <typename K>
constexpr int64_t units_of(int64_t n) {
  return (n + K::kPair - 1) / K::kPair;
}
constexpr int64_t units_of_step(int64_t units) {
  return larger(1, smaller(units, kSide));
}
template <typename K>
constexpr int64_t packed_units(int64_t n) {
  const int64_t units = units_of<K>(n);
  return in_tiles<K> ? round_up(units, units_of_step(units)) : units;
}

// What one element becomes in a tile: its bits in a pair, else its value in the arithmetic type,
// rounded to T on the way.
template <typename K>
struct PartOf {
  using type = typename K::Acc;
};
#if defined(__AVX512BF16__)
template <>
struct PartOf<BF2> {
  using type = uint16_t;
};
#endif
template <typename K>
using Part = typename PartOf<K>::type;

template <typename K, typename T, typename S>
LOTR_INLINE Part<K> part(S s) {
  if constexpr (pairs<K>) {
    if constexpr (same<S, bf16>) {
      return s.bits;
    } else {
      return Narrow<bf16>::from(float(to_float(s))).bits;
    }
  } else if constexpr (same<S, T>) {
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
    if constexpr (!pairs<K> && !same<S, double> && (same<S, T> || same<T, float>)) {  // exact
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

// Copies rows [i0, i0 + rows) and columns [c0, c0 + cols) of `a`. A tile row has `ld` units; those
// past the columns become zero. `mask` is a buffer of cols + kMaskSlack, used with dropout.
template <typename K, typename T>
inline void tile_along_row(typename K::Unit* tile, int64_t ld, const TensorView& a, int64_t i0,
                           int64_t rows, int64_t c0, int64_t cols, const Drop& drop,
                           uint32_t* mask) {
  by_dtype(a.dtype, [&](auto* tag) {
    using S = typename Pointee<decltype(tag)>::type;
    for (int64_t i = 0; i < rows; ++i) {
      const S* src = static_cast<const S*>(a.data) + (i0 + i) * a.row_stride + c0 * a.col_stride;
      const uint32_t* keep =
          drop.on ? keep_mask(mask, uint64_t(i0 + i) * uint64_t(a.cols) + uint64_t(c0), cols,
                              drop.seed, drop.threshold)
                  : nullptr;
      Part<K>* dst = reinterpret_cast<Part<K>*>(tile + i * ld);
      parts<K, T>(dst, src, a.col_stride, cols, keep);
      for (int64_t j = cols; j < ld * K::kPair; ++j) dst[j] = Part<K>(0);
    }
  });
}

// Copies the same rectangle with units down the columns: ceil(rows / pair) tile rows of `ld` units.
// `row` is a buffer for two rows of cols parts, used for pairs.
template <typename K, typename T>
inline void tile_down_columns(typename K::Unit* tile, int64_t ld, const TensorView& a, int64_t i0,
                              int64_t rows, int64_t c0, int64_t cols, const Drop& drop,
                              uint32_t* mask, uint16_t* row) {
  by_dtype(a.dtype, [&](auto* tag) {
    using S = typename Pointee<decltype(tag)>::type;
    int64_t i = 0;
    if constexpr (pairs<K>)
      if constexpr (same<S, bf16>) {  // nested: otherwise clang++ looks for pair_up in every K
        // Full vectors of neighboring pairs, as in a factor of rank 16.
        const bool full_vectors =
            a.col_stride == 1 && !drop.on && cols == ld && cols % K::kLanes == 0;
        const auto* src = reinterpret_cast<const uint16_t*>(static_cast<const S*>(a.data) +
                                                            i0 * a.row_stride + c0);
        for (; full_vectors && i + 2 <= rows; i += 2, tile += ld) {
          for (int64_t j = 0; j < cols; j += K::kLanes)
            store(tile + j,
                  K::pair_up(src + i * a.row_stride + j, src + (i + 1) * a.row_stride + j));
        }
      }
    if constexpr (!pairs<K> && same<S, float> && same<T, float>) {
      // A rank that is not a multiple of the lanes: loads each row's elements and its padding at
      // once.
      const bool full_vectors = a.col_stride == 1 && !drop.on && ld % K::kLanes == 0;
      const float* src = static_cast<const float*>(a.data) + i0 * a.row_stride + c0;
      for (; full_vectors && i < rows; ++i, src += a.row_stride, tile += ld) {
        for (int64_t j = 0; j < ld; j += K::kLanes)
          store(tile + j, load_first(src + j, larger(0, cols - j)));
      }
    }
    for (; i < rows; i += K::kPair, tile += ld) {
      typename K::Unit* dst = tile;
      const uint16_t* half[2] = {row, row + cols};
      for (int p = 0; p < K::kPair; ++p) {
        const bool inside = i + p < rows;
        const S* src =
            static_cast<const S*>(a.data) + (i0 + i + p) * a.row_stride + c0 * a.col_stride;
        if constexpr (!pairs<K>) {
          const uint64_t e = uint64_t(i0 + i) * uint64_t(a.cols) + uint64_t(c0);
          parts<K, T>(dst, src, a.col_stride, cols,
                      drop.on ? keep_mask(mask, e, cols, drop.seed, drop.threshold) : nullptr);
        } else if (same<S, bf16> && inside && a.col_stride == 1 && !drop.on) {
          half[p] = reinterpret_cast<const uint16_t*>(src);
        } else if (inside) {
          const uint64_t e = uint64_t(i0 + i + p) * uint64_t(a.cols) + uint64_t(c0);
          parts<K, T>(row + p * cols, src, a.col_stride, cols,
                      drop.on ? keep_mask(mask, e, cols, drop.seed, drop.threshold) : nullptr);
        } else {
          for (int64_t j = 0; j < cols; ++j) row[p * cols + j] = 0;
        }
      }
      if constexpr (pairs<K>) {
        constexpr int kHalves = LOTR_VB / 2;
        int64_t j = 0;
        for (; j + kHalves <= cols; j += kHalves) {
          const auto a = load(half[0] + j);
          const auto b = load(half[1] + j);
          store(dst + j, reinterpret_cast<vi>(zip<0, kHalves>(a, b)));
          store(dst + j + K::kLanes, reinterpret_cast<vi>(zip<1, kHalves>(a, b)));
        }
        for (; j + K::kLanes <= cols; j += K::kLanes)
          store(dst + j, K::pair_up(half[0] + j, half[1] + j));
        for (; j < cols; ++j) dst[j] = uint32_t(half[0][j]) | uint32_t(half[1][j]) << 16;
      }
      for (int64_t j = cols; j < ld; ++j) dst[j] = 0;
    }
  });
}

// Whether the tensor's memory can serve as the tile.
template <typename K, typename T>
inline bool native(const TensorView& a) {
  if (a.col_stride != 1) return false;
  if constexpr (pairs<K>) return a.dtype == DType::bfloat16;
  if constexpr (same<K, F64>) return a.dtype == DType::float64;
  return same<T, float> && a.dtype == DType::float32;
}

// Transposes rows [n0, n0 + width) of F [N, r]: panel[packed unit of r][width], zero past the end.
// `width` is a multiple of the lanes; `buffer` has room for kLanes rows of r rounded up to kLanes
// units.
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
    // Full vectors are loaded, so a load of a short row reads on into the next rows. That is
    // allowed as long as there are such rows.
    const bool direct = in_place && rows == kLanes &&
                        (n0 + j + kLanes - 1) * F.row_stride + padded * K::kPair <= end;
    const char* src = reinterpret_cast<const char*>(buffer);
    int64_t step = padded * int64_t(sizeof(Unit));
    if (direct) {
      src = reinterpret_cast<const char*>(static_cast<const Part<K>*>(F.data) +
                                          (n0 + j) * F.row_stride);
      step = F.row_stride * int64_t(sizeof(Part<K>));
    } else {
      tile_along_row<K, T>(buffer, padded, F, n0 + j, rows, 0, F.cols, Drop{}, nullptr);
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
  TensorView t = a;
  t.rows = a.cols;
  t.cols = a.rows;
  t.row_stride = a.col_stride;
  t.col_stride = a.row_stride;
  return t;
}

}  // namespace lotr::cpu::LOTR_ISA
