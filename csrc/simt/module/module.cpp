// The Python module lotr_simt: the executor's controls here, the launchers of csrc/cuda in module_*.cpp.
#include "module.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>

#include "cuda/counters.h"
#include "cuda/gemm_lotr.h"
#include "cuda/launchers.h"
#include "cuda/plans.h"

namespace lotr::simt {
namespace {

// The arrival counters of the one stream that all calls here use.
int32_t* arrived() {
  return cuda::counters(nullptr, cuda::COUNTERS_EACH);
}

// The kernel's address less the module's: what nm lists for its symbol.
uintptr_t offset_in_module(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info))
    throw std::runtime_error("a kernel's address: expected in this module, found elsewhere");
  return reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(info.dli_fbase);
}

py::dict counters_dict() {
  const Counters c = counters();
  py::dict arrays;
  for (const Traffic& t : c.arrays) {
    py::dict a;
    a["size"] = t.size, a["read_bytes"] = t.read_bytes, a["read_sectors"] = t.read_sectors;
    a["written_bytes"] = t.written_bytes, a["written_sectors"] = t.written_sectors;
    a["atomics"] = t.atomics, a["unwrapped"] = t.unwrapped;
    arrays[py::str(t.name)] = a;
  }
  py::list launches;
  for (const LaunchRecord& l : c.launches) {
    py::dict d;
    d["name"] = l.name, d["shared_bytes"] = l.shared_bytes, d["offset"] = offset_in_module(l.kernel);
    d["cleared"] = l.cleared, d["early"] = l.early, d["cooperative"] = l.cooperative,
    d["let_next"] = l.let_next, d["barriers"] = l.barriers, d["half_loads"] = l.half_loads,
    d["bytes"] = l.bytes;
    d["grid"] = py::make_tuple(l.grid[0], l.grid[1], l.grid[2]);
    d["cluster"] = py::make_tuple(l.cluster[0], l.cluster[1], l.cluster[2]);
    d["block"] = py::make_tuple(l.block[0], l.block[1], l.block[2]);
    launches.append(d);
  }
  py::dict d;
  d["blocks"] = c.blocks, d["threads"] = c.threads, d["switches"] = c.switches, d["barriers"] = c.barriers;
  d["warp_collectives"] = c.warp_collectives, d["mma"] = c.mma, d["wgmma"] = c.wgmma;
  d["bulk_bytes"] = c.bulk_bytes, d["multiply"] = c.multiply, d["ldmatrix"] = c.ldmatrix;
  d["async_copies"] = c.async_copies, d["async_waits"] = c.async_waits, d["late_loads"] = c.late_loads;
  d["late_bytes"] = c.late_bytes, d["late_total"] = c.late_total, d["late_stored"] = c.late_stored;
  d["last_shared"] = c.last_shared, d["last_loads"] = c.last_loads;
  d["cluster_total"] = c.cluster_total, d["sum_loads"] = c.sum_loads, d["cluster_loads"] = c.cluster_loads,
  d["cluster_bytes"] = c.cluster_bytes, d["atomics"] = c.atomics;
  d["shared_phases"] = c.shared_phases;
  d["shared_wavefronts"] = c.shared_wavefronts, d["shared_unwrapped"] = c.shared_unwrapped;
  d["launches"] = launches, d["arrays"] = arrays;
  return d;
}

void set_options_py(const std::string& order, uint64_t seed, unsigned preempt, bool count_memory,
                    std::optional<size_t> shared_limit, unsigned resident, std::optional<uint64_t> room) {
  Options o;
  o.order = order_of("order", order);
  o.seed = seed, o.preempt = preempt, o.count_memory = count_memory;
  o.shared_limit = shared_limit.value_or(settings.shared_limit());
  o.resident = resident;
  o.room = room.value_or(o.room);
  set_options(o);
}

py::dict dict_of(const plan::Plan& p) {
  using namespace pybind11::literals;
  return py::dict("m_blocks"_a = p.m_blocks, "n_blocks"_a = p.n_blocks, "cluster"_a = p.cluster,
                  "of_row"_a = p.of_row, "together"_a = p.together, "extra_bytes"_a = p.extra_bytes,
                  "microseconds"_a = p.microseconds, "wgmma"_a = p.wgmma, "rows"_a = p.rows,
                  "cols"_a = p.cols, "text"_a = cuda::text_of(p));
}

