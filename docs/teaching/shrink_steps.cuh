// Five kernels for u [M, 16] = x [M, K] A [K, 16], from a naive one to the structure of
// csrc/cuda/kernels/shrink.cuh. x and A are bfloat16, sums are float32. docs/teaching/shrink.md
// explains the steps, and shrink_steps.cpp runs them.
#pragma once
#include "cuda/tile/mma.cuh"
#include "cuda/tile/shared.cuh"

namespace steps {
using namespace lotr;
using bf16 = __nv_bfloat16;
constexpr int R = 16;

struct Params {
  const bf16* x;  // [M, K], K a multiple of 64
  const bf16* A;  // [K, R]
  float* u;       // [M, R]
  int M, K;
};

// ---- 1: a thread for each element of u ----

__global__ void __launch_bounds__(256) naive(const Params p) {
  const int m = int(blockIdx.x) * 16 + int(threadIdx.x) / R;
  const int j = int(threadIdx.x) % R;
  if (m >= p.M) return;
  float sum = 0.f;
  for (int k = 0; k < p.K; ++k)
    sum = fmaf(ptx::to_float(ptx::load(p.x + size_t(m) * p.K + k)),
               ptx::to_float(ptx::load(p.A + size_t(k) * R + j)), sum);
  ptx::store(p.u + size_t(m) * R + j, sum);
}

// ---- 2: a warp for each token; a lane loads 16 bytes at a time ----

// Converts the eight elements of a 16-byte chunk. A bfloat16 is the upper half of a float.
LOTR_DEVICE void unpack(float (&to)[8], const uint4& chunk) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = ptx::as_float(words[i] << 16);
    to[2 * i + 1] = ptx::as_float(words[i] & 0xffff0000u);
  }
}

__global__ void __launch_bounds__(256) wide(const Params p) {
  const int lane = int(threadIdx.x) % 32;
  const int m = int(blockIdx.x) * 8 + int(threadIdx.x) / 32;
  if (m >= p.M) return;  // all lanes of the warp
  float sum[R] = {};
  for (int k = 8 * lane; k < p.K; k += 256) {
    float x[8];
    unpack(x, ptx::load(reinterpret_cast<const uint4*>(p.x + size_t(m) * p.K + k)));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint4* row = reinterpret_cast<const uint4*>(p.A + size_t(k + i) * R);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float a[8];
        unpack(a, ptx::load(row + half));
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[8 * half + j] = fmaf(x[i], a[j], sum[8 * half + j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < R; ++j) {
    for (int mask = 16; mask > 0; mask /= 2) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], mask);
    if (lane == j) ptx::store(p.u + size_t(m) * R + j, sum[j]);
  }
}

// ---- 3: a tile of 64 tokens in shared memory, so that A is read once for all of them ----

constexpr int ROWS = 64, COLS = 64;  // of a tile of x

struct PlainSmem {
  alignas(16) bf16 x[ROWS][COLS];
  alignas(16) bf16 A[COLS][R];
};

__global__ void __launch_bounds__(256) tiled(const Params p) {
  PlainSmem& s = ptx::shared_storage<PlainSmem>();
  const int t = int(threadIdx.x);
  const int m0 = int(blockIdx.x) * ROWS;
  const int row = t / 4;
  const int j = t % 4 * 4;  // the first of this thread's four sums, all of one token
  float sum[4] = {};
  for (int k0 = 0; k0 < p.K; k0 += COLS) {
    for (int chunk = t; chunk < ROWS * COLS / 8; chunk += 256) {
      const int m = chunk / 8;
      const int k = chunk % 8 * 8;
      const uint4 zeros{};
      const bool inside = m0 + m < p.M;
      ptx::store_shared(
          reinterpret_cast<uint4*>(&s.x[m][k]),
          inside ? ptx::load(reinterpret_cast<const uint4*>(p.x + size_t(m0 + m) * p.K + k0 + k))
                 : zeros);
    }
    if (t < COLS * R / 8)  // one 16-byte chunk per thread, two per row of A
      ptx::store_shared(reinterpret_cast<uint4*>(&s.A[t / 2][t % 2 * 8]),
                        ptx::load(reinterpret_cast<const uint4*>(p.A + size_t(k0) * R) + t));
    __syncthreads();  // the tile is complete
    for (int k = 0; k < COLS; ++k) {
      const float x = ptx::to_float(ptx::load_shared(&s.x[row][k]));
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sum[i] = fmaf(x, ptx::to_float(ptx::load_shared(&s.A[k][j + i])), sum[i]);
    }
    __syncthreads();  // all threads have read it, so the next one may replace it
  }
  if (m0 + row < p.M)
    ptx::store(reinterpret_cast<float4*>(p.u + size_t(m0 + row) * R + j),
               float4{sum[0], sum[1], sum[2], sum[3]});
}

