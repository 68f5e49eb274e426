// The products of a layer on CUDA tensors (layer.h): the base product by the library, the others by the
// launchers of cuda/. All run on the current stream of the operands' device; nothing synchronises.
#pragma once
#include "composite.h"
#include "cuda/counters.h"
#include "cuda_args.h"
#include "layer.h"

namespace lotr {

// out = start + a b; start null: a b.
inline void cuda_mm(const Tensor& out, AtenTensorHandle start, const Tensor& a, const Tensor& b) {
  const TorchCuda& torch = TorchCuda::functions();
  STABLE_TORCH_ERROR_CODE_CHECK(start ? torch.addmm_out(out.get(), start, a.get(), b.get(), 1.0, 1.0)
                                      : torch.mm_out(out.get(), a.get(), b.get()));
}

class CudaProducts {
 public:
  // A matrix, and the tensor that it lies in.
  struct Value {
    void* data = nullptr;
    int64_t rows = 0, cols = 0, row = 0, col = 0;
    DType type = DType::float32;
    AtenTensorHandle handle = nullptr;
  };
  static constexpr bool decomposed = false, folded_first = true, unfolded_first = false;
  static constexpr int64_t max_rank = cuda::MAX_RANK;
#ifdef LOTR_SM90A
  static constexpr bool fuses = true;
#else
  static constexpr bool fuses = false;
#endif

  // y or dx: the tensor, the same as a matrix for the library and for the kernels; of y the bias of the base
  // product, or the scale of its columns, with a bias that is not scaled.
  struct Output {
    Tensor tensor, matrix;
    Value value;
    AtenTensorHandle bias = nullptr;
    RowScale of_rows{};
  };
  // Q: a given sum, which is added to, or a new one, which is written.
  struct Sum {
    OptionalTensor memory;
    Value value;
    bool add;

    Sum(const CudaProducts& p, const Arg& given, bool own, int64_t rows, int64_t cols) : add(bool(given)) {
      if (given) value = p.written(given);
      if (own) value = p.floats(memory, rows, cols);
    }
    explicit operator bool() const { return value.handle; }
  };

  CudaProducts(const Check& c, const Arg& like, double p, const Arg& seed)
      : context_(c.op, like), dropout_(dropout(p, seed)) {}
  static int64_t order_of(const Check& c, int64_t strategy) {
    const int64_t order = strategy & ~UNFOLDED;
    if (order != TWO_PASS && order != BETA && !(fuses && strategy == FUSED))
      fail(c.op, ": strategy: expected 0 (two_pass) or 1 (beta)", fuses ? "" : " in a build without sm_90a",
           ", got ", strategy, strategy == FUSED ? " (fused)" : "");
    return order;
  }

  Value read(const Arg& a) const { return value_of(a, read_data(a)); }
  // The first of [l, rows, cols].
  Value first(const Arg& a) const {
    const int64_t *size = a.size + a.dim - 2, *stride = a.stride + a.dim - 2;
    return {read_data(a), size[0], size[1], stride[0], stride[1], dtype_of(context_.op(), a), a.handle};
  }

  Output output(const Arg& x, int64_t cols, const Arg& bias, const Arg& scale) const {
    Output y = new_output(x, cols);
    if (scale)
      y.of_rows = row_scale(scale, bias);
    else if (bias)
      y.bias = bias.handle;
    return y;
  }
  Output gradient(const Arg& given, const Arg& g, int64_t cols) const {
    if (!given) return new_output(g, cols);
    return {*given.tensor, matrix_view(given), written(given)};
  }
  Tensor result(Output& y) const { return std::move(y.tensor); }

  void base(Output& y, const Arg& x, const Arg& weight) const {
    cuda_mm(y.matrix, y.bias, matrix_view(x), transposed_view(weight));
  }
  void base_onto(Output& y, const Arg& x, const Arg& weight) const {
    cuda_mm(y.matrix, y.matrix.get(), matrix_view(x), transposed_view(weight));
  }
  void base_gradient(Output& dx, const Arg& g, const Arg& weight, bool fresh) const {
    cuda_mm(dx.matrix, fresh ? nullptr : dx.matrix.get(), matrix_view(g), *weight.tensor);
  }

