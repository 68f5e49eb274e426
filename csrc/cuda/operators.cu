// csrc/cuda/launch.h: prepare() chooses kernel, plan and workspace, run() launches them.  Choice of the
// element type, ranks beyond one launch, inputs that have to be packed.
#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "counters.h"
#include "dispatch.h"
#include "launchers.h"
#include "one_product_sm90.h"
#include "plans.h"
#include "shrink_grad_sm90.h"

namespace lotr::cuda {
namespace {

template <class F>
void dispatch_policy(const Call& call, F f) {
  dispatch_type(call.type, [&](auto type) {
    if constexpr (decltype(type)::value == int(DType::bfloat16))
      f(Launchers<tile::Half<__nv_bfloat16>>{});
    else if constexpr (decltype(type)::value == int(DType::float16))
      f(Launchers<tile::Half<__half>>{});
    else if (call.float32 == Float32::tf32)
      f(Launchers<tile::Tf32>{});
    else
      f(Launchers<tile::Exact>{});
  });
}

// Columns first .. of a matrix.
template <class M>
M columns(M m, int64_t first, DType type) {
  const int64_t size = m.access == Access::float32_element ? 4 : element_size(type);
  auto* data = static_cast<const char*>(m.data) + first * m.col * size;
  if constexpr (std::is_same_v<M, Matrix>)
    m.data = data;
  else
    m.data = const_cast<char*>(data);
  return m;
}

// f(i, first, ranks) for the i-th of at most two launches, which takes so many ranks from `first` on
template <class F>
void each_launch(const Call& call, int64_t r, F f) {
  const int64_t most = max_rank(call.type);
  for (int i = 0; i * most < r; ++i) f(i, i * most, int32_t(std::min(most, r - i * most)));
}

// Takes packed copies of inputs off the front of the workspace, where they are needed.  Without one (null) it
// only counts their bytes.
class Packer {
 public:
  Packer(const Call& call, void* workspace) : call_(call), start_(static_cast<char*>(workspace)) {}

  void operator()(Matrix& m, int64_t rows, int64_t cols) {
    if (m.access == Access::vector) return;
    const int64_t chunk = row_elements(call_.type), row = plan::ceil_div(cols, chunk) * chunk;
    const Matrix packed{start_ + bytes_, row, 1, Access::vector};
    bytes_ += aligned(size_t(rows * row) * size_t(element_size(call_.type)));
    if (start_) pack(call_, {m, const_cast<void*>(packed.data), rows, cols, row});
    m = packed;
  }
  size_t bytes() const { return bytes_; }
  void* rest() const { return start_ + bytes_; }

