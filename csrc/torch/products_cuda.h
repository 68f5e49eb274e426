// The products of a layer on CUDA tensors (layer.h): the base product by the library, the others by the
// launchers of cuda/. All run on the current stream of the operands' device; nothing synchronises.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda_args.h"
#include "layer.h"

namespace lotr {

inline Tensor in_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

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
  static constexpr bool unfolded_first = false;
  static constexpr int64_t max_rank = cuda::MAX_RANK;
#ifdef LOTR_SM90A
  static constexpr bool has_fused = true;
#else
  static constexpr bool has_fused = false;
#endif

  // y or dx: the tensor, the same as a matrix for the library and for the kernels, and y's bias.
  struct Output {
    Tensor tensor, matrix;
    Value value, bias;
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
    if (order != TWO_PASS && order != BETA && !(has_fused && strategy == FUSED))
      fail(c.op, ": strategy: expected 0 (two_pass) or 1 (beta)",
           has_fused ? "" : " in a build without sm_90a", ", got ", strategy,
           strategy == FUSED ? " (fused)" : "");
    return order;
  }

  Value read(const Arg& a) const { return value_of(a, read_data(a)); }
  // The first of [l, rows, cols].
  Value first(const Arg& a) const {
    const int64_t *size = a.size + a.dim - 2, *stride = a.stride + a.dim - 2;
    return {read_data(a), size[0], size[1], stride[0], stride[1], dtype_of(context_.op(), a), a.handle};
  }

  Output output(const Arg& x, int64_t cols, const Arg& bias) const {
    Output y = new_output(x, cols);
    if (bias) y.bias = {read_data(bias), 1, cols, 0, bias.stride[0], y.value.type, bias.handle};
    return y;
  }
  Output gradient(const Arg& given, const Arg& g, int64_t cols) const {
    if (!given) return new_output(g, cols);
    return {*given.tensor, matrix_view(given), written(given), {}};
  }
  Tensor result(Output& y) const { return std::move(y.tensor); }

  void base(Output& y, const Arg& x, const Arg& weight) const {
    cuda_mm(y.matrix, y.bias.handle, matrix_view(x), transposed_view(weight));
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
  // fresh: y starts with this and its bias, whatever it holds.
  void expand(Output& y, const Value& u, const Value& F, bool fresh, bool dropped) const {
    ExpandProblem q{};
    q.y = out(y.value), q.u = in(u), q.F = in(F);
    q.M = y.value.rows, q.N = y.value.cols, q.r = int32_t(u.cols), q.dropout = mask(dropped);
    q.fresh = fresh;
    if (fresh) q.bias = y.bias.data, q.bias_stride = y.bias.col;
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
    made = torch::stable::subtract(*made, *given.tensor, -1.0);  // the stable interface has no sum of tensors
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
      sum = floats(total, n, r_out);
    FoldGradProblem q{};
    q.Q = in(Q), q.Q_stride = Q_stride;
    q.B = in(factor), q.cores = in(core), q.core_stride = cores.dim == 3 ? cores.stride[0] : 0;
    q.dB = static_cast<float*>(sum.data), q.dB_row = sum.row, q.dB_col = sum.col, q.add_dB = bool(dB);
    q.dcores = static_cast<float*>(dcores.mutable_data_ptr());
    q.B_type = factor.type, q.core_type = core.type;
    q.N = n, q.L = int32_t(l), q.r_in = int32_t(r_in), q.r_out = int32_t(r_out), q.scale = float(scaling);
    context_.run(q);
    if (total) made.dB = in_dtype(*total, narrow);
    if (need_core) made.dcore = in_dtype(dcores, narrow);
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
    q.B = in(read(a.B)), q.u = out(rank_rows(made, s[M], s[R_IN]));
    q.M = s[M], q.K = s[K], q.N = s[N];
    q.r_in = int32_t(s[R_IN]), q.r_out = int32_t(s[R_OUT]), q.scale = float(scaling);
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
      const Value dA = a.dA ? written(a.dA) : floats(new_dA, s[K], s[R_IN]);
      q.x = in(read(a.x)), q.dA = static_cast<float*>(dA.data), q.dA_row = dA.row, q.dA_col = dA.col;
      q.add_dA = bool(a.dA);
    }
    if (need_B) {
      const Value dB = a.dB ? written(a.dB) : floats(new_dB, s[N], s[R_OUT]);
      q.dB = static_cast<float*>(dB.data), q.dB_row = dB.row, q.dB_col = dB.col, q.add_dB = bool(a.dB);
    }
    if (need_core) q.dcore = static_cast<float*>(floats(new_core, s[R_IN], s[R_OUT]).data);
    q.M = s[M], q.K = s[K], q.N = s[N];
    q.r_in = int32_t(s[R_IN]), q.r_out = int32_t(s[R_OUT]), q.scale = float(scaling);
    context_.run(q);
    if (new_dA) made.dA = in_dtype(*new_dA, narrow);
    if (new_dB) made.dB = in_dtype(*new_dB, narrow);
    if (new_core) made.dcore = in_dtype(*new_core, narrow);
  }

  // ---- the base product with the adapter inside, y = x W^T + bias + u F^T: fused_cuda.h ----

  // Whether the kernel takes these.
  bool fuses(const Output& y, const Arg& x, const Arg& weight, const Value& u, const Value& F,
             bool backward) const;
  void fused(Output& y, const Arg& x, const Arg& weight, const Value& u, const Value& F, bool backward) const;

  // ---- a core a row: cuda_rows.cpp ----

  Tensor row_core(const RowArgs& a, const Sizes& s, double scaling) const;
  std::tuple<Tensor, Tensor> row_core_backward(const RowArgs& a, const Sizes& s, double scaling, bool need_u,
                                               bool need_cores) const;

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
    context_.run(PackProblem{in(v), rows.data, v.rows, v.cols, rows.row});
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
  Value written(const Arg& a) const { return value_of(a, written_data(a)); }
  Output new_output(const Arg& like, int64_t cols) const {
    const int64_t rows = like.flat.rows;
    Tensor matrix = context_.empty<2>({rows, cols});
    const Value value{matrix.mutable_data_ptr(), rows, cols, cols, 1, context_.call().type, matrix.get()};
    if (like.dim == 2) return {matrix, matrix, value, {}};
    return {contiguous_view(matrix, size_like(like, cols)), matrix, value, {}};
  }
  Value floats(OptionalTensor& made, int64_t rows, int64_t cols) const {
    made = context_.empty_float<2>({rows, cols});
    return {made->mutable_data_ptr(), rows, cols, cols, 1, DType::float32, made->get()};
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
