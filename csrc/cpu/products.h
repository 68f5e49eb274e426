// u = x A: a tile of rows of x times a packed factor (shrink_tile), written and rounded once
// (write_rows). Also du = g F and F = s B G^T. y = start + drop(u F^T) is in the second half.
//
// A tile is summed in steps along k: a step's part of the packed factor stays in half of L1 while
// all rows use it. A sum takes the steps in order: each is summed in registers, and then added. AMX
// differs (amx.h): its steps have at most 16 units, and tile registers hold the sum over all k.
//
// Example: x [200, 1001] in bfloat16 with AVX-512 BF16, r = 40. A row has 501 units (pairs) and r
// is 3 vectors of 16, so a step has 16384 / 4 / 48 = 85 units. Tiles of 96, 96 and 8 rows walk 5
// steps of 85 units and one of 76, of which 75 are read in place. The last unit is copied, because
// its second element would be past the end of the row.
#pragma once

#include "cpu/amx.h"
#include "cpu/runtime.h"

namespace lotr::cpu::LOTR_ISA {

constexpr int64_t kTileRows = 96;  // a multiple of every block's rows
constexpr int64_t kBlockRows = 8;  // the most rows of a block (kRows, block.h)
constexpr int64_t kMinStep = 64;   // units of a step
constexpr int64_t kMaxStep = 256;
constexpr int64_t kHalfL1 = 16384;  // bytes

// A rank in vectors, and padded to full ones.
template <typename K>
constexpr int64_t vectors_of(int64_t r) {
  return ceil_div(r, K::kLanes);
}
template <typename K>
constexpr int64_t padded_rank(int64_t r) {
  return round_up(r, K::kLanes);
}

// A factor [k, r] in units, zero padded: [packed units of k][padded rank]. In place if possible.
template <typename K, typename T>
struct PackedFactor {
  using Unit = typename K::Unit;
  Scratch memory;
  Factor<K> units;

