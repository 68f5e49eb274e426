// Instantiates every operator for one instruction set. Included by the isa_*.cpp files only.
#pragma once

#include "cpu/rows.h"
#include "cpu/table.h"

namespace lotr::cpu::LOTR_ISA {

// f(T) for the storage type of a dtype.
template <typename F>
inline void typed(Dtype t, F&& f) {
  by_dtype(t, [&](auto* tag) { f(typename Pointee<decltype(tag)>::type{}); });
}

inline void shrink(const Mat& u, const Mat& x, const Mat& A, const Drop& drop) {
  typed(x.dtype, [&](auto t) { Operators<decltype(t)>::shrink(u, x, A, drop); });
}
inline void expand_add(const Mat& y, const Mat& u, const Mat& F, const Drop& drop, const Start& start) {
  typed(y.dtype, [&](auto t) { Operators<decltype(t)>::expand_add(y, u, F, drop, start); });
}
inline void factor_grad(const Mat& acc, const Mat& x, const Mat& k, const Drop& drop, bool add) {
  typed(x.dtype, [&](auto t) { Operators<decltype(t)>::factor_grad(acc, x, k, drop, add); });
}
inline void shrink_grad(const Mat& k, const Mat& Q, const Mat& g, const Mat& F, const Mat& u, bool add) {
  typed(g.dtype, [&](auto t) { Operators<decltype(t)>::shrink_grad(k, Q, g, F, u, add); });
}
inline void fold(const Mat& F, int64_t F_ls, const Mat& B, const Mat& cores, int64_t cores_ls, int64_t l,
                 double scaling) {
  const bool alike = B.dtype == F.dtype && cores.dtype == F.dtype;
  const Dtype as = alike || F.dtype == Dtype::f64 ? F.dtype : Dtype::f32;
  typed(as, [&](auto t) { fold_as<decltype(t)>(F, F_ls, B, cores, cores_ls, l, scaling); });
}
inline void fold_grad(const Mat& dB, const Mat& dcores, int64_t dcores_ls, const Mat& Q, int64_t Q_ls,
                      const Mat& B, const Mat& cores, int64_t cores_ls, int64_t l, double scaling, bool add) {
  const auto run = Q.dtype == Dtype::f64 ? &CoreProducts<F64>::fold_grad : &CoreProducts<F32>::fold_grad;
  run(dB, dcores, dcores_ls, Q, Q_ls, B, cores, cores_ls, l, scaling, add);
}
inline void add(const Mat& out, const Mat& a) {
  typed(out.dtype, [&](auto t) { Operators<decltype(t)>::add(out, a); });
}
inline void small_forward(const Mat& u, const Mat& y, const Mat& x, const Mat& A, const Mat& core,
                          const Mat& B, double scaling, const Start& start) {
  typed(x.dtype, [&](auto t) { Small<decltype(t)>::forward(u, y, x, A, core, B, scaling, start); });
}
inline void small_backward(const SmallBackward& s) {
  typed(s.g.dtype, [&](auto t) { Small<decltype(t)>::backward(s); });
}
inline void row_core(const Mat& h, const Mat& u, const int64_t* token, const Mat& cores, int64_t cores_ls,
                     const Groups& by_core, double scaling) {
  typed(u.dtype,
        [&](auto t) { RowProducts<decltype(t)>::row_core(h, u, token, cores, cores_ls, by_core, scaling); });
}
inline void row_core_grad(const Mat& dcores, int64_t dcores_ls, const Mat& g, const Mat& u,
                          const int64_t* token, const Groups& by_core, double scaling) {
  typed(u.dtype, [&](auto t) {
    RowProducts<decltype(t)>::row_core_grad(dcores, dcores_ls, g, u, token, by_core, scaling);
  });
}
inline void sum_rows(const Mat& du, const Mat& k, const Groups& by_token) {
  typed(du.dtype, [&](auto t) { RowProducts<decltype(t)>::sum_rows(du, k, by_token); });
}

}  // namespace lotr::cpu::LOTR_ISA

#define LOTR_TEXT_(x) #x
#define LOTR_TEXT(x) LOTR_TEXT_(x)
#define LOTR_TABLE_(isa) table_##isa
#define LOTR_TABLE(isa) LOTR_TABLE_(isa)

namespace lotr::cpu {
extern const Table LOTR_TABLE(LOTR_ISA);
const Table LOTR_TABLE(LOTR_ISA) = {
    LOTR_TEXT(LOTR_ISA),      &LOTR_ISA::shrink,         &LOTR_ISA::expand_add, &LOTR_ISA::factor_grad,
    &LOTR_ISA::shrink_grad,   &LOTR_ISA::fold,           &LOTR_ISA::fold_grad,  &LOTR_ISA::add,
    &LOTR_ISA::small_forward, &LOTR_ISA::small_backward, &LOTR_ISA::row_core,   &LOTR_ISA::row_core_grad,
    &LOTR_ISA::sum_rows,
};
}  // namespace lotr::cpu
