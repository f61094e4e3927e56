// Loads and stores shared by the CPU kernels, bfloat16 <-> float32, written for auto-vectorization.
#pragma once

#include <cstdint>

#ifndef MIMDET_ISA
#error "vec.h belongs in files that are compiled for each instruction set (*CPU.cpp)"
#endif

namespace mimdet {
namespace MIMDET_ISA {

struct bf16 {
  uint16_t bits;
};

using bf16_type = bf16;  // bf16 is also the name of flags

// Runs call with T = float or bf16.
#define MIMDET_BY_TYPE(is_bf16, ...) \
  if (is_bf16) {                     \
    using T = bf16_type;             \
    __VA_ARGS__;                     \
  } else {                           \
    using T = float;                 \
    __VA_ARGS__;                     \
  }

static inline float load(const float* p) { return *p; }
static inline float load(const bf16* p) {
  const uint32_t u = static_cast<uint32_t>(p->bits) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
static inline void store(float* p, float f) { *p = f; }
static inline void store(bf16* p, float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  // Round to nearest, ties to even; NaN stays NaN.
  u = f != f ? 0x7fc00000u : u + 0x7fffu + ((u >> 16) & 1u);
  p->bits = static_cast<uint16_t>(u >> 16);
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
