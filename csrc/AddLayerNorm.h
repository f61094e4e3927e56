// Residual addition and LayerNorm on a CPU, one declaration for each instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

// residual, x, residual_out, y (rows, C); scale (rows / N,); weight, bias (C,), mean, rstd (rows,) float32.
// x and scale may be null; residual_out, in residual's dtype, is written only with x.
MIMDET_DECLARE_ISA(void add_layer_norm_fwd(const void* residual, const void* x, const float* scale, const float* weight,
                                           const float* bias, void* residual_out, void* y, float* mean, float* rstd,
                                           int64_t first, int64_t last, int64_t N, int64_t C, float eps, bool bf16_r,
                                           bool bf16_x, bool bf16_y))

// Each chunk of `step` rows sums its gradients of the parameters into its own rows of d*_partial (chunks, C).
// dresidual_out, scale and dx may be null; dresidual_out, residual_out and dresidual have one dtype.
MIMDET_DECLARE_ISA(void add_layer_norm_bwd(const void* dresidual_out, const void* dy, const void* residual_out,
                                           const float* mean, const float* rstd, const float* scale,
                                           const float* weight, void* dresidual, void* dx, float* dw_partial,
                                           float* db_partial, int64_t first, int64_t last, int64_t step, int64_t rows,
                                           int64_t N, int64_t C, bool bf16_r, bool bf16_x, bool bf16_y))
