#include "ScatterFill.h"

#include "vec.h"

namespace mimdet {
namespace MIMDET_ISA {
namespace {

template <typename In, typename Out>
void assemble(const In* kept, int64_t kept_batch_stride, int64_t kept_row_stride, const In* fill,
              int64_t fill_batch_stride, int64_t fill_row_stride, const int64_t* ids_restore, const Out* pos, Out* out,
              int64_t kept_rows, int64_t length, int64_t channels, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t b = r / length, row = ids_restore[r];
    Out* to = out + r * channels;
    if (row < 0) {
      __builtin_memset(to, 0, sizeof(Out) * channels);
      continue;
    }
    const In* from = row < kept_rows ? kept + b * kept_batch_stride + row * kept_row_stride
                                     : fill + b * fill_batch_stride + (row - kept_rows) * fill_row_stride;
    const Out* shift = pos + (r - b * length) * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) store(to + c, load(from + c) + load(shift + c));
  }
}

template <typename In, typename Out>
void split(const In* dy, const int64_t* ids_restore, Out* kept, Out* fill, int64_t kept_rows, int64_t fill_rows,
           int64_t length, int64_t channels, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t b = r / length, row = ids_restore[r];
    if (row < 0) continue;
    const In* from = dy + r * channels;
    Out* to = row < kept_rows ? kept + (b * kept_rows + row) * channels
                              : fill + (b * fill_rows + row - kept_rows) * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) store(to + c, load(from + c));
  }
}

}  // namespace

void scatter_fill_rows(const void* kept, int64_t kept_batch_stride, int64_t kept_row_stride, const void* fill,
                       int64_t fill_batch_stride, int64_t fill_row_stride, bool sources_bf16,
                       const int64_t* ids_restore, const void* pos, void* out, bool out_bf16, int64_t kept_rows,
                       int64_t length, int64_t channels, int64_t begin, int64_t end) {
  if (out_bf16) {
    assemble(static_cast<const bf16*>(kept), kept_batch_stride, kept_row_stride, static_cast<const bf16*>(fill),
             fill_batch_stride, fill_row_stride, ids_restore, static_cast<const bf16*>(pos), static_cast<bf16*>(out),
             kept_rows, length, channels, begin, end);
  } else if (sources_bf16) {
    assemble(static_cast<const bf16*>(kept), kept_batch_stride, kept_row_stride, static_cast<const bf16*>(fill),
             fill_batch_stride, fill_row_stride, ids_restore, static_cast<const float*>(pos), static_cast<float*>(out),
             kept_rows, length, channels, begin, end);
  } else {
    assemble(static_cast<const float*>(kept), kept_batch_stride, kept_row_stride, static_cast<const float*>(fill),
             fill_batch_stride, fill_row_stride, ids_restore, static_cast<const float*>(pos), static_cast<float*>(out),
             kept_rows, length, channels, begin, end);
  }
}

void scatter_fill_backward_rows(const void* dy, bool dy_bf16, const int64_t* ids_restore, void* kept, void* fill,
                                bool out_bf16, int64_t kept_rows, int64_t fill_rows, int64_t length,
                                int64_t channels, int64_t begin, int64_t end) {
  if (dy_bf16 && out_bf16) {
    split(static_cast<const bf16*>(dy), ids_restore, static_cast<bf16*>(kept), static_cast<bf16*>(fill), kept_rows,
          fill_rows, length, channels, begin, end);
  } else if (out_bf16) {
    split(static_cast<const float*>(dy), ids_restore, static_cast<bf16*>(kept), static_cast<bf16*>(fill), kept_rows,
          fill_rows, length, channels, begin, end);
  } else if (dy_bf16) {
    split(static_cast<const bf16*>(dy), ids_restore, static_cast<float*>(kept), static_cast<float*>(fill), kept_rows,
          fill_rows, length, channels, begin, end);
  } else {
    split(static_cast<const float*>(dy), ids_restore, static_cast<float*>(kept), static_cast<float*>(fill), kept_rows,
          fill_rows, length, channels, begin, end);
  }
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
