// Registration of batch norm and ReLU for the CPU, and how its work is spread over threads: in tasks of a fixed size
// whose partial results are combined in order, so that the numbers do not depend on the number of threads.
#include "BatchNorm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "image_area.h"

namespace mimdet {
namespace {


// Rows whose float sums stay exact enough to be added up in double.
constexpr int64_t kMostRows = 128;

// Cells of N maps of S positions: rows of C channels (nhwc), or N planes of each of C channels.
struct Tasks {
  bool nhwc;
  int64_t bytes, N, C, S;
  Areas areas;

  Tasks(const Tensor& x, const OptionalTensor& sizes, bool nhwc)
      : nhwc(nhwc),
        bytes(is_bfloat16(x) ? 2 : 4),
        N(x.size(0)),
        C(x.size(1)),
        S(x.size(2) * x.size(3)),
        areas(x, sizes, 0),
        whole_(!sizes) {}

  // Rows of a task: cells of all channels (nhwc), or planes.
  int64_t rows() const {
    const int64_t length = std::max<int64_t>(1, kGrain / (nhwc ? C : S));
    return nhwc ? std::min(length, kMostRows) : length;
  }
  int64_t count() const { return ((nhwc ? N * S : N * C) + rows() - 1) / rows(); }

  template <class F>
  static void each(int64_t count, F f) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }

  // Calls f(start, n, channel, valid) for the stretches of a task: n cells whose elements begin at byte start, of all
  // channels (nhwc) or of one.
  template <class F>
  void stretches(int64_t task, F f) const {
    const int64_t first = task * rows();
    if (!nhwc) {
      const int64_t last = std::min(first + rows(), N * C);
      for (int64_t plane = first; plane < last; ++plane) of_plane(plane, f);
      return;
    }
    const int64_t last = std::min(first + rows(), N * S);
    if (whole_) {
      f(first * C * bytes, last - first, int64_t(0), true);
      return;
    }
    for (int64_t cell = first; cell < last;) {
      const int64_t sample = cell / S, position = cell % S, n = std::min(last - cell, S - position);
      areas.each_run(sample, position, n, [&](int64_t at, int64_t length, bool valid) {
        f((sample * S + at) * C * bytes, length, int64_t(0), valid);
      });
      cell += n;
    }
  }

  // The same for all maps of one channel (nchw).
  template <class F>
  void of_channel(int64_t channel, F f) const {
    for (int64_t sample = 0; sample < N; ++sample) of_plane(sample * C + channel, f);
  }

  // Writes zeros over a stretch.
  void clear(char* p, int64_t n) const { std::memset(p, 0, n * (nhwc ? C : 1) * bytes); }

 private:
  template <class F>
  void of_plane(int64_t plane, F f) const {
    areas.each_run(plane / C, 0, S, [&](int64_t at, int64_t n, bool valid) {
      f((plane * S + at) * bytes, n, plane % C, valid);
    });
  }

  bool whole_;
};

// Mean and sum of squared deviations of count numbers, of each channel.
struct Moments {
  double count = 0.0;
  std::vector<double> mean, m2;

  explicit Moments(int64_t C) : mean(C, 0.0), m2(C, 0.0) {}

