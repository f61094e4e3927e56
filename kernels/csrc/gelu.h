// Exact GELU's ingredients for the CPU kernels, written for auto-vectorisation.
#pragma once

#include "vec.h"

namespace mimdet {
namespace MIMDET_ISA {

// exp(-a) for a >= 0 within 2e-7 relative; about 1e-38 from a = 87 on.
static inline float exp_minus(float a) {
  float z = a * -1.44269504088896341f;
  z = z < -125.5f ? -125.5f : z;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
  const float shifted = z + magic;
  const float f = (z - (shifted - magic)) * 0.693147180559945309f;
  float p = 1.98412698e-4f;
  p = p * f + 1.38888889e-3f;
  p = p * f + 8.33333333e-3f;
  p = p * f + 4.16666667e-2f;
  p = p * f + 1.66666667e-1f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  int32_t n, bits;
  __builtin_memcpy(&n, &shifted, 4);
  bits = (n + 127) << 23;  // magic's own bits leave at the top
  float two_to_n;
  __builtin_memcpy(&two_to_n, &bits, 4);
  return p * two_to_n;
}

// Normal distribution at h: its cumulative function, and exp(-h * h / 2), which is its density but for a factor.
struct Normal {
  float cdf, bell;
};

static inline Normal normal(float h) {
  const float a = h < 0.0f ? -h : h;
  const float bell = exp_minus(0.5f * h * h);
  // The tail beyond a is bell * t * q(t) with t = 1 / (1 + 0.35 a); q is a minimax fit of relative error 3.3e-8.
  const float t = 1.0f / (1.0f + 0.35f * a);
  float q = -0.02922184423f;
  q = q * t + 0.1443433517f;
  q = q * t + -0.256485861f;
  q = q * t + 0.16005808f;
  q = q * t + -0.02371815818f;
  q = q * t + 0.1057641502f;
  q = q * t + 0.1197688562f;
  q = q * t + 0.1398704758f;
  q = q * t + 0.1396209332f;
  const float tail = bell * t * q;
  return {h < 0.0f ? tail : 1.0f - tail, bell};
}

static inline float gelu(float h) { return h * normal(h).cdf; }

static inline float gelu_derivative(float h) {
  const Normal n = normal(h);
  return n.cdf + h * 0.398942280401432678f * n.bell;
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
