// The two ways in which the warpgroups of gemm_lotr.cuh touch global memory: u from block to block, and y.
//
// Fragments: thread t of a warpgroup holds rows 16 (t / 32) + t % 32 / 4 and the one 8 further down, of each
// 8 columns the two from 2 (t % 4) on.  The accumulators of u = x A have the layout of the first operand
// of a product by u, so u never passes through shared memory.
#pragma once
#include "gemm_lotr_traits.cuh"

namespace lotr::kernels {

template <class T>
LOTR_DEVICE uint32_t pack(float a, float b) {
  struct alignas(2 * sizeof(T)) Pair {
    T a, b;
  };
  return ptx::bit_cast<uint32_t>(Pair{ptx::from_float<T>(a), ptx::from_float<T>(b)});
}

template <class T>
LOTR_DEVICE void unpack(uint32_t word, float& a, float& b) {
  struct alignas(2 * sizeof(T)) Pair {
    T a, b;
  };
  const Pair pair = ptx::bit_cast<Pair>(word);
  a = ptx::to_float(pair.a), b = ptx::to_float(pair.b);
}

// ---- u: 64 rows of a warpgroup, kept in the layout of the first operand, 16 ranks a step ----

template <class Traits>
class Rows {
  using T = typename Traits::T;

 public:
  uint32_t operand[Traits::R / 16][4];

  // Of tile row `tile` (128 rows).
  LOTR_DEVICE Rows(const GemmLotrParams& p, int tile) : p_(p) {
    const int t = threadIdx.x % 128, group = threadIdx.x / 128;
    row_ = tile * Traits::BM + 64 * group + t / 32 * 16 + t % 32 / 4;
    flag_ = p.sync + GEMM_LOTR_FLAGS + Traits::GROUPS * tile + group;
  }

  // A scout: stores the sums, then releases the flag for all that wait for these rows.
  LOTR_DEVICE void publish(const float (&sum)[Traits::R / 2], uint32_t epoch) {
    each([&](int step, int i, int rank, int h) {
      const int j = 4 * (2 * step + i / 2) + 2 * h;
      const float a = rank < p_.r ? sum[j] : 0.f, b = rank + 1 < p_.r ? sum[j + 1] : 0.f;
      if (row_ + 8 * h < p_.M && rank < padded()) ptx::store(place(rank, h), pack<T>(a, b));
    });
    ptx::barrier_sync(1 + threadIdx.x / 128, 128);
    if (threadIdx.x % 128 == 0) ptx::store_release(flag_, int32_t(epoch));
  }

  // A tile: waits for the scout, then loads.
  LOTR_DEVICE void acquire(uint32_t epoch) {
    if (threadIdx.x % 32 == 0) ptx::wait_equal(flag_, int32_t(epoch));
    __syncwarp();
    each([&](int step, int i, int rank, int h) {
      operand[step][i] = row_ + 8 * h < p_.M && rank < padded() ? ptx::load_cg(place(rank, h)) : 0u;
    });
  }

 private:
  LOTR_DEVICE int padded() const { return (p_.r + 7) / 8 * 8; }
  LOTR_DEVICE uint32_t* place(int rank, int h) const {
    return reinterpret_cast<uint32_t*>(static_cast<T*>(p_.u) + int64_t(row_ + 8 * h) * p_.u_row + rank);
  }
  // Word i of step: ranks `rank` and the next, of the upper (h = 0) or the lower row.
  template <class F>
  static LOTR_DEVICE void each(F f) {
#pragma unroll
    for (int step = 0; step < Traits::R / 16; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(step, i, 16 * step + i / 2 * 8 + int(threadIdx.x % 4) * 2, i % 2);
  }

  const GemmLotrParams& p_;
  int row_;
  int32_t* flag_;
};

// ---- y ----

// The tile's bias into shared memory, by the warpgroup that reads it after its next barrier.
template <class Traits>
LOTR_DEVICE void load_bias(typename Traits::T* to, int n0, const GemmLotrParams& p) {
  using T = typename Traits::T;
  const auto* bias = static_cast<const T*>(p.bias);
  for (int n = threadIdx.x % 128; n < Traits::BN; n += 128)
    ptx::store_shared(to + n, bias && n0 + n < p.N ? ptx::load_nc(bias + n0 + n) : ptx::from_float<T>(0.f));
}

// Words of four neighbouring blocks of 8 columns, two columns a lane: afterwards lane q of four holds the
// eight columns of block q.
LOTR_DEVICE void transpose_quad(uint32_t (&v)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = ptx::shfl_xor(odd ? v[i] : v[i + 1], 1);
    if (odd)
      v[i] = other;
    else
      v[i + 1] = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = ptx::shfl_xor(high ? v[i] : v[i + 2], 2);
    if (high)
      v[i] = other;
    else
      v[i + 2] = other;
  }
}

// d + bias to y, 16 bytes a store; 2 at the ragged edge and where rows of y are not aligned.
template <class Traits>
LOTR_DEVICE void store_tile(const float (&d)[Traits::BN / 2], const typename Traits::T* bias, int m0, int n0,
                            const GemmLotrParams& p) {
  using T = typename Traits::T;
  const int t = threadIdx.x % 128, q = t % 4;
  const int row = m0 + 64 * int(threadIdx.x / 128) + t / 32 * 16 + t % 32 / 4;
#pragma unroll
  for (int j = 0; j < Traits::BN / 8; j += 4)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float b0, b1;
        unpack<T>(ptx::load_shared(reinterpret_cast<const uint32_t*>(bias + 8 * (j + i) + 2 * q)), b0, b1);
        word[i] = pack<T>(d[4 * (j + i) + 2 * h] + b0, d[4 * (j + i) + 2 * h + 1] + b1);
      }
      transpose_quad(word);
      const int m = row + 8 * h, n = n0 + 8 * (j + q);
      if (m >= p.M) continue;
      T* y = static_cast<T*>(p.y) + int64_t(m) * p.y_row + n;
      if (p.y_vector && n + 8 <= p.N) {
        ptx::store(reinterpret_cast<uint4*>(y), uint4{word[0], word[1], word[2], word[3]});
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (n + e < p.N)
            ptx::store(reinterpret_cast<uint16_t*>(y + e), uint16_t(word[e / 2] >> 16 * (e % 2)));
      }
    }
}

}  // namespace lotr::kernels
