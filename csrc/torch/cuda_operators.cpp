// The operators on CUDA tensors: checks (check.h, the same as on the CPU), outputs, workspace, stream,
// launch.
//
// Compiled by the host compiler and linked into the one extension module, which must import under a torch
// without CUDA: so nothing of libtorch_cuda is linked, and the current stream is found when it is first asked
// for.  Nothing here synchronises, and all memory comes from torch's allocator on the current stream, so a
// call may be captured in a graph.
#include <Python.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <tuple>

#include "check.h"
#include "cuda/launch.h"

namespace lotr {
namespace {

using OptionalTensor = std::optional<Tensor>;
constexpr int MAX_DEVICES = 64;

void* current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    // the library that torch has loaded; RTLD_DEFAULT would not see it
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (!get) fail("lotr: expected a torch built with CUDA, got one without libtorch_cuda.so");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

// Multiprocessors of a device that our kernels run on; asked for once.
int multiprocessors(const char* op, int32_t device) {
  static std::atomic<int> known[MAX_DEVICES];
  if (device < MAX_DEVICES && known[device].load(std::memory_order_relaxed)) return known[device];
  int count = 0, major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error) fail(op, ": device ", device, ": ", cudaGetErrorString(error));
  if (major < 8) {
    fail(op, ": device ", device, ": expected a GPU of compute capability 8.0 or later, got ", major, ".",
         minor, "; the composite path runs everywhere (LOTR_STRATEGY=composite)");
  }
  if (device < MAX_DEVICES) known[device] = count;
  return count;
}

// Whether torch rounds the operands of float32 products to tf32.  Python holds that setting; float32 calls
// only.
Float32 float32_products() {
  if (!Py_IsInitialized()) return Float32::exact;
  const PyGILState_STATE gil = PyGILState_Ensure();
  PyObject* object = PyImport_ImportModule("torch");
  for (const char* name : {"backends", "cuda", "matmul", "fp32_precision"}) {
    PyObject* next = object ? PyObject_GetAttrString(object, name) : nullptr;
    Py_XDECREF(object);
    object = next;
  }
  const bool tf32 = object && PyUnicode_CompareWithASCIIString(object, "tf32") == 0;
  Py_XDECREF(object);
  PyErr_Clear();
  PyGILState_Release(gil);
  return tf32 ? Float32::tf32 : Float32::exact;
}

DType dtype_of(const char* op, const Arg& a) {
  switch (a.dtype) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      fail(op, ": ", a.name, ": expected dtype torch.float32, torch.bfloat16 or torch.float16 on CUDA, got ",
           dtype_name(a.dtype), "; the composite path takes it (LOTR_STRATEGY=composite)");
  }
}

// Everything a call needs besides its operands.  Its device is the current one while this lives.
class Context {
 public:
  Context(const char* op, const Arg& like) : op_(op), device_(like.device_index), guard_(like.device_index) {
    const DType type = dtype_of(op, like);
    call_ = {type, type == DType::float32 ? float32_products() : Float32::exact, multiprocessors(op, device_),
             current_stream(device_)};
  }
  const cuda::Call& call() const { return call_; }
  const char* op() const { return op_; }

