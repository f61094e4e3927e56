// Registration of GroupNorm + GELU for the CPU, and how its work is spread over threads.
//
// Work is cut into tasks of a fixed size, whatever the number of threads, and partial results are added in the order of
// the tasks: the numbers are the same on one core and on many.
#include "GroupNormGelu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "binding.h"

namespace mimdet {
namespace {

const char* at(const void* p, int64_t elements, bool bf16) {
  return static_cast<const char*>(p) + elements * (bf16 ? 2 : 4);
}
char* at(void* p, int64_t elements, bool bf16) { return static_cast<char*>(p) + elements * (bf16 ? 2 : 4); }

// Tasks of one sample: rows of width elements, length rows a task. For channel-major samples a row is a channel.
struct Tasks {
  int64_t rows, width, length, count;

  Tasks(int64_t C, int64_t S, bool nhwc)
      : rows(nhwc ? S : C),
        width(nhwc ? C : S),
        length(std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width))),
        count((rows + length - 1) / length) {}

  int64_t begin(int64_t task) const { return task * length; }
  int64_t size(int64_t task) const { return std::min(length, rows - begin(task)); }
};

void group_norm_gelu(
    const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool nhwc, const Tensor& y,
    const Tensor& mean, const Tensor& rstd) {
  const int64_t B = x.size(0), C = weight.numel(), N = B ? x.numel() / B : 0;
  if (B == 0 || N == 0) return;
  const bool bf16 = is_bfloat16(x);
  const Tasks tasks(C, N / C, nhwc);
  const void* xs = rows(x);
  void* ys = rows(y);
  const float *w = floats(weight), *b = floats(bias);
  float *means = floats(mean), *rstds = floats(rstd);

  const auto moments = MIMDET_PICK_ISA(gng_moments);
  std::vector<double> partial(2 * B * tasks.count);
  torch::stable::parallel_for(0, B * tasks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / tasks.count, task = i % tasks.count;
      const void* start = at(xs, sample * N + tasks.begin(task) * tasks.width, bf16);
      moments(start, bf16, tasks.size(task) * tasks.width, &partial[2 * i], &partial[2 * i + 1]);
    }
  });
  for (int64_t sample = 0; sample < B; ++sample) {
    // Chan, Golub, LeVeque 1979: means and squared deviations of parts -> those of the whole.
    double count = 0.0, average = 0.0, m2 = 0.0;
    for (int64_t task = 0; task < tasks.count; ++task) {
      const double* part = &partial[2 * (sample * tasks.count + task)];
      const double n = static_cast<double>(tasks.size(task) * tasks.width), delta = part[0] - average;
      average += delta * n / (count + n);
      m2 += part[1] + delta * delta * count * n / (count + n);
      count += n;
    }
    means[sample] = static_cast<float>(average);
    rstds[sample] = static_cast<float>(1.0 / std::sqrt(m2 / N + eps));
  }

  const auto by_position = MIMDET_PICK_ISA(gng_forward_nhwc);
  const auto by_channel = MIMDET_PICK_ISA(gng_forward_nchw);
  torch::stable::parallel_for(0, B * tasks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / tasks.count, task = i % tasks.count;
      const int64_t first = tasks.begin(task), n = tasks.size(task), start = sample * N + first * tasks.width;
      if (nhwc) {
        by_position(at(xs, start, bf16), at(ys, start, bf16), bf16, n, C, means[sample], rstds[sample], w, b);
        continue;
      }
      for (int64_t c = first; c < first + n; ++c) {
        const int64_t channel = sample * N + c * tasks.width;
        by_channel(
            at(xs, channel, bf16), at(ys, channel, bf16), bf16, tasks.width, means[sample], rstds[sample], w[c], b[c]);
      }
    }
  });
}

