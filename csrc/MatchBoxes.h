// Matching of candidates with ground-truth boxes: loops over a block of candidates for the CPU.
#pragma once

#include <cstdint>

#include "isa.h"

namespace mimdet {

constexpr int64_t kMatchBlock = 256;

// Candidates are divided into bands by ascending thresholds; labels are one more.
struct MatchBands {
  const float* thresholds;
  const int8_t* labels;
  int64_t count;
};

}  // namespace mimdet

// n (at most kMatchBlock) candidates (n, 4), outside (n) or null, boxes (count, 4) -> index (n), label (n), and maxima
// (count): the best overlap of each box within the block.
MIMDET_DECLARE_ISA(void match_boxes_block(const float* candidates, const bool* outside, int64_t n, const float* boxes,
                                          int64_t count, MatchBands bands, int32_t* index, int8_t* label,
                                          float* maxima))

// label[i] = 1 where the overlap of candidate i with the box is `best`, which is above 0.
MIMDET_DECLARE_ISA(void match_boxes_ties(const float* candidates, const bool* outside, int64_t n, const float* box,
                                         float best, int8_t* label))
