// This file is compiled without contraction of a * b + c: every operation is rounded once, as PyTorch's are.
#include "MatchBoxes.h"

#ifndef MIMDET_ISA
#error "this file is compiled for each instruction set"
#endif

namespace mimdet {
namespace MIMDET_ISA {
namespace {

// A block of candidates, coordinate by coordinate. NaN is in the places of those outside, and past the last one:
// their overlap with every box is 0.
struct Block {
  float x0[kMatchBlock], y0[kMatchBlock], x1[kMatchBlock], y1[kMatchBlock], area[kMatchBlock];
  float left, top, right, bottom;  // of all that are not NaN

  Block(const float* candidates, const bool* outside, int64_t n) {
    const float nan = __builtin_nanf("");
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      x0[i] = candidates[4 * i];
      y0[i] = candidates[4 * i + 1];
      x1[i] = candidates[4 * i + 2];
      y1[i] = candidates[4 * i + 3];
    }
    for (int64_t i = n; i < kMatchBlock; ++i) x0[i] = y0[i] = x1[i] = y1[i] = nan;
    for (int64_t i = 0; outside && i < n; ++i) {
      if (outside[i]) x0[i] = y0[i] = x1[i] = y1[i] = nan;
    }
    float l = __builtin_inff(), t = l, r = -l, b = -l;
#pragma omp simd reduction(min : l, t) reduction(max : r, b)
    for (int64_t i = 0; i < kMatchBlock; ++i) {
      area[i] = (x1[i] - x0[i]) * (y1[i] - y0[i]);
      l = x0[i] < l ? x0[i] : l;
      t = y0[i] < t ? y0[i] : t;
      r = x1[i] > r ? x1[i] : r;
      b = y1[i] > b ? y1[i] : b;
    }
    left = l;
    top = t;
    right = r;
    bottom = b;
  }

  // Whether a candidate may share some area with the box.
  bool touches(const float* box) const {
    return box[0] < right && box[2] > left && box[1] < bottom && box[3] > top;
  }

  // 0 instead of NaN: that of a coordinate is in the area.
  float overlap(int64_t i, const float* box, float box_area) const {
    const float w = (x1[i] < box[2] ? x1[i] : box[2]) - (x0[i] > box[0] ? x0[i] : box[0]);
    const float h = (y1[i] < box[3] ? y1[i] : box[3]) - (y0[i] > box[1] ? y0[i] : box[1]);
    const float shared = (w > 0.0f ? w : 0.0f) * (h > 0.0f ? h : 0.0f);
    const float quotient = shared / (box_area + area[i] - shared);
    return quotient > 0.0f ? quotient : 0.0f;
  }
};

float area_of(const float* box) { return (box[2] - box[0]) * (box[3] - box[1]); }

}  // namespace

void match_boxes_block(const float* candidates, const bool* outside, int64_t n, const float* boxes, int64_t count,
                       MatchBands bands, int32_t* index, int8_t* label, float* maxima) {
  const Block block(candidates, outside, n);
  float best[kMatchBlock] = {};
  int32_t slots[kMatchBlock] = {}, labels[kMatchBlock];
  for (int64_t g = 0; g < count; ++g) {
    const float box[4] = {boxes[4 * g], boxes[4 * g + 1], boxes[4 * g + 2], boxes[4 * g + 3]}, area = area_of(box);
    float highest = 0.0f;
    if (block.touches(box)) {
      const int32_t slot = static_cast<int32_t>(g);
#pragma omp simd reduction(max : highest)
      for (int64_t i = 0; i < kMatchBlock; ++i) {
        const float overlap = block.overlap(i, box, area);
        slots[i] = overlap > best[i] ? slot : slots[i];
        best[i] = overlap > best[i] ? overlap : best[i];
        highest = overlap > highest ? overlap : highest;
      }
    }
    maxima[g] = highest;
  }
#pragma omp simd
  for (int64_t i = 0; i < kMatchBlock; ++i) labels[i] = bands.labels[0];
  for (int64_t k = 0; k < bands.count; ++k) {
    const float threshold = bands.thresholds[k];
    const int32_t upper = bands.labels[k + 1];
#pragma omp simd
    for (int64_t i = 0; i < kMatchBlock; ++i) labels[i] = best[i] >= threshold ? upper : labels[i];
  }
  __builtin_memcpy(index, slots, sizeof(int32_t) * n);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) label[i] = static_cast<int8_t>(labels[i]);
  for (int64_t i = 0; outside && i < n; ++i) label[i] = outside[i] ? -1 : label[i];
}

void match_boxes_ties(const float* candidates, const bool* outside, int64_t n, const float* box, float best,
                      int8_t* label) {
  const Block block(candidates, outside, n);
  const float area = area_of(box);
  for (int64_t i = 0; i < n; ++i) {
    if (block.overlap(i, box, area) == best) label[i] = 1;
  }
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
