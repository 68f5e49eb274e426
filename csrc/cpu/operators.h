// The operators for one element type T: each is a product of products.h or outer.h, divided
// among threads. Equations are in torch/schema.cpp, terms in tiles.h. K is the kind of arithmetic
// of T, Unit what one of its lanes multiplies, Acc the type of sums (vec.h). Work is counted in
// multiplications.
#pragma once

#include "cpu/outer.h"

namespace lotr::cpu::LOTR_ISA {

// Multiplications per thread: below this, waking a thread takes longer.
constexpr int64_t kThreadWork = 3 << 15;

// Runs body(begin, end) over [0, tasks), in this thread if there is too little work for two.
template <typename F>
inline void run_tasks(int64_t tasks, int64_t work, F&& body) {
  if (work < 2 * kThreadWork || tasks <= 1) {
    if (tasks > 0) body(int64_t(0), tasks);
    return;
  }
  parallel_for(
      tasks, larger(1, tasks * kThreadWork / work),
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
      },
      &body);
}

// Runs body(i0, i1) over [0, rows), cut at multiples of kBlock. A body walks its rows in tiles.
template <int64_t kBlock = kTileRows / 4, typename F>
inline void run_rows(int64_t rows, int64_t work, F&& body) {
  run_tasks(ceil_div(rows, kBlock), work,
            [&](int64_t begin, int64_t end) { body(begin * kBlock, smaller(end * kBlock, rows)); });
}

// How the rows of a sum over m tokens are cut into chunks, which are summed independently. Their
// size depends only on m and their sums are added in order, so the number of threads changes no
// bit. Up to 1024 rows a chunk has 128; beyond, there are 5 to 64 chunks. Examples: 1000 rows make
// 8 of 128 (the last has 104), 3000 rows 8 of 384, 65536 rows 64 of 1024.
struct Chunks {
  int64_t count;
  int64_t rows;  // of a chunk
  explicit Chunks(int64_t m) {
    constexpr int64_t kStep = 2 * kTileUnits;  // 128
    const int64_t target = m <= 1024 ? ceil_div(m, kStep) : smaller(64, larger(8, m / 256));
    rows = round_up(ceil_div(m, larger(1, target)), kStep);
    count = ceil_div(m, larger(1, rows));
  }
};

// The sums of chunks of x^T v, each a block of numbers (OuterSums, outer.h), added in order when
// all are computed. With one thread each chunk is added to the first block as soon as it is summed,
// or summed there if it is a single tile. That has the same bits, in one or two blocks in cache.
template <typename K>
struct ChunkSums {
  using Acc = typename K::Acc;
  const bool one_thread = threads() == 1;
  const int64_t S_cols;  // columns of x that are summed in S
  const int64_t r;
  const int64_t size;  // of a block
  const int64_t blocks;
  Scratch memory;

  ChunkSums(const Chunks& chunks, int64_t tile_rows, int64_t cols, int64_t S_cols, int64_t r)
      : S_cols(S_cols),
        r(r),
        size(OuterSums<K>::size(cols, S_cols, r)),
        blocks(block_count(one_thread, chunks, tile_rows)),
        memory(size_t(blocks * size) * sizeof(Acc)) {}
  static int64_t block_count(bool one_thread, const Chunks& chunks, int64_t tile_rows) {
    if (!one_thread) return chunks.count;
    return smaller(chunks.count, chunks.rows <= tile_rows ? 1 : 2);
  }
  Acc* block_of(int64_t chunk) const {
    return memory.template get<Acc>() + larger(0, smaller(chunk, blocks - 1)) * size;
  }
  OuterSums<K> of_chunk(int64_t chunk) const {
    return OuterSums<K>::in_block(block_of(chunk), S_cols, r);
  }
  bool fresh(int64_t chunk) const { return chunk == 0 || blocks > 1; }
  void finish(int64_t chunk) const {
    if (!one_thread || chunk == 0 || blocks == 1) return;
    Acc* const first = block_of(0);
    const Acc* const sums = block_of(chunk);
    for (int64_t j = 0; j < size; j += K::kLanes)
      store(first + j, load(first + j) + load(sums + j));
  }

