#include "GatherAddPos.h"

#include "vec.h"

namespace mimdet {
namespace MIMDET_ISA {
namespace {

template <typename In, typename Out>
void gather(const In* x, int64_t batch_stride, int64_t row_stride, const Out* pos, const int64_t* index, Out* out,
            int64_t count, int64_t channels, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const In* from = x + r / count * batch_stride + index[r] * row_stride;
    Out* to = out + r * channels;
    if (pos == nullptr) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) store(to + c, load(from + c));
    } else {
      const Out* shift = pos + index[r] * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) store(to + c, load(from + c) + load(shift + c));
    }
  }
}

template <typename In, typename Out>
void scatter(const In* dy, const int64_t* source, Out* out, int64_t channels, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    Out* to = out + r * channels;
    if (source[r] < 0) {
      __builtin_memset(to, 0, sizeof(Out) * channels);
    } else {
      const In* from = dy + source[r] * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) store(to + c, load(from + c));
    }
  }
}

}  // namespace

void gather_add_pos_rows(const void* x, bool x_bf16, int64_t batch_stride, int64_t row_stride, const void* pos,
                         const int64_t* index, void* out, bool out_bf16, int64_t count, int64_t channels,
                         int64_t begin, int64_t end) {
  if (out_bf16) {
    gather(static_cast<const bf16*>(x), batch_stride, row_stride, static_cast<const bf16*>(pos), index,
           static_cast<bf16*>(out), count, channels, begin, end);
  } else if (x_bf16) {
    gather(static_cast<const bf16*>(x), batch_stride, row_stride, static_cast<const float*>(pos), index,
           static_cast<float*>(out), count, channels, begin, end);
  } else {
    gather(static_cast<const float*>(x), batch_stride, row_stride, static_cast<const float*>(pos), index,
           static_cast<float*>(out), count, channels, begin, end);
  }
}

void gather_add_pos_backward_rows(const void* dy, bool dy_bf16, const int64_t* source, void* out, bool out_bf16,
                                  int64_t channels, int64_t begin, int64_t end) {
  if (dy_bf16 && out_bf16) {
    scatter(static_cast<const bf16*>(dy), source, static_cast<bf16*>(out), channels, begin, end);
  } else if (out_bf16) {
    scatter(static_cast<const float*>(dy), source, static_cast<bf16*>(out), channels, begin, end);
  } else if (dy_bf16) {
    scatter(static_cast<const bf16*>(dy), source, static_cast<float*>(out), channels, begin, end);
  } else {
    scatter(static_cast<const float*>(dy), source, static_cast<float*>(out), channels, begin, end);
  }
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
