// expand_add:  y = start + scale * drop(u F^T)      y, start [M, N], u [M, r], F [N, r]
//              y = bias + scale * drop(u F^T)       bias [N]: an instance that does not read start
//
// start is y itself (y += u F^T, dx += drop(du A^T)), or another matrix, which is not changed.
//
// Grid     x: pieces of N (up to SUBS tiles of COLS columns), y: blocks along tokens. A warp takes
//          strips of 16 tokens, from the last to the first, because what the base product has
//          written last is still in L2, and walks each strip tile by tile. The piece's rows of F
//          stay in shared memory.
// Bytes    start once in (with a bias: no start), y once out; F, and the bias, once for each block
//          along tokens; u once for each piece of N (plan.h balances them)
// Sums     float32, start or the bias added last, rounded once
//
// Lane 4 g + q reads only the part of start that it copied. In each product of 8 columns it has the
// sums (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1). The rows of F are dealt to the products
// so that the lane's sums of a row are 16 contiguous bytes of y. So in the loop, lanes share only
// the warp's strip of u and F, which no longer changes, and no warp waits for another.
//
// Timeline of a warp (tile t = strip i, column tile n; L copies in flight, P product, sum and
// store; a __syncwarp at |, for u):
//
//   start  stage t % STAGES   L L P |
//   u      slot  i % STAGES   L L P P P P |
#pragma once
#include "rectangle.cuh"

namespace lotr::kernels {

template <class P, int R_, bool FROM_BIAS_>
struct ExpandTraits {
  using Policy = P;
  using T = typename P::T;
  static constexpr bool FROM_BIAS = FROM_BIAS_;
  static constexpr int R = R_, THREADS = expand_threads(sizeof(T), R), WARPS = THREADS / 32;
  static constexpr int STRIP = 16, COLS = 128 / sizeof(T), SUBS = expand_subs(sizeof(T), R);
  static constexpr int NJ = COLS / 8, BLOCKS = blocks_together(R);
  // Shared memory is divided for BLOCKS; a GPU with more of it may have room for a second block.
  static constexpr int BLOCKS_OF_REGISTERS = blocks_of_one_product(R);
  static constexpr int CHUNK = 16 / sizeof(T);
  static constexpr int GROUP = 4 * CHUNK, GROUPS = COLS / GROUP;  // of four lanes

  using Factor = tile::Shared<T, COLS, R>;
  struct Stage {
    tile::Shared<T, STRIP, R> u;
    // rows g and g + 8 of each group, by lane. FROM_BIAS: used only at a ragged edge.
    tile::Chunk<T> y[2 * GROUPS][32];
  };
  static constexpr int STAGES =
      stages_that_fit(WARPS * sizeof(Stage), SUBS * sizeof(Factor), 3, shared_budget(BLOCKS));
  struct Smem {
    Factor F[SUBS];
    Stage stage[WARPS][STAGES];
    alignas(16) T bias[FROM_BIAS ? SUBS * COLS : CHUNK];
  };
  static_assert(STAGES >= 2 && sizeof(Smem) <= shared_budget(BLOCKS));

