// row_core and its backward (schema.cpp) on CUDA tensors: one launch for each of the kernels of
// cuda/kernels/row_core.cuh.  Indices are sorted by torch, stably.  Nothing synchronises.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>

#include "cuda/rows.h"
#include "cuda_args.h"

namespace lotr {
namespace {

// The indices of a call, contiguous for the kernels.
struct Rows {
  OptionalTensor index, offs, tokens;

  explicit Rows(const RowArgs& a) : index(packed(a.index)), offs(packed(a.offs)), tokens(packed(a.tokens)) {}
  RowIndex of(const RowSizes& s) const {
    RowIndex x{};
    if (index) x.core = static_cast<const int64_t*>(index->const_data_ptr());
    if (offs) x.ends = static_cast<const int32_t*>(offs->const_data_ptr());
    if (tokens) x.token = static_cast<const int64_t*>(tokens->const_data_ptr());
    x.rows = s.rows, x.tokens = s.m, x.cores = s.cores;
    return x;
  }
  static OptionalTensor packed(const Arg& a) {
    return a ? OptionalTensor(torch::stable::contiguous(*a.tensor)) : std::nullopt;
  }
};

void check_sizes(const Check& c, const RowSizes& s) {
  for (const int64_t size : {s.rows, s.m, s.cores})
    if (size >= std::numeric_limits<int32_t>::max())
      fail(c.op, ": expected fewer than 2^31 rows, tokens and cores, got ", size);
}

// h = s a G, of `a` [tokens, r_in]; transposed: by G^T.
void product(const Context& c, const Arg& h, const Arg& a, const RowIndex& index, const Arg& cores,
             bool transposed, double scaling, float missing) {
  RowCoreParams q{};
  q.index = index, q.a = c.read(a), q.cores = c.read(cores), q.core_stride = cores.stride[0];
  q.h = c.written(h);
  q.r_in = int32_t(cores.size[1]), q.r_out = int32_t(cores.size[2]);
  if (transposed) std::swap(q.cores.row, q.cores.col), std::swap(q.r_in, q.r_out);
  q.a_type = dtype_of(c.op(), a), q.core_type = dtype_of(c.op(), cores), q.h_type = dtype_of(c.op(), h);
  q.scale = float(scaling), q.missing = missing;
  cuda::row_core(c.call(), q);
}

// The rows sorted by a key below `bound`, in the order of the rows where that is the same, and their ends.
struct Sorted {
  Tensor keys, order, ends;

  Sorted(const Context& c, const Tensor& key, int64_t bound) : Sorted(c, sort(key), bound) {}
  Segments segments() const {
    return {static_cast<const int64_t*>(order.const_data_ptr()),
            static_cast<const int32_t*>(ends.const_data_ptr()), 0};
  }

 private:
  Sorted(const Context& c, std::tuple<Tensor, Tensor> sorted, int64_t bound)
      : keys(std::get<0>(sorted)),
        order(std::get<1>(sorted)),
        ends(c.empty<1>({bound + 1}, aoti_torch_dtype_int32())) {
    RowEndsParams q{};
    q.keys = static_cast<const int64_t*>(keys.const_data_ptr());
    q.ends = static_cast<int32_t*>(ends.mutable_data_ptr());
    q.rows = keys.size(0), q.bound = bound;
    cuda::row_ends(c.call(), q);
  }
  static std::tuple<Tensor, Tensor> sort(const Tensor& key) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    std::array<StableIValue, 4> stack{from(key), from(std::optional<bool>(true)), from(int64_t(0)),
                                      from(false)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }
};

Tensor row_core(const Tensor& u, const Tensor& cores, const OptionalTensor& index, const OptionalTensor& offs,
                const OptionalTensor& tokens, double scaling) {
  const Check check{"lotr::row_core", false, cuda::MAX_RANK};
  const RowArgs a{{"g", OptionalTensor()}, {"u", u},       {"cores", cores},
                  {"index", index},        {"offs", offs}, {"tokens", tokens}};
  const RowSizes s = a.check(check, scaling);
  check_sizes(check, s);
  const Context c(check.op, a.u);
  const Rows rows(a);
  Tensor h = c.empty_rows<2>({s.rows, s.r_out});
  product(c, Arg("h", h), a.u, rows.of(s), a.cores, false, scaling, std::numeric_limits<float>::quiet_NaN());
  return h;
}

std::tuple<Tensor, Tensor> row_core_backward(const Tensor& g, const Tensor& u, const Tensor& cores,
                                             const OptionalTensor& index, const OptionalTensor& offs,
                                             const OptionalTensor& tokens, double scaling, bool need_u,
                                             bool need_cores) {
  const Check check{"lotr::row_core_backward", false, cuda::MAX_RANK};
  const RowArgs a{{"g", g}, {"u", u}, {"cores", cores}, {"index", index}, {"offs", offs}, {"tokens", tokens}};
  const RowSizes s = a.check(check, scaling);
  check_sizes(check, s);
  const Context c(check.op, a.u);
  const Rows rows(a);
  Tensor du = need_u ? c.empty_rows<2>({s.m, s.r_in}) : c.empty<2>({0, 0});
  Tensor dcores = c.empty_float<3>(need_cores ? std::array<int64_t, 3>{s.cores, s.r_in, s.r_out}
                                              : std::array<int64_t, 3>{0, 0, 0});
  const Arg adu("du", du);
  if (need_u) {
    RowIndex by_core = rows.of(s);
    by_core.token = nullptr, by_core.tokens = s.rows;  // g has a row for each
    if (!rows.tokens) {
      product(c, adu, a.g, by_core, a.cores, true, scaling, 0.f);
    } else {
      const Sorted by_token(c, *rows.tokens, s.m);
      Tensor k = c.empty_float<2>({s.rows, s.r_in});  // not rounded before it is summed
      product(c, Arg("k", k), a.g, by_core, a.cores, true, scaling, 0.f);
      SumRowsParams q{};
      q.of_token = by_token.segments(), q.k = static_cast<const float*>(k.const_data_ptr());
      q.du = c.written(adu), q.du_type = dtype_of(check.op, adu), q.tokens = s.m, q.r = int32_t(s.r_in);
      cuda::sum_rows(c.call(), q);
    }
  }
  if (need_cores) {
    std::optional<Sorted> by_core;
    if (rows.index) by_core.emplace(c, *rows.index, s.cores);
    const RowIndex x = rows.of(s);
    RowCoreGradParams q{};
    q.of_core = by_core ? by_core->segments() : Segments{nullptr, x.ends, 1};
    q.token = x.token, q.u = c.read(a.u), q.g = c.read(a.g), q.type = dtype_of(check.op, a.u);
    q.dcores = static_cast<float*>(dcores.mutable_data_ptr());
    q.tokens = s.m, q.cores = s.cores, q.r_in = int32_t(s.r_in), q.r_out = int32_t(s.r_out);
    q.scale = float(scaling);
    const auto prepared = cuda::prepare_row_core_grad(c.call(), q, s.rows);
    c.with_workspace(prepared.workspace, [&](void* w) { cuda::row_core_grad(c.call(), q, prepared, w); });
  }
  return {du, dcores};
}

}  // namespace
}  // namespace lotr

STABLE_TORCH_LIBRARY_IMPL(lotr, CUDA, m)
{
  m.impl("row_core", TORCH_BOX(&lotr::row_core));
  m.impl("row_core_backward", TORCH_BOX(&lotr::row_core_backward));
}
