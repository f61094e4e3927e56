#include "BatchNorm.h"

#include "moments.h"

namespace mimdet {
namespace MIMDET_ISA {
namespace {

constexpr int kRows = 8;  // rows that are read at once, so that sums are loaded and stored once for all of them

// R rows.
template <int R, typename T>
void add_rows(const T* x, int64_t C, float* sum) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    float total = 0.0f;
    for (int r = 0; r < R; ++r) total += load(x + r * C + c);
    sum[c] += total;
  }
}

template <int R, typename T>
void add_squares(const T* x, int64_t C, const float* center, float* sum, float* square) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    float total = 0.0f, squares = 0.0f;
    for (int r = 0; r < R; ++r) {
      const float d = load(x + r * C + c) - center[c];
      total += d;
      squares += d * d;
    }
    sum[c] += total;
    square[c] += squares;
  }
}

// The rows are few: the second pass finds them in the cache.
template <typename T>
void moments_nhwc(const T* x, int64_t n, int64_t C, float* center, float* sum, float* square) {
  for (int64_t c = 0; c < C; ++c) center[c] = sum[c] = square[c] = 0.0f;
  int64_t r = 0;
  for (; r + kRows <= n; r += kRows) add_rows<kRows>(x + r * C, C, center);
  for (; r < n; ++r) add_rows<1>(x + r * C, C, center);
  for (int64_t c = 0; c < C; ++c) center[c] /= n;
  for (r = 0; r + kRows <= n; r += kRows) add_squares<kRows>(x + r * C, C, center, sum, square);
  for (; r < n; ++r) add_squares<1>(x + r * C, C, center, sum, square);
}

// A NaN stays one.
template <bool relu>
float activate(float z) {
  return relu && z < 0.0f ? 0.0f : z;
}

template <bool relu>
float before_relu(float dy, float centered, float gain, float bias) {
  return relu && centered * gain + bias <= 0.0f ? 0.0f : dy;
}

template <bool relu, typename T>
void forward_nhwc(const T* x, T* y, int64_t n, int64_t C, const float* mean, const float* gain, const float* bias) {
  for (int64_t r = 0; r < n; ++r, x += C, y += C) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) store(y + c, activate<relu>((load(x + c) - mean[c]) * gain[c] + bias[c]));
  }
}

template <bool relu, typename T>
void forward_nchw(const T* x, T* y, int64_t n, float mean, float gain, float bias) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(y + i, activate<relu>((load(x + i) - mean) * gain + bias));
}

template <bool relu, int R, typename T>
void sums_rows(
    const T* dy, const T* x, int64_t C, const float* mean, const float* gain, const float* bias, float* sum,
    float* product) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    float total = 0.0f, dot = 0.0f;
    for (int r = 0; r < R; ++r) {
      const float centered = load(x + r * C + c) - mean[c];
      const float dz = before_relu<relu>(load(dy + r * C + c), centered, gain[c], bias[c]);
      total += dz;
      dot += dz * centered;
    }
    sum[c] += total;
    product[c] += dot;
  }
}

template <bool relu, typename T>
void sums_nhwc(
    const T* dy, const T* x, int64_t n, int64_t C, const float* mean, const float* gain, const float* bias,
    float* sums) {
  int64_t r = 0;
  for (; r + kRows <= n; r += kRows) {
    sums_rows<relu, kRows>(dy + r * C, x + r * C, C, mean, gain, bias, sums, sums + C);
  }
  for (; r < n; ++r) sums_rows<relu, 1>(dy + r * C, x + r * C, C, mean, gain, bias, sums, sums + C);
}

template <bool relu, typename T>
void sums_nchw(const T* dy, const T* x, int64_t n, float mean, float gain, float bias, double* sums) {
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t end = i + kBlock < n ? i + kBlock : n;
    float sum = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : sum, product)
    for (int64_t j = i; j < end; ++j) {
      const float centered = load(x + j) - mean;
      const float dz = before_relu<relu>(load(dy + j), centered, gain, bias);
      sum += dz;
      product += dz * centered;
    }
    sums[0] += sum;
    sums[1] += product;
  }
}

