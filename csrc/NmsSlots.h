// Non-maximum suppression on a CPU: the search for boxes that may overlap enough.
#pragma once

#include <cstdint>

#include "isa.h"

namespace mimdet {

// Boxes that are compared at once. A group has x0, y0, x1, y1 and area of each, one array after the other.
constexpr int64_t kGroup = 16;

}  // namespace mimdet

// The first of groups [group, count) with a box whose intersection with `box` (x0, y0, x1, y1, area) is not below
// `share` of the sum of their areas, or is NaN; `count` if there is none.
MIMDET_DECLARE_ISA(int64_t nms_slots_search(const float* groups, int64_t group, int64_t count, const float* box,
                                            float share))