  // out [cols, r] (+)= scale * the sum of all chunks. Its first rows are S^T, the others P.
  void add_to(const TensorView& out, double scale, bool add) const {
    constexpr int kRowsAtOnce = kPairColumns<K>;  // which divides `S_cols`
    const int64_t ld = padded_rank<K>(r);
    const OuterSums<K> first = of_chunk(0);
    const int64_t count = one_thread ? smaller(1, blocks) : blocks;
    // A number that is read from memory is counted as 4 multiplications.
    run_rows<kRowsAtOnce>(out.rows, count * out.rows * r * 4, [&](int64_t i0, int64_t i1) {
      Scratch rows_memory(size_t(kRowsAtOnce * ld) * sizeof(Acc));
      Acc* tile = rows_memory.get<Acc>();
      for (int64_t i = i0; i < i1; i += kRowsAtOnce) {
        const int64_t rows = smaller(kRowsAtOnce, i1 - i);
        for (int64_t j = 0; j < r; j += K::kLanes) {
          if (i < S_cols) {
            add_transposed(tile + j, ld, first.S + j * S_cols + i, smaller(K::kLanes, r - j),
                           count);
            continue;
          }
          const Acc* P = first.P + (i - S_cols) * ld + j;
          for (int64_t row = 0; row < rows; ++row)
            store(tile + row * ld + j, sum(P + row * ld, count));
        }
        write_rows<K>(out, i, rows, tile, ld, scale, add);
      }
    });
  }
  // tile [kPairColumns][n] = S [n][kPairColumns], summed, transposed and in order (pair_at, vec.h).
  void add_transposed(Acc* tile, int64_t ld, const Acc* S, int64_t n, int64_t count) const {
    for (int64_t column = 0; column < kPairColumns<K>; column += K::kLanes) {
      decltype(load(S)) square[K::kLanes] = {};
      for (int64_t j = 0; j < n; ++j) square[j] = sum(S + j * S_cols + column, count);
      transpose<K::kLanes>(square);
      for (int64_t i = 0; i < K::kLanes; ++i) store(tile + pair_at(column + i) * ld, square[i]);
    }
  }
  // A vector of sums of `count` blocks, from its place in the first one.
  LOTR_INLINE auto sum(const Acc* first, int64_t count) const {
    auto total = decltype(load(first)){};
    for (int64_t p = 0; p < count; ++p) total += load(first + p * size);
    return total;
  }
};

// outer_few computes products of at most this many tokens.
constexpr int64_t kFewRows = 4;

inline TensorView core_of(const TensorView& cores, int64_t core_stride, int64_t index) {
  TensorView core = cores;
  core.data = static_cast<char*>(cores.data) + index * core_stride * element_size(cores.dtype);
  return core;
}

// No dropout, only a scale.
inline Drop scaled_by(double scale) {
  return {/*on=*/false, /*threshold=*/0, scale};
}

template <typename T>
struct Operators {
  using K = typename KindOf<T>::type;
  using Unit = typename K::Unit;
  using Acc = typename K::Acc;

  static void shrink(const TensorView& u, const TensorView& x, const TensorView& A,
                     const Drop& drop) {
    product(u, x, A, drop, /*add=*/false);
  }

  // out (+)= scale * drop(x) A: rows of x times a packed factor.
  static void product(const TensorView& out, const TensorView& x, const TensorView& A,
                      const Drop& drop, bool add) {
    const int64_t ld = padded_rank<K>(A.cols);
    run_rows(x.rows, x.rows * x.cols * A.cols, [&](int64_t i0, int64_t i1) {
      const PackedFactor<K, T> packed(A);  // one per thread: other cores' caches are slow
      const size_t sum_bytes = size_t(kTileRows * ld) * sizeof(Acc);
      Scratch memory(sum_bytes + size_t(shrink_bytes<K>()));
      for (int64_t i = i0; i < i1; i += kTileRows) {
        ShrinkRows rows{i, smaller(kTileRows, i1 - i)};
        rows.cold = i == i0;
        rows.prefetch_below = true;
        shrink_tile<K, T>(memory.get<Acc>(), ld, x, drop, packed.units, rows,
                          memory.get<char>() + sum_bytes);
        write_rows<K>(out, i, rows.count, memory.get<Acc>(), ld, drop.scale, add);
      }
    });
  }