  // Contiguous, not initialised.
  template <size_t dim>
  Tensor empty(const std::array<int64_t, dim>& size, int32_t dtype) const {
    std::array<int64_t, dim> stride;
    int64_t step = 1;
    for (size_t i = dim; i-- > 0; step *= size[i]) stride[i] = step;
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(dim), size.data(), stride.data(), dtype,
                                                           aoti_torch_device_type_cuda(), device_, &handle));
    return Tensor(handle);
  }
  template <size_t dim>
  Tensor empty(const std::array<int64_t, dim>& size) const {
    return empty(size, code(call_.type));
  }
  template <size_t dim>
  Tensor empty_float(const std::array<int64_t, dim>& size) const {
    return empty(size, aoti_torch_dtype_float32());
  }
  static int32_t code(DType t) {
    return t == DType::float32    ? aoti_torch_dtype_float32()
           : t == DType::bfloat16 ? aoti_torch_dtype_bfloat16()
                                  : aoti_torch_dtype_float16();
  }

  // Runs f(workspace) on `bytes` of memory that goes back to the allocator afterwards, in stream order.
  template <class F>
  void with_workspace(size_t bytes, F f) const {
    if (bytes == 0) return f(nullptr);
    Tensor memory = empty<1>({int64_t(bytes)}, aoti_torch_dtype_uint8());
    f(memory.mutable_data_ptr());
  }

  Matrix read(const Arg& a) const {
    const void* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(a.handle, &data));
    const int64_t row = a.stride[a.dim - 2], col = a.stride[a.dim - 1];
    return {data, row, col, cuda::access_of(data, row, col, a.size[a.dim - 2], dtype_of(op_, a), call_.type)};
  }
  MutableMatrix written(const Arg& a) const {
    void* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(a.handle, &data));
    const Matrix m = read(a);
    return {data, m.row, m.col, m.access};
  }
  float* written_floats(const Arg& a) const { return static_cast<float*>(written(a).data); }

 private:
  const char* op_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Call call_;
};

// First and last byte of an argument's elements, and what is needed to see that two column ranges of one
// buffer are apart.
struct Extent {
  uintptr_t first, last;
  int64_t row_bytes, width_bytes;  // of a matrix whose rows are contiguous, else 0
};
Extent extent(const Arg& a) {
  const void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(a.handle, &data));
  const int64_t item = a.dtype == ScalarType::Float ? 4 : a.dtype == ScalarType::Double ? 8 : 2;
  int64_t end = item;
  for (int64_t i = 0; i < a.dim; ++i) {
    if (a.size[i] == 0) return {0, 0, 0, 0};
    end += (a.size[i] - 1) * a.stride[i] * item;
  }
  const auto first = reinterpret_cast<uintptr_t>(data);
  const bool rows = a.dim == 2 && a.stride[1] == 1 && a.size[0] > 1;
  return {first, first + uintptr_t(end), rows ? a.stride[0] * item : 0, rows ? a.size[1] * item : 0};
}

// A matrix that is written must share no element with one that is read: blocks run in no order.
void apart(const char* op, const Arg& written, const Arg& other) {
  const Extent w = extent(written), o = extent(other);
  if (w.last <= o.first || o.last <= w.first) return;
  if (w.row_bytes && w.row_bytes == o.row_bytes) {  // columns of one buffer
    const int64_t distance = int64_t(o.first - w.first),
                  shift = ((distance % w.row_bytes) + w.row_bytes) % w.row_bytes;
    if (shift >= w.width_bytes && shift + o.width_bytes <= w.row_bytes) return;
  }
  fail(op, ": ", written.name, ": expected memory of its own (it is written), got memory that overlaps ",
       other.name);
}

void check_rank(const char* op, const Arg& a, int64_t axis) {
  if (a.size[axis] > cuda::MAX_RANK) {
    fail(op, ": ", a.name, ": expected a rank of at most ", cuda::MAX_RANK, " in dimension ", axis,
         ", got shape ", a.shape(), "; the composite path takes it (LOTR_STRATEGY=composite)");
  }
}

Dropout dropout(double p, const OptionalTensor& seed) {
  if (p == 0.0) return {nullptr, 0, 1.f};
  return {static_cast<const int64_t*>(seed->const_data_ptr()), uint32_t(p * 4294967296.0),
          float(1.0 / (1.0 - p))};
}

std::optional<Arg> optional_arg(const char* name, const OptionalTensor& t) {
  return t ? std::optional<Arg>(std::in_place, name, *t) : std::nullopt;
}
const Arg* pointer(const std::optional<Arg>& a) {
  return a ? &*a : nullptr;
}

