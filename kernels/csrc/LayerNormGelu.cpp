// Registration of channel-wise LayerNorm + GELU for the CPU, and how its work is spread over threads: in tasks of a
// fixed size whose partial sums are added in order, so that the numbers do not depend on the number of threads.
#include "LayerNormGelu.h"

#include <algorithm>
#include <vector>

#include "binding.h"

namespace mimdet {
namespace {

// Tasks of consecutive positions, none of which spans two samples.
struct Positions {
  int64_t C, S, length, per_sample, count;

  Positions(int64_t B, int64_t C, int64_t S)
      : C(C),
        S(S),
        length(std::max<int64_t>(1, kGrain / C / kPositions) * kPositions),
        per_sample((S + length - 1) / length),
        count(B * per_sample) {}

  int64_t sample(int64_t task) const { return task / per_sample; }
  int64_t first(int64_t task) const { return task % per_sample * length; }
  int64_t size(int64_t task) const { return std::min(length, S - first(task)); }
  // Where the task's first position lies among all elements, and among all positions.
  int64_t element(int64_t task, bool nhwc) const { return sample(task) * C * S + first(task) * (nhwc ? C : 1); }
  int64_t position(int64_t task) const { return sample(task) * S + first(task); }
};

void layer_norm_gelu(
    const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool nhwc, const Tensor& y,
    const Tensor& mean, const Tensor& rstd) {
  if (x.numel() == 0) return;
  const bool bf16 = is_bfloat16(x);
  const int64_t C = weight.numel(), bytes = bf16 ? 2 : 4;
  const Positions tasks(x.size(0), C, x.numel() / x.size(0) / C);
  const char* xs = static_cast<const char*>(rows(x));
  char* ys = static_cast<char*>(rows(y));
  const float *w = floats(weight), *b = floats(bias), e = static_cast<float>(eps);
  float *means = floats(mean), *rstds = floats(rstd);
  const auto by_position = MIMDET_PICK_ISA(lng_forward_nhwc);
  const auto by_channel = MIMDET_PICK_ISA(lng_forward_nchw);
  torch::stable::parallel_for(0, tasks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = tasks.element(i, nhwc) * bytes, p = tasks.position(i), n = tasks.size(i);
      if (nhwc) {
        by_position(xs + start, ys + start, bf16, n, C, w, b, e, means + p, rstds + p);
      } else {
        by_channel(xs + start, ys + start, bf16, n, C, tasks.S, w, b, e, means + p, rstds + p);
      }
    }
  });
}

void layer_norm_gelu_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
    const Tensor& rstd, bool nhwc, const Tensor& dx, const Tensor& dweight, const Tensor& dbias) {
  const int64_t C = weight.numel();
  float *dw = floats(dweight), *db = floats(dbias);
  std::fill(dw, dw + C, 0.0f);
  std::fill(db, db + C, 0.0f);
  if (x.numel() == 0) return;
  const bool bf16 = is_bfloat16(x);
  const int64_t bytes = bf16 ? 2 : 4;
  const Positions tasks(x.size(0), C, x.numel() / x.size(0) / C);
  const char *xs = static_cast<const char*>(rows(x)), *dys = static_cast<const char*>(rows(dy));
  char* dxs = static_cast<char*>(rows(dx));
  const float *w = floats(weight), *b = floats(bias), *means = floats(mean), *rstds = floats(rstd);
  const auto by_position = MIMDET_PICK_ISA(lng_backward_nhwc);
  const auto by_channel = MIMDET_PICK_ISA(lng_backward_nchw);
  std::vector<float> sums(tasks.count * 2 * C);
  torch::stable::parallel_for(0, tasks.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(C * (nhwc ? 1 : kPositions));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = tasks.element(i, nhwc) * bytes, p = tasks.position(i), n = tasks.size(i);
      float* sum = &sums[i * 2 * C];
      if (nhwc) {
        by_position(
            dys + start, xs + start, dxs + start, bf16, n, C, w, b, means + p, rstds + p, scratch.data(), sum);
      } else {
        by_channel(
            dys + start, xs + start, dxs + start, bf16, n, C, tasks.S, w, b, means + p, rstds + p, scratch.data(),
            sum);
      }
    }
  });
  std::vector<double> total(2 * C, 0.0);
  for (int64_t i = 0; i < tasks.count; ++i) {
    for (int64_t c = 0; c < 2 * C; ++c) total[c] += sums[i * 2 * C + c];
  }
  for (int64_t c = 0; c < C; ++c) {
    db[c] = static_cast<float>(total[c]);
    dw[c] = static_cast<float>(total[C + c]);
  }
}

}  // namespace
}  // namespace mimdet

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def(
      "layer_norm_gelu_fwd(Tensor x, Tensor weight, Tensor bias, float eps, bool nhwc, Tensor(a!) y, Tensor(b!) mean, "
      "Tensor(c!) rstd) -> ()");
  m.def(
      "layer_norm_gelu_bwd(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, bool nhwc, "
      "Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) {
  m.impl("layer_norm_gelu_fwd", TORCH_BOX(&mimdet::layer_norm_gelu));
  m.impl("layer_norm_gelu_bwd", TORCH_BOX(&mimdet::layer_norm_gelu_backward));
}
