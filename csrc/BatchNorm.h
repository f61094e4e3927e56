// Batch norm and ReLU: the CPU loops, for tasks that the binding spreads over threads.
//
// Element types are float or bfloat16 (bf16 = true); all parameters and statistics are float. Functions ending in nhwc
// take n rows of C channels, those ending in nchw n positions of one channel.
#pragma once

#include <cstdint>

#include "isa.h"

// The mean of each channel as float arithmetic has it, and sums of x_centered and of its squares.
MIMDET_DECLARE_ISA(void bn_moments_nhwc(
    const void* x, bool bf16, int64_t n, int64_t C, float* center, float* sum, float* square))

// The same of one channel.
MIMDET_DECLARE_ISA(void bn_moments_nchw(const void* x, bool bf16, int64_t n, double* mean, double* m2))

// y = (x - mean) * gain + bias, behind a ReLU if asked.
MIMDET_DECLARE_ISA(void bn_forward_nhwc(
    const void* x, void* y, bool bf16, int64_t n, int64_t C, const float* mean, const float* gain, const float* bias,
    bool relu))

MIMDET_DECLARE_ISA(void bn_forward_nchw(
    const void* x, void* y, bool bf16, int64_t n, float mean, float gain, float bias, bool relu))

// Adds sums of dz and of dz * (x - mean) to sums[0..C) and sums[C..2C); dz is dy where the ReLU let x pass, else 0.
MIMDET_DECLARE_ISA(void bn_sums_nhwc(
    const void* dy, const void* x, bool bf16, int64_t n, int64_t C, const float* mean, const float* gain,
    const float* bias, bool relu, float* sums))

// The same, added to sums[0] and sums[1].
MIMDET_DECLARE_ISA(void bn_sums_nchw(
    const void* dy, const void* x, bool bf16, int64_t n, float mean, float gain, float bias, bool relu, double* sums))

// dx = gain * dz - a - (x - mean) * k.
MIMDET_DECLARE_ISA(void bn_backward_nhwc(
    const void* dy, const void* x, void* dx, bool bf16, int64_t n, int64_t C, const float* mean, const float* gain,
    const float* bias, bool relu, const float* a, const float* k))

MIMDET_DECLARE_ISA(void bn_backward_nchw(
    const void* dy, const void* x, void* dx, bool bf16, int64_t n, float mean, float gain, float bias, bool relu,
    float a, float k))