  // Chan, Golub, LeVeque 1979: f(c, mean, m2) gives those of n more numbers.
  template <class F>
  void add(double n, F f) {
    if (n == 0.0) return;
    const double share = n / (count + n), weight = count * share;
    for (size_t c = 0; c < mean.size(); ++c) {
      double part_mean, part_m2;
      f(c, part_mean, part_m2);
      const double delta = part_mean - mean[c];
      mean[c] += delta * share;
      m2[c] += part_m2 + delta * delta * weight;
    }
    count += n;
  }
};

void batch_norm_moments(const Tensor& x, const OptionalTensor& sizes, bool nhwc, const Tensor& moments) {
  const bool bf16 = is_bfloat16(x);
  const Tasks tasks(x, sizes, nhwc);
  const int64_t C = tasks.C;
  const char* xs = static_cast<const char*>(rows(x));
  float* out = floats(moments);
  double count = 0.0;
  for (int64_t sample = 0; sample < tasks.N; ++sample) count += tasks.areas.positions(sample);
  out[2 * C] = static_cast<float>(count);
  if (!nhwc) {
    const auto of_stretch = MIMDET_PICK_ISA(bn_moments_nchw);
    Tasks::each(C, [&](int64_t channel) {
      Moments all(1);
      tasks.of_channel(channel, [&](int64_t start, int64_t n, int64_t, bool valid) {
        if (!valid) return;
        double part_mean, part_m2;
        of_stretch(xs + start, bf16, n, &part_mean, &part_m2);
        all.add(n, [&](size_t, double& mean, double& m2) {
          mean = part_mean;
          m2 = part_m2;
        });
      });
      out[channel] = static_cast<float>(all.mean[0]);
      out[C + channel] = static_cast<float>(all.m2[0]);
    });
    return;
  }
  const auto of_rows = MIMDET_PICK_ISA(bn_moments_nhwc);
  std::vector<Moments> partial(tasks.count(), Moments(0));
  torch::stable::parallel_for(0, tasks.count(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(3 * C);
    float *center = scratch.data(), *sum = center + C, *square = sum + C;
    for (int64_t i = begin; i < end; ++i) {
      partial[i] = Moments(C);
      tasks.stretches(i, [&](int64_t start, int64_t n, int64_t, bool valid) {
        if (!valid) return;
        of_rows(xs + start, bf16, n, C, center, sum, square);
        const double share = 1.0 / n;
        partial[i].add(n, [&](size_t c, double& mean, double& m2) {
          const double rest = sum[c] * share;
          mean = center[c] + rest;
          m2 = square[c] - sum[c] * rest;
        });
      });
    }
  });
  Moments all(C);
  for (const Moments& part : partial) {
    all.add(part.count, [&](size_t c, double& mean, double& m2) {
      mean = part.mean[c];
      m2 = part.m2[c];
    });
  }
  std::copy(all.mean.begin(), all.mean.end(), out);
  std::copy(all.m2.begin(), all.m2.end(), out + C);
}

// In the order of the parts and in double: the same bits in every process.
void batch_norm_statistics(const Tensor& parts, double eps, bool unbiased, const Tensor& statistics) {
  const int64_t P = parts.size(0), C = parts.size(1) / 2, row = 2 * C + 1;
  const float* from = floats(parts);
  float* out = floats(statistics);
  double total = 0.0;
  for (int64_t part = 0; part < P; ++part) total += from[part * row + 2 * C];
  const double inverse = total > 0.0 ? 1.0 / total : 0.0;
  for (int64_t c = 0; c < C; ++c) {
    double mean = 0.0, m2 = 0.0;
    for (int64_t part = 0; part < P; ++part) mean += from[part * row + 2 * C] * static_cast<double>(from[part * row + c]);
    mean *= inverse;
    for (int64_t part = 0; part < P; ++part) {
      const double off = from[part * row + c] - mean;
      m2 += from[part * row + C + c] + from[part * row + 2 * C] * off * off;
    }
    const double variance = m2 * inverse;
    out[c] = static_cast<float>(mean);
    out[C + c] = static_cast<float>(1.0 / std::sqrt(variance + eps));
    out[2 * C + c] = static_cast<float>(unbiased ? m2 / std::max(total - 1.0, 1.0) : variance);
  }
  out[3 * C] = static_cast<float>(inverse);
}

// weight * rstd of each channel.
std::vector<float> gains(const Tensor& weight, const Tensor& rstd, int64_t C) {
  std::vector<float> made(C);
  const float *w = floats(weight), *r = floats(rstd);
  for (int64_t c = 0; c < C; ++c) made[c] = w[c] * r[c];
  return made;
}

void batch_norm(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& sizes, bool relu, bool nhwc, const Tensor& y) {
  const bool bf16 = is_bfloat16(x);
  const Tasks tasks(x, sizes, nhwc);
  const char* xs = static_cast<const char*>(rows(x));
  char* ys = static_cast<char*>(rows(y));
  const float *means = floats(mean), *biases = floats(bias);
  const std::vector<float> gain = gains(weight, rstd, tasks.C);
  const auto of_rows = MIMDET_PICK_ISA(bn_forward_nhwc);
  const auto of_stretch = MIMDET_PICK_ISA(bn_forward_nchw);
  Tasks::each(tasks.count(), [&](int64_t task) {
    tasks.stretches(task, [&](int64_t start, int64_t n, int64_t c, bool valid) {
      if (!valid) {
        tasks.clear(ys + start, n);
      } else if (nhwc) {
        of_rows(xs + start, ys + start, bf16, n, tasks.C, means, gain.data(), biases, relu);
      } else {
        of_stretch(xs + start, ys + start, bf16, n, means[c], gain[c], biases[c], relu);
      }
    });
  });
}

void batch_norm_sums(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
    const Tensor& rstd, const OptionalTensor& sizes, bool relu, bool nhwc, const Tensor& sums) {
  const bool bf16 = is_bfloat16(x);
  const Tasks tasks(x, sizes, nhwc);
  const int64_t C = tasks.C;
  const char *xs = static_cast<const char*>(rows(x)), *dys = static_cast<const char*>(rows(dy));
  const float *means = floats(mean), *biases = floats(bias), *rstds = floats(rstd);
  float* out = floats(sums);
  const std::vector<float> gain = gains(weight, rstd, C);
  std::vector<double> total(2 * C, 0.0);
  if (nhwc) {
    const auto of_rows = MIMDET_PICK_ISA(bn_sums_nhwc);
    std::vector<float> partial(tasks.count() * 2 * C, 0.0f);
    Tasks::each(tasks.count(), [&](int64_t task) {
      tasks.stretches(task, [&](int64_t start, int64_t n, int64_t, bool valid) {
        if (!valid) return;
        of_rows(
            dys + start, xs + start, bf16, n, C, means, gain.data(), biases, relu, &partial[task * 2 * C]);
      });
    });
    for (int64_t task = 0; task < tasks.count(); ++task) {
      for (int64_t c = 0; c < 2 * C; ++c) total[c] += partial[task * 2 * C + c];
    }
  } else {
    const auto of_stretch = MIMDET_PICK_ISA(bn_sums_nchw);
    Tasks::each(C, [&](int64_t channel) {
      double pair[2] = {};
      tasks.of_channel(channel, [&](int64_t start, int64_t n, int64_t c, bool valid) {
        if (valid) of_stretch(dys + start, xs + start, bf16, n, means[c], gain[c], biases[c], relu, pair);
      });
      total[channel] = pair[0];
      total[C + channel] = pair[1];
    });
  }
  for (int64_t c = 0; c < C; ++c) {
    out[c] = static_cast<float>(total[c]);
    out[C + c] = static_cast<float>(total[C + c] * rstds[c]);
  }
}

void batch_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
    const Tensor& rstd, const Tensor& means, const OptionalTensor& sizes, bool relu, bool nhwc, const Tensor& dx) {
  const bool bf16 = is_bfloat16(x);
  const Tasks tasks(x, sizes, nhwc);
  const int64_t C = tasks.C;
  const char *xs = static_cast<const char*>(rows(x)), *dys = static_cast<const char*>(rows(dy));
  char* dxs = static_cast<char*>(rows(dx));
  const float *centers = floats(mean), *biases = floats(bias), *rstds = floats(rstd), *averages = floats(means);
  const std::vector<float> gain = gains(weight, rstd, C);
  std::vector<float> a(C), k(C);
  for (int64_t c = 0; c < C; ++c) {
    a[c] = gain[c] * averages[c];
    k[c] = gain[c] * averages[C + c] * rstds[c];
  }
  const auto of_rows = MIMDET_PICK_ISA(bn_backward_nhwc);
  const auto of_stretch = MIMDET_PICK_ISA(bn_backward_nchw);
  Tasks::each(tasks.count(), [&](int64_t task) {
    tasks.stretches(task, [&](int64_t start, int64_t n, int64_t c, bool valid) {
      const char *grad = dys + start, *from = xs + start;
      char* to = dxs + start;
      if (!valid) {
        tasks.clear(to, n);
      } else if (nhwc) {
        of_rows(
            grad, from, to, bf16, n, C, centers, gain.data(), biases, relu, a.data(), k.data());
      } else {
        of_stretch(grad, from, to, bf16, n, centers[c], gain[c], biases[c], relu, a[c], k[c]);
      }
    });
  });
}

}  // namespace
}  // namespace mimdet

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def("batch_norm_moments(Tensor x, Tensor? sizes, bool nhwc, Tensor(a!) moments) -> ()");
  m.def("batch_norm_statistics(Tensor parts, float eps, bool unbiased, Tensor(a!) statistics) -> ()");
  m.def(
      "batch_norm_fwd(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, Tensor? sizes, bool relu, "
      "bool nhwc, Tensor(a!) y) -> ()");
  m.def(
      "batch_norm_sums(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, Tensor? sizes, "
      "bool relu, bool nhwc, Tensor(a!) sums) -> ()");
  m.def(
      "batch_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, Tensor means, "
      "Tensor? sizes, bool relu, bool nhwc, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) {
  m.impl("batch_norm_moments", TORCH_BOX(&mimdet::batch_norm_moments));
  m.impl("batch_norm_statistics", TORCH_BOX(&mimdet::batch_norm_statistics));
  m.impl("batch_norm_fwd", TORCH_BOX(&mimdet::batch_norm));
  m.impl("batch_norm_sums", TORCH_BOX(&mimdet::batch_norm_sums));
  m.impl("batch_norm_bwd", TORCH_BOX(&mimdet::batch_norm_backward));
}
