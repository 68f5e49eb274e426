// row_core and its backward (schema.cpp) on CUDA tensors: one launch for each of the kernels of
// cuda/kernels/row_core.cuh. Indices are sorted by torch, stably. Nothing synchronizes.
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>

#include "products_cuda.h"

namespace lotr {
namespace {

// The indices of a call, contiguous for the kernels.
struct Rows {
  OptionalTensor index, offs, tokens;

  explicit Rows(const RowArgs& a)
      : index(packed(a.index)), offs(packed(a.offs)), tokens(packed(a.tokens)) {}
  RowIndex index_in(const Sizes& s) const {
    RowIndex x{};
    if (index) x.core = static_cast<const int64_t*>(index->const_data_ptr());
    if (offs) x.ends = static_cast<const int32_t*>(offs->const_data_ptr());
    if (tokens) x.token = static_cast<const int64_t*>(tokens->const_data_ptr());
    x.rows = s[tokens ? ROWS : M];
    x.tokens = s[M];
    x.cores = s[L];
    return x;
  }
  static OptionalTensor packed(const Arg& a) {
    return a ? OptionalTensor(torch::stable::contiguous(*a.tensor)) : std::nullopt;
  }
};

void check_sizes(const char* op, const Sizes& s) {
  for (const int64_t size : {s[ROWS], s[M], s[L]})
    if (size >= std::numeric_limits<int32_t>::max())
      fail(op, ": expected fewer than 2^31 rows, tokens and cores, got ", size);
}

// h = s a G, of `a` [tokens, r_in]; transposed: by G^T.
void product(const CudaProducts& products, const TensorView& h, const TensorView& a,
             const RowIndex& index, const Arg& cores, bool transposed, double scaling,
             float missing) {
  const TensorView G = read(cores);  // with the rows of the cores
  RowCoreProblem q{};
  q.index = index;
  q.a = products.matrix(a);
  q.cores = products.matrix(G);
  q.core_stride = cores.stride[0];
  q.h = products.matrix(h);
  q.a_type = a.dtype;
  q.core_type = G.dtype;
  q.h_type = h.dtype;
  q.r_in = int32_t(cores.size[1]);
  q.r_out = int32_t(cores.size[2]);
  if (transposed) {
    std::swap(q.cores.row, q.cores.col);
    std::swap(q.r_in, q.r_out);
  }
  q.scale = float(scaling);
  q.missing = missing;
  products.run(q);
}

// The rows sorted by a key below `bound`, in the order of the rows where that is the same, and
// their ends.
struct Sorted {
  Tensor keys, order, ends;

  Sorted(const CudaProducts& products, const Arg& like, const Tensor& key, int64_t bound) {
    std::tie(keys, order) = sort(key);
    ends = empty<1>(like, {bound + 1}, aoti_torch_dtype_int32());
    RowEndsProblem q{};
    q.keys = static_cast<const int64_t*>(keys.const_data_ptr());
    q.ends = static_cast<int32_t*>(ends.mutable_data_ptr());
    q.rows = keys.size(0);
    q.bound = bound;
    products.run(q);
  }
  Segments segments() const {
    return {static_cast<const int64_t*>(order.const_data_ptr()),
            static_cast<const int32_t*>(ends.const_data_ptr()), 0};
  }

 private:
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

}  // namespace

Tensor CudaProducts::row_core(const RowArgs& a, const Sizes& s, double scaling) const {
  check_sizes(op_, s);
  const Rows rows(a);
  OptionalTensor h;
  product(*this, make(h, s[a.tokens ? ROWS : M], s[R_OUT], like_.dtype, true), read(a.u),
          rows.index_in(s), a.cores, false, scaling, std::numeric_limits<float>::quiet_NaN());
  return *h;
}

std::tuple<Tensor, Tensor> CudaProducts::row_core_backward(const RowArgs& a, const Sizes& s,
                                                           double scaling, bool need_u,
                                                           bool need_cores) const {
  check_sizes(op_, s);
  const Rows rows(a);
  const RowIndex index = rows.index_in(s);
  OptionalTensor du;
  Tensor dcores;
  if (need_u) {
    const TensorView du_out = make(du, s[M], s[R_IN], like_.dtype, true);
    RowIndex by_core = index;
    by_core.token = nullptr;
    by_core.tokens = index.rows;  // g has a row for each
    if (!rows.tokens) {
      product(*this, du_out, read(a.g), by_core, a.cores, true, scaling, 0.f);
    } else {
      const Sorted by_token(*this, like_, *rows.tokens, s[M]);
      OptionalTensor k;  // float32: not rounded before it is summed
      const TensorView k_out = make(k, index.rows, s[R_IN], ScalarType::Float, false);
      product(*this, k_out, read(a.g), by_core, a.cores, true, scaling, 0.f);
      SumRowsProblem q{};
      q.of_token = by_token.segments();
      q.k = static_cast<const float*>(k_out.data);
      q.du = matrix(du_out);
      q.du_type = du_out.dtype;
      q.tokens = s[M];
      q.r = int32_t(s[R_IN]);
      run(q);
    }
  }
  if (need_cores) {
    dcores = empty<3>(like_, {s[L], s[R_IN], s[R_OUT]}, aoti_torch_dtype_float32());
    std::optional<Sorted> by_core;
    if (rows.index) by_core.emplace(*this, like_, *rows.index, s[L]);
    const TensorView u = read(a.u);
    RowCoreGradProblem q{};
    q.of_core = by_core ? by_core->segments() : Segments{nullptr, index.ends, 1};
    q.token = index.token;
    q.u = matrix(u);
    q.g = matrix(read(a.g));
    q.type = u.dtype;
    q.dcores = static_cast<float*>(dcores.mutable_data_ptr());
    q.rows = index.rows;
    q.tokens = s[M];
    q.cores = s[L];
    q.r_in = int32_t(s[R_IN]);
    q.r_out = int32_t(s[R_OUT]);
    q.scale = float(scaling);
    run(q);
  }
  return {du.value_or(Tensor()), dcores};
}

}  // namespace lotr
