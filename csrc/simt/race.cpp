// Implements race.h. Each granule of memory has a cell with its latest accesses. Two accesses of
// different threads, at least one of them a write, are a race unless the clocks show that the
// earlier one happened before the later one: `check`.
#include "race.h"

#if LOTR_SIMT_RACE

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <tuple>
#include <unordered_map>

#include "state.h"

namespace lotr::simt::race {

bool kernel_code = false;

namespace {

constexpr int MAX_REPORTS = 4;    // of a launch
constexpr int READERS = 4;        // reads that a cell keeps
constexpr uintptr_t GRANULE = 2;  // bytes: the smallest element of a kernel
constexpr uintptr_t PAGE = 4096;

// A place in the kernel: a wrapper's op and site, or the address of an instruction.
struct Place {
  void* pc;
  const char* op;
  Site site;
};

using PlaceKey = std::tuple<void*, const char*, const char*, int>;

struct Event {         // an access
  uint32_t clock = 0;  // of the thread, 0: nothing has happened here
  uint32_t thread = 0;
  uint32_t cluster = 0;  // its number in the launch
  uint32_t place = 0;
};

struct Cell {  // the latest accesses to a granule of memory
  Event write;
  Event reads[READERS];
  uint32_t read_count = 0;
};
using Page = std::unique_ptr<Cell[]>;

struct Detector {
  std::unordered_map<uintptr_t, Page> pages;  // global memory
  uintptr_t latest_page = 0;  // a cache of one entry of pages: its number, its cells
  Cell* latest_cells = nullptr;
  std::vector<Cell> shared;  // of the cluster's blocks, one after the other

  uint32_t threads = 0, cluster = 0;  // threads of the cluster that runs, and its number
  std::vector<uint32_t> clocks;       // [t][u]: the latest time of u that t has seen

