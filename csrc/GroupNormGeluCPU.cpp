#include "GroupNormGelu.h"

#include "gelu.h"
#include "moments.h"

namespace mimdet {
namespace MIMDET_ISA {
namespace {

template <typename T>
void forward_nhwc(const T* x, T* y, int64_t n, int64_t C, float mean, float rstd, const float* w, const float* b) {
  for (int64_t r = 0; r < n; ++r, x += C, y += C) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) store(y + c, gelu((load(x + c) - mean) * rstd * w[c] + b[c]));
  }
}

template <typename T>
void forward_nchw(const T* x, T* y, int64_t n, float mean, float rstd, float w, float b) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(y + i, gelu((load(x + i) - mean) * rstd * w + b));
}

// R rows at a time, so that the sums are loaded and stored once for all of them.
template <int R, typename T>
void backward_sums_rows(
    const T* dy, const T* x, T* dx, int64_t C, float mean, float rstd, const float* w, const float* b, float* sum,
    float* product) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    float total = sum[c], dot = product[c];
    for (int r = 0; r < R; ++r) {
      const float x_hat = (load(x + r * C + c) - mean) * rstd;
      const float dz = load(dy + r * C + c) * gelu_derivative(x_hat * w[c] + b[c]);
      store(dx + r * C + c, dz);
      total += dz;
      dot += dz * x_hat;
    }
    sum[c] = total;
    product[c] = dot;
  }
}

template <typename T>
void backward_sums_nhwc(
    const T* dy, const T* x, T* dx, int64_t n, int64_t C, float mean, float rstd, const float* w, const float* b,
    float* sums) {
  constexpr int kRows = 4;
  int64_t r = 0;
  for (; r + kRows <= n; r += kRows) {
    backward_sums_rows<kRows>(dy + r * C, x + r * C, dx + r * C, C, mean, rstd, w, b, sums, sums + C);
  }
  for (; r < n; ++r) backward_sums_rows<1>(dy + r * C, x + r * C, dx + r * C, C, mean, rstd, w, b, sums, sums + C);
}

template <typename T>
void backward_sums_nchw(
    const T* dy, const T* x, T* dx, int64_t n, float mean, float rstd, float w, float b, double* sums) {
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t end = i + kBlock < n ? i + kBlock : n;
    float sum = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : sum, product)
    for (int64_t j = i; j < end; ++j) {
      const float x_hat = (load(x + j) - mean) * rstd;
      const float dz = load(dy + j) * gelu_derivative(x_hat * w + b);
      store(dx + j, dz);
      sum += dz;
      product += dz * x_hat;
    }
    sums[0] += sum;
    sums[1] += product;
  }
}

template <typename T>
void backward_dx_nhwc(
    const T* x, T* dx, int64_t n, int64_t C, float mean, float rstd, const float* w, float a, float k) {
  for (int64_t r = 0; r < n; ++r, x += C, dx += C) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      store(dx + c, rstd * (w[c] * load(dx + c) - a - (load(x + c) - mean) * rstd * k));
    }
  }
}

template <typename T>
void backward_dx_nchw(const T* x, T* dx, int64_t n, float mean, float rstd, float w, float a, float k) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(dx + i, rstd * (w * load(dx + i) - a - (load(x + i) - mean) * rstd * k));
}

}  // namespace

using In = const void*;

void gng_moments(In x, bool bf16, int64_t n, double* mean, double* m2) {
  MIMDET_BY_TYPE(bf16, moments(static_cast<const T*>(x), n, mean, m2))
}

void gng_forward_nhwc(
    In x, void* y, bool bf16, int64_t n, int64_t C, float mean, float rstd, const float* weight, const float* bias) {
  MIMDET_BY_TYPE(
      bf16, forward_nhwc(static_cast<const T*>(x), static_cast<T*>(y), n, C, mean, rstd, weight, bias))
}

void gng_forward_nchw(In x, void* y, bool bf16, int64_t n, float mean, float rstd, float weight, float bias) {
  MIMDET_BY_TYPE(bf16, forward_nchw(static_cast<const T*>(x), static_cast<T*>(y), n, mean, rstd, weight, bias))
}

void gng_backward_sums_nhwc(
    In dy, In x, void* dx, bool bf16, int64_t n, int64_t C, float mean, float rstd, const float* weight,
    const float* bias, float* sums) {
  MIMDET_BY_TYPE(
      bf16, backward_sums_nhwc(
                static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), n, C, mean, rstd, weight,
                bias, sums))
}

void gng_backward_sums_nchw(
    In dy, In x, void* dx, bool bf16, int64_t n, float mean, float rstd, float weight, float bias, double* sums) {
  MIMDET_BY_TYPE(
      bf16, backward_sums_nchw(
                static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), n, mean, rstd, weight, bias,
                sums))
}

void gng_backward_dx_nhwc(
    In x, void* dx, bool bf16, int64_t n, int64_t C, float mean, float rstd, const float* weight, float a, float k) {
  MIMDET_BY_TYPE(
      bf16, backward_dx_nhwc(static_cast<const T*>(x), static_cast<T*>(dx), n, C, mean, rstd, weight, a, k))
}

void gng_backward_dx_nchw(
    In x, void* dx, bool bf16, int64_t n, float mean, float rstd, float weight, float a, float k) {
  MIMDET_BY_TYPE(bf16, backward_dx_nchw(static_cast<const T*>(x), static_cast<T*>(dx), n, mean, rstd, weight, a, k))
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