Tensor shrink(const Tensor& x, const Tensor& A, double p, const OptionalTensor& seed) {
  const Arg ax("x", x), aA("A", A);
  const Sizes s = check_shrink(ax, aA, p, seed);
  check_rank("lotr::shrink", aA, 1);
  const Context c("lotr::shrink", ax);
  Tensor u = c.empty<2>({s.m, s.r});
  ShrinkParams q{};
  q.x = c.read(ax), q.A = c.read(aA), q.u = c.written(Arg("u", u));
  q.M = s.m, q.K = s.k, q.r = int32_t(s.r);
  q.scale = 1.f, q.dropout = dropout(p, seed);
  c.with_workspace(cuda::shrink_workspace(c.call(), q), [&](void* w) { cuda::shrink(c.call(), q, w); });
  return u;
}

void expand_add_(const Tensor& y, const Tensor& u, const Tensor& F, double p, const OptionalTensor& seed) {
  const Arg ay("y", y), au("u", u), aF("F", F);
  const Sizes s = check_expand_add(ay, au, aF, p, seed);
  check_rank("lotr::expand_add_", aF, 1);
  const Context c("lotr::expand_add_", ay);
  apart(c.op(), ay, au), apart(c.op(), ay, aF);
  ExpandParams q{};
  q.y = c.written(ay), q.u = c.read(au), q.F = c.read(aF);
  q.M = s.m, q.N = s.n, q.r = int32_t(s.r), q.dropout = dropout(p, seed);
  cuda::expand_add(c.call(), q);
}

void factor_grad_(const Tensor& acc, const Tensor& x, const Tensor& k, double p, const OptionalTensor& seed) {
  const Arg aacc("acc", acc), ax("x", x), ak("k", k);
  const Sizes s = check_factor_grad(aacc, ax, ak, p, seed);
  check_rank("lotr::factor_grad_", ak, 1);
  const Context c("lotr::factor_grad_", ax);
  apart(c.op(), aacc, ax), apart(c.op(), aacc, ak);
  FactorGradParams q{};
  q.x = c.read(ax), q.v = c.read(ak), q.D = c.written_floats(aacc), q.D_row = aacc.stride[0],
  q.D_col = aacc.stride[1];
  q.M = s.m, q.K = s.k, q.r = int32_t(s.r), q.accumulate = 1, q.dropout = dropout(p, seed);
  c.with_workspace(cuda::factor_grad_workspace(c.call(), q),
                   [&](void* w) { cuda::factor_grad(c.call(), q, w); });
}

// k = g F and Q (+)= g^T u.
void run_shrink_grad(const Context& c, const Sizes& s, const Arg& k, const Arg& Q, const Arg& g, const Arg& F,
                     const Arg& u, bool accumulate) {
  ShrinkGradParams q{};
  q.g = c.read(g), q.F = c.read(F), q.u = c.read(u), q.k = c.written(k);
  q.Q = c.written_floats(Q), q.Q_row = Q.stride[0], q.Q_col = Q.stride[1], q.accumulate = accumulate;
  q.M = s.m, q.N = s.n, q.r = int32_t(s.r);
  c.with_workspace(cuda::shrink_grad_workspace(c.call(), q),
                   [&](void* w) { cuda::shrink_grad(c.call(), q, w); });
}

std::tuple<Tensor, Tensor> shrink_grad(const Tensor& g, const Tensor& F, const Tensor& u) {
  const Arg ag("g", g), aF("F", F), au("u", u);
  const Sizes s = check_shrink_grad(ag, aF, au);
  check_rank("lotr::shrink_grad", aF, 1);
  const Context c("lotr::shrink_grad", ag);
  Tensor k = c.empty<2>({s.m, s.r}), Q = c.empty_float<2>({s.n, s.r});
  run_shrink_grad(c, s, Arg("k", k), Arg("Q", Q), ag, aF, au, false);
  return {k, Q};
}