void group_norm_gelu_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
    const Tensor& rstd, bool nhwc, const Tensor& dx, const Tensor& dweight, const Tensor& dbias) {
  const int64_t B = x.size(0), C = weight.numel(), N = B ? x.numel() / B : 0;
  const bool bf16 = is_bfloat16(x);
  float *dw = floats(dweight), *db = floats(dbias);
  std::fill(dw, dw + C, 0.0f);
  std::fill(db, db + C, 0.0f);
  if (B == 0 || N == 0) return;
  const Tasks tasks(C, N / C, nhwc);
  const void *xs = rows(x), *dys = rows(dy);
  void* dxs = rows(dx);
  const float *w = floats(weight), *b = floats(bias), *means = floats(mean), *rstds = floats(rstd);

  // channel_sums[sample][0][c] = sum of dz, [1][c] = sum of dz * xhat.
  std::vector<double> channel_sums(B * 2 * C, 0.0);
  if (nhwc) {
    const auto sums = MIMDET_PICK_ISA(gng_backward_sums_nhwc);
    std::vector<float> partial(B * tasks.count * 2 * C);
    torch::stable::parallel_for(0, B * tasks.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / tasks.count, task = i % tasks.count;
        const int64_t start = sample * N + tasks.begin(task) * C;
        sums(
            at(dys, start, bf16), at(xs, start, bf16), at(dxs, start, bf16), bf16, tasks.size(task), C, means[sample],
            rstds[sample], w, b, &partial[i * 2 * C]);
      }
    });
    for (int64_t i = 0; i < B * tasks.count; ++i) {
      double* total = &channel_sums[i / tasks.count * 2 * C];
      for (int64_t c = 0; c < 2 * C; ++c) total[c] += partial[i * 2 * C + c];
    }
  } else {
    const auto sums = MIMDET_PICK_ISA(gng_backward_sums_nchw);
    torch::stable::parallel_for(0, B * C, tasks.length, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / C, c = i % C, start = i * tasks.width;
        double pair[2];
        sums(
            at(dys, start, bf16), at(xs, start, bf16), at(dxs, start, bf16), bf16, tasks.width, means[sample],
            rstds[sample], w[c], b[c], pair);
        channel_sums[sample * 2 * C + c] = pair[0];
        channel_sums[sample * 2 * C + C + c] = pair[1];
      }
    });
  }

  std::vector<float> a(B), k(B);
  std::vector<double> dw_sum(C, 0.0), db_sum(C, 0.0);
  for (int64_t sample = 0; sample < B; ++sample) {
    const double *dz = &channel_sums[sample * 2 * C], *dz_xhat = dz + C;
    double a_sum = 0.0, k_sum = 0.0;
    for (int64_t c = 0; c < C; ++c) {
      a_sum += w[c] * dz[c];
      k_sum += w[c] * dz_xhat[c];
      db_sum[c] += dz[c];
      dw_sum[c] += dz_xhat[c];
    }
    a[sample] = static_cast<float>(a_sum / N);
    k[sample] = static_cast<float>(k_sum / N);
  }
  for (int64_t c = 0; c < C; ++c) {
    dw[c] = static_cast<float>(dw_sum[c]);
    db[c] = static_cast<float>(db_sum[c]);
  }

  const auto by_position = MIMDET_PICK_ISA(gng_backward_dx_nhwc);
  const auto by_channel = MIMDET_PICK_ISA(gng_backward_dx_nchw);
  torch::stable::parallel_for(0, B * tasks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i / tasks.count, task = i % tasks.count;
      const int64_t first = tasks.begin(task), n = tasks.size(task), start = s * N + first * tasks.width;
      if (nhwc) {
        by_position(at(xs, start, bf16), at(dxs, start, bf16), bf16, n, C, means[s], rstds[s], w, a[s], k[s]);
        continue;
      }
      for (int64_t c = first; c < first + n; ++c) {
        const int64_t channel = s * N + c * tasks.width;
        by_channel(
            at(xs, channel, bf16), at(dxs, channel, bf16), bf16, tasks.width, means[s], rstds[s], w[c], a[s], k[s]);
      }
    }
  });
}

}  // namespace
}  // namespace mimdet

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def(
      "group_norm_gelu_fwd(Tensor x, Tensor weight, Tensor bias, float eps, bool nhwc, Tensor(a!) y, Tensor(b!) mean, "
      "Tensor(c!) rstd) -> ()");
  m.def(
      "group_norm_gelu_bwd(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, bool nhwc, "
      "Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) {
  m.impl("group_norm_gelu_fwd", TORCH_BOX(&mimdet::group_norm_gelu));
  m.impl("group_norm_gelu_bwd", TORCH_BOX(&mimdet::group_norm_gelu_backward));
}