  std::vector<Place> places;
  std::map<PlaceKey, uint32_t> place_numbers;
  std::vector<std::string> reports;
} detector;

uint32_t* clocks_of(uint32_t thread) {
  return detector.clocks.data() + size_t(thread) * detector.threads;
}

void join(uint32_t* to, const uint32_t* from) {
  for (uint32_t i = 0, n = detector.threads; i < n; ++i) to[i] = std::max(to[i], from[i]);
}

// The number of a place: of the instruction at pc, or, if that is null, of the running thread's op.
uint32_t place_number(void* pc) {
  const Thread& t = self();
  const Place place = pc ? Place{pc, nullptr, {"", 0}} : Place{nullptr, t.op, t.site};
  const PlaceKey key{place.pc, place.op, place.site.file, place.site.line};
  static PlaceKey latest_key;
  static uint32_t latest = 0;
  if (key == latest_key && !detector.places.empty()) return latest;
  const auto [entry, is_new] =
      detector.place_numbers.emplace(key, uint32_t(detector.places.size()));
  if (is_new) detector.places.push_back(place);
  latest_key = key;
  latest = entry->second;
  return latest;
}

// The file's name and line of the instruction at pc. If functions are inlined there, an instruction
// has several lines: this is the innermost one outside the executor, the wrappers and CUDA's
// headers.
std::string line_of(void* pc) {
  Dl_info info;
  if (!dladdr(pc, &info)) return "?";
  char command[800], line[800];
  snprintf(command, sizeof command, "addr2line -ie '%s' %#zx 2>/dev/null", info.dli_fname,
           size_t(static_cast<char*>(pc) - static_cast<char*>(info.dli_fbase) - 1));
  std::string result = "?";
  if (FILE* pipe = popen(command, "r")) {
    while (fgets(line, sizeof line, pipe)) {
      line[strcspn(line, "\n(")] = 0;
      if (strstr(line, "csrc/simt/") || strstr(line, "csrc/cuda/ptx/") || strstr(line, "??") ||
          strstr(line, "/include/"))
        continue;
      const char* slash = strrchr(line, '/');
      result = slash ? slash + 1 : line;
      break;
    }
    pclose(pipe);
  }
  while (!result.empty() && result.back() == ' ') result.pop_back();
  return result;
}

std::string describe(uint32_t place) {
  const Place& p = detector.places[place];
  if (p.pc) return line_of(p.pc);
  const char* slash = strrchr(p.site.file, '/');
  return std::string(slash ? slash + 1 : p.site.file) + ":" + std::to_string(p.site.line) + " (" +
         p.op + ")";
}

// The offset in the shared memory of the cluster's blocks, or -1.
std::ptrdiff_t shared_place(uintptr_t address) {
  for (const Block& block : machine.blocks) {
    const uintptr_t offset = address - reinterpret_cast<uintptr_t>(block.shared);
    if (offset < block.shared_bytes)
      return std::ptrdiff_t(block.rank * block.shared_bytes + offset);
  }
  return -1;
}

// The block of an earlier access, as the running thread sees it.
std::string block_of(const Event& event) {
  if (event.cluster != detector.cluster) return "an earlier block";
  const Block& block = machine.blocks[event.thread / self().block->thread_count];
  if (&block == self().block) return "the same block";
  const uint3 index = block.index;
  return "block (" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

// Reports that the running thread's access `use` at `place` is not ordered after `before`.
void add_report(uintptr_t address, Use use, uint32_t place, const Event& before, Use use_before) {
  const Thread& t = self();
  const std::ptrdiff_t shared = shared_place(address);
  const std::string where =
      shared >= 0
          ? "shared memory, offset " + std::to_string(shared % std::ptrdiff_t(machine.launch.smem))
          : "global memory " + global_name(address);
  const bool writes = use == Use::write;
  const bool wrote = use_before == Use::write;
  const char* kind = writes ? "write after write" : "read after write";
  if (!wrote) kind = "write after read";
  char text[1200];
  snprintf(
      text, sizeof text,
      "data race (%s) on %s: block (%u,%u,%u) thread %u %s at %s; thread %u of %s had %s at %s; "
      "nothing orders the two",
      kind, where.c_str(), t.block->index.x, t.block->index.y, t.block->index.z, t.linear,
      writes ? "writes" : "reads", describe(place).c_str(), before.thread % t.block->thread_count,
      block_of(before).c_str(), wrote ? "written" : "read", describe(before.place).c_str());
  detector.reports.push_back(text);
}

// Whether `before` happens before the running thread's current access.
bool ordered(const Event& before, uint32_t me, const uint32_t* clocks) {
  if (!before.clock) return true;
  return before.cluster == detector.cluster &&
         (before.thread == me || clocks[before.thread] >= before.clock);
}

Cell& cell_of(uintptr_t address) {
  const std::ptrdiff_t shared = shared_place(address);
  if (shared >= 0) {
    Cell& cell = detector.shared[size_t(shared) / GRANULE];
    // Accesses of an earlier cluster were to its blocks' memory: they are forgotten.
    const auto is_earlier = [](const Event& e) { return e.cluster != detector.cluster; };
    if (is_earlier(cell.write)) cell.write = Event{};
    Event* const end = std::remove_if(cell.reads, cell.reads + cell.read_count, is_earlier);
    cell.read_count = uint32_t(end - cell.reads);
    return cell;
  }
  const uintptr_t page = address / PAGE;
  if (!detector.latest_cells || detector.latest_page != page) {
    Page& cells = detector.pages[page];
    if (!cells) cells.reset(new Cell[PAGE / GRANULE]);
    detector.latest_page = page;
    detector.latest_cells = cells.get();
  }
  return detector.latest_cells[address % PAGE / GRANULE];
}

// Adds a read to the cell, in place of a read that happened before it: a write that is ordered
// after the new read is ordered after the old one too. In a full cell it replaces a random one.
void note_read(Cell& cell, const Event& now, uint32_t me, const uint32_t* clocks) {
  for (uint32_t i = 0; i < cell.read_count; ++i)
    if (ordered(cell.reads[i], me, clocks)) {
      cell.reads[i] = now;
      return;
    }
  const uint32_t i =
      cell.read_count < READERS ? cell.read_count++ : uint32_t(next_random() % READERS);
  cell.reads[i] = now;
}

// Checks an access of the running thread, and adds it to the cells that it touches.
void check(uintptr_t address, size_t bytes, Use use, void* pc) {
  if (int(detector.reports.size()) >= MAX_REPORTS || !bytes) return;
  const uint32_t me = self().id;
  const uint32_t* clocks = clocks_of(me);
  const uint32_t place = place_number(pc);
  const Event now{clocks[me], me, detector.cluster, place};
  for (uintptr_t a = address / GRANULE * GRANULE; a < address + bytes; a += GRANULE) {
    Cell& cell = cell_of(a);
    if (!ordered(cell.write, me, clocks)) return add_report(a, use, place, cell.write, Use::write);
    if (use == Use::read) {
      note_read(cell, now, me, clocks);
      continue;
    }
    for (uint32_t i = 0; i < cell.read_count; ++i)
      if (!ordered(cell.reads[i], me, clocks))
        return add_report(a, use, place, cell.reads[i], Use::read);
    cell.write = now;
    cell.read_count = 0;
  }
}

// Whether p is on the stack of the process, where `launch` keeps the kernel's parameters.
bool on_process_stack(uintptr_t p) {
  static uintptr_t base = 0;
  static size_t bytes = 0;
  if (!base) {
    pthread_attr_t attributes;
    void* address = nullptr;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
      pthread_attr_getstack(&attributes, &address, &bytes);
      pthread_attr_destroy(&attributes);
    }
    base = reinterpret_cast<uintptr_t>(address);
  }
  return p - base < bytes;
}

// Whether p is in threadIdx or another of these, which are globals here.
bool is_builtin(uintptr_t p) {
  const auto within = [p](const auto& object) {
    return p - reinterpret_cast<uintptr_t>(&object) < sizeof object;
  };
  return within(threadIdx) || within(blockIdx) || within(blockDim) || within(gridDim);
}

}  // namespace

void begin_launch() {
  detector.pages.clear();
  detector.latest_cells = nullptr;
  detector.shared.clear();
  detector.reports.clear();
  detector.cluster = 0;
}

void begin_blocks(uint32_t threads) {
  ++detector.cluster;
  detector.threads = threads;
  detector.clocks.assign(size_t(threads) * threads, 0);
  for (uint32_t t = 0; t < threads; ++t) clocks_of(t)[t] = 1;
  detector.shared.resize(machine.launch.smem * machine.blocks.size() / GRANULE + 1);
}

void release(Sync& sync, uint32_t first, uint32_t lanes) {
  if (sync.clock.empty()) sync.clock.assign(detector.threads, 0);
  for (; lanes; lanes &= lanes - 1) {
    const uint32_t thread = first + uint32_t(__builtin_ctz(lanes));
    join(sync.clock.data(), clocks_of(thread));
    ++clocks_of(thread)[thread];
  }
}

void acquire(const Sync& sync, uint32_t first, uint32_t lanes) {
  if (sync.clock.empty()) return;
  for (; lanes; lanes &= lanes - 1)
    join(clocks_of(first + uint32_t(__builtin_ctz(lanes))), sync.clock.data());
}

void access(const void* p, size_t bytes, Use use) {
  check(reinterpret_cast<uintptr_t>(p), bytes, use, nullptr);
}

void access_by_code(uintptr_t p, size_t bytes, Use use, void* pc) {
  ExecutorScope scope;
  // A thread's variables, its parameters and built-ins are registers or constants on a GPU.
  if (machine.stacks.contains(reinterpret_cast<void*>(p)) || on_process_stack(p) || is_builtin(p))
    return;
  count_unwrapped(p, bytes);
  check(p, bytes, use, pc);
}

std::string report() {
  std::string text;
  for (const std::string& line : detector.reports) text += (text.empty() ? "" : "\n") + line;
  return text;
}

}  // namespace lotr::simt::race

#endif
