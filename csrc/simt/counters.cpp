// Counts the traffic of a launch. Each lane logs its accesses. When the warp converges, flush_log
// splits the logs into instructions: the lanes' n-th accesses at one call site are one instruction.
// Each instruction then counts as one access of a warp to global or to shared memory.
#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "state.h"

namespace lotr::simt {

Counters totals;

namespace {

constexpr uint32_t SECTOR = 32;

struct Array {
  uintptr_t base = 0;
  size_t bytes = 0;
  size_t order = 0;  // of registration
  Traffic traffic;
};
std::vector<Array> arrays;  // by address
Array unregistered;

// The registered array that the address is in, or `unregistered`.
Array& array_of(uintptr_t address) {
  static size_t latest = 0;
  if (latest < arrays.size() && address - arrays[latest].base < arrays[latest].bytes)
    return arrays[latest];
  const auto after =
      std::upper_bound(arrays.begin(), arrays.end(), address,
                       [](uintptr_t a, const Array& array) { return a < array.base; });
  if (after == arrays.begin()) return unregistered;
  Array& array = *(after - 1);
  if (address - array.base >= array.bytes) return unregistered;
  latest = size_t(&array - arrays.data());
  return array;
}

void add(Traffic& traffic, Space space, uint64_t bytes, uint64_t sectors) {
  if (space == Space::global_read) {
    traffic.read_bytes += bytes;
    traffic.read_sectors += sectors;
  } else {
    traffic.written_bytes += bytes;
    traffic.written_sectors += sectors;
  }
}

// Bytes and sectors of one instruction. An aligned access of at most 16 bytes is inside one
// sector.
void count_global_instruction(const Access* const* lanes, size_t count) {
  struct Touched {
    uintptr_t sector;
    uint32_t byte_mask;  // one bit for each of its bytes
  } touched[32];
  size_t sectors = 0;
  for (size_t i = 0; i < count; ++i) {
    const Access& access = *lanes[i];
    const uintptr_t sector = access.address / SECTOR;
    const uint32_t byte_mask = ((uint32_t(1) << access.bytes) - 1) << access.address % SECTOR;
    Touched* const end = touched + sectors;
    Touched* const same =
        std::find_if(touched, end, [&](const Touched& other) { return other.sector == sector; });
    if (same == end)
      touched[sectors++] = {sector, byte_mask};
    else
      same->byte_mask |= byte_mask;
  }
  for (size_t i = 0; i < sectors; ++i) {
    const uintptr_t first = touched[i].sector * SECTOR + __builtin_ctz(touched[i].byte_mask);
    add(array_of(first).traffic, lanes[0]->space, __builtin_popcount(touched[i].byte_mask), 1);
  }
}

// 32 banks of 4 bytes. A cycle transfers 128 bytes: a warp of 4-byte accesses, half a warp of
// 8-byte accesses, a quarter of 16-byte accesses. Lanes that access one word share it; different
// words in one bank need several cycles.
void count_shared_instruction(const Access* const* lanes, const int* lane_numbers, size_t count) {
  const uint32_t bytes = lanes[0]->bytes;
  const int lanes_per_phase = bytes <= 4 ? 32 : 128 / int(bytes);
  for (int first = 0; first < 32; first += lanes_per_phase) {
    uintptr_t words[32];  // those that the phase accesses
    size_t word_count = 0;
    int words_in_bank[32] = {}, worst = 0;
    for (size_t i = 0; i < count; ++i) {
      if (lane_numbers[i] < first || lane_numbers[i] >= first + lanes_per_phase) continue;
      for (uintptr_t word = lanes[i]->address / 4; word * 4 < lanes[i]->address + bytes; ++word) {
        uintptr_t* const end = words + word_count;
        if (std::find(words, end, word) != end) continue;
        words[word_count++] = word;
        worst = std::max(worst, ++words_in_bank[word % 32]);
      }
    }
    if (worst) count_shared_phase(worst);
  }
}

void count_instruction(const Access* const* lanes, const int* lane_numbers, size_t count) {
  if (lanes[0]->space == Space::shared)
    count_shared_instruction(lanes, lane_numbers, count);
  else
    count_global_instruction(lanes, count);
}

bool same_instruction(const Access& a, const Access& b) {
  return a.line == b.line && a.file == b.file && a.space == b.space &&
         (a.space != Space::shared || a.bytes == b.bytes);
}

// The usual case, in which all lanes passed the same call sites. Returns false, without counting
// anything, if they did not.
bool flush_in_step(Warp& warp) {
  const std::vector<Access>* logs[32];  // those that are not empty
  int lane_numbers[32];
  size_t count = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (warp.present >> lane & 1 && !warp.thread[lane].log.empty()) {
      lane_numbers[count] = lane;
      logs[count++] = &warp.thread[lane].log;
    }
  const std::vector<Access>& first = *logs[0];
  for (size_t i = 1; i < count; ++i) {
    if (logs[i]->size() != first.size()) return false;
    for (size_t k = 0; k < first.size(); ++k)
      if (!same_instruction(first[k], (*logs[i])[k])) return false;
  }
  for (size_t k = 0; k < first.size(); ++k) {
    const Access* lanes[32];
    for (size_t i = 0; i < count; ++i) lanes[i] = &(*logs[i])[k];
    count_instruction(lanes, lane_numbers, count);
  }
  return true;
}

// Any case: numbers each lane's accesses at each call site, then sorts them by instruction.
void flush_diverged(Warp& warp) {
  struct Entry {
    const Access* access;
    size_t nth;  // of the lane's accesses at this call site: 0, 1, ..
    int lane;
  };
  std::vector<Entry> entries;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(warp.present >> lane & 1)) continue;
    for (const Access& access : warp.thread[lane].log) entries.push_back({&access, 0, lane});
  }
  const auto key = [](const Access& a) {
    return std::make_tuple(a.file, a.line, int(a.space), a.space == Space::shared ? a.bytes : 0);
  };
  std::stable_sort(entries.begin(), entries.end(), [&](const Entry& a, const Entry& b) {
    const auto ka = key(*a.access);
    const auto kb = key(*b.access);
    return ka != kb ? ka < kb : a.lane < b.lane;
  });
  for (size_t i = 1; i < entries.size(); ++i)
    if (same_instruction(*entries[i - 1].access, *entries[i].access) &&
        entries[i - 1].lane == entries[i].lane)
      entries[i].nth = entries[i - 1].nth + 1;
  std::stable_sort(entries.begin(), entries.end(), [&](const Entry& a, const Entry& b) {
    const auto ka = key(*a.access);
    const auto kb = key(*b.access);
    return ka != kb ? ka < kb : a.nth < b.nth;
  });
  for (size_t i = 0; i < entries.size();) {
    const Access* lanes[32];
    int lane_numbers[32];
    size_t count = 0;
    const Entry& head = entries[i];
    for (; i < entries.size() && entries[i].nth == head.nth &&
           same_instruction(*entries[i].access, *head.access);
         ++i) {
      lanes[count] = entries[i].access;
      lane_numbers[count++] = entries[i].lane;
    }
    count_instruction(lanes, lane_numbers, count);
  }
}

}  // namespace

