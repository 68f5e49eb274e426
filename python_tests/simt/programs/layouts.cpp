// Runs each matrix instruction once on numbers that tell where they came from and prints registers and memory
// as JSON; test_layouts.py knows from the PTX manual what they must be.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/ptx/sm90.cuh"
#include "harness.h"

namespace {
using namespace lotr;

// ---- printing ----

template <class T>
void print(const char* name, const std::vector<T>& values, bool last = false) {
  printf("  \"%s\": [", name);
  for (size_t i = 0; i < values.size(); ++i) printf("%s%.17g", i ? "," : "", double(values[i]));
  printf("]%s\n", last ? "" : ",");
}

// ---- ldmatrix ----

struct Tiles {
  alignas(16) uint16_t tile[4][8][8];
};

__global__ void ldmatrix_kernel(uint32_t* out) {  // [5 kinds][32 lanes][4]
  Tiles& s = ptx::shared_storage<Tiles>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) (&s.tile[0][0][0])[i] = uint16_t(i);
  __syncwarp();
  const void* row = s.tile[lane / 8][lane % 8];
  uint32_t r[5][4] = {}, pair[2];
  ptx::ldmatrix_x4(r[0], row);
  ptx::ldmatrix_x4_trans(r[1], row);
  ptx::ldmatrix_x2(pair, row);
  r[2][0] = pair[0], r[2][1] = pair[1];
  ptx::ldmatrix_x2_trans(pair, row);
  r[3][0] = pair[0], r[3][1] = pair[1];
  for (int i = 0; i < 4; ++i) r[4][i] = ptx::movmatrix_trans(r[0][i]);
  for (int kind = 0; kind < 5; ++kind)
    for (int i = 0; i < 4; ++i) out[(kind * 32 + lane) * 4 + i] = r[kind][i];
}

// ---- mma.sync ----

struct Registers {
  uint32_t a[4], b[2];
  float c[4];
};

template <int KIND>  // 0: bf16, 1: fp16, 2: tf32
__global__ void mma_kernel(const Registers* in, float* out) {
  const Registers& r = in[threadIdx.x];
  uint32_t a[4] = {r.a[0], r.a[1], r.a[2], r.a[3]}, b[2] = {r.b[0], r.b[1]};
  float d[4] = {r.c[0], r.c[1], r.c[2], r.c[3]};
  if constexpr (KIND == 0)
    ptx::mma_m16n8k16<__nv_bfloat16>(d, a, b);
  else if constexpr (KIND == 1)
    ptx::mma_m16n8k16<__half>(d, a, b);
  else
    ptx::mma_m16n8k8_tf32(d, a, b);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}

// The registers' 16-bit (or 32-bit) elements as numbers, in the manual's order a0, a1, ...
template <int KIND>
void mma(const char* name) {
  harness::Numbers number{unsigned(KIND) + 11};
  std::vector<Registers> in(32);
  std::vector<float> a, b, c, d(128);
  const auto word = [&](std::vector<float>& elements) {
    if (KIND == 2) {
      const float x = number() + 0x1p-9f;
      elements.push_back(x);
      uint32_t bits;
      memcpy(&bits, &x, 4);
      return bits | 0xfffu;  // the low bits must not matter
    }
    uint32_t bits = 0;
    for (int h = 0; h < 2; ++h) {
      const float x = number();
      elements.push_back(x);
      uint16_t half;
      if (KIND == 0) {
        const __nv_bfloat16 v = __float2bfloat16(x);
        memcpy(&half, &v, 2);
      } else {
        const __half v = __float2half(x);
        memcpy(&half, &v, 2);
      }
      bits |= uint32_t(half) << 16 * h;
    }
    return bits;
  };
  for (Registers& r : in) {
    for (uint32_t& x : r.a) x = word(a);
    for (uint32_t& x : r.b) x = word(b);
    for (float& x : r.c) c.push_back(x = number());
  }
  ptx::launch({dim3(1), dim3(32), 0, nullptr, dim3(1, 1, 1), "mma"}, mma_kernel<KIND>, in.data(), d.data());
  printf("\"%s\": {\n", name);
  print("a", a);
  print("b", b);
  print("c", c);
  print("d", d, true);
  printf("},\n");
}

