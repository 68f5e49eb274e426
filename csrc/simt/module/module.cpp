// The Python module lotr_simt: run() of a kernel, and the executor's controls.
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>

#include "arguments.h"
#include "cuda/plans.h"

namespace lotr::simt {
namespace {

// Bytes of shared memory that a block may request: on the supported GPUs with the least (sm_86),
// and on sm_90, for gemm_lotr.
constexpr size_t SHARED_LIMIT = 101376, SHARED_LIMIT_SM90 = 232448;

void run(const std::string& name, const py::dict& arrays, const py::dict& numbers) {
  std::string names;
  for (const Kernel& kernel : kernels()) {
    if (name == kernel.name) {
      clear_arrays();
      return kernel.run(Arguments(kernel, arrays, numbers));
    }
    names += (names.empty() ? "" : ", ") + std::string(kernel.name);
  }
  throw py::value_error("run: name: expected one of " + names + ", got " + name);
}

py::dict counters_dict() {
  using namespace pybind11::literals;
  const auto triple = [](const unsigned (&extent)[3]) {
    return py::make_tuple(extent[0], extent[1], extent[2]);
  };
  const Counters c = counters();
  py::dict arrays;
  for (const Traffic& array : c.arrays)
    arrays[py::str(array.name)] =
        py::dict("size"_a = array.size, "read_bytes"_a = array.read_bytes,
                 "read_sectors"_a = array.read_sectors, "written_bytes"_a = array.written_bytes,
                 "written_sectors"_a = array.written_sectors, "unwrapped"_a = array.unwrapped);
  py::list launches;
  for (const LaunchRecord& launch : c.launches)
    launches.append(py::dict("name"_a = launch.name, "shared_bytes"_a = launch.shared_bytes,
                             "early"_a = launch.early,
                             "launched_dependents"_a = launch.launched_dependents,
                             "grid"_a = triple(launch.grid), "block"_a = triple(launch.block)));
  return py::dict(
      "blocks"_a = c.blocks, "threads"_a = c.threads, "switches"_a = c.switches,
      "barriers"_a = c.barriers, "warp_collectives"_a = c.warp_collectives, "mma"_a = c.mma,
      "wgmma"_a = c.wgmma, "bulk_bytes"_a = c.bulk_bytes, "ldmatrix"_a = c.ldmatrix,
      "async_copies"_a = c.async_copies, "async_waits"_a = c.async_waits,
      "shared_phases"_a = c.shared_phases, "shared_wavefronts"_a = c.shared_wavefronts,
      "shared_unwrapped"_a = c.shared_unwrapped, "launches"_a = launches, "arrays"_a = arrays);
}

void set_options_py(const std::string& order, uint64_t seed, unsigned preempt, bool count_memory,
                    bool sm90) {
  Options options;
  options.order = order_of("order", order);
  options.seed = seed;
  options.preempt = preempt;
  options.count_memory = count_memory;
  options.shared_limit = sm90 ? SHARED_LIMIT_SM90 : SHARED_LIMIT;
  set_options(options);
}

void set_device(int multiprocessors, bool early) {
  if (multiprocessors < 1) throw py::value_error("multiprocessors: expected at least 1");
  device = {{multiprocessors}, early};
}

std::string plan_text_of(const std::string& op, int64_t M, int64_t N, int32_t r, int32_t r_out,
                         int element) {
  const DType type = element == 4 ? DType::float32 : DType::bfloat16;
  return cuda::plan_text({type, device.card, nullptr, device.early}, op, M, N, r, r_out);
}

// The places where threads synchronize. test_builds.py skips each of them.
py::list synchronization_sites_py() {
  py::list sites;
  for (const SynchronizationSite& site : synchronization_sites())
    sites.append(py::make_tuple(site.op, site.file, site.line, site.calls));
  return sites;
}

py::array sparse_array(const std::vector<py::ssize_t>& shape, const py::dtype& dtype) {
  size_t bytes = size_t(dtype.itemsize());
  for (const py::ssize_t n : shape) bytes *= size_t(n);
  struct Map {
    void* memory;
    size_t bytes;
  };
  auto map = std::make_unique<Map>(Map{map_sparse(bytes), bytes});
  void* memory = map->memory;
  py::capsule owner(map.release(), [](void* p) {
    const std::unique_ptr<Map> sparse(static_cast<Map*>(p));
    unmap_sparse(sparse->memory, sparse->bytes);
  });
  return py::array(dtype, shape, memory, owner);
}

}  // namespace
}  // namespace lotr::simt

PYBIND11_MODULE(lotr_simt, m) {
  using namespace lotr::simt;
  using namespace pybind11::literals;
  m.doc() = "The CUDA kernels of lotr_ext, run on the CPU by the SIMT executor. Test builds only.";
  py::register_exception<Error>(m, "Error", PyExc_RuntimeError);
  m.def("run", &run, "name"_a, "arrays"_a, "numbers"_a = py::dict(),
        "Runs a kernel's operator on numpy arrays (bfloat16 as uint16), which it writes in place");
  m.def("set_device", &set_device, py::kw_only(), "multiprocessors"_a = 132, "early"_a = true,
        "The GPU that plans are made for. early: it has programmatic dependent launches (sm_90 "
        "and later)");
  m.def(
      "plan_text", &plan_text_of, "op"_a, "M"_a, "N"_a, "r"_a, "r_out"_a, "element"_a = 2,
      "A kernel's plan in one line, as python -m lotr_ext.info prints it. element: bytes, 2 or 4");
  m.def("set_options", &set_options_py, py::kw_only(), "order"_a = "forward", "seed"_a = 1,
        "preempt"_a = 0, "count_memory"_a = false, "sm90"_a = false,
        "How threads are scheduled and what is counted. sm90: a block may take an H100's shared "
        "memory");
  m.def("counters", &counters_dict);
  m.def("reset_counters", &reset_counters);
  m.def("synchronization_sites", &synchronization_sites_py,
        "(op, file, line, calls) of every barrier, arrival, commit, wait and fence since "
        "reset_counters");
  m.def(
      "skip_synchronization",
      [](const std::string& file, int line) { skip_synchronization({file, line}); }, "file"_a,
      "line"_a, "The calls that synchronize at this line do nothing from now on; ('', 0) ends it");
  m.def("sparse_array", &sparse_array, "shape"_a, "dtype"_a,
        "Zeros whose pages take memory only when touched, for matrices beyond 2^31 elements");
}