void record(Space space, const void* address, uint32_t bytes, Site site) {
  if (!machine.options.count_memory) return;
  Thread& t = self();
  const uintptr_t place =
      space == Space::shared ? shared_offset(address) : reinterpret_cast<uintptr_t>(address);
  t.log.push_back({place, site.file, site.line, bytes, space});
  t.warp->logged = true;
}

void flush_log(Warp& warp) {
  if (!warp.logged) return;
  warp.logged = false;
  if (!flush_in_step(warp)) flush_diverged(warp);
  for (int lane = 0; lane < 32; ++lane)
    if (warp.present >> lane & 1) warp.thread[lane].log.clear();
}

void count_shared_phase(int wavefronts) {
  ++totals.shared_phases;
  totals.shared_wavefronts += uint64_t(wavefronts);
}

void count_global(Space space, uintptr_t address, uint64_t bytes) {
  if (!machine.options.count_memory || !bytes) return;
  const uint64_t sectors = (address + bytes - 1) / SECTOR - address / SECTOR + 1;
  add(array_of(address).traffic, space, bytes, sectors);
}

void count_unwrapped(uintptr_t address, size_t bytes) {
  const Block& block = *self().block;
  if (address - reinterpret_cast<uintptr_t>(block.shared) < block.shared_bytes)
    totals.shared_unwrapped += bytes;
  else
    array_of(address).traffic.unwrapped += bytes;
}

std::string global_name(uintptr_t address) {
  const Array& array = array_of(address);
  if (&array != &unregistered)
    return array.traffic.name + " + " + std::to_string(address - array.base);
  char text[24];
  snprintf(text, sizeof text, "%#zx", size_t(address));
  return text;
}

Counters counters() {
  Counters result = totals;
  result.arrays.resize(arrays.size());
  for (const Array& array : arrays) result.arrays[array.order] = array.traffic;
  result.arrays.push_back(unregistered.traffic);
  result.arrays.back().name = "(unregistered)";
  return result;
}

void reset_counters() {
  totals = Counters{};
  forget_sites();
  for (Array& array : arrays) {
    const Traffic zero{array.traffic.name, array.traffic.size};
    array.traffic = zero;
  }
  unregistered.traffic = Traffic{};
}

void register_array(const std::string& name, const void* base, size_t bytes) {
  if (!bytes) return;
  const uintptr_t from = reinterpret_cast<uintptr_t>(base);
  for (const Array& array : arrays) {
    if (array.base == from && array.bytes == bytes && array.traffic.name == name) return;
    if (from < array.base + array.bytes && array.base < from + bytes)
      throw std::invalid_argument("register_array: " + name + " overlaps " + array.traffic.name);
  }
  Array array;
  array.base = from;
  array.bytes = bytes;
  array.order = arrays.size();
  array.traffic.name = name;
  array.traffic.size = bytes;
  arrays.insert(std::upper_bound(arrays.begin(), arrays.end(), array,
                                 [](const Array& a, const Array& b) { return a.base < b.base; }),
                array);
}

void clear_arrays() {
  arrays.clear();
}

}  // namespace lotr::simt