 private:
  const Call& call_;
  char* start_;
  size_t bytes_ = 0;
};

// h = core_scale * u core as a product of its own, where no block has the whole rank of u.  In exact float32,
// as within shrink.
ShrinkProblem core_product(const ShrinkProblem& p) {
  ShrinkProblem h{};
  h.x = read_only(p.u);
  h.A = p.core;
  h.u = p.h;
  h.M = p.M;
  h.K = p.r;
  h.r = p.r_core;
  h.scale = p.core_scale;
  h.dropout.scale = 1.f;
  return h;
}
Call exactly(Call call) {
  call.float32 = Float32::exact;
  return call;
}

// The key of a problem.  bits: what else of its operands decides, the access of those that may be packed
// first.
Key key_of(Operator op, const Call& call, int64_t M, int64_t N, int64_t r, int64_t r_core,
           std::initializer_list<bool> bits) {
  Key key{M, N, int32_t(r), int32_t(r_core), call.card, 0, 0};
  for (const bool bit : bits) key.what = key.what * 2 + bit;
  key.what = key.what * 4 + uint32_t(op);
  const Switches& off = call.off;
  for (const bool bit : {call.float32 == Float32::tf32, call.early, call.wgmma, off.wgmma, off.early,
                         off.cluster, off.together, off.fused})
    key.how = key.how * 2 + bit;
  key.how = (key.how * 16 + uint32_t(call.most_of_cluster)) * 4 + uint32_t(call.type);
  return key;
}
plan::Plan choose(const Call& call, Operator op, int64_t M, int64_t N, int32_t r, bool wgmma = false) {
  return plans_of(call, op, M, N, r, wgmma).front();
}

bool packs(const Matrix& m) {
  return m.access != Access::vector;
}

}  // namespace

#ifndef LOTR_SM90A  // then shrink_grad_sm90.cu has it
bool runs_wgmma() {
  return false;
}
#endif

Workspace::Workspace(const Call& call, void* memory, int64_t tiles)
    : counters_(counters(call.stream, tiles)), floats_(static_cast<char*>(memory)) {
  const size_t bytes = aligned(size_t(tiles) * sizeof(int32_t));
  if (!counters_) {
    counters_ = static_cast<int32_t*>(memory);
    clear(memory, bytes, call.stream);
  }
  floats_ += bytes;
}

Reduction Workspace::take(int64_t tiles, int64_t floats) {
  const Reduction sum{reinterpret_cast<float*>(floats_), counters_};
  counters_ += tiles;
  floats_ += aligned(size_t(floats) * sizeof(float));
  return sum;
}

void pack(const Call& call, const PackParams& p) {
  dispatch_policy(call, [&](auto launchers) { launchers.pack(call, p); });
}

Remembered& remembered() {
  static Remembered known;
  return known;
}

Prepared prepare(const Call& call, const ShrinkProblem& problem) {
  ShrinkProblem p = problem;
  check_rank("shrink", "A", p.r);
  if (p.core.data) check_rank("shrink", "core", p.r_core);
  if (p.M == 0) return {};
  Packer pack(call, nullptr);
  pack(p.x, p.M, p.K), pack(p.A, p.K, p.r);
  const bool core = p.core.data, bulk = !core && one_product_wgmma_takes(call, p, p.A, p.K);
  const Key key = key_of(Operator::shrink, call, p.M, p.K, p.r, p.r_core,
                         {packs(problem.x), packs(problem.A), core, bulk});
  Prepared made = remembered()(key, [&] {
    Prepared made;
    size_t bytes = 0;
    each_launch(call, p.r, [&](int i, int64_t, int32_t ranks) {
      const plan::Plan plan = choose(call, Operator::shrink, p.M, p.K, ranks, bulk);
      const int R = plan::padded_rank(ranks);
      const int64_t floats = int64_t(kernels::shrink_subs(R, plan.rows)) * plan.rows * R;
      bytes = std::max(bytes, reduction_bytes(plan.m_blocks, plan.n_blocks, floats));
      made.plans[size_t(i)] = plan;
    });
    made.workspace = pack.bytes() + bytes;
    return made;
  });
  if (core && p.r > max_rank(call.type)) {  // a product of its own, with a choice of its own
    const Prepared h = prepare(exactly(call), core_product(p));
    made.workspace = std::max(made.workspace, pack.bytes() + h.workspace);
    made.next = h.plans;
  }
  return made;
}

void run(const Call& call, const ShrinkProblem& problem, const Prepared& prepared, void* workspace) {
  ShrinkProblem p = problem;
  if (p.M == 0) return;
  Packer pack(call, workspace);
  pack(p.x, p.M, p.K), pack(p.A, p.K, p.r);
#ifdef LOTR_SM90A  // the build has code of sm_90a
  if (prepared.plans[0].wgmma) return shrink_wgmma(call, p, prepared.plans[0]);
#endif
  const bool whole = p.r <= max_rank(call.type);
  each_launch(call, p.r, [&](int i, int64_t first, int32_t ranks) {
    ShrinkProblem piece = p;
    piece.r = ranks;
    piece.A = columns(p.A, first, call.type);
    piece.u = columns(p.u, first, call.type);
    if (!whole) piece.core.data = nullptr;
    dispatch_policy(
        call, [&](auto launchers) { launchers.shrink(call, piece, prepared.plans[size_t(i)], pack.rest()); });
  });
  if (p.core.data && !whole) run(exactly(call), core_product(p), {0, prepared.next}, pack.rest());
}

Prepared prepare(const Call& call, const ExpandProblem& problem) {
  ExpandProblem p = problem;
  check_rank("expand_add", "F", p.r);
  if (p.of_rows.scale && p.dropout.seed)
    throw std::invalid_argument("expand_add: scale: expected none with dropout, got both");
  if (p.M == 0) return {};
  const Key key = key_of(Operator::expand_add, call, p.M, p.N, p.r, 0, {packs(problem.u), packs(problem.F)});
  return remembered()(key, [&] {
    Prepared made;
    Packer pack(call, nullptr);
    pack(p.u, p.M, p.r), pack(p.F, p.N, p.r);
    made.workspace = pack.bytes();
    each_launch(call, p.r, [&](int i, int64_t, int32_t ranks) {
      made.plans[size_t(i)] = choose(call, Operator::expand_add, p.M, p.N, ranks);
    });
    return made;
  });
}

void run(const Call& call, const ExpandProblem& problem, const Prepared& prepared, void* workspace) {
  ExpandProblem p = problem;
  if (p.M == 0) return;
  Packer pack(call, workspace);
  pack(p.u, p.M, p.r), pack(p.F, p.N, p.r);
  each_launch(call, p.r, [&](int i, int64_t first, int32_t ranks) {
    ExpandProblem piece = p;
    piece.r = ranks;
    piece.u = columns(p.u, first, call.type);
    piece.F = columns(p.F, first, call.type);
    if (first + ranks < p.r) piece.of_rows = {};  // the last launch scales the whole sum
    dispatch_policy(call,
                    [&](auto launchers) { launchers.expand_add(call, piece, prepared.plans[size_t(i)]); });
  });
}

Prepared prepare(const Call& call, const FactorGradProblem& problem) {
  FactorGradProblem p = problem;
  check_rank("factor_grad", "k", p.r);
  if (p.M == 0) return {};
  Packer pack(call, nullptr);
  pack(p.x, p.M, p.K), pack(p.v, p.M, p.r);
  const bool bulk = one_product_wgmma_takes(call, p, p.v, p.M);
  const Key key =
      key_of(Operator::factor_grad, call, p.M, p.K, p.r, 0, {packs(problem.x), packs(problem.v), bulk});
  return remembered()(key, [&] {
    Prepared made;
    size_t bytes = 0;
    each_launch(call, p.r, [&](int i, int64_t, int32_t ranks) {
      const plan::Plan plan = choose(call, Operator::factor_grad, p.M, p.K, ranks, bulk);
      const int R = plan::padded_rank(ranks);
      const int64_t floats = int64_t(kernels::factor_grad_subs(R, plan.cols)) * plan.cols * R;
      if (!plan.cluster) bytes = std::max(bytes, reduction_bytes(plan.n_blocks, plan.m_blocks, floats));
      made.plans[size_t(i)] = plan;
    });
    made.workspace = pack.bytes() + bytes;
    return made;
  });
}

void run(const Call& call, const FactorGradProblem& problem, const Prepared& prepared, void* workspace) {
  FactorGradProblem p = problem;
  if (p.M == 0) {
    if (!p.accumulate) clear(p.D, size_t(p.K * p.r) * sizeof(float), call.stream);  // then D is contiguous
    return;
  }
  Packer pack(call, workspace);
  pack(p.x, p.M, p.K), pack(p.v, p.M, p.r);
#ifdef LOTR_SM90A
  if (prepared.plans[0].wgmma) return factor_grad_wgmma(call, p, prepared.plans[0]);
#endif
  each_launch(call, p.r, [&](int i, int64_t first, int32_t ranks) {
    FactorGradProblem piece = p;
    piece.r = ranks;
    piece.v = columns(p.v, first, call.type);
    piece.D = p.D + first * p.D_col;
    dispatch_policy(call, [&](auto launchers) {
      launchers.factor_grad(call, piece, prepared.plans[size_t(i)], pack.rest());
    });
  });
}

namespace {

// k and Q from two reads of g, for ranks whose partial sums would cost more than the second read.
void two_reads(const ShrinkGradProblem& p, ShrinkProblem& k, FactorGradProblem& Q) {
  k = ShrinkProblem{};
  k.x = p.g;
  k.A = p.F;
  k.u = p.k;
  k.M = p.M;
  k.K = p.N;
  k.r = p.r;
  k.scale = k.dropout.scale = 1.f;
  Q = FactorGradProblem{};
  Q.x = p.g;
  Q.v = p.u;
  Q.D = p.Q;
  Q.D_row = p.Q_row;
  Q.D_col = p.Q_col;
  Q.accumulate = p.accumulate;
  Q.M = p.M;
  Q.K = p.N;
  Q.r = p.r;
  Q.dropout.scale = 1.f;
}

// Without the packed inputs.
size_t shrink_grad_bytes(const Call& call, const ShrinkGradProblem& p, const plan::Plan& plan) {
#ifdef LOTR_SM90A
  if (plan.wgmma) return shrink_grad_wgmma_workspace(plan, p.r);
#endif
  const size_t element = size_t(element_size(call.type));
  const int R = plan::padded_rank(p.r);
  const int64_t k_floats = plan.m_tiles * plan.n_blocks * plan.rows * R;
  const int64_t Q_floats = plan.m_blocks * plan.n_blocks * kernels::shrink_grad_subs(element, R) *
                           kernels::shrink_grad_cols(element) * R;
  return Workspace::bytes(plan.m_tiles + plan.n_tiles, k_floats) + Workspace::bytes(0, Q_floats);
}

}  // namespace

Prepared prepare(const Call& call, const ShrinkGradProblem& problem) {
  ShrinkGradProblem p = problem;
  check_rank("shrink_grad", "F", p.r);
  if (p.M == 0) return {};
  Packer pack(call, nullptr);
  pack(p.g, p.M, p.N), pack(p.F, p.N, p.r), pack(p.u, p.M, p.r);
  if (p.r > SHRINK_GRAD_MAX_RANK) {  // two products, each with a choice of its own
    ShrinkProblem k;
    FactorGradProblem Q;
    two_reads(p, k, Q);
    const Prepared first = prepare(call, k), second = prepare(call, Q);
    return {pack.bytes() + std::max(first.workspace, second.workspace), first.plans, second.plans};
  }
  const bool bulk = shrink_grad_wgmma_takes(call, p);
  const Key key = key_of(Operator::shrink_grad, call, p.M, p.N, p.r, 0,
                         {packs(problem.g), packs(problem.F), packs(problem.u), bulk});
  return remembered()(key, [&] {
    Prepared made;
    made.workspace = pack.bytes();
    made.plans[0] = choose(call, Operator::shrink_grad, p.M, p.N, p.r, bulk);
    made.workspace += shrink_grad_bytes(call, p, made.plans[0]);
    return made;
  });
}

void run(const Call& call, const ShrinkGradProblem& problem, const Prepared& prepared, void* workspace) {
  ShrinkGradProblem p = problem;
  if (p.M == 0 && p.accumulate) return;
  if (p.M == 0) return clear(p.Q, size_t(p.N * p.r) * sizeof(float), call.stream);
  Packer pack(call, workspace);
  pack(p.g, p.M, p.N), pack(p.F, p.N, p.r), pack(p.u, p.M, p.r);
  if (p.r > SHRINK_GRAD_MAX_RANK) {
    ShrinkProblem k;
    FactorGradProblem Q;
    two_reads(p, k, Q);
    run(call, k, prepared, pack.rest());
    return run(call, Q, {0, prepared.next}, pack.rest());
  }
#ifdef LOTR_SM90A
  if (prepared.plans[0].wgmma) return shrink_grad_wgmma(call, p, prepared.plans[0], pack.rest());
#endif
  dispatch_policy(call,
                  [&](auto launchers) { launchers.shrink_grad(call, p, prepared.plans[0], pack.rest()); });
}

}  // namespace lotr::cuda