py::list plans_of(const std::string& kernel, int64_t M, int64_t N, int64_t r, int element,
                  int multiprocessors) {
  cuda::Call as = call(element == 2 ? DType::bfloat16 : DType::float32);
  as.card.multiprocessors = multiprocessors;
  py::list list;
  for (const plan::Plan& plan : cuda::plans_of(as, kernel, M, N, int32_t(r))) list.append(dict_of(plan));
  return list;
}

// (text, blocks) of the plan that printed_plans gives first.
py::tuple printed_plan(const std::string& kernel, int64_t M, int64_t N, int r, int r_out, int element,
                       int multiprocessors) {
  cuda::Call as = call(element == 2 ? DType::bfloat16 : DType::float32);
  as.card.multiprocessors = multiprocessors;
  const cuda::PrintedPlan plan = cuda::printed_plans(as, kernel, M, N, r, r_out).front();
  return py::make_tuple(plan.text, plan.blocks);
}

// For mutate_kernels.py: where threads synchronise, so that each place can be left out without compiling
// again.
py::list synchronisation_sites_py() {
  py::list sites;
  for (const SynchronisationSite& s : synchronisation_sites())
    sites.append(py::make_tuple(s.op, s.file, s.line, s.calls));
  return sites;
}

py::array sparse_array(std::vector<py::ssize_t> shape, const py::dtype& dtype) {
  size_t bytes = size_t(dtype.itemsize());
  for (const py::ssize_t n : shape) bytes *= size_t(n);
  void* memory = map_sparse(bytes);
  struct Map {
    void* memory;
    size_t bytes;
  };
  py::capsule owner(new Map{memory, bytes}, [](void* p) {
    std::unique_ptr<Map> map(static_cast<Map*>(p));
    unmap_sparse(map->memory, map->bytes);
  });
  return py::array(dtype, shape, memory, owner);
}

}  // namespace
}  // namespace lotr::simt

