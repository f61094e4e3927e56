// Moments of stretches of memory for the CPU kernels, written for auto-vectorization.
#pragma once

#include "vec.h"

namespace mimdet {
namespace MIMDET_ISA {

constexpr int64_t kBlock = 2048;  // elements whose float sums stay exact enough to be added up in double

// Mean and sum of squared deviations of n numbers.
template <typename T>
static inline void moments(const T* x, int64_t n, double* mean, double* m2) {
  double total = 0.0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t end = i + kBlock < n ? i + kBlock : n;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = i; j < end; ++j) sum += load(x + j);
    total += sum;
  }
  const float center = static_cast<float>(total / n);
  double squares = 0.0, rest = 0.0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t end = i + kBlock < n ? i + kBlock : n;
    float sum = 0.0f, off = 0.0f;
#pragma omp simd reduction(+ : sum, off)
    for (int64_t j = i; j < end; ++j) {
      const float x_centered = load(x + j) - center;
      sum += x_centered * x_centered;
      off += x_centered;
    }
    squares += sum;
    rest += off;
  }
  // center is the mean rounded to float; shift corrects both moments for that rounding.
  const double shift = rest / n;
  *mean = center + shift;
  *m2 = squares - n * shift * shift;
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