Tensor shrink_grad_(const Tensor& Q, const Tensor& g, const Tensor& F, const Tensor& u) {
  const Arg aQ("Q", Q), ag("g", g), aF("F", F), au("u", u);
  const Sizes s = check_shrink_grad_add(aQ, ag, aF, au);
  check_rank("lotr::shrink_grad_", aF, 1);
  const Context c("lotr::shrink_grad_", ag);
  for (const Arg* a : {&ag, &aF, &au}) apart(c.op(), aQ, *a);
  Tensor k = c.empty<2>({s.m, s.r});
  run_shrink_grad(c, s, Arg("k", k), aQ, ag, aF, au, true);
  return k;
}

Tensor fold(const Tensor& B, const Tensor& cores, double scaling, ScalarType dtype) {
  const Arg aB("B", B), acores("cores", cores);
  const Sizes s = check_fold(aB, acores, scaling, dtype);
  const Context c("lotr::fold", aB);
  check_rank(c.op(), aB, 1), check_rank(c.op(), acores, 1);
  const DType type =
      dtype == ScalarType::Float      ? DType::float32
      : dtype == ScalarType::BFloat16 ? DType::bfloat16
      : dtype == ScalarType::Half
          ? DType::float16
          : (fail(c.op(), ": dtype: expected torch.float32, torch.bfloat16 or torch.float16 on CUDA, got ",
                  dtype_name(dtype)),
             DType::float32);
  Tensor F = c.empty<3>({s.l, s.n, s.r_in}, Context::code(type));
  FoldParams q{};
  q.B = c.read(aB), q.cores = c.read(acores), q.core_stride = acores.stride[0],
  q.F = c.written(Arg("F", F)).data;
  q.B_type = dtype_of(c.op(), aB), q.core_type = dtype_of(c.op(), acores), q.F_type = type;
  q.N = s.n, q.L = int32_t(s.l), q.r_in = int32_t(s.r_in), q.r_out = int32_t(s.r_out),
  q.scale = float(scaling);
  cuda::fold(c.call(), q);
  return F;
}

Tensor fold_grad(const Tensor& Q, const Tensor& B, const Tensor& cores, double scaling,
                 const OptionalTensor& dB) {
  const Arg aQ("Q", Q), aB("B", B), acores("cores", cores);
  const auto adB = optional_arg("dB", dB);
  const Sizes s = check_fold_grad(aQ, aB, acores, scaling, pointer(adB));
  const Context c("lotr::fold_grad", aQ);
  check_rank(c.op(), aB, 1), check_rank(c.op(), acores, 1);
  if (adB)
    for (const Arg* a : {&aQ, &aB, &acores}) apart(c.op(), *adB, *a);
  Tensor dcores = c.empty_float<3>({s.l, s.r_in, s.r_out});
  FoldGradParams q{};
  q.Q = c.read(aQ), q.Q_stride = aQ.stride[0];
  q.B = c.read(aB), q.cores = c.read(acores), q.core_stride = acores.stride[0];
  if (adB) q.dB = c.written_floats(*adB), q.dB_row = adB->stride[0], q.dB_col = adB->stride[1];
  q.dcores = c.written_floats(Arg("dcores", dcores));
  q.B_type = dtype_of(c.op(), aB), q.core_type = dtype_of(c.op(), acores);
  q.N = s.n, q.L = int32_t(s.l), q.r_in = int32_t(s.r_in), q.r_out = int32_t(s.r_out),
  q.scale = float(scaling);
  c.with_workspace(cuda::fold_grad_workspace(c.call(), q), [&](void* w) { cuda::fold_grad(c.call(), q, w); });
  return dcores;
}

