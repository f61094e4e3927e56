// torch.ops.mimdet_cpu.add_layer_norm_*: shared out among torch's threads. Shapes and dtypes are checked in Python.
#include "AddLayerNorm.h"

#include <optional>

#include "binding.h"

namespace mimdet {
namespace {

using Maybe = std::optional<Tensor>;

void* rows(const Maybe& t) { return t ? mimdet::rows(*t) : nullptr; }
float* floats(const Maybe& t) { return t ? mimdet::floats(*t) : nullptr; }

void fwd(const Tensor& r, const Maybe& branch, const Maybe& scale, const Tensor& weight, const Tensor& bias,
         const Tensor& r_new, const Tensor& y, const Tensor& mean, const Tensor& rstd, double eps) {
  const int64_t count = r.size(0) * r.size(1), N = r.size(1), C = r.size(2);
  const auto kernel = MIMDET_PICK_ISA(add_layer_norm_fwd);
  const void* pr = mimdet::rows(r);
  const void* pb = rows(branch);
  const float* ps = floats(scale);
  const float* pw = mimdet::floats(weight);
  const float* pbias = mimdet::floats(bias);
  void* pn = mimdet::rows(r_new);
  void* py = mimdet::rows(y);
  float* pm = mimdet::floats(mean);
  float* pd = mimdet::floats(rstd);
  const bool bf16_r = is_bfloat16(r), bf16_branch = branch && is_bfloat16(*branch), bf16_y = is_bfloat16(y);
  torch::stable::parallel_for(0, count, kGrain / C + 1, [&](int64_t first, int64_t last) {
    kernel(pr, pb, ps, pw, pbias, pn, py, pm, pd, first, last, N, C, static_cast<float>(eps), bf16_r, bf16_branch,
           bf16_y);
  });
}

void bwd(const Maybe& grad_r_new, const Tensor& grad_y, const Tensor& r_new, const Tensor& mean, const Tensor& rstd,
         const Maybe& scale, const Tensor& weight, const Tensor& grad_r, const Maybe& grad_branch,
         const Tensor& partial_w, const Tensor& partial_b, int64_t step) {
  const int64_t count = r_new.size(0) * r_new.size(1), N = r_new.size(1), C = r_new.size(2);
  const auto kernel = MIMDET_PICK_ISA(add_layer_norm_bwd);
  const void* pg = rows(grad_r_new);
  const void* py = mimdet::rows(grad_y);
  const void* pr = mimdet::rows(r_new);
  const float* pm = mimdet::floats(mean);
  const float* pd = mimdet::floats(rstd);
  const float* ps = floats(scale);
  const float* pw = mimdet::floats(weight);
  void* to_r = mimdet::rows(grad_r);
  void* to_branch = rows(grad_branch);
  float* to_w = mimdet::floats(partial_w);
  float* to_b = mimdet::floats(partial_b);
  const bool bf16_r = is_bfloat16(r_new), bf16_y = is_bfloat16(grad_y);
  const bool bf16_branch = grad_branch && is_bfloat16(*grad_branch);
  torch::stable::parallel_for(0, partial_w.size(0), kGrain / (step * C) + 1, [&](int64_t first, int64_t last) {
    kernel(pg, py, pr, pm, pd, ps, pw, to_r, to_branch, to_w, to_b, first, last, step, count, N, C, bf16_r,
           bf16_branch, bf16_y);
  });
}

}  // namespace
}  // namespace mimdet

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def(
      "add_layer_norm_fwd(Tensor r, Tensor? branch, Tensor? scale, Tensor weight, Tensor bias, Tensor(a!) r_new, "
      "Tensor(b!) y, Tensor(c!) mean, Tensor(d!) rstd, float eps) -> ()");
  m.def(
      "add_layer_norm_bwd(Tensor? grad_r_new, Tensor grad_y, Tensor r_new, Tensor mean, Tensor rstd, Tensor? scale, "
      "Tensor weight, Tensor(a!) grad_r, Tensor(b!)? grad_branch, Tensor(c!) partial_w, Tensor(d!) partial_b, "
      "int step) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&mimdet::fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&mimdet::bwd));
}
