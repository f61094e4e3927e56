// Token sampling of one picture for the CPU. Integer work with little to vectorise: compiled once, for any processor.
#pragma once

#include <cstdint>

namespace mimdet {

// Splits tokens 0 .. length - 1 into the `count` of smallest noise and the others, both in raster order.
// noise, valid, restore: length; keep: count; drop: length - count; scratch: 2 * length.
void sample_tokens_row(const float* noise, const bool* valid, int64_t length, int64_t count, int64_t* keep,
                       int64_t* drop, int64_t* restore, uint32_t* scratch);

}  // namespace mimdet
