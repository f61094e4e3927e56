// ROIAlign over all levels of a pyramid: loops over channels for the CPU.
//
// The average of a bin's bilinear samples is separable: a bin has weights of the map's rows and weights of its columns.
// Of each axis an ROI has `ranges`, the first and last position of each bin (2 * size numbers, the last before the first
// where a bin has none), and `weights`: that of position p in bin b is at p + kGap * b. First and last positions do not
// descend from bin to bin.
#pragma once

#include <cstdint>

#include "isa.h"

namespace mimdet {

// The next bin's samples begin at most one position before the last one's end, and rounding may add one.
constexpr int64_t kGap = 3;

struct RoiAxis {
  const int32_t* ranges;
  const float* weights;
};

}  // namespace mimdet

// One ROI. map: (H, W, channels) of float32 or bfloat16; y: (size, size, channels) of the same; scratch: size * 64.
MIMDET_DECLARE_ISA(void roi_align_pool(const void* map, bool bf16, int64_t width, int64_t channels, int64_t size,
                                       RoiAxis rows, RoiAxis columns, void* y, float* scratch))

// Adds the gradient of row p of the map to row (W, channels). dy: (size, size, channels); scratch: size * channels.
MIMDET_DECLARE_ISA(void roi_align_add_row(const void* dy, bool bf16, int64_t channels, int64_t size, int64_t p,
                                          RoiAxis rows, RoiAxis columns, float* row, float* scratch))

// bfloat16 to = from.
MIMDET_DECLARE_ISA(void roi_align_round(const float* from, void* to, int64_t n))