  static void expand(const TensorView& y, const TensorView& u, const TensorView& F,
                     const Drop& drop, const Start& start) {
    if (y.rows <= kTileRows) return expand_few(y, u, F, drop, start);
    const Panels<K> panels(F);
    const auto pack = [&](Unit* to, int64_t begin, int64_t end) {
      Scratch rows(panels.row_bytes);
      for (int64_t p = begin; p < end; ++p)
        pack_panel<K, T>(to + p * panels.size, kPanel<K>, F, p * kPanel<K>, rows.get<Unit>());
    };
    // All threads pack the panels together if that is work for two. Otherwise each packs them all.
    const int64_t all_units = panels.count * panels.size;
    const bool together = all_units >= 2 * kThreadWork;
    Scratch packed_together(together ? size_t(all_units) * sizeof(Unit) : 0);
    if (together)
      run_tasks(panels.count, all_units,
                [&](int64_t begin, int64_t end) { pack(packed_together.get<Unit>(), begin, end); });
    run_rows(y.rows, y.rows * y.cols * u.cols, [&](int64_t i0, int64_t i1) {
      Scratch u_memory(UnitRows<K, T>::bytes(u, kTileRows));
      Scratch mask(panels.mask_bytes);
      Scratch packed_by_thread(together ? 0 : size_t(all_units) * sizeof(Unit));
      if (!together) pack(packed_by_thread.get<Unit>(), 0, panels.count);
      const Unit* packed = (together ? packed_together : packed_by_thread).template get<Unit>();
      for (int64_t i = i0; i < i1; i += kTileRows) {
        const int64_t rows = smaller(kTileRows, i1 - i);
        const Broadcast rows_of_u = UnitRows<K, T>::read(u, i, rows, u_memory.get<Unit>());
        for (int64_t p = 0; p < panels.count; ++p) {
          expand_panel<K, T>({y, i, rows, p * kPanel<K>, kPanel<K>}, rows_of_u, panels.units,
                             packed + p * panels.size, drop, start, mask.get<uint32_t>());
        }
      }
    });
  }

  // For few tokens: each panel is packed by the task that uses it, and is then still in L1.
  static void expand_few(const TensorView& y, const TensorView& u, const TensorView& F,
                         const Drop& drop, const Start& start) {
    const Panels<K> panels(F);
    Scratch u_memory(UnitRows<K, T>::bytes(u, kTileRows));
    const Broadcast rows_of_u = UnitRows<K, T>::read(u, 0, y.rows, u_memory.get<Unit>());
    run_tasks(panels.count, y.rows * y.cols * u.cols, [&](int64_t begin, int64_t end) {
      const size_t panel_bytes = size_t(panels.size) * sizeof(Unit);
      Scratch memory(panel_bytes + panels.row_bytes + panels.mask_bytes);
      Unit* panel = memory.get<Unit>();
      auto* mask = reinterpret_cast<uint32_t*>(memory.get<char>() + panel_bytes + panels.row_bytes);
      for (int64_t p = begin; p < end; ++p) {
        pack_panel<K, T>(panel, kPanel<K>, F, p * kPanel<K>, panel + panels.size);
        expand_panel<K, T>({y, 0, y.rows, p * kPanel<K>, kPanel<K>}, rows_of_u, panels.units, panel,
                           drop, start, mask);
      }
    });
  }

