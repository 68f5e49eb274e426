// The GPU that a plan is made for.
#pragma once
#include <algorithm>

#include "../kernels/traits.h"
#include "plan.h"

namespace lotr::plan {

// Properties of a card, as the driver reports them.  The defaults are an H100 SXM's.
struct Card {
  int32_t multiprocessors = 132;
  int32_t shared = 233472;  // bytes of shared memory of a multiprocessor
  float clock = 1755;       // clocks of a multiprocessor in a microsecond
  float memory = 25.4e3f;   // bytes of device memory in a microsecond and multiprocessor: 3,352 GB/s / 132
};

// A card and what a kernel may use of it.
struct Machine {
  Card card;
  bool has_clusters = true;
  bool clusters = true;                   // has_clusters, and this kernel's splits may be one
  bool cooperative = true;                // all blocks may be launched to run at the same time
  int most_of_cluster = MOST_OF_CLUSTER;  // blocks
  int blocks = 1;                         // of this kernel that a multiprocessor holds

  // For a kernel whose registers allow that many blocks per multiprocessor, of that much shared memory each.
  Machine with(int at_most, size_t bytes = kernels::SHARED_BYTES_OF_TWO) const {
    Machine machine = *this;
    machine.blocks = std::min(size_t(card.shared) >= 2 * (bytes + 1024) ? 2 : 1, at_most);
    return machine;
  }
  // whether that many splits form one cluster
  bool cluster(int64_t splits) const {
    return clusters && splits > 1 && splits <= std::min(most_of_cluster, int(card.multiprocessors)) &&
           (splits & (splits - 1)) == 0;
  }
  // whether the splits may wait for each other without a cluster: the whole grid runs at the same time
  bool together(int64_t owners, int64_t splits) const {
    return cooperative && !has_clusters && splits > 1 && owners * splits <= slots();
  }
  int64_t slots() const { return int64_t(card.multiprocessors) * blocks; }
};

}  // namespace lotr::plan
