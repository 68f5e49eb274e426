// The products of a layer on CUDA tensors (layer.h): the base product by the library, the others by
// the launchers of cuda/. All run on the current stream of the operands' device. Nothing
// synchronises, and all memory comes from torch's allocator on that stream, so a CUDA graph may
// capture a call.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "cuda/sm90/gemm_lotr.h"
#include "cuda_device.h"
#include "layer.h"

namespace lotr {

class CudaProducts {
 public:
  struct Value {
    void* data = nullptr;
    int64_t rows = 0, cols = 0, row = 0, col = 0;
    DType type = DType::float32;
    AtenTensorHandle handle = nullptr;  // of an argument
  };
  static constexpr bool unfolded_first = false;
  static constexpr int64_t max_rank = cuda::MAX_RANK;
#ifdef LOTR_SM90A
  static constexpr bool has_fused = true;
#else
  static constexpr bool has_fused = false;
#endif

  // like's device is current during the lifetime.
  CudaProducts(const Check& c, const Arg& like, double p = 0.0, const Arg& seed = Arg("seed"))
      : op_(c.op), like_(like), guard_(like.device_index) {
    const DType type = cuda_dtype(op_, like.name, like.dtype);
    const Device& device = device_of(op_, like.device_index);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        TorchCuda::functions().current_stream(like.device_index, &stream));
    call_ = {type, device.card, stream, device.early};
    if (p != 0.0)
      dropout_ = {static_cast<const int64_t*>(read_data(seed)), uint32_t(p * 4294967296.0),
                  float(1.0 / (1.0 - p))};
  }
  static int64_t order_of(const Check& c, int64_t strategy) {
    const int64_t order = strategy & ~UNFOLDED;
    if (order != TWO_PASS && order != BETA && !(has_fused && strategy == FUSED))
      fail(c.op, ": strategy: expected 0 (two_pass) or 1 (beta)",
           has_fused ? "" : " in a build without sm_90a", ", got ", strategy,
           strategy == FUSED ? " (fused)" : "");
    return order;
  }

  Value read(const Arg& a) const { return value_of(a, read_data(a)); }
  Matrix matrix(const Value& v) const {
    return {v.data, v.row, v.col,
            cuda::access_of(v.data, v.row, v.col, v.rows, v.type, call_.type)};
  }
  static FloatSum float_sum(const Sum<Value>& sum) {
    return {static_cast<float*>(sum.value.data), sum.value.row, sum.value.col, sum.add};
  }
  // A new matrix, not initialised. ranks: its rows start at multiples of 16 bytes, so that kernels
  // copy them whole whatever the rank is.
  Value make(OptionalTensor& made, int64_t rows, int64_t cols, ScalarType dtype, bool ranks) const {
    const DtypeInfo info = dtype_info(dtype);
    made = empty<2>(like_, {rows, cols}, info.code, ranks ? 16 / info.bytes : 1);
    return {made->mutable_data_ptr(), rows, cols,
            made->stride(0),          1,    cuda_dtype(op_, "dtype", dtype)};
  }
  // Runs an operator of cuda/launch.h.
  template <class Problem>
  void run(const Problem& problem) const {
    OptionalTensor memory;  // freed in stream order
    if (const size_t bytes = cuda::workspace(call_, problem))
      memory = empty<1>(like_, {int64_t(bytes)}, aoti_torch_dtype_uint8());
    cuda::run(call_, problem, memory ? memory->mutable_data_ptr() : nullptr);
  }

  // y or dx, new, with like's leading dimensions.
  Output<Value> output(const Arg& like, int64_t cols, const Arg& bias) const {
    OptionalTensor matrix;
    const Value value = make(matrix, like.flat.rows, cols, like_.dtype, false);
    Output<Value> y{with_leading(*matrix, like, cols), *matrix, value, {}};
    if (bias) y.bias = {read_data(bias), 1, cols, 0, bias.stride[0], call_.type, bias.handle};
    return y;
  }
  Output<Value> onto(const Arg& given) const {
    return {*given.tensor, matrix_view(given), value_of(given, written_data(given)), {}};
  }
  // float32; a new one is rounded to its dtype when all launches are queued.
  Sum<Value> sum(const Arg& given, OptionalTensor& made, int64_t rows, int64_t cols,
                 ScalarType) const {
    if (given) return {value_of(given, written_data(given)), true};
    return {make(made, rows, cols, ScalarType::Float, false), false};
  }

