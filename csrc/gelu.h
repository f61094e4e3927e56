// Exact GELU for the CPU kernels, written for auto-vectorization: minimax fits by odd rational functions, without an
// exponential. Their error, with that of float arithmetic, is below 3e-7 of the larger of 1 and |h|.
#pragma once

#include "vec.h"

namespace mimdet {
namespace MIMDET_ISA {

// h clamped to -bound .. bound; NaN stays NaN.
static inline float clamp(float h, float bound) {
  h = h < -bound ? -bound : h;
  return h > bound ? bound : h;
}

// h * Phi(h), Phi being the cumulative function of the normal distribution.
static inline float gelu(float h) {
  const float x = clamp(h, 5.6f), u = x * x;
  float p = 2.170691364e-08f;
  p = p * u + 6.525740109e-06f;
  p = p * u + 1.867777635e-04f;
  p = p * u + 4.785930159e-03f;
  p = p * u + 3.555708851e-02f;
  p = p * u + 3.989421046e-01f;
  float q = 1.180047191e-06f;
  q = q * u + 7.968333795e-05f;
  q = q * u + 1.985306293e-03f;
  q = q * u + 2.963263781e-02f;
  q = q * u + 2.557926053e-01f;
  q = q * u + 1.0f;
  const float y = h * (0.5f + x * p / q);
  // Below -5.6, |y| < 6e-8; h would magnify the rounding error of 0.5 - 0.5.
  return h < -5.6f ? 0.0f : y;
}

// Phi(h) + h * phi(h).
static inline float gelu_derivative(float h) {
  const float x = clamp(h, 6.0f), u = x * x;
  float p = 1.704629447e-08f;
  p = p * u + 9.225212206e-07f;
  p = p * u + 3.409189270e-05f;
  p = p * u + 2.027280813e-04f;
  p = p * u + 1.385734650e-02f;
  p = p * u + -2.237143311e-02f;
  p = p * u + 7.978845312e-01f;
  float q = 1.314767258e-09f;
  q = q * u + 3.389763142e-07f;
  q = q * u + 1.030768608e-05f;
  q = q * u + 2.453233349e-04f;
  q = q * u + 3.971498777e-03f;
  q = q * u + 4.413352598e-02f;
  q = q * u + 3.052945283e-01f;
  q = q * u + 1.0f;
  const float d = 0.5f + x * p / q;
  return h < -6.0f ? 0.0f : d;
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