  // The column of y, in its tile, that row s of Factor belongs to. In a group, columns 2q and 2q +
  // 1 of product j are elements 2j and 2j + 1 of the chunk of lane q.
  static LOTR_DEVICE int column(int s) {
    const int group = s / GROUP;
    const int j = s % GROUP / 8;
    const int c = s % 8;
    return group * GROUP + c / 2 * CHUNK + 2 * j + c % 2;
  }
};

// Copies the rows of F from row0 on, dealt to the products. Plain loads do it while the first tiles
// of start are in flight, so the loop waits only for these.
template <class Traits>
LOTR_DEVICE void load_factor(typename Traits::Factor& tile, const Matrix& F, int64_t row0,
                             int64_t rows, int r) {
  using T = typename Traits::T;
  using Chunk = tile::Chunk<T>;
  constexpr int CHUNKS = Traits::Factor::CHUNKS;
#pragma unroll 4
  for (int index = threadIdx.x; index < Traits::COLS * CHUNKS; index += Traits::THREADS) {
    const int s = index / CHUNKS;
    const int c = index % CHUNKS;
    const int64_t row = row0 + Traits::column(s);
    const int valid = tile::valid_elements<Traits::CHUNK>(row, rows, c * Traits::CHUNK, r);
    const T* from = static_cast<const T*>(F.data) + row * F.row + c * Traits::CHUNK;
    Chunk value{};
    if (valid == Traits::CHUNK) {
      value = ptx::load(reinterpret_cast<const Chunk*>(from));
    } else {
#pragma unroll
      for (int e = 0; e < Traits::CHUNK; ++e)
        value.v[e] = e < valid ? ptx::load(from + e) : ptx::from_float<T>(0.f);
    }
    ptx::store_shared(tile.as_chunk(s, c), value);
  }
}

// The bias of the piece. Zeros past the last column, and without a bias.
template <class Traits>
LOTR_DEVICE void load_bias(typename Traits::Smem& sm, const ExpandParams& p, int64_t n_begin,
                           int cols) {
  using T = typename Traits::T;
  for (int index = threadIdx.x; index < cols; index += Traits::THREADS) {
    const bool exists = p.bias && n_begin + index < p.N;
    const T* from = static_cast<const T*>(p.bias) + (n_begin + index) * p.bias_stride;
    ptx::store_shared(&sm.bias[index], exists ? ptx::load(from) : ptx::from_float<T>(0.f));
  }
}

// The strip's rows of u, by one warp.
template <class Tile>
LOTR_DEVICE void load_strip(Tile& tile, const Matrix& u, int64_t row0, int64_t rows, int r) {
  using T = typename Tile::T;
#pragma unroll
  for (int i = 0; i < Tile::ROWS * Tile::CHUNKS / 32; ++i) {
    const int index = i * 32 + int(threadIdx.x) % 32;
    const int row = index / Tile::CHUNKS;
    const int c = index % Tile::CHUNKS;
    const int valid = tile::valid_elements<Tile::CHUNK>(row0 + row, rows, c * Tile::CHUNK, r);
    const T* from = static_cast<const T*>(u.data);
    ptx::cp_async16(tile.chunk(row, c),
                    valid ? from + (row0 + row) * u.row + c * Tile::CHUNK : from,
                    valid * int(sizeof(T)));
  }
}

// How a lane walks a matrix [M, N], in elements. In a tile, the lane has 2 GROUPS chunks: chunk c
// is c % 2 steps down and c / 2 steps to the right of the first one.
struct LaneSteps {
  int64_t down;      // 8 rows
  int64_t right;     // a group of columns
  int64_t to_tile;   // to the next tile of the strip
  int64_t to_strip;  // from past the last tile of a strip to the first one of the next strip
  int full_strips;   // strips entirely inside the matrix; 0 unless by_chunks
  bool by_chunks;    // 16 bytes at a time

