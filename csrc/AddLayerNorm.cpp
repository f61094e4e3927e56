// torch.ops.mimdet_cpu.add_layer_norm_*: torch's threads share the rows. Python has checked shapes and dtypes.
#include "AddLayerNorm.h"

#include "binding.h"

namespace mimdet {
namespace {

void* rows(const OptionalTensor& t) { return t ? mimdet::rows(*t) : nullptr; }
float* floats(const OptionalTensor& t) { return t ? mimdet::floats(*t) : nullptr; }

void fwd(const Tensor& residual, const OptionalTensor& x, const OptionalTensor& scale, const Tensor& weight,
         const Tensor& bias, double eps, const Tensor& residual_out, const Tensor& y, const Tensor& mean,
         const Tensor& rstd) {
  const int64_t count = residual.size(0) * residual.size(1), N = residual.size(1), C = residual.size(2);
  const auto kernel = MIMDET_PICK_ISA(add_layer_norm_fwd);
  const void* pr = mimdet::rows(residual);
  const void* px = rows(x);
  const float* ps = floats(scale);
  const float* pw = mimdet::floats(weight);
  const float* pbias = mimdet::floats(bias);
  void* pn = mimdet::rows(residual_out);
  void* py = mimdet::rows(y);
  float* pm = mimdet::floats(mean);
  float* pd = mimdet::floats(rstd);
  const bool bf16_r = is_bfloat16(residual), bf16_x = x && is_bfloat16(*x), bf16_y = is_bfloat16(y);
  torch::stable::parallel_for(0, count, kGrain / C + 1, [&](int64_t first, int64_t last) {
    kernel(pr, px, ps, pw, pbias, pn, py, pm, pd, first, last, N, C, static_cast<float>(eps), bf16_r, bf16_x,
           bf16_y);
  });
}

void bwd(const OptionalTensor& dresidual_out, const Tensor& dy, const Tensor& residual_out, const Tensor& mean,
         const Tensor& rstd, const OptionalTensor& scale, const Tensor& weight, int64_t step, const Tensor& dresidual,
         const OptionalTensor& dx, const Tensor& partials) {
  const int64_t count = residual_out.size(0) * residual_out.size(1), N = residual_out.size(1), C = residual_out.size(2);
  const auto kernel = MIMDET_PICK_ISA(add_layer_norm_bwd);
  const void* pg = rows(dresidual_out);
  const void* py = mimdet::rows(dy);
  const void* pr = mimdet::rows(residual_out);
  const float* pm = mimdet::floats(mean);
  const float* pd = mimdet::floats(rstd);
  const float* ps = floats(scale);
  const float* pw = mimdet::floats(weight);
  void* pdr = mimdet::rows(dresidual);
  void* pdx = rows(dx);
  const int64_t chunks = partials.size(1);
  float* pdb = mimdet::floats(partials);
  float* pdw = pdb + chunks * C;
  const bool bf16_r = is_bfloat16(residual_out), bf16_y = is_bfloat16(dy);
  const bool bf16_x = dx && is_bfloat16(*dx);
  torch::stable::parallel_for(0, chunks, kGrain / (step * C) + 1, [&](int64_t first, int64_t last) {
    kernel(pg, py, pr, pm, pd, ps, pw, pdr, pdx, pdw, pdb, first, last, step, count, N, C, bf16_r,
           bf16_x, bf16_y);
  });
}

}  // namespace
}  // namespace mimdet

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def(
      "add_layer_norm_fwd(Tensor residual, Tensor? x, Tensor? scale, Tensor weight, Tensor bias, float eps, "
      "Tensor(a!) residual_out, Tensor(b!) y, Tensor(c!) mean, Tensor(d!) rstd) -> ()");
  m.def(
      "add_layer_norm_bwd(Tensor? dresidual_out, Tensor dy, Tensor residual_out, Tensor mean, Tensor rstd, "
      "Tensor? scale, Tensor weight, int step, Tensor(a!) dresidual, Tensor(b!)? dx, Tensor(c!) partials) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&mimdet::fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&mimdet::bwd));
}