  Value shrink(OptionalTensor& made, const Value& x, const Arg& A, bool dropped) const {
    const Value u = rank_rows(made, x.rows, A.size[1]);
    ShrinkProblem q{};
    q.x = in(x), q.A = in(read(A)), q.u = out(u);
    q.M = x.rows, q.K = x.cols, q.r = int32_t(u.cols);
    q.scale = 1.f, q.dropout = mask(dropped);
    context_.run(q);
    return u;
  }
  // F of one core, or of all of [l, r_in, r_out].
  Value fold(OptionalTensor& made, const Arg& B, const Arg& cores, double scaling, ScalarType dtype) const {
    const Value core = first(cores), factor = read(B);
    const int64_t n = B.size[0], r_in = core.rows, l = cores.dim == 3 ? cores.size[0] : 1;
    const DType type = dtype_of(context_.op(), "dtype", dtype);
    made =
        cores.dim == 3 ? context_.empty_rows<3>({l, n, r_in}, type) : context_.empty_rows<2>({n, r_in}, type);
    const int64_t row = made->stride(cores.dim - 2);
    const Value F{made->mutable_data_ptr(), n, r_in, row, 1, type, made->get()};
    FoldProblem q{};
    q.B = in(factor), q.cores = in(core), q.core_stride = cores.dim == 3 ? cores.stride[0] : 0;
    q.F = F.data, q.F_layer = n * row, q.F_row = row;
    q.B_type = factor.type, q.core_type = core.type, q.F_type = type;
    q.N = n, q.L = int32_t(l), q.r_in = int32_t(r_in), q.r_out = int32_t(core.cols), q.scale = float(scaling);
    context_.run(q);
    return F;
  }
  // fresh: by the library, which writes y without reading it.
  void expand(Output& y, const Value& u, const Value& F, bool fresh, bool dropped) const {
    const Dropout drop = mask(dropped);
    if (fresh && !drop.seed) {
      OptionalTensor copy;
      const Value factor = F.type == context_.call().type ? F : packed(copy, F);
      cuda_mm(y.matrix, y.bias, matrix_view(u.handle, u.rows, u.cols, u.row, u.col),
              matrix_view(factor.handle, factor.cols, factor.rows, factor.col, factor.row));
      return;
    }
    if (fresh) clear(y.value);
    ExpandProblem q{};
    q.y = out(y.value), q.u = in(u), q.F = in(F);
    q.M = y.value.rows, q.N = y.value.cols, q.r = int32_t(u.cols), q.dropout = drop;
    q.of_rows = y.of_rows;
    context_.run(q);
  }
  Value shrink_grad(OptionalTensor& made, const Sum& Q, const Value& g, const Arg& F, const Arg& u) const {
    const Value k = rank_rows(made, g.rows, F.size[1]);
    ShrinkGradProblem q{};
    q.g = in(g), q.F = in(read(F)), q.u = in(read(u)), q.k = out(k);
    q.Q = static_cast<float*>(Q.value.data), q.Q_row = Q.value.row, q.Q_col = Q.value.col;
    q.accumulate = Q.add, q.M = g.rows, q.N = g.cols, q.r = int32_t(k.cols);
    context_.run(q);
    return k;
  }
  void add_outer(const Sum& Q, const Value& g, const Arg& u) const {
    outer(Q.value, g, read(u), false, Q.add);
  }
  void add(OptionalTensor& made, Value& k, const Arg& given) const {
    AtenTensorHandle sum = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(TorchCuda::functions().add(made->get(), given.handle, 1.0, &sum));
    made = Tensor(sum);
    k = read(Arg("k", *made));
  }
  // Of one core, or of all of [l, r_in, r_out], whose Q are Q_stride apart. dB is added to where it is given.
  void fold_grad(Made& made, const Value& Q, int64_t Q_stride, const Arg& B, const Arg& cores, double scaling,
                 const Arg& dB, bool need_B, bool need_core, ScalarType narrow) const {
    const Value core = first(cores), factor = read(B);
    const int64_t n = B.size[0], r_in = core.rows, r_out = core.cols, l = cores.dim == 3 ? cores.size[0] : 1;
    Tensor dcores =
        cores.dim == 3 ? context_.empty_float<3>({l, r_in, r_out}) : context_.empty_float<2>({r_in, r_out});
    OptionalTensor total;
    Value sum;
    if (dB)
      sum = written(dB);
    else if (need_B)
      sum = zeros(total, n, r_out);
    FoldGradProblem q{};
    q.Q = in(Q), q.Q_stride = Q_stride;
    q.B = in(factor), q.cores = in(core), q.core_stride = cores.dim == 3 ? cores.stride[0] : 0;
    q.dB = static_cast<float*>(sum.data), q.dB_row = sum.row, q.dB_col = sum.col;
    q.dcores = static_cast<float*>(dcores.mutable_data_ptr());
    q.B_type = factor.type, q.core_type = core.type;
    q.N = n, q.L = int32_t(l), q.r_in = int32_t(r_in), q.r_out = int32_t(r_out), q.scale = float(scaling);
    context_.run(q);
    if (total) made.dB = in_dtype(*total, narrow);
    if (need_core) made.dcore = in_dtype(dcores, narrow);
  }
  std::tuple<Tensor, Tensor> scale_backward(const Arg& g, const Arg& y, const Arg& bias,
                                            const Arg& scale) const {
    const int64_t n = g.flat.cols;
    Output g0 = new_output(g, n);
    Tensor dscale = context_.empty_float<1>({n});
    ScaleBackwardProblem q{};
    q.g = in(read(g)), q.y = in(read(y)), q.g0 = out(g0.value), q.of_rows = row_scale(scale, bias);
    q.dscale = static_cast<float*>(dscale.mutable_data_ptr());
    q.M = g.flat.rows, q.N = n;
    context_.run(q);
    return {std::move(g0.tensor), std::move(dscale)};
  }
  // sum += drop(x)^T k, or a new tensor where none is given.
  void factor_grad(OptionalTensor& made, const Arg& sum, int64_t rows, int64_t cols, ScalarType narrow,
                   const Arg& x, const Value& k) const {
    if (sum) return outer(written(sum), read(x), k, true, true);
    OptionalTensor total;
    outer(floats(total, rows, cols), read(x), k, true, false);
    made = in_dtype(*total, narrow);
  }

