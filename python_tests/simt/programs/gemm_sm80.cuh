// C [M, N] = A [M, K] B [K, N], bf16, row-major; K and N multiples of 8.  A kernel with most of what sm_80
// offers, and the bugs that a person writes into such a kernel.
//
//   64 x 64 output tile a block, 128 threads, each warp 32 x 32; K in steps of 32 through three stages:
//   copy    0 1 2 | 3   4   5  ...
//   compute       | 0   1   2  ...      the barrier between the two frees the stage that the next copy writes
#pragma once
#include "cuda/ptx/sm80.cuh"

namespace gemm80 {
using namespace lotr;
using bf16 = __nv_bfloat16;

enum Bug : int {
  none,
  no_barrier,            // nobody waits for the others' copies, or frees a stage
  no_wait,               // cp.async.wait_group deleted
  wait_off_by_one,       // one group too few
  no_commit,             // copies in no group
  barrier_in_branch,     // one warp meets the others at another line
  barrier_skipped,       // one warp does not come
  shared_out_of_bounds,  // the stage after the last
  global_out_of_bounds,  // no zero-fill at the edge
  store_out_of_bounds,   // rows beyond M
  uninitialised,         // the padding of the tile is read
  exit_in_flight,        // no wait before the end
  misaligned_copy,       // source of cp.async not at 16 bytes
  partial_warp_mma,      // some lanes skip the product
  shared_too_small,      // the launch gives less than the struct
};

constexpr int BM = 64, BN = 64, BK = 32, PAD = 8, STAGES = 3, THREADS = 128;

struct Smem {
  alignas(16) bf16 a[STAGES][BM][BK + PAD];
  alignas(16) bf16 b[STAGES][BK][BN + PAD];
};

struct Params {
  bf16* C;        // [M, N]
  const bf16* A;  // [M, K]
  const bf16* B;  // [K, N]
  int M, N, K;
  int bug;
};

LOTR_DEVICE void copy(Smem& s, int stage, const Params& p, int m0, int n0, int k0) {
  const int t = threadIdx.x, shift = p.bug == misaligned_copy ? 1 : 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // A: 64 rows of 4 x 16 bytes
    const int chunk = t + i * THREADS, m = chunk / 4, k = chunk % 4 * 8;
    const bool inside = m0 + m < p.M && k0 + k < p.K;
    ptx::cp_async16(&s.a[stage][m][k], p.A + (inside ? size_t(m0 + m) * p.K + k0 + k + shift : 0),
                    inside ? 16 : 0);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // B: 32 rows of 8 x 16 bytes
    const int chunk = t + i * THREADS, k = chunk / 8, n = chunk % 8 * 8;
    const bool inside = (k0 + k < p.K && n0 + n < p.N) || p.bug == global_out_of_bounds;
    ptx::cp_async16(&s.b[stage][k][n], p.B + (inside ? size_t(k0 + k) * p.N + n0 + n : 0), inside ? 16 : 0);
  }
}

LOTR_DEVICE void multiply(float (&acc)[2][4][4], Smem& s, int stage, const Params& p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp / 2 * 32, wn = warp % 2 * 32;
  const int b_stage = p.bug == shared_out_of_bounds ? stage + 1 : stage;
#pragma unroll
  for (int k = 0; k < BK; k += 16) {
    uint32_t a[2][4], b[4][2];
    const int ka = p.bug == uninitialised ? k + PAD : k;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      ptx::ldmatrix_x4(a[i], &s.a[stage][wm + i * 16 + lane % 16][ka + lane / 16 * 8]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t r[4];
      ptx::ldmatrix_x4_trans(r, &s.b[b_stage][k + lane % 16][wn + j * 16 + lane / 16 * 8]);
      b[2 * j][0] = r[0], b[2 * j][1] = r[1], b[2 * j + 1][0] = r[2], b[2 * j + 1][1] = r[3];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (p.bug == partial_warp_mma && lane > 15) continue;
        ptx::mma_m16n8k16<bf16>(acc[i][j], a[i], b[j]);
      }
  }
}

__global__ void __launch_bounds__(THREADS) kernel(Params p) {
  Smem& s = ptx::shared_storage<Smem>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp / 2 * 32, wn = warp % 2 * 32;
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, steps = (p.K + BK - 1) / BK;
  float acc[2][4][4] = {};

#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (stage < steps) copy(s, stage, p, m0, n0, stage * BK);
    if (p.bug != no_commit) ptx::cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    if (p.bug == wait_off_by_one)
      ptx::cp_async_wait<STAGES - 1>();
    else if (p.bug != no_wait)
      ptx::cp_async_wait<STAGES - 2>();
    if (p.bug == barrier_in_branch && warp == 3)
      __syncthreads();
    else if (p.bug != no_barrier && !(p.bug == barrier_skipped && warp == 3))
      __syncthreads();
    const int next = step + STAGES - 1;
    if (next < steps) copy(s, next % STAGES, p, m0, n0, next * BK);
    if (p.bug != no_commit) ptx::cp_async_commit();
    multiply(acc, s, step % STAGES, p);
  }
  if (p.bug == exit_in_flight) copy(s, 0, p, m0, n0, 0);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int m = m0 + wm + i * 16 + lane / 4 + h * 8, n = n0 + wn + j * 8 + lane % 4 * 2;
        if ((m < p.M || p.bug == store_out_of_bounds) && n < p.N)
          ptx::store(reinterpret_cast<__nv_bfloat162*>(p.C + size_t(m) * p.N + n),
                     __floats2bfloat162_rn(acc[i][j][2 * h], acc[i][j][2 * h + 1]));
      }
}

inline void run(const Params& p, ptx::stream_t stream = nullptr) {
  const dim3 grid((p.N + BN - 1) / BN, (p.M + BM - 1) / BM);
  const size_t smem = p.bug == shared_too_small ? sizeof(Smem) / 2 : sizeof(Smem);
  ptx::launch<kernel>({grid, dim3(THREADS), smem, stream, dim3(1, 1, 1), "gemm_sm80"}, p);
}

}  // namespace gemm80
