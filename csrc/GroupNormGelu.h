// GroupNorm over whole samples and exact GELU: the CPU loops, for tasks that the binding spreads over threads.
//
// A sample is C channels of S positions, stored position-major (nhwc: [S][C]) or channel-major ([C][S]). Element types
// are float or bfloat16 (bf16 = true); weight, bias and all statistics are float.
#pragma once

#include <cstdint>

#include "isa.h"

// Mean, and sum of squared x - mean, of n numbers at x.
MIMDET_DECLARE_ISA(void gng_moments(const void* x, bool bf16, int64_t n, double* mean, double* m2))

// y = gelu((x - mean) * rstd * weight + bias) for nhwc rows [0, n) of C.
MIMDET_DECLARE_ISA(void gng_forward_nhwc(
    const void* x, void* y, bool bf16, int64_t n, int64_t C, float mean, float rstd, const float* weight,
    const float* bias))

// The same for the n positions of one channel.
MIMDET_DECLARE_ISA(void gng_forward_nchw(
    const void* x, void* y, bool bf16, int64_t n, float mean, float rstd, float weight, float bias))

// dz = dy * gelu'(z) into dx; adds sums of dz and of dz * x_hat over n nhwc rows to sums[0..C) and sums[C..2C).
MIMDET_DECLARE_ISA(void gng_backward_sums_nhwc(
    const void* dy, const void* x, void* dx, bool bf16, int64_t n, int64_t C, float mean, float rstd,
    const float* weight, const float* bias, float* sums))

// The same over n positions of one channel; adds to sums[0] and sums[1].
MIMDET_DECLARE_ISA(void gng_backward_sums_nchw(
    const void* dy, const void* x, void* dx, bool bf16, int64_t n, float mean, float rstd, float weight, float bias,
    double* sums))

// dx = rstd * (weight * dz - a - x_hat * k), where dx holds dz: reading it is cheaper than GELU's derivative.
MIMDET_DECLARE_ISA(void gng_backward_dx_nhwc(
    const void* x, void* dx, bool bf16, int64_t n, int64_t C, float mean, float rstd, const float* weight, float a,
    float k))

MIMDET_DECLARE_ISA(void gng_backward_dx_nchw(
    const void* x, void* dx, bool bf16, int64_t n, float mean, float rstd, float weight, float a, float k))