  // D (+)= scale * drop(x)^T v: in D itself, or for few tokens without copies, or in chunks.
  static void factor_grad(const TensorView& D, const TensorView& x, const TensorView& v,
                          const Drop& drop, bool add) {
    const bool has_sum_dtype =
        D.dtype == (std::is_same_v<Acc, double> ? DType::float64 : DType::float32);
    const bool holds_sums = has_sum_dtype && D.col_stride == 1;
    // AMX sums in the form S (outer.h), but D has the form P.
    const bool better_in_tiles =
        in_tiles<K> && Outer<T>::transposed_columns(x, drop) > 0 && x.rows >= kSide;
    if (holds_sums && Chunks(x.rows).count == 1 && !better_in_tiles && drop.scale == 1.0 &&
        v.cols % K::kLanes == 0)
      return outer_in_output(D, x, v, drop, add);
    if constexpr (std::is_same_v<T, Acc>) {
      const bool in_place = native<K, T>(x) && native<K, T>(v) && !drop.on;
      if (holds_sums && in_place && x.rows <= kFewRows) return outer_few(D, x, v, drop.scale, add);
    }
    outer_in_chunks(D, x, v, drop, add);
  }
  // With the sums in D itself, which is then read and written only once per tile of rows.
  static void outer_in_output(const TensorView& D, const TensorView& x, const TensorView& v,
                              const Drop& drop, bool add) {
    const int64_t tile_rows = Outer<T>::tile_rows(x, drop, v.cols);
    const int64_t blocks = ceil_div(x.cols, kTileColumns);
    run_tasks(blocks, x.rows * x.cols * v.cols, [&](int64_t begin, int64_t end) {
      Scratch memory(size_t(Outer<T>::bytes(v.cols)));
      const Outer<T> outer(memory.get<char>(), v.cols);
      const int64_t c0 = begin * kTileColumns;
      const int64_t c1 = smaller(end * kTileColumns, x.cols);
      const OuterSums<K> sums{/*S=*/nullptr, /*S_cols=*/0, static_cast<Acc*>(D.data), D.row_stride};
      OuterRange range{0, x.rows, c0, c1, tile_rows};
      range.fresh = !add;
      outer.add(sums, x, drop, v, range);
    });
  }
  // For a rank that does not fill its vectors: padding v and the sums would take longer than the
  // multiplications. Each element of D is written once, and no operand is copied.
  static void outer_few(const TensorView& D, const TensorView& x, const TensorView& v, double scale,
                        bool add) {
    run_rows(x.cols, x.rows * x.cols * v.cols, [&](int64_t c0, int64_t c1) {
      int64_t j = 0;
      for (; j + 8 <= v.cols; j += 8) outer_few_columns<8>(D, c0, c1, x, v, j, scale, add);
      for (; j + 4 <= v.cols; j += 4) outer_few_columns<4>(D, c0, c1, x, v, j, scale, add);
      for (; j < v.cols; ++j) outer_few_columns<1>(D, c0, c1, x, v, j, scale, add);
    });
  }
  // Columns [j, j + n) of rows [c0, c1) of D.
  template <int n>
  static void outer_few_columns(const TensorView& D, int64_t c0, int64_t c1, const TensorView& x,
                                const TensorView& v, int64_t j, double scale, bool add) {
    typedef Acc Run __attribute__((vector_size(n * sizeof(Acc)), aligned(sizeof(Acc)), may_alias));
    for (int64_t c = c0; c < c1; ++c) {
      Run sum = {};
      const Acc* a = static_cast<const Acc*>(x.data) + c;
      const Acc* b = static_cast<const Acc*>(v.data) + j;
      for (int64_t i = 0; i < x.rows; ++i, a += x.row_stride, b += v.row_stride)
        sum += *a * *reinterpret_cast<const Run*>(b);
      write_run<n>(static_cast<Acc*>(D.data) + c * D.row_stride + j,
                   reinterpret_cast<const Acc*>(&sum), Acc(scale), add);
    }
  }
  static void outer_in_chunks(const TensorView& D, const TensorView& x, const TensorView& v,
                              const Drop& drop, bool add) {
    const Chunks chunks(x.rows);
    const int64_t tile_rows = Outer<T>::tile_rows(x, drop, v.cols);
    const int64_t S_cols = Outer<T>::transposed_columns(x, drop);
    const ChunkSums<K> chunk_sums(chunks, tile_rows, x.cols, S_cols, v.cols);
    // With fewer than two chunks per thread x is cut by columns too, which changes no sum. Example:
    // with 16 threads, the 8 chunks of x [1000, 4096] are cut into 4 ranges of up to 1056 columns.
    const int64_t cuts = chunks.count ? ceil_div(2 * threads(), chunks.count) : 1;
    const int64_t columns = threads() == 1 ? x.cols : ceil_div(x.cols, cuts);
    const int64_t width = round_up(larger(2 * kTileColumns, columns), kTileColumns);
    const int64_t across = ceil_div(x.cols, width);
    const int64_t work = x.rows * x.cols * v.cols;
    run_tasks(chunks.count * across, work, [&](int64_t begin, int64_t end) {
      Scratch memory(size_t(Outer<T>::bytes(v.cols)));
      const Outer<T> outer(memory.get<char>(), v.cols);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t chunk = task / across;
        const int64_t c0 = task % across * width;
        const int64_t i0 = chunk * chunks.rows;
        OuterRange range{i0, smaller(i0 + chunks.rows, x.rows), c0, smaller(c0 + width, x.cols),
                         tile_rows};
        range.fresh = chunk_sums.fresh(chunk);
        outer.add(chunk_sums.of_chunk(chunk), x, drop, v, range);
        chunk_sums.finish(chunk);
      }
    });
    chunk_sums.add_to(D, drop.scale, add);
  }

  // du = g F, Q (+)= g^T u. If a tile of g stays in cache for both, g is read from memory once.
  static void shrink_grad(const TensorView& du, const TensorView& Q, const TensorView& g,
                          const TensorView& F, const TensorView& u, bool add) {
    const int64_t tile_rows = rows_read_twice(g, F.cols);
    if (tile_rows == 0) {
      shrink(du, g, F, {});
      factor_grad(Q, g, u, {}, add);
      return;
    }
    const Chunks chunks(g.rows);
    const int64_t ld = padded_rank<K>(F.cols);
    const int64_t S_cols = Outer<T>::transposed_columns(g, Drop{});
    const ChunkSums<K> chunk_sums(chunks, tile_rows, g.cols, S_cols, F.cols);
    run_tasks(chunks.count, 2 * g.rows * g.cols * F.cols, [&](int64_t begin, int64_t end) {
      const PackedFactor<K, T> packed(F);
      const size_t du_bytes = size_t(tile_rows * ld) * sizeof(Acc);
      Scratch memory(du_bytes + size_t(larger(shrink_bytes<K>(), Outer<T>::bytes(F.cols))));
      Acc* du_sums = memory.get<Acc>();
      char* space = memory.get<char>() + du_bytes;  // used by one product, then by the other
      const Outer<T> outer(space, F.cols);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * chunks.rows;
        const int64_t last = smaller(first + chunks.rows, g.rows);
        for (int64_t i = first; i < last; i += tile_rows) {
          const int64_t tile_end = smaller(i + tile_rows, last);
          for (int64_t i0 = i; i0 < tile_end; i0 += kTileRows) {
            ShrinkRows rows{i0, smaller(kTileRows, tile_end - i0)};
            rows.cold = chunk == begin && i == first;
            // Outer::add prefetches the rows below too. With pairs only the last block of each 32
            // columns does, in bursts, so some of those rows are prefetched here.
            rows.prefetch_below = pairs<K>;
            shrink_tile<K, T>(du_sums, ld, g, Drop{}, packed.units, rows, space);
            write_rows<K>(du, i0, rows.count, du_sums, ld, /*scale=*/1.0, /*add=*/false);
          }
          OuterRange range{i, tile_end, 0, g.cols, tile_rows};
          range.fresh = chunk_sums.fresh(chunk) && i == first;
          range.warm = true;
          outer.add(chunk_sums.of_chunk(chunk), g, Drop{}, u, range);
        }
        chunk_sums.finish(chunk);
      }
    });
    chunk_sums.add_to(Q, 1.0, add);
  }

  // Rows of a tile of g [m, n] that shrink_grad reads twice, or 0 where two passes over g cost
  // less. The factor [n, r] and two sums of its size are used again for each tile: if they exceed
  // L2, the taller tiles of two passes read them less often. A tile is halved unless it and the
  // next one, which is prefetched, fit in L2.
  static int64_t rows_read_twice(const TensorView& g, int64_t r) {
    if (3 * g.cols * r * int64_t(sizeof(Acc)) > l2_bytes()) return 0;
    const int64_t unit_bytes = g.cols * element_size(g.dtype) * K::kPair;  // a row, or two rows
    // With AMX a tile's sums are added to S in memory at its end, so tall tiles cost less.
    if (in_tiles<K> && 2 * unit_bytes * kDeepUnits <= l2_bytes()) return kDeepUnits * K::kPair;
    const bool two_tiles_fit = 2 * unit_bytes * kTileUnits <= l2_bytes();
    return (two_tiles_fit ? kTileUnits : kTileUnits / 2) * K::kPair;
  }

  static void add(const TensorView& out, const TensorView& a) {
    for (int64_t i = 0; i < out.rows; ++i) {
      T* to = static_cast<T*>(out.data) + i * out.row_stride;
      const T* from = static_cast<const T*>(a.data) + i * a.row_stride;
      for (int64_t j = 0; j < out.cols; ++j) {
        to[j * out.col_stride] =
            Narrow<T>::from(to_float(to[j * out.col_stride]) + to_float(from[j * a.col_stride]));
      }
    }
  }
};

}  // namespace lotr::cpu::LOTR_ISA
