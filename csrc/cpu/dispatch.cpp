// Picks the instruction set once, when an operator first runs: the best one this CPU has, or a lower one that
// LOTR_CPU_ISA names (generic, avx2, avx512, avx512_bf16, amx_bf16; for tests).
#if defined(LOTR_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/table.h"

namespace lotr::cpu {

extern const Table table_generic;
#ifdef LOTR_X86
extern const Table table_avx2, table_avx512, table_avx512_bf16, table_amx_bf16;
#endif

namespace {

#ifdef LOTR_X86
// Whether this CPU multiplies bfloat16 in tiles, and the system lets this process: Linux gives it room for
// the tiles only when asked, once for all threads. The call's numbers are ARCH_REQ_XCOMP_PERM and
// XFEATURE_XTILEDATA, for which older headers have no names; cpuid's bits are AMX-BF16 and AMX-TILE.
bool has_tiles() {
#ifdef __linux__
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) &&
         syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif

const Table* choose() {
  const Table* supported[5] = {&table_generic};
  int count = 1;
#ifdef LOTR_X86
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) supported[count++] = &table_avx2;
  if (avx512) supported[count++] = &table_avx512;
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512_bf16) supported[count++] = &table_avx512_bf16;
  if (avx512_bf16 && has_tiles()) supported[count++] = &table_amx_bf16;
#endif
  const char* forced = std::getenv("LOTR_CPU_ISA");
  if (!forced || !*forced) return supported[count - 1];
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (std::string(forced) == supported[i]->name) return supported[i];
    names += (i ? ", " : "") + std::string(supported[i]->name);
  }
  throw std::runtime_error("LOTR_CPU_ISA: expected one of " + names + " (what this CPU runs), got " + forced);
}

const Table& table() {
  static const Table* chosen = choose();
  return *chosen;
}

}  // namespace

void shrink(const Mat& u, const Mat& x, const Mat& A, const Drop& drop) {
  table().shrink(u, x, A, drop);
}
void expand_add(const Mat& y, const Mat& u, const Mat& F, const Drop& drop, const Start& start) {
  table().expand_add(y, u, F, drop, start);
}
void factor_grad(const Mat& acc, const Mat& x, const Mat& k, const Drop& drop, bool add) {
  table().factor_grad(acc, x, k, drop, add);
}
void shrink_grad(const Mat& k, const Mat& Q, const Mat& g, const Mat& F, const Mat& u, bool add) {
  table().shrink_grad(k, Q, g, F, u, add);
}
void fold(const Mat& F, int64_t F_ls, const Mat& B, const Mat& cores, int64_t cores_ls, int64_t l,
          double scaling) {
  table().fold(F, F_ls, B, cores, cores_ls, l, scaling);
}
void fold_grad(const Mat& dB, const Mat& dcores, int64_t dcores_ls, const Mat& Q, int64_t Q_ls, const Mat& B,
               const Mat& cores, int64_t cores_ls, int64_t l, double scaling, bool add) {
  table().fold_grad(dB, dcores, dcores_ls, Q, Q_ls, B, cores, cores_ls, l, scaling, add);
}
void add(const Mat& out, const Mat& a) {
  table().add(out, a);
}
void small_forward(const Mat& u, const Mat& y, const Mat& x, const Mat& A, const Mat& core, const Mat& B,
                   double scaling, const Start& start) {
  table().small_forward(u, y, x, A, core, B, scaling, start);
}
void small_backward(const SmallBackward& s) {
  table().small_backward(s);
}
void row_core(const Mat& h, const Mat& u, const int64_t* token, const Mat& cores, int64_t cores_ls,
              const Groups& by_core, double scaling) {
  table().row_core(h, u, token, cores, cores_ls, by_core, scaling);
}
void row_core_grad(const Mat& dcores, int64_t dcores_ls, const Mat& g, const Mat& u, const int64_t* token,
                   const Groups& by_core, double scaling) {
  table().row_core_grad(dcores, dcores_ls, g, u, token, by_core, scaling);
}
void sum_rows(const Mat& du, const Mat& k, const Groups& by_token) {
  table().sum_rows(du, k, by_token);
}

const char* isa_name() {
  return table().name;
}

}  // namespace lotr::cpu
