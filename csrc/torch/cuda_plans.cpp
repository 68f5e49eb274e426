// Operators that list the plans of a CUDA kernel and set rules for them (cuda/plans.h).  They launch nothing.
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <string>
#include <vector>

#include "cuda/plans.h"
#include "cuda_args.h"

namespace lotr {
namespace {

// The properties of a device; device < 0: of a GPU that this machine does not have, given as
// {multiprocessors, bytes of shared memory per multiprocessor, MHz, MB/s of memory, early launches, wgmma}.
cuda::Call call_of(const char* op, ScalarType dtype, int64_t device, const std::vector<int64_t>& card) {
  cuda::Call call{};
  call.type = dtype_of(op, "dtype", dtype);
  call.off = cuda::switches();
  if (device >= 0) {
    const torch::stable::accelerator::DeviceGuard guard{int32_t(device)};
    if (const cudaError_t error = make_current(int32_t(device)))
      fail(op, ": device ", device, ": ", cudaGetErrorString(error));
    const Device found = device_of(op, int32_t(device));
    call.card = found.card, call.early = found.early, call.wgmma = found.wgmma;
    call.most_of_cluster = found.most_of_cluster;
    return call;
  }
  if (card.size() != 6 || card[0] < 1)
    fail(op, ": card: expected six numbers, the first at least 1, got ", card.size());
  call.card = {int32_t(card[0]), int32_t(card[1]), float(card[2]), float(card[3]) / float(card[0])};
  call.early = card[4], call.wgmma = card[5];
  return call;
}

// JSON: a list of {"plan": the words of a rule, "blocks", "microseconds"}, the chosen plan first;
// microseconds 0: it has no estimate.
std::string cuda_plans(std::string op, int64_t M, int64_t N, int64_t r, int64_t r_out, ScalarType dtype,
                       int64_t device, std::vector<int64_t> card) {
  constexpr const char* name = "lotr::cuda_plans";
  const bool has_rank = op != "scale_backward", has_core = op == "fold_grad" || op == "row_core_grad";
  if (M < 1 || N < 1 || r < has_rank || r > cuda::MAX_RANK || r_out < has_core || r_out > cuda::MAX_RANK)
    fail(name, ": expected M and N of at least 1 and a rank from 1 to ", cuda::MAX_RANK, ", got ", M, ", ", N,
         " and ", r, has_core ? " x " + std::to_string(r_out) : "");
  std::ostringstream s;
  s << '[';
  const char* comma = "";
  for (const cuda::PrintedPlan& plan :
       cuda::printed_plans(call_of(name, dtype, device, card), op, M, N, int32_t(r), int32_t(r_out))) {
    s << comma << "{\"plan\": \"" << plan.text << "\", \"blocks\": " << plan.blocks
      << ", \"microseconds\": " << plan.microseconds << '}';
    comma = ", ";
  }
  s << ']';
  return s.str();
}

// Replaces the forced or the measured rules and returns the old ones.
std::string cuda_plan_rules(std::string rules, bool forced) {
  return cuda::set_rules(forced ? cuda::Rules::forced : cuda::Rules::measured, rules);
}

}  // namespace
}  // namespace lotr

// No tensor argument, so no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(lotr, CompositeExplicitAutograd, m)
{
  m.impl("cuda_plans", TORCH_BOX(&lotr::cuda_plans));
  m.impl("cuda_plan_rules", TORCH_BOX(&lotr::cuda_plan_rules));
}
