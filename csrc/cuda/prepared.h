// The launches of an operator for a problem: chosen once, then cached.
#pragma once
#include <array>
#include <cstddef>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "plan/machine.h"

namespace lotr::cuda {

// The choice for one call.  A launch takes at most max_rank() ranks; beyond them there are two.  next: the
// launches of a second product, where an operator is two.
struct Prepared {
  size_t workspace = 0;  // bytes
  std::array<plan::Plan, 2> plans{}, next{};
};

// The same for a kernel whose plan has a form of its own.  Such a plan takes a few divisions and is not
// cached.
template <class Plan>
struct PreparedOne {
  size_t workspace = 0;
  Plan plan{};
};

// All that the choice depends on.  No padding, since keys are compared by their bytes.
struct Key {
  int64_t M, N;  // extents of the large matrix
  int32_t r, r_core;
  plan::Card card;
  // Bits: the operator, how its operands lie, the types, the ways of launching that are on.
  uint32_t what, how;
};
static_assert(sizeof(Key) == 48);

// Prepared problems of all devices and threads.
class Remembered {
 public:
  // The Prepared of the key, made by choose() the first time.
  template <class Choose>
  Prepared operator()(const Key& key, Choose choose) {
    uint64_t times;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (const auto found = known_.find(key); found != known_.end()) return found->second;
      times = forgotten_;
    }
    const Prepared made = choose();  // outside of the lock: it takes microseconds
    const std::lock_guard<std::mutex> lock(mutex_);
    if (times != forgotten_) return made;       // perhaps by the rules before
    if (known_.size() >= MOST) known_.clear();  // a run over batches of ever new lengths
    known_.emplace(key, made);
    return made;
  }
  void forget() {
    const std::lock_guard<std::mutex> lock(mutex_);
    known_.clear();
    ++forgotten_;
  }
  size_t size() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return known_.size();
  }

 private:
  static constexpr size_t MOST = 4096;
  struct Hash {
    size_t operator()(const Key& key) const {
      uint64_t words[sizeof(Key) / 8], hash = 0xcbf29ce484222325u;
      std::memcpy(words, &key, sizeof(key));
      for (const uint64_t word : words) hash = (hash ^ word ^ (hash >> 29)) * 0x9e3779b97f4a7c15u;
      return size_t(hash ^ (hash >> 32));
    }
  };
  struct Equal {
    bool operator()(const Key& a, const Key& b) const { return std::memcmp(&a, &b, sizeof(Key)) == 0; }
  };
  std::unordered_map<Key, Prepared, Hash, Equal> known_;
  uint64_t forgotten_ = 0;  // how often
  std::mutex mutex_;
};
Remembered& remembered();

}  // namespace lotr::cuda
