// torch.ops.mimdet_cpu.layer_norm_gelu_*: torch's threads share tasks of a fixed size, and partial sums are added in
// their order, so the numbers do not depend on the number of threads.
#include "LayerNormGelu.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "image_area.h"

namespace mimdet {
namespace {

// Tasks of consecutive positions, none of which spans two samples.
struct Tasks {
  bool nhwc;
  int64_t bytes, B, C, S, length, per_sample;
  Areas areas;

  Tasks(const Tensor& x, const OptionalTensor& sizes, bool nhwc)
      : nhwc(nhwc),
        bytes(is_bfloat16(x) ? 2 : 4),
        B(x.size(0)),
        C(x.size(1)),
        S(x.size(2) * x.size(3)),
        length(std::max<int64_t>(1, kGrain / C / kPositions) * kPositions),
        per_sample((S + length - 1) / length),
        areas(x, sizes) {}

  int64_t count() const { return B * per_sample; }

  // Calls f(start, position, n, is_valid) for the runs of a task: n positions, the first at byte start and with this
  // number among the positions of all samples. Without sizes, a task is one run.
  template <class F>
  void each_run(int64_t task, F f) const {
    const int64_t sample = task / per_sample, first = task % per_sample * length;
    areas.each_run(sample, first, std::min(length, S - first), [&](int64_t position, int64_t n, bool is_valid) {
      f((sample * C * S + position * (nhwc ? C : 1)) * bytes, sample * S + position, n, is_valid);
    });
  }

  // Writes zeros over n positions.
  void clear(char* p, int64_t n) const {
    if (nhwc) {
      std::memset(p, 0, n * C * bytes);
    } else {
      for (int64_t c = 0; c < C; ++c) std::memset(p + c * S * bytes, 0, n * bytes);
    }
  }
};

void layer_norm_gelu(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& sizes, double eps, bool nhwc,
    const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  const bool bf16 = is_bfloat16(x);
  const Tasks tasks(x, sizes, nhwc);
  const int64_t C = tasks.C;
  const char* xs = static_cast<const char*>(rows(x));
  char* ys = static_cast<char*>(rows(y));
  const float *w = floats(weight), *b = floats(bias), e = static_cast<float>(eps);
  float *means = floats(mean), *rstds = floats(rstd);
  const auto by_position = MIMDET_PICK_ISA(lng_forward_nhwc);
  const auto by_channel = MIMDET_PICK_ISA(lng_forward_nchw);
  torch::stable::parallel_for(0, tasks.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      tasks.each_run(i, [&](int64_t start, int64_t p, int64_t n, bool is_valid) {
        if (!is_valid) {
          tasks.clear(ys + start, n);
          std::fill_n(means + p, n, 0.0f);
          std::fill_n(rstds + p, n, 0.0f);
        } else if (nhwc) {
          by_position(xs + start, ys + start, bf16, n, C, w, b, e, means + p, rstds + p);
        } else {
          by_channel(xs + start, ys + start, bf16, n, C, tasks.S, w, b, e, means + p, rstds + p);
        }
      });
    }
  });
}

void layer_norm_gelu_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& sizes,
    const Tensor& mean, const Tensor& rstd, bool nhwc, const Tensor& dx, const Tensor& dparameters) {
  const bool bf16 = is_bfloat16(x);
  const Tasks tasks(x, sizes, nhwc);
  const int64_t C = tasks.C;
  const char *xs = static_cast<const char*>(rows(x)), *dys = static_cast<const char*>(rows(dy));
  char* dxs = static_cast<char*>(rows(dx));
  const float *w = floats(weight), *b = floats(bias), *means = floats(mean), *rstds = floats(rstd);
  const auto by_position = MIMDET_PICK_ISA(lng_backward_nhwc);
  const auto by_channel = MIMDET_PICK_ISA(lng_backward_nchw);
  std::vector<float> sums(tasks.count() * 2 * C, 0.0f);
  torch::stable::parallel_for(0, tasks.count(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(C * (nhwc ? 1 : kPositions));
    for (int64_t i = begin; i < end; ++i) {
      float* sum = &sums[i * 2 * C];
      tasks.each_run(i, [&](int64_t start, int64_t p, int64_t n, bool is_valid) {
        const char *grad = dys + start, *from = xs + start;
        char* to = dxs + start;
        if (!is_valid) {
          tasks.clear(to, n);
        } else if (nhwc) {
          by_position(grad, from, to, bf16, n, C, w, b, means + p, rstds + p, scratch.data(), sum);
        } else {
          by_channel(grad, from, to, bf16, n, C, tasks.S, w, b, means + p, rstds + p, scratch.data(), sum);
        }
      });
    }
  });
  std::vector<double> total(2 * C, 0.0);
  for (int64_t i = 0; i < tasks.count(); ++i) {
    for (int64_t c = 0; c < 2 * C; ++c) total[c] += sums[i * 2 * C + c];
  }
  std::copy(total.begin(), total.end(), floats(dparameters));
}

}  // namespace
}  // namespace mimdet

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def(
      "layer_norm_gelu_fwd(Tensor x, Tensor weight, Tensor bias, Tensor? sizes, float eps, bool nhwc, "
      "Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def(
      "layer_norm_gelu_bwd(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor? sizes, Tensor mean, Tensor rstd, "
      "bool nhwc, Tensor(a!) dx, Tensor(b!) dparameters) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) {
  m.impl("layer_norm_gelu_fwd", TORCH_BOX(&mimdet::layer_norm_gelu));
  m.impl("layer_norm_gelu_bwd", TORCH_BOX(&mimdet::layer_norm_gelu_backward));
}