  void small_forward(OptionalTensor& made, Output& y, const ForwardArgs& a, const Sizes& s, double scaling,
                     bool) const {
    SmallForwardProblem q{};
    q.y = out(y.value), q.x = in(read(a.x)), q.A = in(read(a.A)), q.core = in(read(a.core));
    q.B = in(read(a.B)), q.u = out(rank_rows(made, s.m, s.r_in));
    q.M = s.m, q.K = s.k, q.N = s.n;
    q.r_in = int32_t(s.r_in), q.r_out = int32_t(s.r_out), q.scale = float(scaling);
    q.of_rows = y.of_rows;
    context_.run(q);
  }
  void small_backward(Made& made, Output* dx, const BackwardArgs& a, const Sizes& s, double scaling, bool,
                      bool need_B, bool need_core, ScalarType narrow) const {
    SmallBackwardProblem q{};
    if (dx) q.dx = out(dx->value);
    q.g = in(read(a.g)), q.A = in(read(a.A)), q.core = in(read(a.core)), q.B = in(read(a.B));
    if (a.u) q.u = in(read(a.u));
    OptionalTensor new_dA, new_dB, new_core;
    if (a.x) {
      const Value dA = sum_or_zeros(a.dA, new_dA, s.k, s.r_in);
      q.x = in(read(a.x)), q.dA = static_cast<float*>(dA.data), q.dA_row = dA.row, q.dA_col = dA.col;
    }
    if (need_B) {
      const Value dB = sum_or_zeros(a.dB, new_dB, s.n, s.r_out);
      q.dB = static_cast<float*>(dB.data), q.dB_row = dB.row, q.dB_col = dB.col;
    }
    if (need_core) q.dcore = static_cast<float*>(floats(new_core, s.r_in, s.r_out).data);
    q.M = s.m, q.K = s.k, q.N = s.n;
    q.r_in = int32_t(s.r_in), q.r_out = int32_t(s.r_out), q.scale = float(scaling);
    context_.run(q);
    if (new_dA) made.dA = in_dtype(*new_dA, narrow);
    if (new_dB) made.dB = in_dtype(*new_dB, narrow);
    if (new_core) made.dcore = in_dtype(*new_core, narrow);
  }

