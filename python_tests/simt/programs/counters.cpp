// Small kernels whose traffic can be counted by hand. Prints the executor's counts, one JSON
// line per kernel.
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/ptx/sm80.cuh"
#include "simt/api.h"

namespace {
using namespace lotr;

struct Smem {
  alignas(1024) float f[2048];
};

struct Params {
  const float* x;
  float *y, *z;
};

#define KERNEL(name) __global__ void name([[maybe_unused]] Params p)
#define LANE const int lane [[maybe_unused]] = threadIdx.x % 32

KERNEL(coalesced16) {
  ptx::store(p.y + threadIdx.x, ptx::load(reinterpret_cast<const float4*>(p.x) + threadIdx.x).x);
}
KERNEL(strided) {
  ptx::store(p.y + threadIdx.x, ptx::load(p.x + 8 * threadIdx.x));
}
KERNEL(broadcast) {
  ptx::store(p.y + threadIdx.x, ptx::load(p.x + 3));
}
KERNEL(straddling) {
  ptx::store(reinterpret_cast<uint16_t*>(p.y) + threadIdx.x,
             ptx::load(reinterpret_cast<const uint16_t*>(p.x) + 1 + threadIdx.x));
}
KERNEL(half_the_lanes) {  // two call sites in a loop that lanes leave at different times
  LANE;
  for (int i = 0; i < 1 + lane / 16; ++i)
    ptx::store(p.y + 32 * i + lane, ptx::load(p.x + 32 * i + lane));
}
KERNEL(zero_fill) {
  Smem& s = ptx::shared_storage<Smem>();
  LANE;
  const int bytes = lane < 8 ? 16 : 4 * (lane == 8);  // the ninth lane copies a quarter
  ptx::cp_async16(&s.f[4 * lane], p.x + 4 * lane, bytes);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}
KERNEL(unregistered) {
  LANE;
  ptx::load(p.z + lane);
}

KERNEL(shared_rows) {
  Smem& s = ptx::shared_storage<Smem>();
  LANE;
  ptx::store_shared(&s.f[lane], 1.f);                                        // 1 phase, 1 wavefront
  ptx::store_shared(reinterpret_cast<float4*>(s.f + 128) + lane, float4{});  // 4, 4
  ptx::store_shared(reinterpret_cast<float2*>(s.f + 256) + lane, float2{});  // 2, 2
  ptx::load_shared(&s.f[512]);                                               // 1, 1
  ptx::load_shared(reinterpret_cast<uint16_t*>(s.f + 512) + lane);           // 1, 1
}
KERNEL(shared_columns) {
  Smem& s = ptx::shared_storage<Smem>();
  LANE;
  ptx::store_shared(&s.f[32 * lane], 1.f);     // 1 phase, 32 wavefronts
  ptx::store_shared(&s.f[2 * lane + 1], 1.f);  // 1, 2
  ptx::store_shared(reinterpret_cast<float4*>(&s.f[1024 + 32 * lane]), float4{});  // 4, 32
}
KERNEL(ldmatrix_rows) {
  Smem& s = ptx::shared_storage<Smem>();
  LANE;
  uint32_t r[4], q[2];
  ptx::ldmatrix_x4(r, &s.f[4 * lane]);          // 4, 4: 16-byte rows
  ptx::ldmatrix_x2(q, &s.f[32 * (lane % 16)]);  // 2, 16: 128-byte rows
  ptx::ldmatrix_x4(r, &s.f[36 * lane]);         // 4, 4: padded to 144 bytes
}
KERNEL(collectives) {
  __syncthreads();
  ptx::barrier_sync(1, 64);
  uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  for (int i = 0; i < 3; ++i) ptx::mma_m16n8k16<__half>(d, a, b);
  for (int mask = 16; mask > 0; mask /= 2) __shfl_xor_sync(0xffffffffu, d[0], mask);
}

KERNEL(plain_access) {
  p.y[threadIdx.x] = p.x[threadIdx.x];
}

template <auto FUNCTION>
void run(const char* name, unsigned threads, unsigned blocks = 1) {
  alignas(32) static float x[4096], y[4096], z[4096];
  simt::clear_arrays();
  simt::register_array("x", x, sizeof x);
  simt::register_array("y", y, sizeof y);
  simt::reset_counters();
  ptx::launch<FUNCTION>({dim3(blocks), dim3(threads), sizeof(Smem), nullptr, dim3(1, 1, 1), name},
                        Params{x, y, z});
  const simt::Counters c = simt::counters();
  printf("{\"kernel\": \"%s\"", c.launches.at(0).name.c_str());
  for (const simt::Traffic& a : c.arrays)
    printf(", \"%s\": [%lu, %lu, %lu, %lu]", a.name.c_str(), a.read_bytes, a.read_sectors,
           a.written_bytes, a.written_sectors);
  printf(
      ", \"shared\": [%lu, %lu], \"barriers\": %lu, \"mma\": %lu, \"ldmatrix\": %lu, "
      "\"collectives\": %lu, \"blocks\": %lu, \"threads\": %lu, \"async_copies\": %lu, "
      "\"launches\": %zu, \"unwrapped\": %lu}\n",
      c.shared_phases, c.shared_wavefronts, c.barriers, c.mma, c.ldmatrix, c.warp_collectives,
      c.blocks, c.threads, c.async_copies, c.launches.size(), c.arrays.at(0).unwrapped);
}

}  // namespace

int main() {
  simt::Options options = simt::options_from_environment();
  options.count_memory = true;
  simt::set_options(options);
#define RUN(kernel, ...) run<kernel>(#kernel, __VA_ARGS__)
  RUN(coalesced16, 64);
  RUN(strided, 32);
  RUN(broadcast, 32);
  RUN(straddling, 32);
  RUN(half_the_lanes, 32);
  RUN(zero_fill, 32);
  RUN(unregistered, 32);
  RUN(shared_rows, 32);
  RUN(shared_columns, 32);
  RUN(ldmatrix_rows, 32);
  RUN(collectives, 64, 2);
  RUN(plain_access, 32);
}
