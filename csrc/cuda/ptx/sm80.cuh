// The device primitives for kernels, for sm_80 and later (../sm90: those that only sm_90a has).
//
// Under nvcc a wrapper is one PTX instruction. Under a host compiler the same kernel source runs
// in the SIMT executor (csrc/simt, test builds only), one fiber per GPU thread, and the wrapper
// does what the PTX manual defines.
//
// Writing a kernel:
//
//   struct Smem { alignas(16) T tile[...]; ... };     // all of the block's shared memory
//   __global__ void __launch_bounds__(128) kernel(Params p) {
//     Smem& s = ptx::shared_storage<Smem>();          // never __shared__
//     ptx::griddepcontrol_wait();                     // before global memory: see launch.cuh
//     ptx::cp_async16(&s.tile[i], p.x + i, bytes);
//     ptx::cp_async_commit();
//     ptx::cp_async_wait<0>();
//     __syncthreads();                                // threadIdx, __syncwarp: as in CUDA
//     ptx::ldmatrix_x4(a, row);
//     ptx::mma_m16n8k16<T>(d, a, b);
//     ptx::store(p.y + j, value);
//   }
//   ptx::launch<kernel>({grid, block, sizeof(Smem), stream, cluster, "name"}, params);
//
// Access global and shared memory through cp_async and the wrappers of memory.cuh: only these are
// counted. A plain *p works and is checked by the sanitizers, but it is missing from the counts
// (the race build reports it as `unwrapped`).
//
// Counting, from the host: simt::register_array("x", pointer, bytes) names a range of global
// memory, simt::set_options turns counting on, and simt::counters() returns the bytes and sectors
// that were read and written for each name (csrc/simt/api.h). Lanes of a warp that execute one
// call site together count as one instruction, so coalescing is counted as on the device. Accesses
// to other memory are listed as "(unregistered)".
//
// The executor throws simt::Error, with file and line, for: a barrier or warp collective that some
// threads do not reach, or reach at another line; lanes missing from a mask; misaligned or
// out-of-range shared addresses; a thread that exits with a copy in flight; a launch that a GPU
// would refuse. The data of cp.async does not exist before the wait: until then the destination
// reads as NaN. Shared memory starts as NaN.
#pragma once
#include "base.cuh"
#include "launch.cuh"
#include "memory.cuh"

namespace lotr::ptx {

// ---- asynchronous copies, global to shared ----

// 16 bytes, bypassing L1; L2 fetches the full 128-byte line. Both addresses are aligned to 16
// bytes.
LOTR_DEVICE void cp_async16(void* shared, const void* global LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
#else
  simt::cp_async(shared, global, 16, 16, site);
#endif
}

// The same; the first src_bytes are copied, the rest become zero.
LOTR_DEVICE void cp_async16(void* shared, const void* global, int src_bytes LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
      "l"(global), "r"(src_bytes)
      : "memory");
#else
  simt::cp_async(shared, global, 16, src_bytes, site);
#endif
}

// Closes a group of this thread's copies. An empty group counts as well.
LOTR_DEVICE void cp_async_commit(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::cp_async_commit(site);
#endif
}

// Waits until at most N of this thread's latest groups are in flight. The copies of other threads
// need a barrier after it.
template <int N>
LOTR_DEVICE void cp_async_wait(LOTR_SITE_ONLY) {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  simt::cp_async_wait(N, site);
#endif
}

// ---- matrices in registers ----

// ldmatrix: 8 x 8 tiles of 16-bit elements. Lane 8 t + i passes the address of row i of tile t (16
// bytes, aligned). Lane l receives elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each tile.
// trans: of the transposed tiles.
LOTR_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  simt::ldmatrix(r, row, 4, false, site);
#endif
}

LOTR_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  simt::ldmatrix(r, row, 4, true, site);
#endif
}

LOTR_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#else
  simt::ldmatrix(r, row, 2, false, site);
#endif
}

LOTR_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#else
  simt::ldmatrix(r, row, 2, true, site);
#endif
}

// d [16 x 8] += a [16 x 16] b [16 x 8], float accumulators. With g = lane / 4, q = lane % 4:
//   a: (g, 2q) (g + 8, 2q) (g, 2q + 8) (g + 8, 2q + 8), each register two neighbors along k
//   b: (2q, g) (2q + 8, g), each register two neighbors along k
//   d: (g, 2q) (g, 2q + 1) (g + 8, 2q) (g + 8, 2q + 1)
template <class T>
LOTR_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                              const uint32_t (&b)[2] LOTR_SITE) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>,
                "T is __nv_bfloat16 or __half");
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  simt::mma_m16n8k16(d, a, b, std::is_same_v<T, __nv_bfloat16>, site);
#endif
}

// Named barriers 1 to 15: waits for `threads` threads of the block, a multiple of 32.
LOTR_DEVICE void barrier_sync(int id, int threads LOTR_SITE) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  simt::barrier_sync(id, threads, site);
#endif
}

}  // namespace lotr::ptx