  // ---- the adapter's product inside the base product: fused_cuda.h ----
  // y = x W^T + bias + u F^T; backward: dx = g W + k A^T.
  void fused(Output& y, const Arg& x, const Arg& weight, const Arg& bias, const Value& u, const Value& F,
             bool backward) const;
  // Why it cannot run with a new y (name, expected, got), or "".
  std::string fused_refusal(const Arg& x, const Arg& weight, int64_t r, bool backward) const;

  const Context& context() const { return context_; }
  Matrix in(const Value& v) const {
    return {v.data, v.row, v.col,
            cuda::access_of(v.data, v.row, v.col, v.rows, v.type, context_.call().type)};
  }
  MutableMatrix out(const Value& v) const {
    const Matrix m = in(v);
    return {v.data, m.row, m.col, m.access};
  }
  // A copy of v in the call's type, whose rows start at multiples of 16 bytes.
  Value packed(OptionalTensor& copy, const Value& v) const {
    const Value rows = rank_rows(copy, v.rows, v.cols);
    cuda::pack(context_.call(), {in(v), rows.data, v.rows, v.cols, rows.row});
    return rows;
  }
  // A new matrix [rows, rank], whose rows start at multiples of 16 bytes.
  Value rank_rows(OptionalTensor& made, int64_t rows, int64_t rank) const {
    made = context_.empty_rows<2>({rows, rank});
    return {made->mutable_data_ptr(), rows, rank, made->stride(0), 1, context_.call().type, made->get()};
  }

 private:
  Value value_of(const Arg& a, void* data) const {
    const DType type = dtype_of(context_.op(), a);
    return {data, a.flat.rows, a.flat.cols, a.flat.row_stride, a.flat.col_stride, type, a.handle};
  }
  static RowScale row_scale(const Arg& scale, const Arg& bias) {
    RowScale row{};
    row.scale = static_cast<const float*>(read_data(scale)), row.scale_stride = scale.stride[0];
    if (bias) row.bias = read_data(bias), row.bias_stride = bias.stride[0];
    return row;
  }
  Value written(const Arg& a) const { return value_of(a, written_data(a)); }
  Output new_output(const Arg& like, int64_t cols) const {
    const int64_t rows = like.flat.rows;
    Tensor matrix = context_.empty<2>({rows, cols});
    const Value value{matrix.mutable_data_ptr(), rows, cols, cols, 1, context_.call().type, matrix.get()};
    if (like.dim == 2) return {matrix, matrix, value};
    return {contiguous_view(matrix, size_like(like, cols)), matrix, value};
  }
  Value floats(OptionalTensor& made, int64_t rows, int64_t cols) const {
    made = context_.empty_float<2>({rows, cols});
    return {made->mutable_data_ptr(), rows, cols, cols, 1, DType::float32, made->get()};
  }
  Value sum_or_zeros(const Arg& given, OptionalTensor& made, int64_t rows, int64_t cols) const {
    return given ? written(given) : zeros(made, rows, cols);
  }
  Value zeros(OptionalTensor& made, int64_t rows, int64_t cols) const {
    const Value v = floats(made, rows, cols);
    clear(v);
    return v;
  }
  // Makes a new contiguous matrix zeros.  Not by torch's zero_, which would pass through the dispatcher.
  void clear(const Value& made) const {
    const size_t bytes = size_t(made.rows * made.cols) * size_t(element_size(made.type));
    if (bytes) cuda::clear(made.data, bytes, context_.call().stream);
  }
  // D (add: +=, else =) drop(x)^T v.
  void outer(const Value& D, const Value& x, const Value& v, bool dropped, bool add) const {
    FactorGradProblem q{};
    q.x = in(x), q.v = in(v), q.D = static_cast<float*>(D.data), q.D_row = D.row, q.D_col = D.col;
    q.M = x.rows, q.K = x.cols, q.r = int32_t(v.cols), q.accumulate = add, q.dropout = mask(dropped);
    context_.run(q);
  }
  Dropout mask(bool dropped) const { return dropped ? dropout_ : Dropout{nullptr, 0, 1.f}; }

  Context context_;
  Dropout dropout_;
};

}  // namespace lotr
