// Exact GELU and its derivative.
#pragma once

namespace mimdet {

__device__ __forceinline__ float normal_cdf(float h) { return 0.5f * (1.0f + erff(h * 0.707106781186547524f)); }
__device__ __forceinline__ float gelu(float h) { return h * normal_cdf(h); }
__device__ __forceinline__ float gelu_derivative(float h) {
  return normal_cdf(h) + h * 0.398942280401432678f * expf(-0.5f * h * h);
}

}  // namespace mimdet
