// Runs each matrix instruction once, on numbers that tell where they came from. Prints registers
// and memory as JSON; test_layouts.py has what the PTX manual says they must be.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/ptx/sm80.cuh"
#include "cuda/sm90/ptx.cuh"

namespace {
using namespace lotr;

// Numbers that need few bits, the same on every run.
struct Numbers {
  unsigned state;
  float operator()() {
    state = state * 1664525u + 1013904223u;
    return float(int(state >> 24) - 128) / 64.f;
  }
};

template <class T>
float number_of(uint16_t bits) {
  T value;
  memcpy(static_cast<void*>(&value), &bits, 2);
  return ptx::to_float(value);
}
template <class T>
uint16_t bits_of(float x) {
  const T value = ptx::from_float<T>(x);
  uint16_t bits;
  memcpy(&bits, &value, 2);
  return bits;
}

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

__global__ void ldmatrix_kernel(uint32_t* out) {  // [4 kinds][32 lanes][4]
  Tiles& s = ptx::shared_storage<Tiles>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) (&s.tile[0][0][0])[i] = uint16_t(i);
  __syncwarp();
  const void* row = s.tile[lane / 8][lane % 8];
  uint32_t r[4][4] = {}, pair[2];
  ptx::ldmatrix_x4(r[0], row);
  ptx::ldmatrix_x4_trans(r[1], row);
  ptx::ldmatrix_x2(pair, row);
  r[2][0] = pair[0];
  r[2][1] = pair[1];
  ptx::ldmatrix_x2_trans(pair, row);
  r[3][0] = pair[0];
  r[3][1] = pair[1];
  for (int kind = 0; kind < 4; ++kind)
    for (int i = 0; i < 4; ++i) out[(kind * 32 + lane) * 4 + i] = r[kind][i];
}

void ldmatrix() {
  std::vector<uint32_t> out(4 * 32 * 4);
  ptx::launch<ldmatrix_kernel>(
      {dim3(1), dim3(32), sizeof(Tiles), nullptr, dim3(1, 1, 1), "ldmatrix"}, out.data());
  printf("\"ldmatrix\": {\n");
  print("r", out, true);
  printf("}\n");
}

// ---- mma.sync ----

struct Registers {
  uint32_t a[4], b[2];
  float c[4];
};

template <class T>
__global__ void mma_kernel(const Registers* in, float* out) {
  const Registers& r = in[threadIdx.x];
  uint32_t a[4] = {r.a[0], r.a[1], r.a[2], r.a[3]}, b[2] = {r.b[0], r.b[1]};
  float d[4] = {r.c[0], r.c[1], r.c[2], r.c[3]};
  ptx::mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}

// The registers' elements as numbers, in the manual's order a0, a1, ...
template <class T>
void mma(const char* name) {
  Numbers number{11};
  std::vector<Registers> in(32);
  std::vector<float> a, b, c, d(128);
  const auto word = [&](std::vector<float>& elements) {
    const float low = number(), high = number();
    elements.push_back(low);
    elements.push_back(high);
    return uint32_t(bits_of<T>(high)) << 16 | bits_of<T>(low);
  };
  for (Registers& r : in) {
    for (uint32_t& x : r.a) x = word(a);
    for (uint32_t& x : r.b) x = word(b);
    for (float& x : r.c) {
      x = number();
      c.push_back(x);
    }
  }
  ptx::launch<mma_kernel<T>>({dim3(1), dim3(32), 0, nullptr, dim3(1, 1, 1), "mma"}, in.data(),
                             d.data());
  printf("\"%s\": {\n", name);
  print("a", a);
  print("b", b);
  print("c", c);
  print("d", d, true);
  printf("},\n");
}

// Some 16-bit patterns through the product with 1: what the executor takes them for.
__global__ void convert_kernel(const uint16_t* in, float* out) {
  uint32_t a[4] = {in[threadIdx.x], 0, 0, 0}, b[2] = {0x3c003c00u, 0};
  float d[4] = {};
  ptx::mma_m16n8k16<__half>(d, a, b);
  out[threadIdx.x] = d[0];
}

void convert() {
  // lane 4 g holds element (g, 0); the other lanes' elements are 0
  const std::vector<uint16_t> halves = {0x0001, 0x03ff, 0x0400, 0x3c01,
                                        0x7bff, 0x8001, 0xc000, 0x3555};
  std::vector<uint16_t> in(32);
  std::vector<float> out(32), result;
  for (size_t g = 0; g < 8; ++g) in[4 * g] = halves[g];
  ptx::launch<convert_kernel>({dim3(1), dim3(32), 0, nullptr, dim3(1, 1, 1), "convert"}, in.data(),
                              out.data());
  for (size_t g = 0; g < 8; ++g) result.push_back(out[4 * g]);
  printf("\"halves\": {\n");
  print("bits", halves);
  print("value", result, true);
  printf("},\n");
}

