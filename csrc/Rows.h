// Gathers of token rows, of gather_add_pos and scatter_fill: row loops for the CPU.
#pragma once

#include <cstdint>

#include "isa.h"

namespace mimdet {

// Rows of an image: `first_rows` of one tensor, then those of another, each at two strides.
struct RowSources {
  const void* first;
  int64_t first_batch_stride, first_row_stride, first_rows;
  const void* second;
  int64_t second_batch_stride, second_row_stride;
};

}  // namespace mimdet

// out[r] = row index[r] of image r / length of the sources, + a row of pos, for begin <= r < end; zeros where index[r]
// is negative. pos has out's type, its row is index[r] or r % length; null adds nothing.
MIMDET_DECLARE_ISA(void gather_rows(const RowSources& sources, bool sources_bf16, const int64_t* index, const void* pos,
                                    bool pos_at_source, void* out, bool out_bf16, int64_t length, int64_t channels,
                                    int64_t begin, int64_t end))
