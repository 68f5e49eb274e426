// A ring of STAGES tiles between one thread that fetches them by bulk copies and the warps that read them.
//
// Stage i has two mbarriers.  full[i] completes a phase when all bytes announced for the stage have landed;
// empty[i] when every reading warp, of every block that the copies come from, has given the stage back.  All
// threads walk the stages in the same order, so each keeps its own Place; the parity changes with each turn
// of the ring.  In a cluster whose blocks write into one another's stages (multicast), a warp gives a stage
// back to the fetching thread of each block.
//
//   fetching thread   wait_empty(at); full = expect(at, bytes); copies that count at full; at.advance()
//   reading warps     wait_full(at); products; .. until they are over ..; release(stage); at.advance()
#pragma once
#include "sm90.cuh"

namespace lotr::ptx {

template <int STAGES>
struct Pipeline {
  uint64_t full[STAGES], empty[STAGES];

  struct Place {
    int stage = 0;
    uint32_t parity = 0;
    // By a divisor of STAGES.
    LOTR_DEVICE void advance(int stages = 1) {
      stage += stages;
      if (stage == STAGES) stage = 0, parity ^= 1;
    }
  };

  // One thread, before fence_mbarrier_init.  readers: the warps that give a stage back, of all blocks.
  LOTR_DEVICE void init(uint32_t readers LOTR_SITE) {
    for (int i = 0; i < STAGES; ++i) {
      mbarrier_init(&full[i], 1 LOTR_PASS_SITE);
      mbarrier_init(&empty[i], readers LOTR_PASS_SITE);
    }
  }

  LOTR_DEVICE void wait_empty(const Place& at LOTR_SITE) {
    mbarrier_wait(&empty[at.stage], at.parity ^ 1 LOTR_PASS_SITE);
  }
  // `bytes` will land in the stage, from this block's copies or those of others.  Returns their mbarrier.
  LOTR_DEVICE uint64_t* expect(const Place& at, uint32_t bytes LOTR_SITE) {
    mbarrier_arrive_expect_tx(&full[at.stage], bytes LOTR_PASS_SITE);
    return &full[at.stage];
  }
  // The fetching thread of a cluster, at its end: waits until all stages are released.  If a block exited
  // earlier, other blocks would arrive at mbarriers that no longer exist.
  LOTR_DEVICE void drain(Place at LOTR_SITE) {
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i, at.advance()) wait_empty(at LOTR_PASS_SITE);
  }

  // The stage `ahead` behind `at` in the same turn.
  LOTR_DEVICE void wait_full(const Place& at, int ahead = 0 LOTR_SITE) {
    mbarrier_wait(&full[at.stage + ahead], at.parity LOTR_PASS_SITE);
  }
  // A whole warp: gives COUNT stages from `first` on back to the fetching threads of CLUSTER blocks.
  template <int COUNT = 1, int CLUSTER = 1>
  LOTR_DEVICE void release(int first LOTR_SITE) {
    __syncwarp();  // the reads of all lanes are over
    const uint32_t lane = threadIdx.x % 32;
    if (lane >= COUNT * CLUSTER) return;
    if constexpr (CLUSTER == 1)
      mbarrier_arrive(&empty[first + lane] LOTR_PASS_SITE);
    else
      mbarrier_give_back(&empty[first + lane / CLUSTER], lane % CLUSTER LOTR_PASS_SITE);
  }
};

}  // namespace lotr::ptx