// ---- bulk copies and wgmma ----

constexpr int N = 256, K = 64;

template <class T>
struct alignas(1024) Operands {
  T a[64][K];
  T b[N * K];  // K-major: [N][K]. MN-major: N / 64 panels [K][64]
  uint64_t full;
};

// d = [0, 1, ..] + a b^T over all k in the first group; e over the first 16 k in the second group,
// which is still in flight when d is read. out [thread]: d, e, whether e was NaN then. a is
// stored to C as well.
template <class T, bool MN>
__global__ void wgmma_kernel(const __grid_constant__ ptx::TensorMap A,
                             const __grid_constant__ ptx::TensorMap B,
                             const __grid_constant__ ptx::TensorMap C, uint16_t* shared,
                             float* out) {
  auto& s = ptx::shared_storage<Operands<T>>();
  const int t = threadIdx.x;
  if (t == 0) {
    ptx::mbarrier_init(&s.full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&s.full, sizeof s.a + sizeof s.b);
    ptx::tma_load_2d(s.a, &A, 64, 3, &s.full);
    for (int n = 0; n < N; n += 64) {
      const int col = MN ? n : 0;
      ptx::tma_load_2d(s.b + n * K, &B, col, n - col, &s.full);
    }
  }
  __syncthreads();
  ptx::mbarrier_wait(&s.full, 0);
  for (int i = t; i < 64 * K; i += 128) memcpy(&shared[i], reinterpret_cast<char*>(s.a) + 2 * i, 2);
  for (int i = t; i < N * K; i += 128) memcpy(&shared[64 * K + i], &s.b[i], 2);
  float d[N / 2], e[N / 2] = {};
  for (int i = 0; i < N / 2; ++i) d[i] = float(i);
  const auto multiply = [&](float (&sums)[N / 2], int k) {
    const uint64_t a = ptx::swizzled_descriptor(&s.a[0][k]);
    if constexpr (MN)
      ptx::wgmma<T, ptx::Major::mn>(sums, a,
                                    ptx::swizzled_descriptor_mn(s.b + k * 64, sizeof(T) * 64 * K));
    else
      ptx::wgmma<T>(sums, a, ptx::swizzled_descriptor(s.b + k));
  };
  ptx::wgmma_fence();
  for (int k = 0; k < K; k += 16) multiply(d, k);
  ptx::wgmma_commit();
  multiply(e, 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
  out += t * (N + 1);
  for (int i = 0; i < N / 2; ++i) out[i] = d[i];
  out[N] = e[N / 2 - 1] != e[N / 2 - 1];
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) out[N / 2 + i] = e[i];
  if (t != 0) return;
  ptx::tma_store_2d(&C, 16, 5, s.a);
  ptx::bulk_commit();
  ptx::bulk_wait_all();
}

template <class T, bool MN>
void wgmma(const char* name) {
  // The box at (row 3, col 64) is inside, except for its last columns.
  constexpr uint32_t ROWS = 70;
  constexpr uint32_t COLS = 136;
  alignas(16) static T A[ROWS * COLS], B[N * K], C[ROWS * COLS];
  std::vector<float> a, b, c, in_shared, out(128 * (N + 1));
  std::vector<uint16_t> shared((64 + N) * K);
  Numbers number{5};
  for (T& x : A) {
    x = ptx::from_float<T>(number());
    a.push_back(ptx::to_float(x));
  }
  for (int i = 0; i < N * K; ++i) {
    b.push_back(number());
    B[MN ? i % K * N + i / K : i] = ptx::from_float<T>(b.back());
  }
  const auto b_map = MN ? ptx::tensor_map_2d(B, K, N, N, K) : ptx::tensor_map_2d(B, N, K, K, 64);
  ptx::launch<wgmma_kernel<T, MN>>(
      {dim3(1), dim3(128), sizeof(Operands<T>), nullptr, dim3(1, 1, 1), "wgmma"},
      ptx::tensor_map_2d(A, ROWS, COLS - 4, COLS, 64), b_map,
      ptx::tensor_map_2d(C, ROWS - 10, COLS - 70, COLS, 64), shared.data(), out.data());
  for (const uint16_t bits : shared) in_shared.push_back(number_of<T>(bits));
  for (const T& x : C) c.push_back(ptx::to_float(x));
  printf("\"%s\": {\n", name);
  print("a", a);
  print("b", b);
  print("c", c);
  print("shared", in_shared);
  print("out", out, true);
  printf("},\n");
}

}  // namespace

int main() {
  printf("{\n");
  mma<__nv_bfloat16>("bf16");
  mma<__half>("fp16");
  convert();
  wgmma<__nv_bfloat16, false>("k_major");
  wgmma<__half, true>("mn_major");
  ldmatrix();
  printf("}\n");
}
