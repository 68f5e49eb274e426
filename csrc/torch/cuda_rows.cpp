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
      : index(contiguous(args.index)),
        offs(contiguous(args.offs)),
        tokens(contiguous(args.tokens)) {}
  RowIndex row_index(const Sizes& sizes) const {
    RowIndex indices{};
    if (index) indices.core = static_cast<const int64_t*>(index->const_data_ptr());
    if (offs) indices.ends = static_cast<const int32_t*>(offs->const_data_ptr());
    if (tokens) indices.token = static_cast<const int64_t*>(tokens->const_data_ptr());
    indices.rows = sizes[tokens ? ROWS : M];
    indices.tokens = sizes[M];
    indices.cores = sizes[L];
    return indices;
  }
  static OptionalTensor contiguous(const Arg& arg) {
    return arg ? OptionalTensor(torch::stable::contiguous(*arg.tensor)) : std::nullopt;
  }
};

void check_sizes(const char* op, const Sizes& sizes) {
  for (const int64_t size : {sizes[ROWS], sizes[M], sizes[L]})
    if (size >= std::numeric_limits<int32_t>::max())
      fail(op, ": expected fewer than 2^31 - 1 rows, tokens and cores, got ", size);
}

// h = s a G, of `a` [tokens, r_in], or backward h = s a G^T. A row whose core or token does not
// exist is a mistake that the forward shows as NaN; its gradient is 0.
void product(const CudaProducts& products, const TensorView& h, const TensorView& a,
             const RowIndex& index, const Arg& cores, Direction direction, double scaling) {
  const TensorView G = read_view(cores);  // [cores * r_in, r_out]; its strides are a core's
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
  problem.missing = std::numeric_limits<float>::quiet_NaN();
  if (direction == Direction::backward) {
    problem.missing = 0.f;
    std::swap(problem.cores.row, problem.cores.col);
    std::swap(problem.r_in, problem.r_out);
  }
  problem.scale = float(scaling);
  products.run(problem);
}

// torch.sort(key, stable=True): the keys and their rows.
std::tuple<Tensor, Tensor> sort(const Tensor& key) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(key), from(/*stable=*/std::optional<bool>(true)),
                                    from(/*dim=*/int64_t(0)), from(/*descending=*/false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// The rows sorted by a key from -1 (none) to bound - 1, and where the rows of each key end.
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
};

// du_t = s * the sum over the rows of t of g_i G_c(i)^T. Without tokens, row i is token i.
Tensor gradient_of_u(const CudaProducts& products, const RowArgs& args, const Sizes& sizes,
                     const Rows& rows, double scaling) {
  RowIndex index_of_g = rows.row_index(sizes);  // row i reads row i of g, not a token's
  index_of_g.token = nullptr;
  index_of_g.tokens = index_of_g.rows;
  // Rows that are summed by token are rounded only after the sum. sum_rows reads unpadded rows.
  const ScalarType dtype = rows.tokens ? ScalarType::Float : args.u.dtype;
  OptionalTensor row_du;
  const TensorView row_du_view =
      rows.tokens ? products.make(row_du, index_of_g.rows, sizes[R_IN], dtype)
                  : products.make_padded(row_du, index_of_g.rows, sizes[R_IN], dtype);
  product(products, row_du_view, read_view(args.g), index_of_g, args.cores, Direction::backward,
          scaling);
  if (!rows.tokens) return *row_du;
  const Sorted by_token(products, args.u, *rows.tokens, sizes[M]);
  OptionalTensor du;
  const TensorView du_view = products.make_padded(du, sizes[M], sizes[R_IN], args.u.dtype);
  SumRowsProblem problem{};
  problem.of_token = by_token.segments();
  problem.row_du = static_cast<const float*>(row_du_view.data);
  problem.du = products.matrix(du_view);
  problem.du_type = du_view.dtype;
  problem.tokens = sizes[M];
  problem.r = int32_t(sizes[R_IN]);
  products.run(problem);
  return *du;
}

Tensor gradient_of_cores(const CudaProducts& products, const RowArgs& args, const Sizes& sizes,
                         const Rows& rows, double scaling) {
  const Tensor dcores =
      empty<3>(args.u, {sizes[L], sizes[R_IN], sizes[R_OUT]}, aoti_torch_dtype_float32());
  const RowIndex index = rows.row_index(sizes);
  const TensorView u = read_view(args.u);
  std::optional<Sorted> by_index;
  if (rows.index) by_index.emplace(products, args.u, *rows.index, sizes[L]);
  RowCoreGradProblem problem{};
  problem.of_core =
      by_index ? by_index->segments() : Segments{nullptr, index.ends, /*from_zero=*/1};
  problem.token = index.token;
  problem.u = products.matrix(u);
  problem.g = products.matrix(read_view(args.g));
  problem.type = u.dtype;
  problem.dcores = static_cast<float*>(dcores.mutable_data_ptr());
  problem.rows = index.rows;
  problem.tokens = sizes[M];
  problem.cores = sizes[L];
  problem.r_in = int32_t(sizes[R_IN]);
  problem.r_out = int32_t(sizes[R_OUT]);
  problem.scale = float(scaling);
  products.run(problem);
  return dcores;
}

}  // namespace

Tensor CudaProducts::row_core(const RowArgs& args, const Sizes& sizes, double scaling) const {
  check_sizes(op_, sizes);
  const Rows rows(args);
  const RowIndex index = rows.row_index(sizes);
  OptionalTensor h;
  product(*this, make_padded(h, index.rows, sizes[R_OUT], like_.dtype), read_view(args.u), index,
          args.cores, Direction::forward, scaling);
  return *h;
}

std::tuple<Tensor, Tensor> CudaProducts::row_core_backward(const RowArgs& args, const Sizes& sizes,
                                                           double scaling, bool need_u,
                                                           bool need_cores) const {
  check_sizes(op_, sizes);
  const Rows rows(args);
  return {need_u ? gradient_of_u(*this, args, sizes, rows, scaling) : Tensor(),
          need_cores ? gradient_of_cores(*this, args, sizes, rows, scaling) : Tensor()};
}

}  // namespace lotr