PYBIND11_MODULE(lotr_simt, m) {
  using namespace lotr;
  using namespace lotr::simt;
  using namespace pybind11::literals;
  m.doc() = "The CUDA kernels of lotr_ext, run on the CPU by the SIMT executor.  Test builds only.";
  py::register_exception<Error>(m, "Error", PyExc_RuntimeError);
  m.def("synchronisation_sites", &synchronisation_sites_py,
        "(op, file, line, calls) of every barrier, commit, wait and fence since reset_counters");
  m.def(
      "skip_synchronisation",
      [](const std::string& file, int line) {
        std::fill_n(arrived(), cuda::COUNTERS_EACH, 0);  // an earlier mutation may have left counts
        skip_synchronisation({file, line});
      },
      "file"_a, "line"_a,
      "Such calls at this line do nothing from now on, as if it were deleted; ('', 0) ends it");
  m.def(
      "arrivals", [] { return std::accumulate(arrived(), arrived() + cuda::COUNTERS_EACH, int64_t(0)); },
      "Sum of the arrival counters: 0 between launches");
  define_operators(m);
  m.def(
      "set_device",
      [](int multiprocessors, const std::string& float32, int shared, bool wgmma, bool early,
         const std::string& without, float clock, float memory, int most_of_cluster) {
        if (multiprocessors < 1) throw py::value_error("multiprocessors: expected at least 1");
        if (shared < 101376) throw py::value_error("shared: expected at least the 101376 bytes of sm_86");
        if (float32 != "exact" && float32 != "tf32")
          throw py::value_error("float32: expected exact or tf32, got " + float32);
        settings = {{multiprocessors, shared, clock, memory},
                    float32 == "tf32" ? Float32::tf32 : Float32::exact,
                    wgmma,
                    early,
                    cuda::switches_of(without),
                    most_of_cluster};
        Options o = options();
        o.shared_limit = settings.shared_limit();
        set_options(o);
      },
      py::kw_only(), "multiprocessors"_a = 132, "float32"_a = "exact", "shared"_a = 233472, "wgmma"_a = false,
      "early"_a = true, "without"_a = "", "clock"_a = plan::Card{}.clock, "memory"_a = plan::Card{}.memory,
      "most_of_cluster"_a = MOST_OF_CLUSTER,
      "without: as LOTR_CUDA_WITHOUT; early: a GPU with early launches and clusters, of compute capability "
      "9.0 or later; most_of_cluster: blocks of the largest cluster that it has room for");
  m.def("set_options", &set_options_py, py::kw_only(), "order"_a = "forward", "seed"_a = 1, "preempt"_a = 0,
        "count_memory"_a = false, "shared_limit"_a = py::none(), "resident"_a = 1, "room"_a = py::none());
  define_gemm_lotr(m);
  define_rows(m);
  m.def("counters", &counters_dict);
  m.def("reset_counters", &reset_counters);
  m.def("product_layouts", [] { return product_layouts; });
  m.def("sparse_array", &sparse_array, "shape"_a, "dtype"_a);
  m.def("write_coverage", &write_coverage);
  m.def("build_mode", [] { return std::string(build_mode()); });
  m.def(
      "constants",
      [] {
        return std::map<std::string, int>{
            {"GEMM_LOTR_FACTOR_RANK", cuda::GEMM_LOTR_FACTOR_RANK},
            {"MOST_RESIDENT", MOST_RESIDENT},
            {"ONE_PRODUCT_WGMMA_COLS", kernels::ONE_PRODUCT_WGMMA_COLS},
            {"ONE_PRODUCT_WGMMA_ROWS", kernels::ONE_PRODUCT_WGMMA_ROWS},
            {"SHRINK_GRAD_MAX_RANK", cuda::SHRINK_GRAD_MAX_RANK},
            {"SHRINK_GRAD_ROWS", kernels::SHRINK_GRAD_ROWS},
            {"SHRINK_GRAD_ROW_BYTES", kernels::SHRINK_GRAD_ROW_BYTES},
            {"SHRINK_GRAD_WGMMA_COLS", kernels::SHRINK_GRAD_WGMMA_COLS},
            {"SHRINK_GRAD_WGMMA_ROWS", kernels::SHRINK_GRAD_WGMMA_ROWS},
            {"SHRINK_GRAD_WGMMA_STAGES", kernels::SHRINK_GRAD_WGMMA_STAGES},
        };
      },
      "Constants of the C++ sources that bench/projection reads");
  m.def(
      "plan",
      [](const std::string& kernel, int64_t M, int64_t N, int64_t r, int element, int multiprocessors)
          -> py::object { return plans_of(kernel, M, N, r, element, multiprocessors)[0]; },
      "kernel"_a, "M"_a, "N"_a, "r"_a, "element"_a = 2, "multiprocessors"_a = 132,
      "The kernel's plan for the large matrix [M, N], and the bytes it moves besides that matrix.");
  m.def("plans", &plans_of, "kernel"_a, "M"_a, "N"_a, "r"_a, "element"_a = 2, "multiprocessors"_a = 132,
        "All plans, the fastest first.");
  m.def("printed_plan", &printed_plan, "kernel"_a, "M"_a, "N"_a, "r"_a, "r_out"_a, "element"_a = 2,
        "multiprocessors"_a = 132, "The plan as explain prints it, and its blocks.");
  m.def(
      "set_rules",
      [](const std::string& forced, const std::string& measured) {
        cuda::set_rules(cuda::Rules::forced, forced), cuda::set_rules(cuda::Rules::measured, measured);
      },
      py::kw_only(), "forced"_a = "", "measured"_a = "", "Rules of csrc/cuda/plans.h");
  m.def("remembered", [] { return cuda::remembered().size(); }, "How many problems' choices are remembered");
  m.def("forget", [] { cuda::remembered().forget(); });
  m.def(
      "remembered_of_a_choice_during_forget",
      [] {
        cuda::Remembered own;
        own(cuda::Key{}, [&] { return own.forget(), cuda::Prepared{}; });
        return own.size();
      },
      "How many choices are remembered after one that was being made when the rules changed");
}
