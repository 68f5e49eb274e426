// Which instruction sets this machine runs: runs_<set>() for each set of CMakeLists.txt.
// dispatch.cpp chooses by them at run time; CMake runs them for LOTR_CPU_ISAS=native.
#pragma once

#ifdef __x86_64__
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace lotr::cpu {

inline bool runs_generic() {
  return true;
}
#ifdef __x86_64__
struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;  // registers, zeros if the CPU does not have the leaf
  explicit Cpuid(unsigned leaf) { __get_cpuid_count(leaf, 0, &a, &b, &c, &d); }
};
inline bool runs_avx2() {
  __builtin_cpu_init();
  // By cpuid: __builtin_cpu_supports of g++ before 11 and of clang++ 14 does not know "f16c".
  const bool f16c = Cpuid(1).c >> 29 & 1;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
}
inline bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
inline bool runs_avx512_bf16() {
  return runs_avx512() && __builtin_cpu_supports("avx512bf16");
}
// Whether this CPU multiplies bfloat16 in tiles and the system lets this process use them: Linux
// reserves room for the tiles only on request, once for all threads. The call's numbers are
// ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA, for which older headers have no names; cpuid's bits
// are AMX-BF16 and AMX-TILE.
inline bool runs_amx_bf16() {
#ifdef __linux__
  const unsigned d = Cpuid(7).d;
  return runs_avx512_bf16() && (d >> 22 & 1) && (d >> 24 & 1) &&
         syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace lotr::cpu