// Every 16-bit pattern through the product with 1: what the executor takes it for.
__global__ void convert_kernel(const uint16_t* in, float* out) {
  uint32_t a[4] = {in[threadIdx.x], 0, 0, 0}, b[2] = {0x3c003c00u, 0};
  float d[4] = {};
  ptx::mma_m16n8k16<__half>(d, a, b);
  out[threadIdx.x] = d[0];
}

void convert() {
  // lane 4 g holds element (g, 0); the other lanes' elements are 0
  const std::vector<uint16_t> halves = {0x0001, 0x03ff, 0x0400, 0x3c01, 0x7bff, 0x8001, 0xc000, 0x3555};
  std::vector<uint16_t> in(32);
  std::vector<float> out(32), result;
  for (size_t g = 0; g < 8; ++g) in[4 * g] = halves[g];
  ptx::launch({dim3(1), dim3(32), 0, nullptr, dim3(1, 1, 1), "convert"}, convert_kernel, in.data(),
              out.data());
  for (size_t g = 0; g < 8; ++g) result.push_back(out[4 * g]);
  printf("\"halves\": {\n");
  print("bits", halves);
  print("value", result, true);
  printf("},\n");
}

void tf32() {
  const std::vector<float> x = {1.f,         1.00048828125f, 1.000488f, -1.00048828125f,
                                3.14159274f, 1e-40f,         65504.f,   -0.f};
  std::vector<float> y;
  for (float v : x) y.push_back(ptx::as_float(ptx::to_tf32(v)));
  printf("\"tf32\": {\n");
  print("x", x);
  print("y", y, true);
  printf("},\n");
}

// ---- bulk copies and wgmma ----

struct alignas(1024) Wide {
  __nv_bfloat16 a[64][64], b[64][64];
  uint64_t full;
};

__global__ void wgmma_kernel(const __grid_constant__ ptx::TensorMap A,
                             const __grid_constant__ ptx::TensorMap B, uint16_t* shared, float* out) {
  Wide& s = ptx::shared_storage<Wide>();
  const int t = threadIdx.x;
  if (t == 0) {
    ptx::mbarrier_init(&s.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&s.full, sizeof s.a + sizeof s.b);
    ptx::tma_load_2d(s.a, &A, 64, 3, &s.full);
    ptx::tma_load_2d(s.b, &B, 0, 0, &s.full);
  }
  __syncthreads();
  ptx::mbarrier_wait(&s.full, 0);
  for (int i = t; i < 64 * 64; i += 128) memcpy(&shared[i], reinterpret_cast<char*>(s.a) + 2 * i, 2);
  float d[32];
  for (int i = 0; i < 32; ++i) d[i] = float(i);
  ptx::wgmma_fence();
  for (int k = 0; k < 64; k += 16)
    ptx::wgmma<__nv_bfloat16, 64>(d, ptx::swizzled_descriptor(&s.a[0][k]),
                                  ptx::swizzled_descriptor(&s.b[0][k]), true);
  ptx::wgmma_commit();
  const float early = d[5];
  out[128 * 32 + t] = early != early;
  ptx::wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) out[t * 32 + i] = d[i];
}

