// LayerNorm over the channels of each position and exact GELU: the CPU loops.
//
// A sample is C channels of S positions, stored position-major (nhwc: [S][C]) or channel-major ([C][S]). Element types
// are float or bfloat16 (bf16 = true); weight, bias and all statistics are float. Each function works on n consecutive
// positions of one sample; mean and rstd have one number for each.
#pragma once

#include <cstdint>

#include "isa.h"

namespace mimdet {
// Positions that channel-major code works on at a time; scratch of the backward: kPositions * C floats.
constexpr int64_t kPositions = 32;
}  // namespace mimdet

MIMDET_DECLARE_ISA(void lng_forward_nhwc(
    const void* x, void* y, bool bf16, int64_t n, int64_t C, const float* weight, const float* bias, float eps,
    float* mean, float* rstd))

MIMDET_DECLARE_ISA(void lng_forward_nchw(
    const void* x, void* y, bool bf16, int64_t n, int64_t C, int64_t S, const float* weight, const float* bias,
    float eps, float* mean, float* rstd))

// Writes dx; adds the n positions' gradients of the bias to sums[0..C) and of the weight to sums[C..2C).
MIMDET_DECLARE_ISA(void lng_backward_nhwc(
    const void* dy, const void* x, void* dx, bool bf16, int64_t n, int64_t C, const float* weight, const float* bias,
    const float* mean, const float* rstd, float* scratch, float* sums))

MIMDET_DECLARE_ISA(void lng_backward_nchw(
    const void* dy, const void* x, void* dx, bool bf16, int64_t n, int64_t C, int64_t S, const float* weight,
    const float* bias, const float* mean, const float* rstd, float* scratch, float* sums))
