// torch.ops.mimdet_cpu.group_norm_gelu_*: torch's threads share tasks of a fixed size, and partial results are added in
// the order of the tasks, so the numbers do not depend on the number of threads.
#include "GroupNormGelu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "image_area.h"

namespace mimdet {
namespace {

const char* at(const void* p, int64_t elements, bool bf16) {
  return static_cast<const char*>(p) + elements * (bf16 ? 2 : 4);
}
char* at(void* p, int64_t elements, bool bf16) { return static_cast<char*>(p) + elements * (bf16 ? 2 : 4); }

// Tasks of B samples: rows of width elements, length rows a task. For channel-major samples a row is a channel.
struct Tasks {
  bool nhwc;
  int64_t B, C, S, rows, width, length, per_sample;
  Areas areas;

  Tasks(const Tensor& x, const OptionalTensor& sizes, bool nhwc)
      : nhwc(nhwc),
        B(x.size(0)),
        C(x.size(1)),
        S(x.size(2) * x.size(3)),
        rows(nhwc ? S : C),
        width(nhwc ? C : S),
        length(std::max<int64_t>(1, kGrain / width)),
        per_sample((rows + length - 1) / length),
        areas(x, sizes) {}

  int64_t count() const { return B * per_sample; }
  double elements(int64_t sample) const { return static_cast<double>(C) * areas.positions(sample); }

  // Calls f(task, sample) for every task, on all threads.
  template <class F>
  void each(F f) const {
    torch::stable::parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i, i / per_sample);
    });
  }

  // Calls f(start, n, channel, is_valid) for the runs of a task: n positions whose elements begin at start, of all
  // channels (nhwc) or of one. Without sizes, a task is one run, or one per channel.
  template <class F>
  void each_run(int64_t task, F f) const {
    const int64_t sample = task / per_sample, first = task % per_sample * length, N = C * S;
    const int64_t last = std::min(first + length, rows);
    if (nhwc) {
      areas.each_run(sample, first, last - first, [&](int64_t position, int64_t n, bool is_valid) {
        f(sample * N + position * C, n, int64_t(0), is_valid);
      });
      return;
    }
    for (int64_t c = first; c < last; ++c) {
      areas.each_run(sample, 0, S, [&](int64_t position, int64_t n, bool is_valid) {
        f(sample * N + c * S + position, n, c, is_valid);
      });
    }
  }

  // Writes zeros over a run.
  void clear(void* p, bool bf16, int64_t start, int64_t n) const {
    std::memset(at(p, start, bf16), 0, n * (nhwc ? C : 1) * (bf16 ? 2 : 4));
  }
};

// Count, mean and sum of squared x_centered.
struct Moments {
  double count = 0.0, mean = 0.0, m2 = 0.0;

  // Chan, Golub, LeVeque 1979: those of parts -> those of the whole.
  void add(const Moments& part) {
    if (part.count == 0.0) return;
    const double both = count + part.count, delta = part.mean - mean;
    mean += delta * part.count / both;
    m2 += part.m2 + delta * delta * count * part.count / both;
    count = both;
  }
};

void group_norm_gelu(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& sizes, double eps, bool nhwc,
    const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  const bool bf16 = is_bfloat16(x);
  const Tasks tasks(x, sizes, nhwc);
  const void* xs = rows(x);
  void* ys = rows(y);
  const float *w = floats(weight), *b = floats(bias);
  float *means = floats(mean), *rstds = floats(rstd);

  const auto moments = MIMDET_PICK_ISA(gng_moments);
  std::vector<Moments> partial(tasks.count());
  tasks.each([&](int64_t task, int64_t) {
    tasks.each_run(task, [&](int64_t start, int64_t n, int64_t, bool is_valid) {
      if (!is_valid) return;
      const int64_t elements = n * (nhwc ? tasks.C : 1);
      Moments part{static_cast<double>(elements)};
      moments(at(xs, start, bf16), bf16, elements, &part.mean, &part.m2);
      partial[task].add(part);
    });
  });
  for (int64_t sample = 0; sample < tasks.B; ++sample) {
    Moments all;
    for (int64_t i = 0; i < tasks.per_sample; ++i) all.add(partial[sample * tasks.per_sample + i]);
    means[sample] = static_cast<float>(all.mean);
    rstds[sample] = static_cast<float>(1.0 / std::sqrt(all.m2 / all.count + eps));
  }

  const auto by_position = MIMDET_PICK_ISA(gng_forward_nhwc);
  const auto by_channel = MIMDET_PICK_ISA(gng_forward_nchw);
  tasks.each([&](int64_t task, int64_t s) {
    tasks.each_run(task, [&](int64_t start, int64_t n, int64_t c, bool is_valid) {
      const char* from = at(xs, start, bf16);
      char* to = at(ys, start, bf16);
      if (!is_valid) {
        tasks.clear(ys, bf16, start, n);
      } else if (nhwc) {
        by_position(from, to, bf16, n, tasks.C, means[s], rstds[s], w, b);
      } else {
        by_channel(from, to, bf16, n, means[s], rstds[s], w[c], b[c]);
      }
    });
  });
}

