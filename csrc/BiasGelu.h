// Bias and exact GELU on a CPU, one declaration for each instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

// x, y (rows, C) float32 or bfloat16; bias (C,) float32.
MIMDET_DECLARE_ISA(void bias_gelu_fwd(const void* x, const float* bias, void* y, int64_t first, int64_t last, int64_t C,
                                      bool bf16_x))

// Each chunk of `step` rows sums its gradients of the bias into its own row of db_partial (chunks, C).
MIMDET_DECLARE_ISA(void bias_gelu_bwd(const void* dy, const void* x, const float* bias, void* dx,
                                      float* db_partial, int64_t first, int64_t last, int64_t step, int64_t rows,
                                      int64_t C, bool bf16_x))
