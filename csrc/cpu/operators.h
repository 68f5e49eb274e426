// The operators for one element type T: how the work is divided into tasks. Equations are in
// torch/schema.cpp, words in tiles.h. K is the kind of arithmetic of T, Unit what one of its lanes
// multiplies, Acc the type of sums (vec.h). Work is counted in multiplications.
#pragma once

#include "cpu/products.h"

namespace lotr::cpu::LOTR_ISA {

// Multiplications per thread: below this, waking a thread takes longer.
constexpr int64_t kThreadWork = 3 << 15;

// Tokens up to which an outer product is computed without copies, if its rank is not a multiple of
// the vector.
constexpr int64_t kFewRows = 4;

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

// Rows of a matrix in blocks; a thread walks its blocks in tiles of up to kTileRows.
template <int64_t kBlock = kTileRows / 4, typename F>
inline void run_rows(int64_t rows, int64_t work, F&& body) {
  run_tasks(ceil_div(rows, kBlock), work,
            [&](int64_t begin, int64_t end) { body(begin * kBlock, smaller(end * kBlock, rows)); });
}

// Chunks of rows, each with a sum. These are added in order. Their size depends only on m, never on
// the threads: 128 rows up to m = 1024, then a multiple of 128, in at most 64 chunks.
struct Chunks {
  int64_t count;
  int64_t rows;
  explicit Chunks(int64_t m) {
    const int64_t target = m <= 1024 ? ceil_div(m, 128) : smaller(64, larger(8, m / 256));
    rows = round_up(ceil_div(m, larger(1, target)), 2 * kTileUnits);
    count = ceil_div(m, larger(1, rows));
  }
};

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
    product(u, x, A, drop, false);
  }

  // out (+)= scale * drop(x) A: rows of x times a packed factor.
  static void product(const TensorView& out, const TensorView& x, const TensorView& A,
                      const Drop& drop, bool add) {
    const int64_t ld = vectors_of<K>(A.cols) * K::kLanes;
    run_rows(x.rows, x.rows * x.cols * A.cols, [&](int64_t i0, int64_t i1) {
      const PackedFactor<K, T> b(A);  // one per thread: other cores' caches are slow
      const size_t sum_bytes = size_t(kTileRows * ld) * sizeof(Acc);
      Scratch memory(sum_bytes + tile_space<K>(A.cols));
      for (int64_t i = i0; i < i1; i += kTileRows) {
        const int64_t rows = smaller(kTileRows, i1 - i);
        const bool cold = i == i0;
        shrink_tile<K, T>(memory.get<Acc>(), ld, x, drop, b.units, {i, rows, cold, true},
                          memory.get<char>() + sum_bytes);
        write_rows<K>(out, i, rows, memory.get<Acc>(), ld, drop.scale, add);
      }
    });
  }

  static constexpr int64_t kColumns = kPanel<K>;  // of a panel
  // The panels of F^T, and the memory in which one is packed and masked.
  struct Panels {
    int64_t units;  // of the rank
    int64_t count;
    int64_t size;  // units of a panel
    size_t row_bytes;
    size_t mask_bytes;

    explicit Panels(const TensorView& F)
        : units(packed_units<K>(F.cols)),
          count(ceil_div(F.rows, kColumns)),
          size(units * kColumns),
          row_bytes(size_t(K::kLanes * round_up(units, K::kLanes)) * sizeof(Unit)),
          mask_bytes(size_t((kExpandRows + 1) * kColumns + kMaskSlack) * sizeof(uint32_t)) {}
  };

  static void expand(const TensorView& y, const TensorView& u, const TensorView& F,
                     const Drop& drop, const Start& start) {
    if (y.rows <= kTileRows) return expand_few(y, u, F, drop, start);
    const Panels panels(F);
    const auto pack = [&](Unit* to, int64_t begin, int64_t end) {
      Scratch buffer(panels.row_bytes);
      for (int64_t p = begin; p < end; ++p)
        pack_panel<K, T>(to + p * panels.size, kColumns, F, p * kColumns, buffer.get<Unit>());
    };
    // Threads share the packing if it is enough work for two. Otherwise each packs all of F.
    const int64_t pack_work = panels.count * panels.size;
    const bool shared = pack_work >= 2 * kThreadWork;
    Scratch packed(shared ? size_t(pack_work) * sizeof(Unit) : 0);
    if (shared)
      run_tasks(panels.count, pack_work,
                [&](int64_t begin, int64_t end) { pack(packed.get<Unit>(), begin, end); });
    run_rows(y.rows, y.rows * y.cols * u.cols, [&](int64_t i0, int64_t i1) {
      Scratch u_memory(u_bytes(u));
      Scratch mask(panels.mask_bytes);
      Scratch packed_here(shared ? 0 : size_t(pack_work) * sizeof(Unit));
      if (!shared) pack(packed_here.get<Unit>(), 0, panels.count);
      const Unit* const all = (shared ? packed : packed_here).template get<Unit>();
      for (int64_t i = i0; i < i1; i += kTileRows) {
        const int64_t rows = smaller(kTileRows, i1 - i);
        const Broadcast rows_of_u = u_rows(u, i, rows, u_memory.get<Unit>());
        for (int64_t p = 0; p < panels.count; ++p) {
          expand_panel<K, T>({y, i, rows, p * kColumns, kColumns}, rows_of_u, panels.units,
                             all + p * panels.size, drop, start, mask.get<uint32_t>());
        }
      }
    });
  }

  // For few tokens each panel is packed where it is used: F passes through L1, and no packed copy
  // is written.
  static void expand_few(const TensorView& y, const TensorView& u, const TensorView& F,
                         const Drop& drop, const Start& start) {
    const Panels panels(F);
    Scratch u_memory(u_bytes(u));
    const Broadcast rows_of_u = u_rows(u, 0, y.rows, u_memory.get<Unit>());
    run_tasks(panels.count, y.rows * y.cols * u.cols, [&](int64_t begin, int64_t end) {
      const size_t panel_bytes = size_t(panels.size) * sizeof(Unit);
      Scratch memory(panel_bytes + panels.row_bytes + panels.mask_bytes);
      Unit* panel = memory.get<Unit>();
      auto* mask = reinterpret_cast<uint32_t*>(memory.get<char>() + panel_bytes + panels.row_bytes);
      for (int64_t p = begin; p < end; ++p) {
        pack_panel<K, T>(panel, kColumns, F, p * kColumns, panel + panels.size);
        expand_panel<K, T>({y, 0, y.rows, p * kColumns, kColumns}, rows_of_u, panels.units, panel,
                           drop, start, mask);
      }
    });
  }

  // Rows of u as units, in place or copied.
  static bool u_in_place(const TensorView& u) {
    return native<K, T>(u) && u.cols == packed_units<K>(u.cols) * K::kPair;
  }
  static size_t u_bytes(const TensorView& u) {
    return u_in_place(u) ? 0 : size_t(kTileRows * packed_units<K>(u.cols)) * sizeof(Unit);
  }
  static Broadcast u_rows(const TensorView& u, int64_t i, int64_t rows, Unit* memory) {
    if (u_in_place(u)) {
      return {reinterpret_cast<const char*>(static_cast<const Part<K>*>(u.data) + i * u.row_stride),
              u.row_stride * int64_t(sizeof(Part<K>))};
    }
    const int64_t units = packed_units<K>(u.cols);
    tile_along_row<K, T>(memory, units, {u, i, rows, 0, u.cols});
    return {reinterpret_cast<const char*>(memory), units * int64_t(sizeof(Unit))};
  }

  // out (+)= scale * the sum of `count` blocks (OuterSums, products.h), in order. The first
  // `transposed` rows of out are S^T, in the order of pair_at (vec.h); the others are P.
  static void add_partials(const TensorView& out, Acc* partials, int64_t count, int64_t transposed,
                           double scale, bool add) {
    constexpr int kLanes = K::kLanes;
    constexpr int kRowsAtOnce = kPairColumns<K>;  // which divides `transposed`
    const int64_t size = OuterSums<K>::size(out.rows, transposed, out.cols);
    const auto first = OuterSums<K>::in_block(partials, transposed, out.cols);
    run_rows<kRowsAtOnce>(out.rows, count * out.rows * out.cols * 4, [&](int64_t i0, int64_t i1) {
      Scratch memory(size_t(kRowsAtOnce * first.ld) * sizeof(Acc));
      Acc* tile = memory.get<Acc>();
      for (int64_t i = i0; i < i1; i += kRowsAtOnce) {
        const int64_t rows = smaller(kRowsAtOnce, i1 - i);
        for (int64_t j = 0; j < out.cols; j += kLanes) {
          if (i >= transposed) {
            const Acc* P = first.P + (i - transposed) * first.ld + j;
            for (int64_t v = 0; v < rows; ++v)
              store(tile + v * first.ld + j, sum_of(P + v * first.ld, count, size));
            continue;
          }
          for (int64_t lanes = 0; lanes < kRowsAtOnce; lanes += kLanes) {
            decltype(load(partials)) square[kLanes] = {};
            for (int64_t v = 0; v < smaller(kLanes, out.cols - j); ++v)
              square[v] = sum_of(first.S + (j + v) * transposed + i + lanes, count, size);
            transpose<kLanes>(square);
            for (int64_t v = 0; v < kLanes; ++v)
              store(tile + pair_at(lanes + v) * first.ld + j, square[v]);
          }
        }
        write_rows<K>(out, i, rows, tile, first.ld, scale, add);
      }
    });
  }
  static LOTR_INLINE auto sum_of(const Acc* partials, int64_t count, int64_t step) {
    auto sum = decltype(load(partials)){};
    for (int64_t p = 0; p < count; ++p) sum += load(partials + p * step);
    return sum;
  }

  // The memory of the chunks' sums: one block per chunk, added in order when all are computed. With
  // one thread there are at most two blocks: each chunk is added to the first block as soon as it
  // is summed, and a chunk of a single tile is summed there. The sum has the same bits, and it
  // never leaves the cache.
  struct Blocks {
    int64_t size;
    int64_t count;
    bool adds_at_once;
    Scratch memory;

    Blocks(const Chunks& chunks, int64_t tile_m, int64_t size)
        : size(size),
          count(smaller(chunks.count, most(chunks, tile_m))),
          adds_at_once(threads() == 1),
          memory(size_t(count * size) * sizeof(Acc)) {}
    static int64_t most(const Chunks& chunks, int64_t tile_m) {
      if (threads() > 1) return chunks.count;
      return chunks.rows <= tile_m ? 1 : 2;
    }
    Acc* sums_of(int64_t chunk) const {
      return memory.template get<Acc>() + larger(0, smaller(chunk, count - 1)) * size;
    }
    // Whether a chunk's sums start anew.
    bool fresh(int64_t chunk) const { return chunk == 0 || count > 1; }
    // Called when a chunk is summed. With one thread it is added to the first block.
    void finish(int64_t chunk) const {
      if (!adds_at_once || chunk == 0 || count == 1) return;
      Acc* const first = sums_of(0);
      const Acc* const sums = sums_of(chunk);
      for (int64_t j = 0; j < size; j += K::kLanes)
        store(first + j, load(first + j) + load(sums + j));
    }
    int64_t to_add() const { return adds_at_once ? smaller(1, count) : count; }
  };

  // Rows [c0, c1) and columns [j, j + n) of out (+)= scale * x^T v, each element written once, no
  // operand copied.
  template <int n>
  static void outer_few_columns(const TensorView& out, int64_t c0, int64_t c1, const TensorView& x,
                                const TensorView& v, int64_t j, double scale, bool add) {
    typedef Acc Run __attribute__((vector_size(n * sizeof(Acc)), aligned(sizeof(Acc)), may_alias));
    for (int64_t c = c0; c < c1; ++c) {
      Run sum = {};
      const Acc* a = static_cast<const Acc*>(x.data) + c;
      const Acc* b = static_cast<const Acc*>(v.data) + j;
      for (int64_t i = 0; i < x.rows; ++i, a += x.row_stride, b += v.row_stride)
        sum += *a * *reinterpret_cast<const Run*>(b);
      write_run<n>(static_cast<Acc*>(out.data) + c * out.row_stride + j,
                   reinterpret_cast<const Acc*>(&sum), Acc(scale), add);
    }
  }
  static void outer_few(const TensorView& out, const TensorView& x, const TensorView& v,
                        double scale, bool add) {
    run_rows(x.cols, x.rows * x.cols * v.cols, [&](int64_t c0, int64_t c1) {
      int64_t j = 0;
      for (; j + 8 <= v.cols; j += 8) outer_few_columns<8>(out, c0, c1, x, v, j, scale, add);
      for (; j + 4 <= v.cols; j += 4) outer_few_columns<4>(out, c0, c1, x, v, j, scale, add);
      for (; j < v.cols; ++j) outer_few_columns<1>(out, c0, c1, x, v, j, scale, add);
    });
  }

  // D (+)= drop(x)^T v, with the sums in D itself: few tokens then read and write it once.
  static void outer_in_output(const TensorView& D, const TensorView& x, const TensorView& v,
                              const Drop& drop, int64_t tile_m, bool add) {
    const int64_t blocks = ceil_div(x.cols, kTileColumns);
    run_tasks(blocks, x.rows * x.cols * v.cols, [&](int64_t begin, int64_t end) {
      Scratch memory(tile_space<K>(v.cols));
      const int64_t c0 = begin * kTileColumns;
      const int64_t c1 = smaller(end * kTileColumns, x.cols);
      const auto sums = OuterSums<K>::in_output(static_cast<Acc*>(D.data), D.row_stride);
      OuterRange range{0, x.rows, c0, c1, tile_m};
      range.fresh = !add;
      outer_rows<K, T>(sums, x, drop, v, range, memory.get<char>());
    });
  }

  // D (+)= scale * drop(x)^T v.
  static void factor_grad(const TensorView& D, const TensorView& x, const TensorView& v,
                          const Drop& drop, bool add) {
    const Chunks chunks(x.rows);
    const int64_t tile_m = factor_grad_tile_rows<K, T>(x, drop, v.cols);
    const bool wide = D.dtype == (std::is_same_v<Acc, double> ? DType::float64 : DType::float32);
    const int64_t transposed = transposed_columns<K, T>(x, drop);
    const bool better_in_tiles = in_tiles<K> && transposed > 0 && x.rows >= kSide;
    const bool in_output = chunks.count == 1 && !better_in_tiles && drop.scale == 1.0 && wide &&
                           D.col_stride == 1 && v.cols % K::kLanes == 0;
    if (in_output) return outer_in_output(D, x, v, drop, tile_m, add);
    if constexpr (std::is_same_v<T, Acc>) {
      // Few tokens, and a rank that is not a multiple of the vector: padding v and the sums would
      // take longer than the sums.
      if (x.rows <= kFewRows && wide && D.col_stride == 1 && native<K, T>(x) && native<K, T>(v) &&
          !drop.on)
        return outer_few(D, x, v, drop.scale, add);
    }
    const Blocks blocks(chunks, tile_m, OuterSums<K>::size(x.cols, transposed, v.cols));
    // With fewer chunks than threads x is cut by columns too, which changes no sum.
    const int64_t cuts = chunks.count ? ceil_div(2 * threads(), chunks.count) : 1;
    const int64_t columns = threads() == 1 ? x.cols : ceil_div(x.cols, cuts);
    const int64_t width = round_up(larger(2 * kTileColumns, columns), kTileColumns);
    const int64_t across = ceil_div(x.cols, width);
    const int64_t work = x.rows * x.cols * v.cols;
    run_tasks(chunks.count * across, work, [&](int64_t begin, int64_t end) {
      Scratch memory(tile_space<K>(v.cols));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t chunk = task / across;
        const int64_t c0 = task % across * width;
        const int64_t i0 = chunk * chunks.rows;
        const auto sums = OuterSums<K>::in_block(blocks.sums_of(chunk), transposed, v.cols);
        OuterRange range{i0, smaller(i0 + chunks.rows, x.rows), c0, smaller(c0 + width, x.cols),
                         tile_m};
        range.fresh = blocks.fresh(chunk);
        outer_rows<K, T>(sums, x, drop, v, range, memory.get<char>());
        blocks.finish(chunk);
      }
    });
    add_partials(D, blocks.sums_of(0), blocks.to_add(), transposed, drop.scale, add);
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

  // Reads a tile of g once from memory and uses it twice in cache, if the tile and its operands fit
  // there.
  static void shrink_grad(const TensorView& du, const TensorView& Q, const TensorView& g,
                          const TensorView& F, const TensorView& u, bool add) {
    const Chunks chunks(g.rows);
    const int64_t ld = vectors_of<K>(F.cols) * K::kLanes;
    const int64_t tile_m = shrink_grad_tile_rows<K>(g, F.cols);
    if (tile_m == 0) {
      shrink(du, g, F, {});
      factor_grad(Q, g, u, {}, add);
      return;
    }
    const int64_t transposed = transposed_columns<K, T>(g, Drop{});
    const Blocks blocks(chunks, tile_m, OuterSums<K>::size(g.cols, transposed, F.cols));
    run_tasks(chunks.count, 2 * g.rows * g.cols * F.cols, [&](int64_t begin, int64_t end) {
      const PackedFactor<K, T> b(F);
      const size_t du_bytes = size_t(tile_m * ld) * sizeof(Acc);
      Scratch memory(du_bytes + tile_space<K>(F.cols));
      char* space = memory.get<char>() + du_bytes;
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * chunks.rows;
        const int64_t last = smaller(first + chunks.rows, g.rows);
        const auto sums = OuterSums<K>::in_block(blocks.sums_of(chunk), transposed, F.cols);
        for (int64_t i = first; i < last; i += tile_m) {
          const int64_t tile_end = smaller(i + tile_m, last);
          for (int64_t i0 = i; i0 < tile_end; i0 += kTileRows) {
            const int64_t rows = smaller(kTileRows, tile_end - i0);
            const bool cold = chunk == begin && i == first;
            // outer_rows prefetches the rows below as well. With pairs only its last blocks do, in
            // bursts, so some of these rows are prefetched here.
            const bool below = pairs<K>;
            shrink_tile<K, T>(memory.get<Acc>(), ld, g, Drop{}, b.units, {i0, rows, cold, below},
                              space);
            write_rows<K>(du, i0, rows, memory.get<Acc>(), ld, 1.0, false);
          }
          OuterRange range{i, tile_end, 0, g.cols, tile_m};
          range.fresh = blocks.fresh(chunk) && i == first;
          range.warm = true;
          outer_rows<K, T>(sums, g, Drop{}, u, range, space);
        }
        blocks.finish(chunk);
      }
    });
    add_partials(Q, blocks.sums_of(0), blocks.to_add(), transposed, 1.0, add);
  }
};

}  // namespace lotr::cpu::LOTR_ISA
