#include "LayerNormGelu.h"

#include "gelu.h"

namespace mimdet {
namespace MIMDET_ISA {
namespace {

using In = const void*;

static inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }

// Rows whose moments are summed before any of them is normalized: sums of several rows overlap in the pipeline.
constexpr int64_t kRows = 16;

template <typename T>
void forward_rows(
    const T* x, T* y, int64_t n, int64_t C, const float* w, const float* b, float eps, float* mean, float* rstd) {
  float squares[kRows], rest[kRows];
  for (int64_t r = 0; r < n; ++r) {
    const T* row = x + r * C;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; ++c) sum += load(row + c);
    mean[r] = sum / C;
  }
  for (int64_t r = 0; r < n; ++r) {
    const T* row = x + r * C;
    const float center = mean[r];
    float square = 0.0f, off = 0.0f;
#pragma omp simd reduction(+ : square, off)
    for (int64_t c = 0; c < C; ++c) {
      const float x_centered = load(row + c) - center;
      square += x_centered * x_centered;
      off += x_centered;
    }
    squares[r] = square;
    rest[r] = off;
  }
#pragma omp simd
  for (int64_t r = 0; r < n; ++r) {
    // shift corrects both moments for the rounding of the sum.
    const float shift = rest[r] / C;
    mean[r] += shift;
    rstd[r] = rsqrt((squares[r] - rest[r] * shift) / C + eps);
  }
  for (int64_t r = 0; r < n; ++r, x += C, y += C) {
    const float row_mean = mean[r], row_rstd = rstd[r];
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) store(y + c, gelu((load(x + c) - row_mean) * row_rstd * w[c] + b[c]));
  }
}

template <typename T>
void forward_nhwc(
    const T* x, T* y, int64_t n, int64_t C, const float* w, const float* b, float eps, float* mean, float* rstd) {
  for (int64_t r = 0; r < n; r += kRows) {
    forward_rows(x + r * C, y + r * C, n - r < kRows ? n - r : kRows, C, w, b, eps, mean + r, rstd + r);
  }
}

// One tile of P <= kPositions positions; channels are S elements apart.
template <typename T>
void forward_tile(
    const T* x, T* y, int64_t P, int64_t C, int64_t S, const float* w, const float* b, float eps, float* mean,
    float* rstd) {
  float center[kPositions] = {}, squares[kPositions] = {}, rest[kPositions] = {};
  for (int64_t c = 0; c < C; ++c) {
#pragma omp simd
    for (int64_t p = 0; p < P; ++p) center[p] += load(x + c * S + p);
  }
  for (int64_t p = 0; p < P; ++p) center[p] /= C;
  for (int64_t c = 0; c < C; ++c) {
#pragma omp simd
    for (int64_t p = 0; p < P; ++p) {
      const float x_centered = load(x + c * S + p) - center[p];
      squares[p] += x_centered * x_centered;
      rest[p] += x_centered;
    }
  }
#pragma omp simd
  for (int64_t p = 0; p < P; ++p) {
    const float shift = rest[p] / C;
    mean[p] = center[p] + shift;
    rstd[p] = rsqrt((squares[p] - rest[p] * shift) / C + eps);
  }
  for (int64_t c = 0; c < C; ++c) {
#pragma omp simd
    for (int64_t p = 0; p < P; ++p) {
      store(y + c * S + p, gelu((load(x + c * S + p) - mean[p]) * rstd[p] * w[c] + b[c]));
    }
  }
}

template <typename T>
void forward_nchw(
    const T* x, T* y, int64_t n, int64_t C, int64_t S, const float* w, const float* b, float eps, float* mean,
    float* rstd) {
  for (int64_t p = 0; p < n; p += kPositions) {
    forward_tile(x + p, y + p, n - p < kPositions ? n - p : kPositions, C, S, w, b, eps, mean + p, rstd + p);
  }
}