void group_norm_gelu_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& sizes,
    const Tensor& mean, const Tensor& rstd, bool nhwc, const Tensor& dx, const Tensor& dparameters) {
  const bool bf16 = is_bfloat16(x);
  const Tasks tasks(x, sizes, nhwc);
  const int64_t B = tasks.B, C = tasks.C;
  const void *xs = rows(x), *dys = rows(dy);
  void* dxs = rows(dx);
  const float *w = floats(weight), *b = floats(bias), *means = floats(mean), *rstds = floats(rstd);

  // channel_sums[sample][0][c] = sum of dz, [1][c] = sum of dz * x_hat.
  std::vector<double> channel_sums(B * 2 * C, 0.0);
  if (nhwc) {
    const auto sums = MIMDET_PICK_ISA(gng_backward_sums_nhwc);
    std::vector<float> partial(tasks.count() * 2 * C, 0.0f);
    tasks.each([&](int64_t task, int64_t s) {
      tasks.each_run(task, [&](int64_t start, int64_t n, int64_t, bool is_valid) {
        if (!is_valid) return;
        sums(
            at(dys, start, bf16), at(xs, start, bf16), at(dxs, start, bf16), bf16, n, C, means[s], rstds[s], w, b,
            &partial[task * 2 * C]);
      });
    });
    for (int64_t task = 0; task < tasks.count(); ++task) {
      double* total = &channel_sums[task / tasks.per_sample * 2 * C];
      for (int64_t c = 0; c < 2 * C; ++c) total[c] += partial[task * 2 * C + c];
    }
  } else {
    const auto sums = MIMDET_PICK_ISA(gng_backward_sums_nchw);
    tasks.each([&](int64_t task, int64_t s) {
      double pair[2] = {};
      int64_t channel = -1;
      tasks.each_run(task, [&](int64_t start, int64_t n, int64_t c, bool is_valid) {
        if (c != channel) pair[0] = pair[1] = 0.0;
        channel = c;
        if (is_valid) {
          sums(
              at(dys, start, bf16), at(xs, start, bf16), at(dxs, start, bf16), bf16, n, means[s], rstds[s], w[c], b[c],
              pair);
        }
        channel_sums[s * 2 * C + c] = pair[0];
        channel_sums[s * 2 * C + C + c] = pair[1];
      });
    });
  }

  std::vector<float> a(B), k(B);
  std::vector<double> total(2 * C, 0.0);
  for (int64_t sample = 0; sample < B; ++sample) {
    const double *dz = &channel_sums[sample * 2 * C], *dz_x_hat = dz + C;
    double a_sum = 0.0, k_sum = 0.0;
    for (int64_t c = 0; c < C; ++c) {
      a_sum += w[c] * dz[c];
      k_sum += w[c] * dz_x_hat[c];
      total[c] += dz[c];
      total[C + c] += dz_x_hat[c];
    }
    a[sample] = static_cast<float>(a_sum / tasks.elements(sample));
    k[sample] = static_cast<float>(k_sum / tasks.elements(sample));
  }
  std::copy(total.begin(), total.end(), floats(dparameters));

  const auto by_position = MIMDET_PICK_ISA(gng_backward_dx_nhwc);
  const auto by_channel = MIMDET_PICK_ISA(gng_backward_dx_nchw);
  tasks.each([&](int64_t task, int64_t s) {
    tasks.each_run(task, [&](int64_t start, int64_t n, int64_t c, bool is_valid) {
      const char* from = at(xs, start, bf16);
      char* to = at(dxs, start, bf16);
      if (!is_valid) {
        tasks.clear(dxs, bf16, start, n);
      } else if (nhwc) {
        by_position(from, to, bf16, n, C, means[s], rstds[s], w, a[s], k[s]);
      } else {
        by_channel(from, to, bf16, n, means[s], rstds[s], w[c], a[s], k[s]);
      }
    });
  });
}

}  // namespace
}  // namespace mimdet

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def(
      "group_norm_gelu_fwd(Tensor x, Tensor weight, Tensor bias, Tensor? sizes, float eps, bool nhwc, "
      "Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def(
      "group_norm_gelu_bwd(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor? sizes, Tensor mean, Tensor rstd, "
      "bool nhwc, Tensor(a!) dx, Tensor(b!) dparameters) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) {
  m.impl("group_norm_gelu_fwd", TORCH_BOX(&mimdet::group_norm_gelu));
  m.impl("group_norm_gelu_bwd", TORCH_BOX(&mimdet::group_norm_gelu_backward));
}
