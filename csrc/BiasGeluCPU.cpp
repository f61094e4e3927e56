// Bias and exact GELU on a CPU: the loops, compiled once for each instruction set.
#include "BiasGelu.h"

#include "gelu.h"

namespace mimdet {
namespace MIMDET_ISA {
namespace {

template <class T>
void forward(const T* x, const float* __restrict bias, T* __restrict y, int64_t first, int64_t last, int64_t C) {
  for (int64_t row = first; row < last; ++row) {
    const T* from = x + row * C;
    T* to = y + row * C;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      store(to + c, gelu(load(from + c) + bias[c]));
    }
  }
}

template <class T>
void backward(const T* grad_y, const T* x, const float* __restrict bias, T* __restrict grad_x,
              float* __restrict partial, int64_t first, int64_t last, int64_t step, int64_t rows, int64_t C) {
  for (int64_t chunk = first; chunk < last; ++chunk) {
    float* __restrict total = partial + chunk * C;
    for (int64_t c = 0; c < C; ++c) {
      total[c] = 0.0f;
    }
    const int64_t end = (chunk + 1) * step < rows ? (chunk + 1) * step : rows;
    for (int64_t row = chunk * step; row < end; ++row) {
      const T* dy = grad_y + row * C;
      const T* from = x + row * C;
      T* to = grad_x + row * C;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) {
        const float g = load(dy + c) * gelu_derivative(load(from + c) + bias[c]);
        store(to + c, g);
        total[c] += g;
      }
    }
  }
}

}  // namespace

void bias_gelu_fwd(const void* x, const float* bias, void* y, int64_t first, int64_t last, int64_t C, bool bf16_x) {
  if (bf16_x) {
    forward(static_cast<const bf16*>(x), bias, static_cast<bf16*>(y), first, last, C);
  } else {
    forward(static_cast<const float*>(x), bias, static_cast<float*>(y), first, last, C);
  }
}

void bias_gelu_bwd(const void* grad_y, const void* x, const float* bias, void* grad_x, float* partial, int64_t first,
                   int64_t last, int64_t step, int64_t rows, int64_t C, bool bf16_x) {
  if (bf16_x) {
    backward(static_cast<const bf16*>(grad_y), static_cast<const bf16*>(x), bias, static_cast<bf16*>(grad_x), partial,
             first, last, step, rows, C);
  } else {
    backward(static_cast<const float*>(grad_y), static_cast<const float*>(x), bias, static_cast<float*>(grad_x),
             partial, first, last, step, rows, C);
  }
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
