// Residual addition and LayerNorm on a CPU, one declaration for each instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

// r, branch, r_new, y (rows, C); scale (rows / N,); weight, bias (C,) float32; mean, rstd (rows,) float32.
// branch and scale may be null; r_new is written only if there is a branch. r_new is of r's dtype.
MIMDET_DECLARE_ISA(void add_layer_norm_fwd(const void* r, const void* branch, const float* scale, const float* weight,
                                           const float* bias, void* r_new, void* y, float* mean, float* rstd,
                                           int64_t first, int64_t last, int64_t N, int64_t C, float eps, bool bf16_r,
                                           bool bf16_branch, bool bf16_y))

// Chunks of `step` rows; each sums its rows' gradients of the parameters into its own rows of partial_* (chunks, C).
// grad_r_new, scale and grad_branch may be null. grad_r_new, r_new and grad_r are of one dtype.
MIMDET_DECLARE_ISA(void add_layer_norm_bwd(const void* grad_r_new, const void* grad_y, const void* r_new,
                                           const float* mean, const float* rstd, const float* scale,
                                           const float* weight, void* grad_r, void* grad_branch, float* partial_w,
                                           float* partial_b, int64_t first, int64_t last, int64_t step, int64_t rows,
                                           int64_t N, int64_t C, bool bf16_r, bool bf16_branch, bool bf16_y))
