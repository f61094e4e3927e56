// Gather of tokens with their position embedding: row loops for the CPU.
#pragma once

#include <cstdint>

#include "isa.h"

// out[r] = x[r / count, index[r]] + pos[index[r]] for rows begin <= r < end; pos may be null.
// x: rows of `channels` at the two strides; pos: (L, channels) of out's type; index: (B * count); out: rows of
// float32, or of bfloat16 where out_bf16 says so (x must then be bfloat16 too).
MIMDET_DECLARE_ISA(void gather_add_pos_rows(const void* x, bool x_bf16, int64_t batch_stride, int64_t row_stride,
                                            const void* pos, const int64_t* index, void* out, bool out_bf16,
                                            int64_t count, int64_t channels, int64_t begin, int64_t end))

// out[r] = dy[source[r]], zero where source[r] is negative, for rows begin <= r < end.
MIMDET_DECLARE_ISA(void gather_add_pos_backward_rows(const void* dy, bool dy_bf16, const int64_t* source, void* out,
                                                     bool out_bf16, int64_t channels, int64_t begin, int64_t end))