Tensor small_forward_(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& core, const Tensor& B,
                      double scaling) {
  const Arg ay("y", y), ax("x", x), aA("A", A), acore("core", core), aB("B", B);
  const Sizes s = check_small_forward(ay, ax, aA, acore, aB, scaling);
  const Context c("lotr::small_forward_", ax);
  check_rank(c.op(), aA, 1), check_rank(c.op(), aB, 1);
  for (const Arg* a : {&ax, &aA, &acore, &aB}) apart(c.op(), ay, *a);
  Tensor u = c.empty<2>({s.m, s.r_in});
  SmallForwardParams q{};
  q.y = c.written(ay), q.x = c.read(ax), q.A = c.read(aA), q.core = c.read(acore), q.B = c.read(aB);
  q.u = c.written(Arg("u", u)), q.M = s.m, q.K = s.k, q.N = s.n;
  q.r_in = int32_t(s.r_in), q.r_out = int32_t(s.r_out), q.scale = float(scaling);
  c.with_workspace(cuda::small_forward_workspace(c.call(), q),
                   [&](void* w) { cuda::small_forward(c.call(), q, w); });
  return u;
}

Tensor small_backward_(const OptionalTensor& dx, const Tensor& g, const OptionalTensor& x, const Tensor& u,
                       const Tensor& A, const Tensor& core, const Tensor& B, double scaling,
                       const OptionalTensor& dA, const OptionalTensor& dB, bool need_core) {
  const auto adx = optional_arg("dx", dx), ax = optional_arg("x", x), adA = optional_arg("dA", dA),
             adB = optional_arg("dB", dB);
  const Arg ag("g", g), au("u", u), aA("A", A), acore("core", core), aB("B", B);
  const Sizes s = check_small_backward(pointer(adx), ag, pointer(ax), au, aA, acore, aB, scaling,
                                       pointer(adA), pointer(adB));
  const Context c("lotr::small_backward_", ag);
  check_rank(c.op(), aA, 1), check_rank(c.op(), aB, 1);
  for (const Arg* w : {pointer(adx), pointer(adA), pointer(adB)})
    for (const Arg* a : {&ag, &au, &aA, &acore, &aB, pointer(ax)})
      if (w && a) apart(c.op(), *w, *a);
  Tensor dcore = need_core ? c.empty_float<2>({s.r_in, s.r_out}) : c.empty_float<2>({0, 0});
  SmallBackwardParams q{};
  if (adx) q.dx = c.written(*adx);
  q.g = c.read(ag), q.u = c.read(au), q.A = c.read(aA), q.core = c.read(acore), q.B = c.read(aB);
  if (adA) {
    q.x = c.read(*ax);
    q.dA = c.written_floats(*adA), q.dA_row = adA->stride[0], q.dA_col = adA->stride[1];
  }
  if (adB) q.dB = c.written_floats(*adB), q.dB_row = adB->stride[0], q.dB_col = adB->stride[1];
  if (need_core) q.dcore = c.written_floats(Arg("dcore", dcore));
  q.M = s.m, q.K = s.k, q.N = s.n;
  q.r_in = int32_t(s.r_in), q.r_out = int32_t(s.r_out), q.scale = float(scaling);
  c.with_workspace(cuda::small_backward_workspace(c.call(), q),
                   [&](void* w) { cuda::small_backward(c.call(), q, w); });
  return dcore;
}

}  // namespace
}  // namespace lotr

STABLE_TORCH_LIBRARY_IMPL(lotr, CUDA, m)
{
  m.impl("shrink", TORCH_BOX(&lotr::shrink));
  m.impl("expand_add_", TORCH_BOX(&lotr::expand_add_));
  m.impl("factor_grad_", TORCH_BOX(&lotr::factor_grad_));
  m.impl("shrink_grad", TORCH_BOX(&lotr::shrink_grad));
  m.impl("shrink_grad_", TORCH_BOX(&lotr::shrink_grad_));
  m.impl("fold", TORCH_BOX(&lotr::fold));
  m.impl("fold_grad", TORCH_BOX(&lotr::fold_grad));
  m.impl("small_forward_", TORCH_BOX(&lotr::small_forward_));
  m.impl("small_backward_", TORCH_BOX(&lotr::small_backward_));
}
