// row_core:       h_i = s a_t(i) G_c(i)       a [tokens, r_in], G_c [r_in, r_out], h [rows, r_out]
//                 and in the backward pass row_du_i = s g_i G_c(i)^T
// row_ends:       the ends of the rows of each core, or token, among the sorted rows
// row_core_grad:  dG_c = s sum of u_t(i)^T g_i over the rows of c       dG [cores, r_in, r_out]
// sum_rows:       du_t = sum of row_du_i over the rows of t        row_du [rows, r_in], float32
//
// Each row is multiplied with a core of r x r: float32 fused multiply-adds on the tiles of
// small_product.cuh keep up with memory. With few rows latency dominates.
//
// Grid     row_core       x: tiles of up to 32 consecutive rows, y: tiles of r_out. A block
//                         processes the runs of its rows that have the same core, which passes
//                         through shared memory once per run. If there are few rows, rows.cu gives
//                         a block fewer of them.
//          row_core_grad  one block for each core, tile of the core and split of its rows
//          row_ends       x: 128 keys, one thread per key
//          sum_rows       x: 128 elements of du, one thread per element
// Bytes    row_core       a r_out / 16 times, the core of each run once, h once
//          row_core_grad  u r_out / 16 times, g r_in / 32 times, dG once. With s splits, dG is
//                         written s times as parts and read s times by sum_parts.
//          sum_rows       row_du once, du once
// Sums     float32, over the rows of a core or token in their order: no atomics, the same bits
//          every time.
//
// The host does not read an index, so it cannot check one. If a core is below -1 or not below
// `cores`, or a token does not exist, the row is NaN in h and is skipped in every gradient.
#pragma once
#include "small_product.cuh"

