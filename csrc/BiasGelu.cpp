// torch.ops.mimdet_cpu.bias_gelu_*: shared out among torch's threads. Shapes and dtypes are checked in Python.
#include "BiasGelu.h"

#include "binding.h"

namespace mimdet {
namespace {

void fwd(const Tensor& x, const Tensor& bias, const Tensor& y) {
  const int64_t C = x.size(1);
  const auto kernel = MIMDET_PICK_ISA(bias_gelu_fwd);
  const void* px = rows(x);
  const float* pb = floats(bias);
  void* py = rows(y);
  const bool bf16_x = is_bfloat16(x);
  torch::stable::parallel_for(0, x.size(0), kGrain / C + 1, [&](int64_t first, int64_t last) {
    kernel(px, pb, py, first, last, C, bf16_x);
  });
}

void bwd(const Tensor& grad_y, const Tensor& x, const Tensor& bias, const Tensor& grad_x, const Tensor& partial,
         int64_t step) {
  const int64_t count = x.size(0), C = x.size(1);
  const auto kernel = MIMDET_PICK_ISA(bias_gelu_bwd);
  const void* pg = rows(grad_y);
  const void* px = rows(x);
  const float* pb = floats(bias);
  void* pgx = rows(grad_x);
  float* pp = floats(partial);
  const bool bf16_x = is_bfloat16(x);
  torch::stable::parallel_for(0, partial.size(0), kGrain / (step * C) + 1, [&](int64_t first, int64_t last) {
    kernel(pg, px, pb, pgx, pp, first, last, step, count, C, bf16_x);
  });
}

}  // namespace
}  // namespace mimdet

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def("bias_gelu_fwd(Tensor x, Tensor bias, Tensor(a!) y) -> ()");
  m.def(
      "bias_gelu_bwd(Tensor grad_y, Tensor x, Tensor bias, Tensor(a!) grad_x, Tensor(b!) partial, int step) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&mimdet::fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&mimdet::bwd));
}
