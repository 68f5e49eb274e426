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

  explicit Rows(const RowArgs& args)
      : index(packed(args.index)), offs(packed(args.offs)), tokens(packed(args.tokens)) {}
  RowIndex index_in(const Sizes& sizes) const {
    RowIndex x{};
    if (index) x.core = static_cast<const int64_t*>(index->const_data_ptr());
    if (offs) x.ends = static_cast<const int32_t*>(offs->const_data_ptr());
    if (tokens) x.token = static_cast<const int64_t*>(tokens->const_data_ptr());
    x.rows = sizes[tokens ? ROWS : M];
    x.tokens = sizes[M];
    x.cores = sizes[L];
    return x;
  }
  static OptionalTensor packed(const Arg& arg) {
    return arg ? OptionalTensor(torch::stable::contiguous(*arg.tensor)) : std::nullopt;
  }
};

void check_sizes(const char* op, const Sizes& sizes) {
  for (const int64_t size : {sizes[ROWS], sizes[M], sizes[L]})
    if (size >= std::numeric_limits<int32_t>::max())
      fail(op, ": expected fewer than 2^31 rows, tokens and cores, got ", size);
}

// h = s a G, of `a` [tokens, r_in]; transposed: by G^T. missing: h of a row whose core or token
// does not exist. The forward shows the mistake as NaN; a gradient of such a row is 0.
void product(const CudaProducts& products, const TensorView& h, const TensorView& a,
             const RowIndex& index, const Arg& cores, bool transposed, double scaling,
             float missing) {
  const TensorView G = read(cores);  // [cores * r_in, r_out], with the row stride inside a core
  RowCoreProblem problem{};
  problem.index = index;
  problem.a = products.matrix(a);
  problem.cores = products.matrix(G);
  problem.core_stride = cores.stride[0];
  problem.h = products.matrix(h);
  problem.a_type = a.dtype;
  problem.core_type = G.dtype;
  problem.h_type = h.dtype;
  problem.r_in = int32_t(cores.size[1]);
  problem.r_out = int32_t(cores.size[2]);
  if (transposed) {
    std::swap(problem.cores.row, problem.cores.col);
    std::swap(problem.r_in, problem.r_out);
  }
  problem.scale = float(scaling);
  problem.missing = missing;
  products.run(problem);
}

// The rows sorted by a key below `bound`, stably, and where the rows of each key end.
struct Sorted {
  Tensor keys, order, ends;

  Sorted(const CudaProducts& products, const Arg& like, const Tensor& key, int64_t bound) {
    std::tie(keys, order) = sort(key);
    ends = empty<1>(like, {bound + 1}, aoti_torch_dtype_int32());
    RowEndsProblem problem{};
    problem.keys = static_cast<const int64_t*>(keys.const_data_ptr());
    problem.ends = static_cast<int32_t*>(ends.mutable_data_ptr());
    problem.rows = keys.size(0);
    problem.bound = bound;
    products.run(problem);
  }
  Segments segments() const {
    return {static_cast<const int64_t*>(order.const_data_ptr()),
            static_cast<const int32_t*>(ends.const_data_ptr()), /*from_zero=*/0};
  }

 private:
  static std::tuple<Tensor, Tensor> sort(const Tensor& key) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    std::array<StableIValue, 4> stack{from(key), from(/*stable=*/std::optional<bool>(true)),
                                      from(/*dim=*/int64_t(0)), from(/*descending=*/false)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }
};

}  // namespace

Tensor CudaProducts::row_core(const RowArgs& args, const Sizes& sizes, double scaling) const {
  check_sizes(op_, sizes);
  const Rows rows(args);
  OptionalTensor h;
  product(*this, make(h, sizes[args.tokens ? ROWS : M], sizes[R_OUT], like_.dtype, true),
          read(args.u), rows.index_in(sizes), args.cores, /*transposed=*/false, scaling,
          /*missing=*/std::numeric_limits<float>::quiet_NaN());
  return *h;
}

std::tuple<Tensor, Tensor> CudaProducts::row_core_backward(const RowArgs& args, const Sizes& sizes,
                                                           double scaling, bool need_u,
                                                           bool need_cores) const {
  check_sizes(op_, sizes);
  const Rows rows(args);
  const RowIndex index = rows.index_in(sizes);
  OptionalTensor du;
  Tensor dcores;
  if (need_u) {
    const TensorView du_out = make(du, sizes[M], sizes[R_IN], like_.dtype, true);
    RowIndex of_g = index;  // row i reads row i of g, not a token's
    of_g.token = nullptr;
    of_g.tokens = index.rows;
    if (!rows.tokens) {
      product(*this, du_out, read(args.g), of_g, args.cores, /*transposed=*/true, scaling,
              /*missing=*/0.f);
    } else {
      const Sorted by_token(*this, like_, *rows.tokens, sizes[M]);
      OptionalTensor row_du;  // float32: not rounded before it is summed
      const TensorView row_du_out = make(row_du, index.rows, sizes[R_IN], ScalarType::Float, false);
      product(*this, row_du_out, read(args.g), of_g, args.cores, /*transposed=*/true, scaling,
              /*missing=*/0.f);
      SumRowsProblem problem{};
      problem.of_token = by_token.segments();
      problem.row_du = static_cast<const float*>(row_du_out.data);
      problem.du = matrix(du_out);
      problem.du_type = du_out.dtype;
      problem.tokens = sizes[M];
      problem.r = int32_t(sizes[R_IN]);
      run(problem);
    }
  }
  if (need_cores) {
    dcores = empty<3>(like_, {sizes[L], sizes[R_IN], sizes[R_OUT]}, aoti_torch_dtype_float32());
    std::optional<Sorted> by_index;
    if (rows.index) by_index.emplace(*this, like_, *rows.index, sizes[L]);
    const TensorView u = read(args.u);
    RowCoreGradProblem problem{};
    problem.of_core =
        by_index ? by_index->segments() : Segments{nullptr, index.ends, /*from_zero=*/1};
    problem.token = index.token;
    problem.u = matrix(u);
    problem.g = matrix(read(args.g));
    problem.type = u.dtype;
    problem.dcores = static_cast<float*>(dcores.mutable_data_ptr());
    problem.rows = index.rows;
    problem.tokens = sizes[M];
    problem.cores = sizes[L];
    problem.r_in = int32_t(sizes[R_IN]);
    problem.r_out = int32_t(sizes[R_OUT]);
    problem.scale = float(scaling);
    run(problem);
  }
  return {du.value_or(Tensor()), dcores};
}

}  // namespace lotr
