// torch.ops.mimdet_cpu.bias_gelu_*: torch's threads share the rows. Python has checked shapes and dtypes.
#include "BiasGelu.h"

#include "binding.h"

namespace mimdet {
namespace {

void fwd(const Tensor& x, const Tensor& bias, const Tensor& y) {
  const int64_t C = bias.size(0);
  const auto kernel = MIMDET_PICK_ISA(bias_gelu_fwd);
  const void* px = rows(x);
  const float* pb = floats(bias);
  void* py = rows(y);
  const bool bf16_x = is_bfloat16(x);
  torch::stable::parallel_for(0, x.numel() / C, kGrain / C + 1, [&](int64_t first, int64_t last) {
    kernel(px, pb, py, first, last, C, bf16_x);
  });
}

void bwd(const Tensor& dy, const Tensor& x, const Tensor& bias, int64_t step, const Tensor& dx,
         const Tensor& db_partial) {
  const int64_t C = bias.size(0), count = x.numel() / C;
  const auto kernel = MIMDET_PICK_ISA(bias_gelu_bwd);
  const void* pdy = rows(dy);
  const void* px = rows(x);
  const float* pb = floats(bias);
  void* pdx = rows(dx);
  float* pdb = floats(db_partial);
  const bool bf16_x = is_bfloat16(x);
  torch::stable::parallel_for(0, db_partial.size(0), kGrain / (step * C) + 1, [&](int64_t first, int64_t last) {
    kernel(pdy, px, pb, pdx, pdb, first, last, step, count, C, bf16_x);
  });
}

}  // namespace
}  // namespace mimdet

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def("bias_gelu_fwd(Tensor x, Tensor bias, Tensor(a!) y) -> ()");
  m.def("bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias, int step, Tensor(a!) dx, Tensor(b!) db_partial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&mimdet::fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&mimdet::bwd));
}
