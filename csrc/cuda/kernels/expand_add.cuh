// expand_add:  y += scale * drop(u F^T)         y [M, N], u [M, r], F [N, r];   also dx += drop(k
// A^T)
//              y = bias + scale * drop(u F^T)   fresh, bias [N]: an instance that does not read y
//
// Grid     x: pieces of N (up to SUBS tiles of COLS columns), y: blocks along tokens.
//          A warp takes strips of 16 tokens, from the last to the first, since what the base
//          product has written last is still in L2, and walks each tile by tile.  The piece's rows
//          of F stay in shared memory.
// Bytes    y once in and once out (fresh: out alone); F, and the bias, once for each block along
// tokens; u
//          once for each piece of N (plan.h balances them)
// Sums     float32, y or the bias added last, rounded once
//
// A lane owns what it copies: of a tile it holds the accumulators (g, 2q), (g, 2q + 1), (g + 8, ..)
// of each of the 8-column products, and the columns of F are dealt to the products so that those
// are 16 bytes in a row of y.  So lanes share only the warp's strip of u, and no warp waits for
// another:
//
// Timeline of a warp (tile t = strip i, column tile n; L copies in flight, P product, sum and
// store):
//   y  stage t % STAGES   L L P |           a __syncwarp at |, for u
//   u  slot  i % STAGES   L L P P P P |
#pragma once
#include "rectangle.cuh"

namespace lotr::kernels {

template <class P, int R_, bool FRESH_>
struct ExpandTraits {
  using Policy = P;
  using T = typename P::T;
  static constexpr bool FRESH = FRESH_;
  static constexpr int R = R_, THREADS = expand_threads(sizeof(T), R), WARPS = THREADS / 32;
  static constexpr int STRIP = 16, COLS = 128 / sizeof(T), SUBS = expand_subs(sizeof(T), R);
  static constexpr int NJ = COLS / 8, BLOCKS = blocks_together(R);
  static constexpr int BLOCKS_OF_REGISTERS =
      blocks_of_one_product(R);  // there may be room for a second
  static constexpr int CHUNK = 16 / sizeof(T), GROUP = 4 * CHUNK,
                       GROUPS = COLS / GROUP;  // of four lanes

  using Factor = tile::Shared<T, COLS, R>;
  struct Stage {
    tile::Shared<T, STRIP, R> u;
    tile::Chunk<T> y[2 * GROUPS]
                    [32];  // rows g and g + 8 of each group, by lane; fresh: of a ragged edge alone
  };
  static constexpr int STAGES =
      stages_that_fit(WARPS * sizeof(Stage), SUBS * sizeof(Factor), 3, shared_budget(BLOCKS));
  struct Smem {
    Factor F[SUBS];
    Stage stage[WARPS][STAGES];
    alignas(16) T bias[FRESH ? SUBS * COLS : CHUNK];
  };
  static_assert(STAGES >= 2 && sizeof(Smem) <= shared_budget(BLOCKS));