  // out (fresh: = with its bias, else +=) x weight.
  void base(const Output<Value>& out, const Arg& x, const Tensor& weight, bool fresh) const {
    const TorchCuda& torch = TorchCuda::functions();
    const Tensor a = matrix_view(x);
    const AtenTensorHandle y = out.matrix.get(), start = fresh ? out.bias.handle : y;
    STABLE_TORCH_ERROR_CODE_CHECK(start ? torch.addmm_out(y, start, a.get(), weight.get(), 1.0, 1.0)
                                        : torch.mm_out(y, a.get(), weight.get()));
  }
#ifdef LOTR_SM90A
  // y = x W^T + bias + u F^T in one launch; backward: dx = g W + k A^T. Returns why the kernel
  // takes none of these, or "" if it ran.
  std::string fused(const Output<Value>& y, const Arg& x, const Arg& weight, const Value& u,
                    const Value& F, bool backward) const {
    // rows in the call's type that start at multiples of 16 bytes, as tensor maps need them
    const auto in_rows = [&](const Value& v, OptionalTensor& copy) {
      const bool fits = v.type == call_.type && v.col == 1 && v.row % 8 == 0 && v.row >= v.cols &&
                        reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
      if (fits || call_.type == DType::float32) return matrix(v);
      const Value rows = make(copy, v.rows, v.cols, like_.dtype, true);
      run(PackProblem{matrix(v), matrix(rows), v.rows, v.cols});
      return matrix(rows);
    };
    OptionalTensor u_copy, F_copy;
    cuda::GemmLotr q{};
    q.backward = backward;
    q.x = matrix(read(x));
    q.W = matrix(read(weight));
    q.u = in_rows(u, u_copy);
    q.F = in_rows(F, F_copy);
    q.y = matrix(y.value);
    q.bias = y.bias.data;
    q.bias_stride = y.bias.col;
    q.M = y.value.rows;
    q.N = y.value.cols;
    q.K = x.flat.cols;
    q.r = int32_t(u.cols);
    std::string refusal = cuda::gemm_lotr_refusal(call_, q);
    if (refusal.empty()) cuda::gemm_lotr(call_, q);
    return refusal;
  }
#else
  template <class... Any>
  static std::string fused(const Any&...) {
    return {};  // order_of has refused it
  }
#endif

  Value shrink(OptionalTensor& made, const Value& x, const Arg& A, bool dropped) const {
    const Value u = make(made, x.rows, A.size[1], like_.dtype, true);
    ShrinkProblem q{};
    q.x = matrix(x);
    q.A = matrix(read(A));
    q.u = matrix(u);
    q.M = x.rows;
    q.K = x.cols;
    q.r = int32_t(u.cols);
    q.scale = 1.f;
    q.dropout = mask(dropped);
    run(q);
    return u;
  }
  Value fold(OptionalTensor& made, const Arg& B, const Arg& core, double scaling,
             ScalarType dtype) const {
    const Value factor = read(B), G = read(core), F = make(made, factor.rows, G.rows, dtype, true);
    FoldProblem q{};
    q.B = matrix(factor);
    q.core = matrix(G);
    q.F = matrix(F);
    q.B_type = factor.type;
    q.core_type = G.type;
    q.F_type = F.type;
    q.N = factor.rows;
    q.r_in = int32_t(G.rows);
    q.r_out = int32_t(G.cols);
    q.scale = float(scaling);
    run(q);
    return F;
  }
  // fresh: y starts with this and its bias, whatever it holds.
  void expand(const Output<Value>& y, const Value& u, const Value& F, bool fresh,
              bool dropped) const {
    ExpandProblem q{};
    q.y = matrix(y.value);
    if (fresh) {
      q.bias = y.bias.data;
      q.bias_stride = y.bias.col;
    } else {
      q.start = q.y;
    }
    q.u = matrix(u);
    q.F = matrix(F);
    q.M = y.value.rows;
    q.N = y.value.cols;
    q.r = int32_t(u.cols);
    q.dropout = mask(dropped);
    run(q);
  }
  Value shrink_grad(OptionalTensor& made, const Sum<Value>& Q, const Value& g, const Arg& F,
                    const Arg& u) const {
    const Value k = make(made, g.rows, F.size[1], like_.dtype, true);
    ShrinkGradProblem q{};
    q.g = matrix(g);
    q.F = matrix(read(F));
    q.u = matrix(read(u));
    q.k = matrix(k);
    q.Q = float_sum(Q);
    q.M = g.rows;
    q.N = g.cols;
    q.r = int32_t(k.cols);
    q.r_u = q.r;
    run(q);
    return k;
  }
  void add(OptionalTensor& made, Value& k, const Arg& given) const {
    made = torch::stable::subtract(*made, *given.tensor,
                                   -1.0);  // the stable interface has no sum of tensors
    k = read(Arg("k", *made));
  }
  void fold_grad(const Sum<Value>& dB, const Sum<Value>& dcore, const Value& Q, const Arg& B,
                 const Arg& core, double scaling) const {
    const Value factor = read(B), G = read(core);
    FoldGradProblem q{};
    q.Q = matrix(Q);
    q.B = matrix(factor);
    q.core = matrix(G);
    q.B_type = factor.type;
    q.core_type = G.type;
    q.dB = float_sum(dB);
    q.dcore = static_cast<float*>(dcore.value.data);
    q.N = factor.rows;
    q.r_in = int32_t(G.rows);
    q.r_out = int32_t(G.cols);
    q.scale = float(scaling);
    run(q);
  }
  // D (+)= drop(x)^T v.
  void outer(const Sum<Value>& D, const Value& x, const Value& v, bool dropped) const {
    FactorGradProblem q{};
    q.x = matrix(x);
    q.v = matrix(v);
    q.D = float_sum(D);
    q.M = x.rows;
    q.K = x.cols;
    q.r = int32_t(v.cols);
    q.dropout = mask(dropped);
    run(q);
  }

