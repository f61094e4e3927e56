// Exact GELU and its derivative, in float.
#pragma once

namespace mimdet {

// 2 ** x, 0 where that is subnormal: one instruction. exp2f takes three more for the subnormal results.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// Phi(h), the cumulative function of the normal distribution, by the fit that kernels/triton_common.py explains.
__device__ __forceinline__ float normal_cdf(float h) {
  const float u = fabsf(h);
  float p = fmaf(u, -2.0721232e-11f, 1.50845303e-09f);
  p = fmaf(u, p, -4.73877719e-08f);
  p = fmaf(u, p, 8.39686436e-07f);
  p = fmaf(u, p, -9.16266254e-06f);
  p = fmaf(u, p, 6.19296188e-05f);
  p = fmaf(u, p, -0.000223863128f);
  p = fmaf(u, p, -0.000118027914f);
  p = fmaf(u, p, 0.00708670029f);
  p = fmaf(u, p, -0.0525301583f);
  p = fmaf(u, p, -0.459193707f);
  p = fmaf(u, p, -1.15110719f);
  p = fmaf(u, p, -0.99999994f);
  const float tail = fast_exp2(p);
  return h < 0.0f ? tail : 1.0f - tail;
}

__device__ __forceinline__ float gelu(float h) {
  return h * normal_cdf(h);
}

__device__ __forceinline__ float gelu_derivative(float h) {
  const float density = fast_exp2(fmaf(h * -0.72134752f, h, -1.3257481f));
  return fmaf(h, density, normal_cdf(h));
}

}  // namespace mimdet