  static bool in_place(const TensorView& A) {
    return !pairs<K> && native<K, T>(A) && A.cols % K::kLanes == 0;
  }
  static size_t packed_bytes(const TensorView& A) {
    return size_t(packed_units<K>(A.rows) * padded_rank<K>(A.cols)) * sizeof(Unit);
  }
  explicit PackedFactor(const TensorView& A)
      : memory(in_place(A) ? 0 : packed_bytes(A) + 2 * size_t(A.cols) * sizeof(uint16_t)) {
    if (in_place(A)) {
      units = {static_cast<const Unit*>(A.data), A.row_stride, vectors_of<K>(A.cols)};
      return;
    }
    const int64_t ld = padded_rank<K>(A.cols);
    auto* packed = memory.template get<Unit>();
    auto* two_rows = reinterpret_cast<uint16_t*>(memory.template get<char>() + packed_bytes(A));
    tile_down_columns<K, T>(packed, ld, {A, 0, A.rows, 0, A.cols}, two_rows);
    for (int64_t i = units_of<K>(A.rows) * ld; i < packed_units<K>(A.rows) * ld; ++i) packed[i] = 0;
    units = {packed, ld, vectors_of<K>(A.cols)};
  }
};

// Bytes of shrink_tile's memory: a copy of a step of x, then a row's mask.
template <typename K>
constexpr int64_t shrink_bytes() {
  return kTileRows * kMaxStep * int64_t(sizeof(typename K::Unit)) +
         (kMaxStep * K::kPair + kMaskSlack) * int64_t(sizeof(uint32_t));
}

// The rows of x that shrink_tile multiplies.
struct ShrinkRows {
  int64_t i0, count;
  bool cold = false;            // these rows were not prefetched
  bool prefetch_below = false;  // prefetch the rows below them
};

// What the step of `width` columns from c0 on prefetches: the next step of these rows, or the first
// one of the rows below. Before that, the first step of cold rows prefetches its later blocks.
inline Ahead ahead_of_step(const TensorView& x, const ShrinkRows& rows, int64_t c0, int64_t width) {
  Piece next;
  const bool last = c0 + width >= x.cols;
  if (last && rows.prefetch_below) next = Rectangle{x, rows.i0 + rows.count, kTileRows, 0, width};
  if (!last && (rows.cold || rows.prefetch_below))
    next = Rectangle{x, rows.i0, rows.count, c0 + width, width};
  if (!rows.cold || c0 > 0) return {next, {}};
  return {Rectangle{x, rows.i0 + kBlockRows, rows.count - kBlockRows, c0, width}, next};
}

// Sums of a tile of rows, unscaled: sums[rows][ld] = drop(x)[rows, :] A.
template <typename K, typename T>
inline void shrink_tile(typename K::Acc* sums, int64_t ld, const TensorView& x, const Drop& drop,
                        const Factor<K>& A, const ShrinkRows& rows, char* memory) {
  using Unit = typename K::Unit;
  const bool in_place = native<K, T>(x) && !drop.on;
  auto* copy = reinterpret_cast<Unit*>(memory);
  if constexpr (in_tiles<K>) {
    if (in_place)
      return shrink_in_tiles<K, T>(sums, ld, x, A, rows.i0, rows.count, rows.prefetch_below, copy);
  }
  auto* mask = reinterpret_cast<uint32_t*>(copy + kTileRows * kMaxStep);
  const int64_t vectors = smaller(A.vectors, kMaxVectors);  // that a block multiplies at once
  const int64_t fitting = kHalfL1 / int64_t(sizeof(Unit)) / (vectors * K::kLanes);
  const int64_t step = smaller(kMaxStep, larger(kMinStep, fitting));
  const int64_t units = units_of<K>(x.cols);
  for (int64_t t = 0; t < units; t += step) {
    const int64_t n = smaller(step, units - t);
    const int64_t c0 = t * K::kPair;
    Ahead ahead = ahead_of_step(x, rows, c0, step * K::kPair);
    // Units in place, then copied ones: all, or the last one if its second element does not exist.
    const int64_t direct = in_place ? smaller(n, (x.cols - c0) / K::kPair) : 0;
    if (direct > 0) {
      const auto* a = static_cast<const Part<K>*>(x.data) + rows.i0 * x.row_stride + c0;
      sum_tile<K, Layout::along_row>({sums, ld, t == 0}, Broadcast::of(a, x.row_stride), rows.count,
                                     A.from_unit(t), direct, ahead);
    }
    if (direct < n) {
      const int64_t copied = n - direct;
      const int64_t first = c0 + direct * K::kPair;
      const int64_t cols = smaller(x.cols - first, copied * K::kPair);
      tile_along_row<K, T>(copy, copied, {x, rows.i0, rows.count, first, cols}, drop, mask);
      sum_tile<K, Layout::along_row>({sums, ld, t + direct == 0}, Broadcast::of(copy, copied),
                                     rows.count, A.from_unit(t + direct), copied, ahead);
    }
  }
}

// A run of n neighboring elements: out (= or +=) scale * c.
template <int n, typename T>
LOTR_INLINE void write_run(T* out, const T* c, T scale, bool add) {
  typedef T Run __attribute__((vector_size(n * sizeof(T)), aligned(sizeof(T)), may_alias));
  Run* const to = reinterpret_cast<Run*>(out);
  const Run sum = scale * *reinterpret_cast<const Run*>(c);
  *to = add ? *to + sum : sum;
}

// out[i0 + i, j] (= or +=) scale * sums[i][j], rounded once.
template <typename K>
inline void write_rows(const TensorView& out, int64_t i0, int64_t rows, const typename K::Acc* sums,
                       int64_t ld, double scale, bool add) {
  using Acc = typename K::Acc;
  by_dtype(out.dtype, [&](auto stored) {
    using T = typename decltype(stored)::type;
    const Acc s = Acc(scale);
    for (int64_t i = 0; i < rows; ++i, sums += ld) {
      T* row = static_cast<T*>(out.data) + (i0 + i) * out.row_stride;
      int64_t j = 0;
      if constexpr (std::is_same_v<Acc, double> == std::is_same_v<T, double>) {
        for (; out.col_stride == 1 && j + K::kLanes <= out.cols; j += K::kLanes) {
          const auto sum = s * load(sums + j);
          store(row + j, add ? load(row + j) + sum : sum);
        }
      }
      // The rest of a rank that is not a multiple of the vector, by halves and quarters: a masked
      // store would make the next row's load wait.
      if constexpr (std::is_same_v<Acc, T>) {
        for (; out.col_stride == 1 && j + 8 <= out.cols; j += 8)
          write_run<8>(row + j, sums + j, s, add);
        for (; out.col_stride == 1 && j + 4 <= out.cols; j += 4)
          write_run<4>(row + j, sums + j, s, add);
      }
      for (; j < out.cols; ++j) {
        T* to = row + j * out.col_stride;
        *to = Narrow<T>::from((add ? to_float(*to) : 0) + s * sums[j]);
      }
    }
  });
}

// ---- expand ----
// y = start + drop(u F^T), one panel of F^T at a time: kPanel columns of y, whose sums for a block
// of rows stay in registers. If all columns of a panel exist and are contiguous, without dropout or
// a scale, full vectors are stored (expand_full_block, or AMX tiles), else elements
// (expand_ragged_block).
//
// Example: y [5, 200] += u [5, 24] F^T in float32 with AVX-512. A panel has 4 vectors, so F^T is
// packed as 4 panels [24 units][64]. The last one has only columns 192 to 199 and is ragged. In
// each panel the blocks have 2, 2 and 1 rows.

template <typename K>
constexpr int64_t kPanel = kMaxVectors * K::kLanes;
// Rows of a block. With AVX-512 fewer than registers hold: out-of-order execution then sees the
// next block's loads and this one's stores during the multiplications, and rows a power of two
// apart do not push each other out of L1.
constexpr int64_t kExpandRows = LOTR_VB == 64 ? 2 : kRows[kMaxVectors];

// The sizes of the panels of F^T, and of the memory in which one is packed and masked.
template <typename K>
struct Panels {
  int64_t units;                 // of the rank
  int64_t count;                 // panels of F^T
  int64_t size;                  // units of a panel
  size_t row_bytes, mask_bytes;  // pack_panel's buffer; the masks of a block's rows

