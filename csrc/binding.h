// Includes and helpers of every CPU binding through torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

namespace mimdet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline bool is_bfloat16(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }

// Float pointer of a contiguous float32 tensor.
inline float* floats(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "mimdet: expected a float32 tensor");
  return static_cast<float*>(t.data_ptr());
}

// Pointer of a float32 or bfloat16 tensor; kernels read the second as 16-bit integers.
inline void* rows(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || is_bfloat16(t), "mimdet: expected float32 or bfloat16");
  return t.data_ptr();
}

// Elements of one task: fewer are not worth a thread.
constexpr int64_t kGrain = 32768;

}  // namespace mimdet
