#include "RoiAlignLevels.h"

#include "vec.h"

namespace mimdet {
namespace MIMDET_ISA {
namespace {

// Channels whose sums stay in registers.
constexpr int64_t kBlock = 64;

// sum[c] = the weighted sum of n columns' channels.
template <int64_t Fixed, typename T>
inline void sum_columns(const T* at, int64_t channels, const float* weights, int64_t n, int64_t count, float* sum) {
  const int64_t m = Fixed ? Fixed : count;
  float total[kBlock] = {};
  for (int64_t i = 0; i < n; ++i, at += channels) {
    const float w = weights[i];
    if (w == 0.0f) continue;  // between the points of a sparse grid
#pragma omp simd
    for (int64_t c = 0; c < m; ++c) total[c] += w * load(at + c);
  }
#pragma omp simd
  for (int64_t c = 0; c < m; ++c) sum[c] = total[c];
}

template <typename T>
void pool(const T* map, int64_t width, int64_t channels, int64_t size, RoiAxis rows, RoiAxis columns, T* y,
          float* bins) {
  for (int64_t pw = 0; pw < size; ++pw) {
    const int64_t x = columns.ranges[2 * pw], n = columns.ranges[2 * pw + 1] - x + 1;
    const float* wx = columns.weights + x + kGap * pw;
    for (int64_t first = 0; first < channels; first += kBlock) {
      const int64_t count = channels - first < kBlock ? channels - first : kBlock;
      __builtin_memset(bins, 0, sizeof(float) * size * kBlock);
      // Bins that share a row are neighbors: [begin, end) have row p.
      const int64_t last = n > 0 ? rows.ranges[2 * size - 1] : -1;
      int64_t begin = 0, end = 0;
      for (int64_t p = rows.ranges[0]; p <= last; ++p) {
        while (begin < size && rows.ranges[2 * begin + 1] < p) ++begin;
        while (end < size && rows.ranges[2 * end] <= p) ++end;
        if (begin >= end) continue;
        float sum[kBlock];
        const T* at = map + (p * width + x) * channels + first;
        if (count == kBlock) sum_columns<kBlock>(at, channels, wx, n, count, sum);
        else sum_columns<0>(at, channels, wx, n, count, sum);
        for (int64_t ph = begin; ph < end; ++ph) {
          const float wy = rows.weights[p + kGap * ph];
          float* bin = bins + ph * kBlock;
#pragma omp simd
          for (int64_t c = 0; c < kBlock; ++c) bin[c] += wy * (c < count ? sum[c] : 0.0f);
        }
      }
      for (int64_t ph = 0; ph < size; ++ph) {
        T* to = y + (ph * size + pw) * channels + first;
        const float* bin = bins + ph * kBlock;
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) store(to + c, bin[c]);
      }
    }
  }
}

template <typename T>
void add_row(const T* dy, int64_t channels, int64_t size, int64_t p, RoiAxis rows, RoiAxis columns, float* row,
             float* bins) {
  // The gradient of this row in each column of bins.
  bool none = true;
  for (int64_t ph = 0; ph < size; ++ph) {
    if (p < rows.ranges[2 * ph] || p > rows.ranges[2 * ph + 1]) continue;
    const float wy = rows.weights[p + kGap * ph];
    const T* from = dy + ph * size * channels;
    if (none) {
#pragma omp simd
      for (int64_t i = 0; i < size * channels; ++i) bins[i] = wy * load(from + i);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < size * channels; ++i) bins[i] += wy * load(from + i);
    }
    none = false;
  }
  if (none) return;
  for (int64_t pw = 0; pw < size; ++pw) {
    const float* from = bins + pw * channels;
    for (int64_t x = columns.ranges[2 * pw]; x <= columns.ranges[2 * pw + 1]; ++x) {
      const float wx = columns.weights[x + kGap * pw];
      if (wx == 0.0f) continue;
      float* to = row + x * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) to[c] += wx * from[c];
    }
  }
}

}  // namespace

void roi_align_pool(const void* map, bool bf16, int64_t width, int64_t channels, int64_t size, RoiAxis rows,
                    RoiAxis columns, void* y, float* scratch) {
  MIMDET_BY_TYPE(bf16, pool(static_cast<const T*>(map), width, channels, size, rows, columns, static_cast<T*>(y),
                            scratch))
}

void roi_align_add_row(const void* dy, bool bf16, int64_t channels, int64_t size, int64_t p, RoiAxis rows,
                       RoiAxis columns, float* row, float* scratch) {
  MIMDET_BY_TYPE(bf16, add_row(static_cast<const T*>(dy), channels, size, p, rows, columns, row, scratch))
}

void roi_align_round(const float* from, void* to, int64_t n) {
  bf16* at = static_cast<bf16*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(at + i, from[i]);
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