  // The column, in its tile, of row s of Factor: product j's columns 2q and 2q + 1 are elements 2j
  // and 2j + 1 of lane q's chunk.
  static LOTR_DEVICE int column(int s) {
    const int group = s / GROUP, j = s % GROUP / 8, c = s % 8;
    return group * GROUP + c / 2 * CHUNK + 2 * j + c % 2;
  }
};

// Rows row0 .. of F, dealt to the products.  By plain loads: the first tiles of y are under way
// meanwhile, and the loop waits for nothing but those.
template <class Traits>
LOTR_DEVICE void load_factor(typename Traits::Factor& tile, const Matrix& F, int64_t row0,
                             int64_t rows, int r) {
  using T = typename Traits::T;
  using Chunk = tile::Chunk<T>;
  constexpr int CHUNKS = Traits::Factor::CHUNKS;
#pragma unroll 4
  for (int index = threadIdx.x; index < Traits::COLS * CHUNKS; index += Traits::THREADS) {
    const int s = index / CHUNKS, c = index % CHUNKS;
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
    ptx::store_shared(tile.whole(s, c), value);
  }
}

// The piece's bias, zeros where there is none.
template <class Traits>
LOTR_DEVICE void load_bias(typename Traits::Smem& sm, const ExpandParams& p, int64_t n_begin,
                           int cols) {
  using T = typename Traits::T;
  for (int index = threadIdx.x; index < cols; index += Traits::THREADS) {
    const bool given = p.bias && n_begin + index < p.N;
    const T* from = static_cast<const T*>(p.bias) + (n_begin + index) * p.bias_stride;
    ptx::store_shared(&sm.bias[index], given ? ptx::load(from) : ptx::from_float<T>(0.f));
  }
}

// The strip's rows of u, by one warp.
template <class Tile>
LOTR_DEVICE void load_strip(Tile& tile, const Matrix& u, int64_t row0, int64_t rows, int r) {
  using T = typename Tile::T;
#pragma unroll
  for (int i = 0; i < Tile::ROWS * Tile::CHUNKS / 32; ++i) {
    const int index = i * 32 + int(threadIdx.x) % 32, row = index / Tile::CHUNKS,
              c = index % Tile::CHUNKS;
    const int valid = tile::valid_elements<Tile::CHUNK>(row0 + row, rows, c * Tile::CHUNK, r);
    const T* from = static_cast<const T*>(u.data);
    ptx::cp_async16(tile.chunk(row, c),
                    valid ? from + (row0 + row) * u.row + c * Tile::CHUNK : from,
                    valid * int(sizeof(T)));
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, Traits::BLOCKS_OF_REGISTERS)
    expand_add(const ExpandParams p) {
  using P = typename Traits::Policy;
  using T = typename Traits::T;
  using Chunk = tile::Chunk<T>;
  constexpr int STAGES = Traits::STAGES, COLS = Traits::COLS, CHUNK = Traits::CHUNK,
                GROUP = Traits::GROUP;
  constexpr int STRIP = Traits::STRIP, GROUPS = Traits::GROUPS;
  auto& sm = ptx::shared_storage<typename Traits::Smem>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int n_tiles = tile::count_of(p.n_pieces, int(blockIdx.x));
  const int64_t n_begin = int64_t(tile::begin_of(p.n_pieces, int(blockIdx.x))) * COLS;
  ptx::griddepcontrol_wait();
  auto* const stages = sm.stage[warp];

  // Strips and column tiles of 16-byte rows entirely inside the matrix.
  const bool chunks = p.y.access == Access::vector;
  const int whole_strips = chunks ? int(p.M / STRIP) : 0, whole_n = int((p.N - n_begin) / COLS);
  const int strips = int((p.M + STRIP - 1) / STRIP), strip_step = int(gridDim.y) * Traits::WARPS;
  // From chunk to chunk of a lane: 8 rows down, a group to the right; from tile to tile, from strip
  // to strip.
  const int64_t down = 8 * p.y.row, right = GROUP * p.y.col, to_tile = COLS * p.y.col;
  const int64_t to_strip = -int64_t(strip_step) * STRIP * p.y.row - n_tiles * to_tile;
  const int row_of_lane = lane / 4, col_of_lane = lane % 4 * CHUNK;

  struct Place {
    int strip, n, stage, u;  // u: the stage that holds the strip's u
    T* y;                    // the lane's first chunk
  };
  const auto advance = [&](Place& a) {
    a.stage = a.stage == STAGES - 1 ? 0 : a.stage + 1;
    a.y += to_tile;
    if (++a.n < n_tiles) return;
    a.n = 0, a.strip -= strip_step, a.y += to_strip;
    a.u = a.u == STAGES - 1 ? 0 : a.u + 1;
  };
  const auto inside = [&](const Place& a) { return a.strip < whole_strips && a.n < whole_n; };
  // Elements of the lane's chunk c that are inside, and where it lies.
  const auto valid_at = [&](const Place& a, int c) {
    return tile::valid_elements<CHUNK>(int64_t(a.strip) * STRIP + row_of_lane + c % 2 * 8, p.M,
                                       n_begin + int64_t(a.n) * COLS + c / 2 * GROUP + col_of_lane,
                                       p.N);
  };
  const auto chunk_at = [&](const Place& a, int c) { return a.y + c % 2 * down + c / 2 * right; };

  const int strip0 = strips - 1 - (int(blockIdx.y) * Traits::WARPS + warp);
  const Place first{strip0, 0, 0, 0,
                    static_cast<T*>(p.y.data) + (int64_t(strip0) * STRIP + row_of_lane) * p.y.row +
                        (n_begin + col_of_lane) * p.y.col};
  Place ahead = first;

  const auto fetch_y = [&](const Place& a) {
    auto& to = stages[a.stage].y;
    if (inside(a)) {
#pragma unroll
      for (int c = 0; c < 2 * GROUPS; ++c)
        ptx::cp_async16(&to[c][lane], a.y + c % 2 * down + c / 2 * GROUP);
    } else {
#pragma unroll 1
      for (int c = 0; c < 2 * GROUPS; ++c) {
        const T* chunk = chunk_at(a, c);
        const int valid = valid_at(a, c);
        if (chunks) {
          ptx::cp_async16(&to[c][lane], valid ? chunk : static_cast<const T*>(p.y.data),
                          valid * int(sizeof(T)));
        } else {
          auto* element = reinterpret_cast<T*>(&to[c][lane]);
#pragma unroll 1
          for (int e = 0; e < valid; ++e)
            ptx::store_shared(element + e, ptx::load(chunk + e * p.y.col));
        }
      }
    }
  };
  const auto fetch = [&] {
    if (ahead.strip >= 0) {
      if constexpr (!Traits::FRESH) fetch_y(ahead);
      if (ahead.n == 0) load_strip(stages[ahead.u].u, p.u, int64_t(ahead.strip) * STRIP, p.M, p.r);
      advance(ahead);
    }
    ptx::cp_async_commit();
  };

#pragma unroll 1
  for (int i = 0; i < STAGES - 1; ++i) fetch();
  for (int n = 0; n < n_tiles; ++n)
    load_factor<Traits>(sm.F[n], p.F, n_begin + int64_t(n) * COLS, p.N, p.r);
  if constexpr (Traits::FRESH) load_bias<Traits>(sm, p, n_begin, n_tiles * COLS);
  __syncthreads();  // F is there

  tile::with_dropout(p.dropout, [&](auto dropout) {
#pragma unroll 1
    for (Place here = first; here.strip >= 0; advance(here)) {
      ptx::cp_async_wait<STAGES - 2>();
      __syncwarp();
      fetch();
      float d[1][Traits::NJ][4] = {};
      tile::warp_product<P, Traits::R, tile::Order::along_k, tile::Order::along_k>(
          d, stages[here.u].u, 0, 0, sm.F[here.n], 0);
      if constexpr (decltype(dropout)::value) {
        const uint64_t seed = uint64_t(ptx::load(p.dropout.seed));
        uint32_t keep = 0;  // bits of the lane's chunks
        static_assert(2 * GROUPS * CHUNK <= 32);
#pragma unroll 1
        for (int c = 0; c < 2 * GROUPS; ++c) {
          const uint64_t row = uint64_t(here.strip) * STRIP + row_of_lane + c % 2 * 8;
          const uint64_t col =
              uint64_t(n_begin) + uint64_t(here.n) * COLS + c / 2 * GROUP + col_of_lane;
          keep |= tile::philox_keep<CHUNK>(seed, row * uint64_t(p.N) + col, p.dropout.threshold)
                  << (c * CHUNK);
        }
#pragma unroll
        for (int i = 0; i < 2 * GROUPS * CHUNK; ++i) {
          const int c = i / CHUNK, e = i % CHUNK;
          float& v = d[0][c / 2 * (CHUNK / 2) + e / 2][c % 2 * 2 + e % 2];
          v = keep >> i & 1 ? v : 0.f;
        }
      }
      auto& y = stages[here.stage].y;
      Chunk sum[2 * GROUPS];
#pragma unroll
      for (int c = 0; c < 2 * GROUPS; ++c) {
        // At a ragged edge only the elements inside the matrix were copied here.  The others hold
        // old contents of shared memory.  They are added to as well, without effect on these, and
        // are not stored below.
        if constexpr (Traits::FRESH)
          sum[c] = ptx::load_shared(reinterpret_cast<const Chunk*>(
              &sm.bias[here.n * COLS + c / 2 * GROUP + col_of_lane]));
        else
          sum[c] = ptx::load_shared(&y[c][lane]);
#pragma unroll
        for (int e = 0; e < CHUNK; e += 2) {
          const float (&v)[4] = d[0][c / 2 * (CHUNK / 2) + e / 2];
          const int h = c % 2 * 2;
          float y0, y1;
          ptx::to_floats(sum[c].v + e, y0, y1);
          y0 += v[h] * p.dropout.scale, y1 += v[h + 1] * p.dropout.scale;
          ptx::from_floats(sum[c].v + e, y0, y1);
        }
      }
      if (inside(here)) {
#pragma unroll
        for (int c = 0; c < 2 * GROUPS; ++c)
          ptx::store(reinterpret_cast<Chunk*>(here.y + c % 2 * down + c / 2 * GROUP), sum[c]);
      } else {
#pragma unroll
        for (int c = 0; c < 2 * GROUPS; ++c) ptx::store_shared(&y[c][lane], sum[c]);
#pragma unroll 1
        for (int c = 0; c < 2 * GROUPS; ++c) {
          const int valid = valid_at(here, c);
          const auto* element = reinterpret_cast<const T*>(&y[c][lane]);
#pragma unroll 1
          for (int e = 0; e < valid; ++e)
            ptx::store(chunk_at(here, c) + e * p.y.col, ptx::load_shared(element + e));
        }
      }
    }
  });
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace lotr::kernels
