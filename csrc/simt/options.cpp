// What a host program sets up: the options of launches, and sparse memory.
#include <sys/mman.h>

#include <cstdlib>
#include <new>
#include <stdexcept>

#include "state.h"

namespace lotr::simt {

void set_options(const Options& options) {
  if (options.preempt > 255)
    throw std::invalid_argument("set_options: preempt is " + std::to_string(options.preempt) +
                                ", expected 0 to 255");
  machine.options = options;
}

const Options& options() {
  return machine.options;
}

Order order_of(const std::string& argument, const std::string& name) {
  const char* const names[] = {"forward", "reverse", "random"};
  for (int i = 0; i < 3; ++i)
    if (name == names[i]) return Order(i);
  throw std::invalid_argument(argument + ": expected forward, reverse or random, got " + name);
}

Options options_from_environment(Options options) {
  if (const char* order = getenv("LOTR_SIMT_ORDER"))
    options.order = order_of("LOTR_SIMT_ORDER", order);
  if (const char* seed = getenv("LOTR_SIMT_SEED")) options.seed = strtoull(seed, nullptr, 10);
  if (const char* preempt = getenv("LOTR_SIMT_PREEMPT"))
    options.preempt = unsigned(strtoul(preempt, nullptr, 10));
  return options;
}

void* map_sparse(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}

void unmap_sparse(void* p, size_t bytes) {
  munmap(p, bytes);
}

}  // namespace lotr::simt