// ---- 4: the same tile, swizzled; multiplied by tensor cores ----

struct Stage {
  tile::Shared<bf16, ROWS, COLS> x;
  tile::Shared<bf16, COLS, R> A;
};
using Product = tile::Half<bf16>;                       // bfloat16 operands, float32 sums
constexpr int WARPS = ROWS / 16, THREADS = 32 * WARPS;  // a warp multiplies 16 tokens

// Stores d[0][nj], 16 tokens x 8 columns per nj, from the registers in which mma.sync leaves them.
LOTR_DEVICE void store_sums(const Params& p, const float (&d)[1][2][4], int m0) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int nj = 0; nj < 2; ++nj)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = m0 + lane / 4 + 8 * half;
      const int j = 8 * nj + lane % 4 * 2;
      if (m < p.M)
        ptx::store(reinterpret_cast<float2*>(p.u + size_t(m) * R + j),
                   float2{d[0][nj][2 * half], d[0][nj][2 * half + 1]});
    }
}

__global__ void __launch_bounds__(THREADS) tensor_cores(const Params p) {
  Stage& s = ptx::shared_storage<Stage>();
  const int t = int(threadIdx.x);
  const int m0 = int(blockIdx.x) * ROWS;
  float d[1][2][4] = {};
  for (int k0 = 0; k0 < p.K; k0 += COLS) {
    for (int chunk = t; chunk < ROWS * COLS / 8; chunk += THREADS) {
      const int m = chunk / 8;
      const int c = chunk % 8;
      const uint4 zeros{};
      const bool inside = m0 + m < p.M;
      ptx::store_shared(
          reinterpret_cast<uint4*>(s.x.chunk(m, c)),
          inside ? ptx::load(reinterpret_cast<const uint4*>(p.x + size_t(m0 + m) * p.K + k0) + c)
                 : zeros);
    }
    ptx::store_shared(reinterpret_cast<uint4*>(s.A.chunk(t / 2, t % 2)),
                      ptx::load(reinterpret_cast<const uint4*>(p.A + size_t(k0) * R) + t));
    __syncthreads();
    tile::warp_product<Product, COLS, tile::Order::along_k, tile::Order::across_k>(
        d, s.x, t / 32 * 16, 16, s.A, 0);  // x from row t / 32 * 16, A from column 0
    __syncthreads();
  }
  store_sums(p, d, m0 + t / 32 * 16);
}

// ---- 5: a ring of stages: three tiles are in flight while the fourth is multiplied ----

constexpr int STAGES = 4;
struct RingSmem {
  Stage stage[STAGES];
};

__global__ void __launch_bounds__(THREADS) ring(const Params p) {
  RingSmem& s = ptx::shared_storage<RingSmem>();
  const int t = int(threadIdx.x);
  const int m0 = int(blockIdx.x) * ROWS;
  const int count = p.K / COLS;
  const auto fetch = [&](int step) {
    if (step < count) {
      Stage& stage = s.stage[step % STAGES];
      for (int chunk = t; chunk < ROWS * COLS / 8; chunk += THREADS) {
        const int m = chunk / 8;
        const int c = chunk % 8;
        const bool inside = m0 + m < p.M;
        ptx::cp_async16(stage.x.chunk(m, c),
                        p.x + (inside ? size_t(m0 + m) * p.K + step * COLS + c * 8 : 0),
                        inside ? 16 : 0);
      }
      ptx::cp_async16(stage.A.chunk(t / 2, t % 2), p.A + size_t(step) * COLS * R + t * 8);
    }
    ptx::cp_async_commit();  // an empty group at the end keeps the count of groups right
  };
  float d[1][2][4] = {};
  for (int step = 0; step < STAGES - 1; ++step) fetch(step);
  for (int step = 0; step < count; ++step) {
    ptx::cp_async_wait<STAGES - 2>();  // this thread's copies of the tile have landed
    __syncthreads();           // so have all threads' copies, and the previous tile is multiplied
    fetch(step + STAGES - 1);  // into the stage of the previous tile
    Stage& stage = s.stage[step % STAGES];
    tile::warp_product<Product, COLS, tile::Order::along_k, tile::Order::across_k>(
        d, stage.x, t / 32 * 16, 16, stage.A, 0);  // x from row t / 32 * 16, A from column 0
  }
  store_sums(p, d, m0 + t / 32 * 16);
}

}  // namespace steps