void wgmma() {
  constexpr uint32_t ROWS = 70, COLS = 136;  // the box at (row 3, col 64) is inside, but for its last columns
  alignas(16) static __nv_bfloat16 A[ROWS * COLS], B[64 * 64];
  std::vector<float> a, b, d(128 * 33);
  std::vector<uint16_t> shared(64 * 64);
  harness::Numbers number{5};
  for (__nv_bfloat16& x : A) a.push_back(__bfloat162float(x = __float2bfloat16(number())));
  for (__nv_bfloat16& x : B) b.push_back(__bfloat162float(x = __float2bfloat16(number())));
  ptx::launch({dim3(1), dim3(128), sizeof(Wide), nullptr, dim3(1, 1, 1), "wgmma"}, wgmma_kernel,
              ptx::tensor_map_2d(A, ROWS, COLS - 4, COLS, 64), ptx::tensor_map_2d(B, 64, 64, 64, 64),
              shared.data(), d.data());
  std::vector<float> in_shared;
  for (uint16_t bits : shared) {
    __nv_bfloat16 v;
    memcpy(static_cast<void*>(&v), &bits, 2);
    in_shared.push_back(__bfloat162float(v));
  }
  printf("\"wgmma\": {\n");
  print("a", a);
  print("b", b);
  print("shared", in_shared);
  print("d", d, true);
  printf("},\n");
}

// ---- wgmma of every n, operands in registers and MN-major ----

enum class First { shared, across, registers };  // where a is: in shared memory K-major or MN-major

#ifdef NARROW_FROM_WIDE  // a bug: operands of 16 or 32 n in rows of 64
constexpr int NARROWEST = 64;
#else
constexpr int NARROWEST = 16;
#endif

template <int N>
struct alignas(1024) Operands {
  static constexpr int WIDTH = N > 64 ? 64 : N < NARROWEST ? NARROWEST : N;
  __half a[64][64];                              // K-major, or across: [k][m]
  __half b[N < 64 ? 64 : N][64];                 // K-major: [n][k]
  __half c[(N + WIDTH - 1) / WIDTH][64][WIDTH];  // MN-major: panels of WIDTH n, [k][n]
  uint64_t full;
};

// d = a b^T over all 64 k in the first group, e over the first 16 k in the second, which is still in flight
// when d is read; early: whether e was NaN then.  shared: the elements of c as they lie.
template <int N, bool B_MN, First FIRST>
__global__ void every_n_kernel(const __grid_constant__ ptx::TensorMap A,
                               const __grid_constant__ ptx::TensorMap B,
                               const __grid_constant__ ptx::TensorMap C, const uint32_t* registers,
                               float* out, uint16_t* shared) {
  constexpr int WIDTH = Operands<N>::WIDTH;
  Operands<N>& s = ptx::shared_storage<Operands<N>>();
  const int t = threadIdx.x;
  if (t == 0) {
    ptx::mbarrier_init(&s.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&s.full, sizeof s.a + sizeof s.b + sizeof s.c);
    ptx::tma_load_2d(s.a, &A, 0, 0, &s.full);
    ptx::tma_load_2d(s.b, &B, 0, 0, &s.full);
    for (int n = 0; n < N; n += WIDTH) ptx::tma_load_2d(s.c[n / WIDTH], &C, n, 0, &s.full);
  }
  __syncthreads();
  ptx::mbarrier_wait(&s.full, 0);
  for (int i = t; i < N * 64; i += 128) memcpy(&shared[i], reinterpret_cast<char*>(s.c) + 2 * i, 2);
  float d[N / 2], e[N / 2];
  uint32_t a[4][4];
  memcpy(a, registers + t * 16, sizeof a);
  const auto multiply = [&](float (&sums)[N / 2], int k) {
    constexpr ptx::Major B_MAJOR = B_MN ? ptx::Major::mn : ptx::Major::k;
    const uint64_t b = B_MN ? ptx::swizzled_descriptor_mn<WIDTH>(&s.c[0][k][0], sizeof s.c[0])
                            : ptx::swizzled_descriptor(&s.b[0][k]);
    if constexpr (FIRST == First::registers)
      ptx::wgmma<__half, N, B_MAJOR>(sums, a[k / 16], b, k > 0);
    else if constexpr (FIRST == First::across)
      ptx::wgmma<__half, N, B_MAJOR, ptx::Major::mn>(sums, ptx::swizzled_descriptor_mn(s.a[k], 0), b, k > 0);
    else
      ptx::wgmma<__half, N, B_MAJOR>(sums, ptx::swizzled_descriptor(&s.a[0][k]), b, k > 0);
  };
  ptx::wgmma_fence();
  for (int k = 0; k < 64; k += 16) multiply(d, k);
  ptx::wgmma_commit();
  multiply(e, 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
  out += t * (N + 1);
  for (int i = 0; i < N / 2; ++i) out[i] = d[i];
  out[N] = e[N / 2 - 1] != e[N / 2 - 1];
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) out[N / 2 + i] = e[i];
}

