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
void backward(const T* dy, const T* x, const float* __restrict bias, T* __restrict dx,
              float* __restrict db_partial, int64_t first, int64_t last, int64_t step, int64_t rows, int64_t C) {
  for (int64_t chunk = first; chunk < last; ++chunk) {
    float* __restrict db = db_partial + chunk * C;
    for (int64_t c = 0; c < C; ++c) {
      db[c] = 0.0f;
    }
    const int64_t end = (chunk + 1) * step < rows ? (chunk + 1) * step : rows;
    for (int64_t row = chunk * step; row < end; ++row) {
      const T* grad = dy + row * C;
      const T* from = x + row * C;
      T* to = dx + row * C;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) {
        const float g = load(grad + c) * gelu_derivative(load(from + c) + bias[c]);
        store(to + c, g);
        db[c] += g;
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

void bias_gelu_bwd(const void* dy, const void* x, const float* bias, void* dx, float* db_partial, int64_t first,
                   int64_t last, int64_t step, int64_t rows, int64_t C, bool bf16_x) {
  if (bf16_x) {
    backward(static_cast<const bf16*>(dy), static_cast<const bf16*>(x), bias, static_cast<bf16*>(dx), db_partial,
             first, last, step, rows, C);
  } else {
    backward(static_cast<const float*>(dy), static_cast<const float*>(x), bias, static_cast<float*>(dx),
             db_partial, first, last, step, rows, C);
  }
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