  void small_forward(OptionalTensor& made, const Output<Value>& y, const ForwardArgs& a,
                     const Sizes& s, double scaling, bool) const {
    SmallForwardProblem q{};
    q.y = matrix(y.value);
    q.x = matrix(read(a.x));
    q.A = matrix(read(a.A));
    q.core = matrix(read(a.core));
    q.B = matrix(read(a.B));
    q.u = matrix(make(made, s[M], s[R_IN], like_.dtype, true));
    q.M = s[M];
    q.K = s[K];
    q.N = s[N];
    q.r_in = int32_t(s[R_IN]);
    q.r_out = int32_t(s[R_OUT]);
    q.scale = float(scaling);
    run(q);
  }
  void small_backward(const BackwardOutputs<Value>& outputs, const BackwardArgs& a, const Sizes& s,
                      double scaling, bool) const {
    const auto& [dx, dA, dB, dcore] = outputs;
    SmallBackwardProblem q{};
    q.dx = matrix(dx.value);
    q.g = matrix(read(a.g));
    q.A = matrix(read(a.A));
    q.core = matrix(read(a.core));
    q.B = matrix(read(a.B));
    if (a.u) q.u = matrix(read(a.u));
    if (a.x) q.x = matrix(read(a.x));
    q.dA = float_sum(dA);
    q.dB = float_sum(dB);
    q.dcore = static_cast<float*>(dcore.value.data);
    q.M = s[M];
    q.K = s[K];
    q.N = s[N];
    q.r_in = int32_t(s[R_IN]);
    q.r_out = int32_t(s[R_OUT]);
    q.scale = float(scaling);
    run(q);
  }

  // ---- a core a row: cuda_rows.cpp ----
  Tensor row_core(const RowArgs& a, const Sizes& s, double scaling) const;
  std::tuple<Tensor, Tensor> row_core_backward(const RowArgs& a, const Sizes& s, double scaling,
                                               bool need_u, bool need_cores) const;

 private:
  Value value_of(const Arg& a, void* data) const {
    const DType type = cuda_dtype(op_, a.name, a.dtype);
    return {data, a.flat.rows, a.flat.cols, a.flat.row_stride, a.flat.col_stride, type, a.handle};
  }
  Dropout mask(bool dropped) const { return dropped ? dropout_ : Dropout{nullptr, 0, 1.f}; }

  const char* op_;
  const Arg& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Call call_{};
  Dropout dropout_{nullptr, 0, 1.f};
};

}  // namespace lotr