template <int N, bool B_MN, First FIRST>
void every_n(const char* name) {
  constexpr int ROWS = N < 64 ? 64 : N, WIDTH = Operands<N>::WIDTH;
  alignas(16) static __half A[64 * 64], B[ROWS * 64], C[64 * ROWS];
  std::vector<uint16_t> shared(N * 64);
  std::vector<float> a, b, elements, out(128 * (N + 1));
  std::vector<uint32_t> registers(128 * 16);
  harness::Numbers number{unsigned(N) + 4 * B_MN + unsigned(FIRST)};
  for (int i = 0; i < 64 * 64; ++i) {
    const __half x = __float2half(number());
    a.push_back(__half2float(x));
    A[FIRST == First::across ? i % 64 * 64 + i / 64 : i] = x;
  }
  for (int i = 0; i < ROWS * 64; ++i) {
    b.push_back(__half2float(B[i] = __float2half(number())));
    C[i % 64 * ROWS + i / 64] = B[i];
  }
  for (uint32_t& word : registers)
    for (int h = 0; h < 2; ++h) {
      const __half x = __float2half(number());
      uint16_t bits;
      memcpy(&bits, &x, 2);
      word |= uint32_t(bits) << 16 * h;
      elements.push_back(__half2float(x));
    }
  ptx::launch({dim3(1), dim3(128), sizeof(Operands<N>), nullptr, dim3(1, 1, 1), "every_n"},
              every_n_kernel<N, B_MN, FIRST>, ptx::tensor_map_2d(A, 64, 64, 64, 64),
              ptx::tensor_map_2d(B, ROWS, 64, 64, ROWS), ptx::tensor_map_2d(C, 64, ROWS, ROWS, 64, WIDTH),
              registers.data(), out.data(), shared.data());
  std::vector<float> in_shared;
  for (uint16_t bits : shared) {
    __half v;
    memcpy(static_cast<void*>(&v), &bits, 2);
    in_shared.push_back(__half2float(v));
  }
  printf("\"%s%d%s\": {\n", name, N, B_MN ? "_mn" : "");
  print("a", a);
  print("registers", elements);
  print("b", b);
  print("shared", in_shared);
  print("out", out, true);
  printf("},\n");
}

template <int N>
void every_n() {
  every_n<N, false, First::shared>("shared");
  every_n<N, true, First::shared>("shared");
  every_n<N, true, First::across>("across");
  every_n<N, false, First::registers>("registers");
  every_n<N, true, First::registers>("registers");
}

}  // namespace

int main() {
  printf("{\n");
  std::vector<uint32_t> out(5 * 32 * 4);
  ptx::launch({dim3(1), dim3(32), sizeof(Tiles), nullptr, dim3(1, 1, 1), "ldmatrix"}, ldmatrix_kernel,
              out.data());
  mma<0>("bf16");
  mma<1>("fp16");
  mma<2>("tf32_mma");
  convert();
  tf32();
  wgmma();
  every_n<16>();
  every_n<32>();
  every_n<64>();
  every_n<128>();
  every_n<256>();
  std::vector<double> words(out.begin(), out.end());
  printf("\"ldmatrix\": {\n");
  printf("  \"r\": [");
  for (size_t i = 0; i < out.size(); ++i) printf("%s%u", i ? "," : "", out[i]);
  printf("]\n}\n}\n");
}