template <bool relu, typename T>
void backward_nhwc(
    const T* dy, const T* x, T* dx, int64_t n, int64_t C, const float* mean, const float* gain, const float* bias,
    const float* a, const float* k) {
  for (int64_t r = 0; r < n; ++r, dy += C, x += C, dx += C) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      const float centered = load(x + c) - mean[c];
      const float dz = before_relu<relu>(load(dy + c), centered, gain[c], bias[c]);
      store(dx + c, gain[c] * dz - a[c] - centered * k[c]);
    }
  }
}

template <bool relu, typename T>
void backward_nchw(
    const T* dy, const T* x, T* dx, int64_t n, float mean, float gain, float bias, float a, float k) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float centered = load(x + i) - mean;
    const float dz = before_relu<relu>(load(dy + i), centered, gain, bias);
    store(dx + i, gain * dz - a - centered * k);
  }
}

}  // namespace

// Runs call with T and with RELU, a constant.
#define MIMDET_BY_TYPE_AND_RELU(...)   \
  if (relu) {                          \
    constexpr bool RELU = true;        \
    MIMDET_BY_TYPE(bf16, __VA_ARGS__)  \
  } else {                             \
    constexpr bool RELU = false;       \
    MIMDET_BY_TYPE(bf16, __VA_ARGS__)  \
  }

void bn_moments_nhwc(const void* x, bool bf16, int64_t n, int64_t C, float* center, float* sum, float* square) {
  MIMDET_BY_TYPE(bf16, moments_nhwc(static_cast<const T*>(x), n, C, center, sum, square))
}

void bn_moments_nchw(const void* x, bool bf16, int64_t n, double* mean, double* m2) {
  MIMDET_BY_TYPE(bf16, moments(static_cast<const T*>(x), n, mean, m2))
}

void bn_forward_nhwc(
    const void* x, void* y, bool bf16, int64_t n, int64_t C, const float* mean, const float* gain, const float* bias,
    bool relu) {
  MIMDET_BY_TYPE_AND_RELU(
      forward_nhwc<RELU>(static_cast<const T*>(x), static_cast<T*>(y), n, C, mean, gain, bias))
}

void bn_forward_nchw(
    const void* x, void* y, bool bf16, int64_t n, float mean, float gain, float bias, bool relu) {
  MIMDET_BY_TYPE_AND_RELU(forward_nchw<RELU>(static_cast<const T*>(x), static_cast<T*>(y), n, mean, gain, bias))
}

void bn_sums_nhwc(
    const void* dy, const void* x, bool bf16, int64_t n, int64_t C, const float* mean, const float* gain,
    const float* bias, bool relu, float* sums) {
  MIMDET_BY_TYPE_AND_RELU(
      sums_nhwc<RELU>(static_cast<const T*>(dy), static_cast<const T*>(x), n, C, mean, gain, bias, sums))
}

void bn_sums_nchw(
    const void* dy, const void* x, bool bf16, int64_t n, float mean, float gain, float bias, bool relu, double* sums) {
  MIMDET_BY_TYPE_AND_RELU(
      sums_nchw<RELU>(static_cast<const T*>(dy), static_cast<const T*>(x), n, mean, gain, bias, sums))
}

void bn_backward_nhwc(
    const void* dy, const void* x, void* dx, bool bf16, int64_t n, int64_t C, const float* mean, const float* gain,
    const float* bias, bool relu, const float* a, const float* k) {
  MIMDET_BY_TYPE_AND_RELU(
      backward_nhwc<RELU>(static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), n, C, mean, gain,
                          bias, a, k))
}

void bn_backward_nchw(
    const void* dy, const void* x, void* dx, bool bf16, int64_t n, float mean, float gain, float bias, bool relu,
    float a, float k) {
  MIMDET_BY_TYPE_AND_RELU(
      backward_nchw<RELU>(static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), n, mean, gain,
                          bias, a, k))
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