template <typename T>
void backward_nhwc(
    const T* dy, const T* x, T* dx, int64_t n, int64_t C, const float* w, const float* b, const float* mean,
    const float* rstd, float* dz, float* sums) {
  float* db = sums;
  float* dw = sums + C;
  for (int64_t r = 0; r < n; ++r, x += C, dy += C, dx += C) {
    const float row_mean = mean[r], row_rstd = rstd[r];
    float a = 0.0f, k = 0.0f;
#pragma omp simd reduction(+ : a, k)
    for (int64_t c = 0; c < C; ++c) {
      const float x_hat = (load(x + c) - row_mean) * row_rstd;
      const float g = load(dy + c) * gelu_derivative(x_hat * w[c] + b[c]);
      db[c] += g;
      dw[c] += g * x_hat;
      const float scaled = g * w[c];
      dz[c] = scaled;
      a += scaled;
      k += scaled * x_hat;
    }
    a /= C;
    k /= C;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      store(dx + c, row_rstd * (dz[c] - a - (load(x + c) - row_mean) * row_rstd * k));
    }
  }
}

template <typename T>
void backward_tile(
    const T* dy, const T* x, T* dx, int64_t P, int64_t C, int64_t S, const float* w, const float* b,
    const float* mean, const float* rstd, float* dz, float* db, float* dw) {
  float a[kPositions] = {}, k[kPositions] = {};
  for (int64_t c = 0; c < C; ++c) {
    float sum = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : sum, product)
    for (int64_t p = 0; p < P; ++p) {
      const float x_hat = (load(x + c * S + p) - mean[p]) * rstd[p];
      const float g = load(dy + c * S + p) * gelu_derivative(x_hat * w[c] + b[c]);
      sum += g;
      product += g * x_hat;
      const float scaled = g * w[c];
      dz[c * kPositions + p] = scaled;
      a[p] += scaled;
      k[p] += scaled * x_hat;
    }
    db[c] += sum;
    dw[c] += product;
  }
  for (int64_t p = 0; p < P; ++p) {
    a[p] /= C;
    k[p] /= C;
  }
  for (int64_t c = 0; c < C; ++c) {
#pragma omp simd
    for (int64_t p = 0; p < P; ++p) {
      const float x_hat = (load(x + c * S + p) - mean[p]) * rstd[p];
      store(dx + c * S + p, rstd[p] * (dz[c * kPositions + p] - a[p] - x_hat * k[p]));
    }
  }
}

template <typename T>
void backward_nchw(
    const T* dy, const T* x, T* dx, int64_t n, int64_t C, int64_t S, const float* w, const float* b,
    const float* mean, const float* rstd, float* scratch, float* sums) {
  for (int64_t p = 0; p < n; p += kPositions) {
    backward_tile(
        dy + p, x + p, dx + p, n - p < kPositions ? n - p : kPositions, C, S, w, b, mean + p, rstd + p, scratch, sums,
        sums + C);
  }
}

}  // namespace

void lng_forward_nhwc(
    In x, void* y, bool bf16, int64_t n, int64_t C, const float* weight, const float* bias, float eps, float* mean,
    float* rstd) {
  MIMDET_BY_TYPE(
      bf16, forward_nhwc(static_cast<const T*>(x), static_cast<T*>(y), n, C, weight, bias, eps, mean, rstd))
}

void lng_forward_nchw(
    In x, void* y, bool bf16, int64_t n, int64_t C, int64_t S, const float* weight, const float* bias, float eps,
    float* mean, float* rstd) {
  MIMDET_BY_TYPE(
      bf16, forward_nchw(static_cast<const T*>(x), static_cast<T*>(y), n, C, S, weight, bias, eps, mean, rstd))
}

void lng_backward_nhwc(
    In dy, In x, void* dx, bool bf16, int64_t n, int64_t C, const float* weight, const float* bias, const float* mean,
    const float* rstd, float* scratch, float* sums) {
  MIMDET_BY_TYPE(
      bf16, backward_nhwc(
                static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), n, C, weight, bias, mean,
                rstd, scratch, sums))
}

void lng_backward_nchw(
    In dy, In x, void* dx, bool bf16, int64_t n, int64_t C, int64_t S, const float* weight, const float* bias,
    const float* mean, const float* rstd, float* scratch, float* sums) {
  MIMDET_BY_TYPE(
      bf16, backward_nchw(
                static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), n, C, S, weight, bias, mean,
                rstd, scratch, sums))
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
