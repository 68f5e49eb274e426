// The features that LOTR_CUDA_WITHOUT turns off, to find out on a GPU which one is at fault.  Each has a
// fallback that runs on all cards; with all of them off, the kernels are those of sm_80.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace lotr::cuda {

// True: off.
struct Switches {
  bool wgmma = false;     // products by wgmma, whose kernels also read by bulk copies and lie in clusters
  bool early = false;     // launches that begin while the one ahead ends
  bool cluster = false;   // clusters of blocks, and so all kernels by wgmma that need them
  bool together = false;  // cooperative launches
  bool fused = false;     // gemm_lotr
};

// From words separated by commas.  Throws std::invalid_argument for an unknown one.
inline Switches switches_of(const std::string& words) {
  Switches off;
  for (size_t begin = 0; begin <= words.size();) {
    const size_t end = std::min(words.find(',', begin), words.size());
    const std::string word = words.substr(begin, end - begin);
    begin = end + 1;
    if (word == "wgmma")
      off.wgmma = true;
    else if (word == "early")
      off.early = true;
    else if (word == "cluster")
      off.cluster = true;
    else if (word == "together")
      off.together = true;
    else if (word == "fused")
      off.fused = true;
    else if (!word.empty())
      throw std::invalid_argument(
          "LOTR_CUDA_WITHOUT: expected words of wgmma, early, cluster, together, fused, separated by commas, "
          "got " +
          word);
  }
  return off;
}

// LOTR_CUDA_WITHOUT, read once.  lotr_ext/ops/planner.py reads it too, at import, for info and explain.
inline const Switches& switches() {
  static const Switches off = [] {
    const char* words = std::getenv("LOTR_CUDA_WITHOUT");
    return switches_of(words ? words : "");
  }();
  return off;
}

}  // namespace lotr::cuda