  explicit Panels(const TensorView& F)
      : units(packed_units<K>(F.cols)),
        count(ceil_div(F.rows, kPanel<K>)),
        size(units * kPanel<K>),
        row_bytes(size_t(K::kLanes * round_up(units, K::kLanes)) * sizeof(typename K::Unit)),
        mask_bytes(size_t((kExpandRows + 1) * kPanel<K> + kMaskSlack) * sizeof(uint32_t)) {}
};

// Rows of u as units, in place or copied.
template <typename K, typename T>
struct UnitRows {
  static bool in_place(const TensorView& u) {
    return native<K, T>(u) && u.cols == packed_units<K>(u.cols) * K::kPair;
  }
  static size_t bytes(const TensorView& u, int64_t rows) {
    return in_place(u) ? 0 : size_t(rows * packed_units<K>(u.cols)) * sizeof(typename K::Unit);
  }
  static Broadcast read(const TensorView& u, int64_t i, int64_t rows, typename K::Unit* copy) {
    if (in_place(u))
      return Broadcast::of(static_cast<const Part<K>*>(u.data) + i * u.row_stride, u.row_stride);
    const int64_t units = packed_units<K>(u.cols);
    tile_along_row<K, T>(copy, units, {u, i, rows, 0, u.cols});
    return Broadcast::of(copy, units);
  }
};

// y = from + bias + u F^T in one full panel, contiguous and not masked, for `rows` rows from y on.
template <typename K, typename T, Form form>
inline void expand_full_rows(T* y, int64_t ldy, const T* from, int64_t ldfrom, int64_t rows,
                             const Broadcast& u, const typename K::Unit* panel, int64_t units,
                             const typename K::Acc* bias) {
  // As many blocks as take about 1000 cycles, which is what memory takes to answer.
  const int64_t blocks_ahead = larger(1, smaller(16, 1024 / (kExpandRows * kMaxVectors * units)));
  row_blocks<kExpandRows>(rows, [&](auto mr, int64_t i) {
    constexpr int MR = decltype(mr)::value;
    // Prefetches down this panel, then from the top of the next one.
    int64_t row = i + kExpandRows * blocks_ahead;
    int64_t column = 0;
    if (row >= rows) {
      row -= rows;
      column = kPanel<K>;
    }
    const T* y_ahead = y == from ? nullptr : y + row * ldy + column;
    expand_full_block<K, T, MR, kMaxVectors, form>(y + i * ldy, ldy, from + i * ldfrom, ldfrom,
                                                   {u.data + i * u.step, u.step}, panel, units,
                                                   from + row * ldfrom + column, y_ahead, bias);
  });
}

// The part of a bias for one panel, widened: zeros past the end of y, or if there is none.
template <typename K, typename T>
inline void widen_bias(typename K::Acc* to, const TensorView& bias, int64_t n0, int64_t cols) {
  const T* from = static_cast<const T*>(bias.data);
  if (from && bias.col_stride == 1 && cols == kPanel<K>) {
    for (int64_t j = 0; j < kPanel<K>; j += K::kLanes) store(to + j, load(from + n0 + j));
    return;
  }
  for (int64_t j = 0; j < kPanel<K>; ++j) to[j] = 0;
  if (!from) return;
  for (int64_t j = 0; j < cols; ++j) to[j] = to_float(from[(n0 + j) * bias.col_stride]);
}

// y_panel = start + scale * drop(u F^T). panel: F^T for these columns. mask: Panels::mask_bytes.
template <typename K, typename T>
inline void expand_panel(const Rectangle& y_panel, const Broadcast& u, int64_t units,
                         const typename K::Unit* panel, const Drop& drop, const Start& start,
                         uint32_t* mask) {
  const TensorView& y = y_panel.a;
  const int64_t cols = smaller(kPanel<K>, y.cols - y_panel.c0);
  const bool has_matrix = start.matrix.data;
  const bool add_bias = start.bias.data || !has_matrix;
  typename K::Acc bias[kPanel<K>];
  if (add_bias) widen_bias<K, T>(bias, start.bias, y_panel.c0, cols);
  const TensorView& origin = has_matrix ? start.matrix : y;  // y: only prefetched, not added
  const T* const from = static_cast<const T*>(origin.data) + y_panel.i0 * origin.row_stride +
                        y_panel.c0 * origin.col_stride;
  T* const top = static_cast<T*>(y.data) + y_panel.i0 * y.row_stride + y_panel.c0 * y.col_stride;
  const bool contiguous = y.col_stride == 1 && origin.col_stride == 1 && cols == kPanel<K>;
  if (contiguous && !drop.on && drop.scale == 1.0) {
    const auto run = [&](auto form) {
      constexpr Form kForm = decltype(form)::value;
      if constexpr (in_tiles<K>)
        expand_in_tiles<K, T, kForm>(top, y.row_stride, from, origin.row_stride, y_panel.rows, u,
                                     panel, units, bias);
      else
        expand_full_rows<K, T, kForm>(top, y.row_stride, from, origin.row_stride, y_panel.rows, u,
                                      panel, units, bias);
    };
    if (!has_matrix) return run(std::integral_constant<Form, Form::bias>{});
    if (!add_bias) return run(std::integral_constant<Form, Form::matrix>{});
    return run(std::integral_constant<Form, Form::matrix_and_bias>{});
  }
  row_blocks<kExpandRows>(y_panel.rows, [&](auto mr, int64_t i) {
    constexpr int MR = decltype(mr)::value;
    const uint32_t* keep = nullptr;
    if (drop.on) {
      uint32_t* buffer = mask + kExpandRows * kPanel<K>;
      for (int64_t row = 0; row < MR; ++row) {
        const uint64_t e = uint64_t(y_panel.i0 + i + row) * uint64_t(y.cols) + uint64_t(y_panel.c0);
        const uint32_t* row_mask = keep_mask(buffer, e, cols, drop.seed, drop.threshold);
        std::memcpy(mask + row * kPanel<K>, row_mask, size_t(cols) * sizeof(uint32_t));
      }
      keep = mask;
    }
    expand_ragged_block<K, T, MR, kMaxVectors>(
        top + i * y.row_stride, y.row_stride, y.col_stride,
        has_matrix ? from + i * origin.row_stride : nullptr, origin.row_stride, origin.col_stride,
        cols, {u.data + i * u.step, u.step}, panel, units, keep, typename K::Acc(drop.scale),
        add_bias ? bias : nullptr);
  });
}

}  // namespace lotr::cpu::LOTR_ISA
