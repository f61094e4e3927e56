// Assembly of the decoder's input: row loops for the CPU.
#pragma once

#include <cstdint>

#include "isa.h"

// out[r] = row ids_restore[r] of cat([kept, fill], 1) in image r / length, + pos[r % length], for begin <= r < end;
// zeros where ids_restore[r] is negative.
// kept: kept_rows rows an image; fill: the others; each at its two strides and of one type. pos: (length, channels) of
// out's type. out: rows of float32, or of bfloat16 where out_bf16 says so (the sources must then be bfloat16 too).
MIMDET_DECLARE_ISA(void scatter_fill_rows(const void* kept, int64_t kept_batch_stride, int64_t kept_row_stride,
                                          const void* fill, int64_t fill_batch_stride, int64_t fill_row_stride,
                                          bool sources_bf16, const int64_t* ids_restore, const void* pos, void* out,
                                          bool out_bf16, int64_t kept_rows, int64_t length, int64_t channels,
                                          int64_t begin, int64_t end))

// Row ids_restore[r] of cat([kept, fill], 1) in image r / length = dy[r], for begin <= r < end, unless
// ids_restore[r] is negative; all contiguous.
MIMDET_DECLARE_ISA(void scatter_fill_backward_rows(const void* dy, bool dy_bf16, const int64_t* ids_restore, void* kept,
                                                   void* fill, bool out_bf16, int64_t kept_rows, int64_t fill_rows,
                                                   int64_t length, int64_t channels, int64_t begin, int64_t end))