  template <class Traits>
  static LOTR_DEVICE LaneSteps of(const Matrix& m, int64_t M, int n_tiles, int strip_step) {
    const bool by_chunks = m.access == Access::vector;
    const int64_t to_tile = Traits::COLS * m.col;
    return {/*down=*/8 * m.row,
            /*right=*/Traits::GROUP * m.col,
            /*to_tile=*/to_tile,
            /*to_strip=*/-int64_t(strip_step) * Traits::STRIP * m.row - n_tiles * to_tile,
            /*full_strips=*/by_chunks ? int(M / Traits::STRIP) : 0,
            /*by_chunks=*/by_chunks};
  }
  template <class T>
  LOTR_DEVICE T* chunk(T* first, int c) const {
    return first + c % 2 * down + c / 2 * right;
  }
};

// In this order: where a lane is and how it advances; the copies, which run STAGES - 1 tiles ahead;
// F and the bias; the loop over the warp's tiles, each of which is a product, a mask, a sum with
// the start or bias, and a store.
template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, Traits::BLOCKS_OF_REGISTERS)
    expand_add(const ExpandParams p) {
  using P = typename Traits::Policy;
  using T = typename Traits::T;
  using Chunk = tile::Chunk<T>;
  constexpr int STAGES = Traits::STAGES, STRIP = Traits::STRIP, COLS = Traits::COLS;
  constexpr int CHUNK = Traits::CHUNK, GROUP = Traits::GROUP, GROUPS = Traits::GROUPS;
  auto& sm = ptx::shared_storage<typename Traits::Smem>();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int n_tiles = tile::count_of(p.n_pieces, int(blockIdx.x));
  const int64_t n_begin = int64_t(tile::begin_of(p.n_pieces, int(blockIdx.x))) * COLS;
  ptx::griddepcontrol_wait();
  auto* const stages = sm.stage[warp];

  const int strips = int((p.M + STRIP - 1) / STRIP);
  const int strip_step = int(gridDim.y) * Traits::WARPS;
  const int full_n = int((p.N - n_begin) / COLS);  // column tiles entirely inside the matrix
  const LaneSteps start_steps = LaneSteps::of<Traits>(p.start, p.M, n_tiles, strip_step);
  const LaneSteps y_steps = LaneSteps::of<Traits>(p.y, p.M, n_tiles, strip_step);
  const int row_of_lane = lane / 4;
  const int col_of_lane = lane % 4 * CHUNK;

  struct Place {
    int strip, n;  // n: the column tile
    int stage, u;  // of the tile, and of the strip's u
    T* first;      // the lane's first chunk
  };
  const auto advance = [&](Place& place, const LaneSteps& steps) {
    place.stage = tile::stage_after<STAGES>(place.stage);
    place.first += steps.to_tile;
    if (++place.n < n_tiles) return;
    place.n = 0;
    place.strip -= strip_step;
    place.first += steps.to_strip;
    place.u = tile::stage_after<STAGES>(place.u);
  };
  const auto inside = [&](const Place& place, const LaneSteps& steps) {
    return place.strip < steps.full_strips && place.n < full_n;
  };
  // How many elements of the lane's chunk c are inside the matrix.
  const auto valid_of = [&](const Place& place, int c) {
    return tile::valid_elements<CHUNK>(
        int64_t(place.strip) * STRIP + row_of_lane + c % 2 * 8, p.M,
        n_begin + int64_t(place.n) * COLS + c / 2 * GROUP + col_of_lane, p.N);
  };

  const int strip0 = strips - 1 - (int(blockIdx.y) * Traits::WARPS + warp);
  const auto begin = [&](const Matrix& m) {
    return Place{strip0, 0, 0, 0,
                 static_cast<T*>(m.data) + (int64_t(strip0) * STRIP + row_of_lane) * m.row +
                     (n_begin + col_of_lane) * m.col};
  };
  Place ahead = begin(p.start);

  const auto fetch_start = [&](const Place& place) {
    auto& to = stages[place.stage].y;
    // Inside, neighbors are contiguous, so a group is GROUP elements: a constant, unlike `right`.
    if (inside(place, start_steps)) {
#pragma unroll
      for (int c = 0; c < 2 * GROUPS; ++c)
        ptx::cp_async16(&to[c][lane], place.first + c % 2 * start_steps.down + c / 2 * GROUP);
      return;
    }
#pragma unroll 1
    for (int c = 0; c < 2 * GROUPS; ++c) {
      const T* chunk = start_steps.chunk(place.first, c);
      const int valid = valid_of(place, c);
      if (start_steps.by_chunks) {
        ptx::cp_async16(&to[c][lane], valid ? chunk : static_cast<const T*>(p.start.data),
                        valid * int(sizeof(T)));
      } else {
        auto* element = reinterpret_cast<T*>(&to[c][lane]);
#pragma unroll 1
        for (int e = 0; e < valid; ++e)
          ptx::store_shared(element + e, ptx::load(chunk + e * p.start.col));
      }
    }
  };
  const auto fetch = [&] {
    if (ahead.strip >= 0) {
      if constexpr (!Traits::FROM_BIAS) fetch_start(ahead);
      if (ahead.n == 0) load_strip(stages[ahead.u].u, p.u, int64_t(ahead.strip) * STRIP, p.M, p.r);
      advance(ahead, start_steps);
    }
    ptx::cp_async_commit();
  };

#pragma unroll 1
  for (int i = 0; i < STAGES - 1; ++i) fetch();
  for (int n = 0; n < n_tiles; ++n)
    load_factor<Traits>(sm.F[n], p.F, n_begin + int64_t(n) * COLS, p.N, p.r);
  if constexpr (Traits::FROM_BIAS) load_bias<Traits>(sm, p, n_begin, n_tiles * COLS);
  __syncthreads();  // F is complete

  tile::with_dropout(p.dropout, [&](auto dropout) {
#pragma unroll 1
    for (Place now = begin(p.y); now.strip >= 0; advance(now, y_steps)) {
      ptx::cp_async_wait<STAGES - 2>();
      __syncwarp();
      fetch();
      float d[1][Traits::NJ][4] = {};
      tile::warp_product<P, Traits::R, tile::Order::along_k, tile::Order::along_k>(
          d, stages[now.u].u, 0, 0, sm.F[now.n], 0);
      // Element e of the lane's chunk c, as Traits::column has dealt them.
      const auto value = [&](int c, int e) -> float& {
        return d[0][c / 2 * (CHUNK / 2) + e / 2][c % 2 * 2 + e % 2];
      };
      if constexpr (decltype(dropout)::value) {
        const uint64_t seed = uint64_t(ptx::load(p.dropout.seed));
        uint32_t keep = 0;  // one bit for each element of the lane's chunks, in their order
        static_assert(2 * GROUPS * CHUNK <= 32);
#pragma unroll 1
        for (int c = 0; c < 2 * GROUPS; ++c) {
          const uint64_t row = uint64_t(now.strip) * STRIP + row_of_lane + c % 2 * 8;
          const uint64_t col =
              uint64_t(n_begin) + uint64_t(now.n) * COLS + c / 2 * GROUP + col_of_lane;
          keep |= tile::philox_keep<CHUNK>(seed, row * uint64_t(p.N) + col, p.dropout.threshold)
                  << (c * CHUNK);
        }
#pragma unroll
        for (int i = 0; i < 2 * GROUPS * CHUNK; ++i) {
          float& v = value(i / CHUNK, i % CHUNK);
          v = keep >> i & 1 ? v : 0.f;
        }
      }
      auto& y = stages[now.stage].y;
      Chunk sum[2 * GROUPS];
#pragma unroll
      for (int c = 0; c < 2 * GROUPS; ++c) {
        // At a ragged edge only the elements inside the matrix were copied. The others, zeros or
        // old contents of shared memory, are added to as well, but not stored below.
        if constexpr (Traits::FROM_BIAS)
          sum[c] = ptx::load_shared(
              reinterpret_cast<const Chunk*>(&sm.bias[now.n * COLS + c / 2 * GROUP + col_of_lane]));
        else
          sum[c] = ptx::load_shared(&y[c][lane]);
#pragma unroll
        for (int e = 0; e < CHUNK; e += 2) {
          float y0, y1;
          ptx::to_floats(sum[c].v + e, y0, y1);
          y0 += value(c, e) * p.dropout.scale;
          y1 += value(c, e + 1) * p.dropout.scale;
          ptx::from_floats(sum[c].v + e, y0, y1);
        }
      }
      if (inside(now, y_steps)) {
#pragma unroll
        for (int c = 0; c < 2 * GROUPS; ++c)
          ptx::store(reinterpret_cast<Chunk*>(now.first + c % 2 * y_steps.down + c / 2 * GROUP),
                     sum[c]);
      } else {
#pragma unroll
        for (int c = 0; c < 2 * GROUPS; ++c) ptx::store_shared(&y[c][lane], sum[c]);
#pragma unroll 1
        for (int c = 0; c < 2 * GROUPS; ++c) {
          const int valid = valid_of(now, c);
          T* chunk = y_steps.chunk(now.first, c);
          const auto* element = reinterpret_cast<const T*>(&y[c][lane]);
#pragma unroll 1
          for (int e = 0; e < valid; ++e)
            ptx::store(chunk + e * p.y.col, ptx::load_shared(element + e));
        }
      }
    }
  });
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace lotr::kernels
