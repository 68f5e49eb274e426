// Counts the calls at each place where threads synchronize, and skips one of the places.
#include <cstring>
#include <map>
#include <utility>

#include "state.h"

namespace lotr::simt {
namespace {

Skip skip;
struct Calls {
  const char* op;
  uint64_t count;
};
// By address of the file's name. One file may have several addresses.
std::map<std::pair<const char*, int>, Calls> sites;

bool ends_with(const char* text, const std::string& end) {
  const size_t length = strlen(text);
  return length >= end.size() && !strcmp(text + length - end.size(), end.c_str());
}

}  // namespace

bool counted_and_skipped(const char* op, Site site) {
  static Calls* latest = nullptr;
  static Site where{nullptr, 0};
  const bool is_latest = where.line == site.line && where.file == site.file && !sites.empty();
  if (!is_latest) {
    where = site;
    latest = &sites[{site.file, site.line}];
    latest->op = op;
  }
  ++latest->count;
  return skip.line == site.line && !skip.file.empty() && ends_with(site.file, skip.file);
}

void forget_sites() {
  sites.clear();
}

void skip_synchronization(const Skip& at) {
  skip = at;
}

std::vector<SynchronizationSite> synchronization_sites() {
  std::map<std::pair<std::string, int>, SynchronizationSite> by_name;
  for (const auto& [where, calls] : sites) {
    SynchronizationSite& site = by_name[{where.first, where.second}];
    site = {calls.op, where.first, where.second, site.calls + calls.count};
  }
  std::vector<SynchronizationSite> result;
  for (auto& entry : by_name) result.push_back(entry.second);
  return result;
}

}  // namespace lotr::simt