namespace lotr::kernels {

struct RowCoreTraits {
  struct Smem {
    SmallTraits::Smem product;
    int core[SMALL_ROWS];        // NONE, MISSING or a core
    int64_t source[SMALL_ROWS];  // row of a
  };
};
constexpr int NONE = -1, MISSING = -2;

// The first place of `sorted` with a value above `value`, or `count`.
template <class T>
LOTR_DEVICE int64_t place_above(const T* sorted, int64_t count, int64_t value) {
  int64_t low = 0;
  for (int64_t high = count; low < high;) {
    const int64_t middle = (low + high) / 2;
    if (int64_t(ptx::load(sorted + middle)) <= value)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

LOTR_DEVICE int core_of(const RowIndex& x, int64_t row) {
  if (!x.core) {
    const int64_t core = place_above(x.ends, x.cores, row);
    return core < x.cores ? int(core) : NONE;
  }
  const int64_t core = ptx::load(x.core + row);
  return core == NONE || (core >= 0 && core < x.cores) ? int(core) : MISSING;
}

template <Order OF_CORES>
__global__ void __launch_bounds__(SmallTraits::THREADS, SmallTraits::BLOCKS)
    row_core(const RowCoreParams p) {
  auto& sm = ptx::shared_storage<RowCoreTraits::Smem>();
  const int64_t row0 = int64_t(blockIdx.x) * p.rows_of_block;
  const int64_t left = p.index.rows - row0;
  const int rows = left < p.rows_of_block ? int(left) : p.rows_of_block;
  const int j0 = blockIdx.y * SmallTraits::COLS;
  ptx::griddepcontrol_wait();
  for (int i = threadIdx.x; i < rows; i += SmallTraits::THREADS) {
    const int64_t token = p.index.token ? ptx::load(p.index.token + row0 + i) : row0 + i;
    const bool exists = token >= 0 && token < p.index.tokens;
    ptx::store_shared(&sm.core[i], exists ? core_of(p.index, row0 + i) : MISSING);
    ptx::store_shared(&sm.source[i], token);
  }
  __syncthreads();
  // Rounds float32 cores to half activations' type, as autocast does.
  const auto round = [&](float value) {
    if (p.a_type == DType::bfloat16) return ptx::to_float(ptx::from_float<__nv_bfloat16>(value));
    if (p.a_type == DType::float16) return ptx::to_float(ptx::from_float<__half>(value));
    return value;
  };
#pragma unroll 1
  for (int begin = 0; begin < rows;) {
    const int core = ptx::load_shared(&sm.core[begin]);
    int end = begin + 1;
    while (end < rows && ptx::load_shared(&sm.core[end]) == core) ++end;
    float d[SmallTraits::PER_THREAD] = {};
    if (core >= 0) {
      small_product<Order::along_k, OF_CORES>(
          d, sm.product, p.r_in,
          [&](int row, int64_t k) {
            return begin <= row && row < end
                       ? read_float(p.a, p.a_type, ptx::load_shared(&sm.source[row]), k)
                       : 0.f;
          },
          [&](int64_t k, int c) {
            return j0 + c < p.r_out
                       ? round(read_float(p.cores, p.core_type, k, j0 + c, core * p.core_stride))
                       : 0.f;
          });
    }
    each_output([&](int i, int row, int c) {
      if (begin <= row && row < end && j0 + c < p.r_out)
        write_float(p.h.data, p.h_type, (row0 + row) * p.h.row + (j0 + c) * p.h.col,
                    core == MISSING ? p.missing : d[i] * p.scale);
    });
    begin = end;
  }
  ptx::griddepcontrol_launch_dependents();
}

static __global__ void __launch_bounds__(SmallTraits::THREADS) row_ends(const RowEndsProblem p) {
  const int64_t key = int64_t(blockIdx.x) * SmallTraits::THREADS + threadIdx.x - 1;
  ptx::griddepcontrol_wait();
  if (key < p.bound) ptx::store(p.ends + key + 1, int32_t(place_above(p.keys, p.rows, key)));
  ptx::griddepcontrol_launch_dependents();
}

// Sets begin and end to the places [begin, end) of a key.
LOTR_DEVICE void segment(const Segments& s, int64_t key, int64_t& begin, int64_t& end) {
  const int64_t last = s.from_zero ? key : key + 1;
  begin = last > 0 ? ptx::load(s.ends + last - 1) : 0;
  end = ptx::load(s.ends + last);
}
LOTR_DEVICE int64_t row_of(const Segments& s, int64_t place) {
  return s.order ? ptx::load(s.order + place) : place;
}

static __global__ void __launch_bounds__(SmallTraits::THREADS, SmallTraits::BLOCKS)
    row_core_grad(const RowCoreGradParams p) {
  constexpr int ROWS = SmallTraits::ROWS, COLS = SmallTraits::COLS, STEP = SmallTraits::STEP;
  auto& sm = ptx::shared_storage<SmallTraits::Smem>();
  const unsigned tiles_out = unsigned(p.r_out + COLS - 1) / COLS;
  const unsigned tiles = unsigned(p.r_in + ROWS - 1) / ROWS * tiles_out;
  const unsigned core_and_tile = blockIdx.x / unsigned(p.splits);
  const unsigned core_tile = core_and_tile % tiles;
  const int64_t core = core_and_tile / tiles;
  const int split = int(blockIdx.x % unsigned(p.splits));
  const int i0 = int(core_tile / tiles_out) * ROWS;
  const int j0 = int(core_tile % tiles_out) * COLS;
  ptx::griddepcontrol_wait();
  int64_t begin, end;
  segment(p.of_core, core, begin, end);
  // Every split but the last ones has `share` rows, a multiple of STEP.
  const int64_t share = (end - begin + p.splits * STEP - 1) / (p.splits * STEP) * STEP;
  begin += split * share;
  if (begin + share < end) end = begin + share;
  const int64_t rows = begin < end ? end - begin : 0;
  float d[SmallTraits::PER_THREAD] = {};
  small_product<Order::across_k, Order::across_k>(
      d, sm, rows,
      [&](int row, int64_t k) {
        if (i0 + row >= p.r_in) return 0.f;
        const int64_t i = row_of(p.of_core, begin + k);
        const int64_t t = p.token ? ptx::load(p.token + i) : i;
        return t >= 0 && t < p.tokens ? read_float(p.u, p.type, t, i0 + row) : 0.f;
      },
      [&](int64_t k, int c) {
        if (j0 + c >= p.r_out) return 0.f;
        const int64_t i = row_of(p.of_core, begin + k);
        const int64_t t = p.token ? ptx::load(p.token + i) : i;
        return t >= 0 && t < p.tokens ? read_float(p.g, p.type, i, j0 + c) : 0.f;
      });
  each_output([&](int i, int row, int c) {
    if (i0 + row < p.r_in && j0 + c < p.dcores_row)
      ptx::store(
          p.dcores + split * p.dcores_part + (core * p.r_in + i0 + row) * p.dcores_row + j0 + c,
          d[i] * p.scale);
  });
  ptx::griddepcontrol_launch_dependents();
}

static __global__ void __launch_bounds__(SmallTraits::THREADS) sum_rows(const SumRowsProblem p) {
  const int64_t element = int64_t(blockIdx.x) * SmallTraits::THREADS + threadIdx.x;
  const int64_t token = element / p.r;
  const int64_t j = element % p.r;
  ptx::griddepcontrol_wait();
  if (token < p.tokens) {
    int64_t begin, end;
    segment(p.of_token, token, begin, end);
    float sum = 0.f;
    for (int64_t place = begin; place < end; ++place)
      sum += ptx::load(p.row_du + row_of(p.of_token, place) * p.r + j);
    write_float(p.du.data, p.du_type, token * p.du.row + j * p.du.col, sum);
  }
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace lotr::kernels
