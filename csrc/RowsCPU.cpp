#include "Rows.h"

#include "vec.h"

namespace mimdet {
namespace MIMDET_ISA {
namespace {

template <typename In, typename Out>
void gather(const RowSources& sources, const int64_t* index, const Out* pos, bool pos_at_source, Out* out,
            int64_t length, int64_t channels, int64_t begin, int64_t end) {
  const auto *first = static_cast<const In*>(sources.first), *second = static_cast<const In*>(sources.second);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t b = r / length, row = index[r], of_second = row - sources.first_rows;
    Out* to = out + r * channels;
    if (row < 0) {
      __builtin_memset(to, 0, sizeof(Out) * channels);
      continue;
    }
    const In* from = of_second < 0 ? first + b * sources.first_batch_stride + row * sources.first_row_stride
                                   : second + b * sources.second_batch_stride + of_second * sources.second_row_stride;
    if (pos == nullptr) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) store(to + c, load(from + c));
    } else {
      const Out* shift = pos + (pos_at_source ? row : r - b * length) * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) store(to + c, load(from + c) + load(shift + c));
    }
  }
}

}  // namespace

void gather_rows(const RowSources& sources, bool sources_bf16, const int64_t* index, const void* pos,
                 bool pos_at_source, void* out, bool out_bf16, int64_t length, int64_t channels, int64_t begin,
                 int64_t end) {
  MIMDET_BY_TYPE(sources_bf16, {
    using In = T;
    MIMDET_BY_TYPE(out_bf16, gather<In>(sources, index, static_cast<const T*>(pos), pos_at_source,
                                        static_cast<T*>(out), length, channels, begin, end))
  })
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
