// Residual addition and LayerNorm on a CPU: the loops, compiled once for each instruction set.
#include "AddLayerNorm.h"

#include "vec.h"

namespace mimdet {
namespace MIMDET_ISA {
namespace {

template <class R, class B, class Y>
void forward(const R* r, const B* branch, const float* scale, const float* __restrict weight,
             const float* __restrict bias, R* __restrict r_new, Y* __restrict y, float* mean, float* rstd,
             int64_t first, int64_t last, int64_t N, int64_t C, float eps) {
  for (int64_t row = first; row < last; ++row) {
    const R* x = r + row * C;
    if (branch) {
      const B* added = branch + row * C;
      R* sum = r_new + row * C;
      const float s = scale ? scale[row / N] : 1.0f;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) {
        store(sum + c, load(x + c) + s * load(added + c));
      }
      // Backward knows only the rounded sum, so the statistics are those of the rounded sum.
      x = sum;
    }
    float total = 0.0f, rest = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < C; ++c) {
      total += load(x + c);
    }
    const float center = total / static_cast<float>(C);
#pragma omp simd reduction(+ : rest, square)
    for (int64_t c = 0; c < C; ++c) {
      const float d = load(x + c) - center;
      rest += d;
      square += d * d;
    }
    // Far from zero, what the first sum's rounding left is no small part of the deviation.
    const float shift = rest / static_cast<float>(C), mu = center + shift;
    const float inverse = 1.0f / __builtin_sqrtf(square / static_cast<float>(C) - shift * shift + eps);
    Y* to = y + row * C;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      store(to + c, (load(x + c) - mu) * inverse * weight[c] + bias[c]);
    }
    mean[row] = mu;
    rstd[row] = inverse;
  }
}

template <class R, class B, class Y>
void backward(const R* grad_r_new, const Y* grad_y, const R* r_new, const float* mean, const float* rstd,
              const float* scale, const float* __restrict weight, R* __restrict grad_r, B* __restrict grad_branch,
              float* __restrict partial_w, float* __restrict partial_b, int64_t first, int64_t last, int64_t step,
              int64_t rows, int64_t N, int64_t C) {
  for (int64_t chunk = first; chunk < last; ++chunk) {
    float* __restrict total_w = partial_w + chunk * C;
    float* __restrict total_b = partial_b + chunk * C;
    for (int64_t c = 0; c < C; ++c) {
      total_w[c] = total_b[c] = 0.0f;
    }
    const int64_t end = (chunk + 1) * step < rows ? (chunk + 1) * step : rows;
    for (int64_t row = chunk * step; row < end; ++row) {
      const R* x = r_new + row * C;
      const Y* dy = grad_y + row * C;
      const float mu = mean[row], inverse = rstd[row];
      float sum = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : sum, dot)
      for (int64_t c = 0; c < C; ++c) {
        const float d = load(dy + c);
        const float hat = (load(x + c) - mu) * inverse;
        total_w[c] += d * hat;
        total_b[c] += d;
        sum += d * weight[c];
        dot += d * weight[c] * hat;
      }
      sum /= static_cast<float>(C);
      dot /= static_cast<float>(C);
      const R* passed = grad_r_new ? grad_r_new + row * C : nullptr;
      R* to = grad_r + row * C;
      // One loop for each case: a branch inside would keep it from being vectorised.
      auto gradient = [&](int64_t c) {
        const float hat = (load(x + c) - mu) * inverse;
        return inverse * (load(dy + c) * weight[c] - sum - hat * dot);
      };
      if (grad_branch) {
        const float s = scale ? scale[row / N] : 1.0f;
        B* to_branch = grad_branch + row * C;
        if (passed) {
#pragma omp simd
          for (int64_t c = 0; c < C; ++c) {
            const float g = gradient(c) + load(passed + c);
            store(to + c, g);
            store(to_branch + c, s * g);
          }
        } else {
#pragma omp simd
          for (int64_t c = 0; c < C; ++c) {
            const float g = gradient(c);
            store(to + c, g);
            store(to_branch + c, s * g);
          }
        }
      } else if (passed) {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) {
          store(to + c, gradient(c) + load(passed + c));
        }
      } else {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) {
          store(to + c, gradient(c));
        }
      }
    }
  }
}

template <class T>
struct Type {
  using type = T;
};

// Calls f with the element types of the residual stream, the branch and the normalised rows.
template <class F>
void with_types(bool bf16_r, bool bf16_branch, bool bf16_y, F f) {
  auto with_y = [&](auto r, auto b) { bf16_y ? f(r, b, Type<bf16>{}) : f(r, b, Type<float>{}); };
  auto with_branch = [&](auto r) { bf16_branch ? with_y(r, Type<bf16>{}) : with_y(r, Type<float>{}); };
  bf16_r ? with_branch(Type<bf16>{}) : with_branch(Type<float>{});
}

}  // namespace

void add_layer_norm_fwd(const void* r, const void* branch, const float* scale, const float* weight, const float* bias,
                        void* r_new, void* y, float* mean, float* rstd, int64_t first, int64_t last, int64_t N,
                        int64_t C, float eps, bool bf16_r, bool bf16_branch, bool bf16_y) {
  with_types(bf16_r, bf16_branch, bf16_y, [&](auto tr, auto tb, auto ty) {
    using R = typename decltype(tr)::type;
    using B = typename decltype(tb)::type;
    using Y = typename decltype(ty)::type;
    forward(static_cast<const R*>(r), static_cast<const B*>(branch), scale, weight, bias, static_cast<R*>(r_new),
            static_cast<Y*>(y), mean, rstd, first, last, N, C, eps);
  });
}

void add_layer_norm_bwd(const void* grad_r_new, const void* grad_y, const void* r_new, const float* mean,
                        const float* rstd, const float* scale, const float* weight, void* grad_r, void* grad_branch,
                        float* partial_w, float* partial_b, int64_t first, int64_t last, int64_t step, int64_t rows,
                        int64_t N, int64_t C, bool bf16_r, bool bf16_branch, bool bf16_y) {
  with_types(bf16_r, bf16_branch, bf16_y, [&](auto tr, auto tb, auto ty) {
    using R = typename decltype(tr)::type;
    using B = typename decltype(tb)::type;
    using Y = typename decltype(ty)::type;
    backward(static_cast<const R*>(grad_r_new), static_cast<const Y*>(grad_y), static_cast<const R*>(r_new), mean,
             rstd, scale, weight, static_cast<R*>(grad_r), static_cast<B*>(grad_branch), partial_w, partial_b, first,
             last, step, rows, N, C);
  });
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
