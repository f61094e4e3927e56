// Residual addition and LayerNorm on a CPU: the loops, compiled once for each instruction set.
#include "AddLayerNorm.h"

#include "vec.h"

namespace mimdet {
namespace MIMDET_ISA {
namespace {

template <class R, class X, class Y>
void forward(const R* residual, const X* x, const float* scale, const float* __restrict weight,
             const float* __restrict bias, R* __restrict residual_out, Y* __restrict y, float* mean, float* rstd,
             int64_t first, int64_t last, int64_t N, int64_t C, float eps) {
  for (int64_t row = first; row < last; ++row) {
    const R* r = residual + row * C;
    if (x) {
      const X* added = x + row * C;
      R* sum = residual_out + row * C;
      const float s = scale ? scale[row / N] : 1.0f;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) {
        store(sum + c, load(r + c) + s * load(added + c));
      }
      // Backward sees only the rounded sum, so the statistics are those of the rounded sum.
      r = sum;
    }
    float total = 0.0f, rest = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < C; ++c) {
      total += load(r + c);
    }
    const float center = total / static_cast<float>(C);
#pragma omp simd reduction(+ : rest, square)
    for (int64_t c = 0; c < C; ++c) {
      const float x_centered = load(r + c) - center;
      rest += x_centered;
      square += x_centered * x_centered;
    }
    // Rounding of the first sum moves a large mean by as much as x varies: shift corrects it.
    const float shift = rest / static_cast<float>(C), row_mean = center + shift;
    const float row_rstd = 1.0f / __builtin_sqrtf(square / static_cast<float>(C) - shift * shift + eps);
    Y* to = y + row * C;
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      store(to + c, (load(r + c) - row_mean) * row_rstd * weight[c] + bias[c]);
    }
    mean[row] = row_mean;
    rstd[row] = row_rstd;
  }
}

template <class R, class X, class Y>
void backward(const R* dresidual_out, const Y* dy, const R* residual_out, const float* mean, const float* rstd,
              const float* scale, const float* __restrict weight, R* __restrict dresidual, X* __restrict dx,
              float* __restrict dw_partial, float* __restrict db_partial, int64_t first, int64_t last, int64_t step,
              int64_t rows, int64_t N, int64_t C) {
  for (int64_t chunk = first; chunk < last; ++chunk) {
    float* __restrict dw = dw_partial + chunk * C;
    float* __restrict db = db_partial + chunk * C;
    for (int64_t c = 0; c < C; ++c) {
      dw[c] = db[c] = 0.0f;
    }
    const int64_t end = (chunk + 1) * step < rows ? (chunk + 1) * step : rows;
    for (int64_t row = chunk * step; row < end; ++row) {
      const R* r = residual_out + row * C;
      const Y* grad = dy + row * C;
      const float row_mean = mean[row], row_rstd = rstd[row];
      float sum = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : sum, dot)
      for (int64_t c = 0; c < C; ++c) {
        const float g = load(grad + c);
        const float x_hat = (load(r + c) - row_mean) * row_rstd;
        dw[c] += g * x_hat;
        db[c] += g;
        sum += g * weight[c];
        dot += g * weight[c] * x_hat;
      }
      sum /= static_cast<float>(C);
      dot /= static_cast<float>(C);
      const R* passed = dresidual_out ? dresidual_out + row * C : nullptr;
      R* to = dresidual + row * C;
      // One loop for each case: a condition inside would prevent vectorization.
      auto gradient = [&](int64_t c) {
        const float x_hat = (load(r + c) - row_mean) * row_rstd;
        return row_rstd * (load(grad + c) * weight[c] - sum - x_hat * dot);
      };
      if (dx) {
        const float s = scale ? scale[row / N] : 1.0f;
        X* to_x = dx + row * C;
        if (passed) {
#pragma omp simd
          for (int64_t c = 0; c < C; ++c) {
            const float g = gradient(c) + load(passed + c);
            store(to + c, g);
            store(to_x + c, s * g);
          }
        } else {
#pragma omp simd
          for (int64_t c = 0; c < C; ++c) {
            const float g = gradient(c);
            store(to + c, g);
            store(to_x + c, s * g);
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

// Calls f with the element types of residual, x and y.
template <class F>
void with_types(bool bf16_r, bool bf16_x, bool bf16_y, F f) {
  auto with_y = [&](auto r, auto x) { bf16_y ? f(r, x, Type<bf16>{}) : f(r, x, Type<float>{}); };
  auto with_x = [&](auto r) { bf16_x ? with_y(r, Type<bf16>{}) : with_y(r, Type<float>{}); };
  bf16_r ? with_x(Type<bf16>{}) : with_x(Type<float>{});
}

}  // namespace

void add_layer_norm_fwd(const void* residual, const void* x, const float* scale, const float* weight, const float* bias,
                        void* residual_out, void* y, float* mean, float* rstd, int64_t first, int64_t last, int64_t N,
                        int64_t C, float eps, bool bf16_r, bool bf16_x, bool bf16_y) {
  with_types(bf16_r, bf16_x, bf16_y, [&](auto tr, auto tx, auto ty) {
    using R = typename decltype(tr)::type;
    using X = typename decltype(tx)::type;
    using Y = typename decltype(ty)::type;
    forward(static_cast<const R*>(residual), static_cast<const X*>(x), scale, weight, bias,
            static_cast<R*>(residual_out), static_cast<Y*>(y), mean, rstd, first, last, N, C, eps);
  });
}

void add_layer_norm_bwd(const void* dresidual_out, const void* dy, const void* residual_out, const float* mean,
                        const float* rstd, const float* scale, const float* weight, void* dresidual, void* dx,
                        float* dw_partial, float* db_partial, int64_t first, int64_t last, int64_t step, int64_t rows,
                        int64_t N, int64_t C, bool bf16_r, bool bf16_x, bool bf16_y) {
  with_types(bf16_r, bf16_x, bf16_y, [&](auto tr, auto tx, auto ty) {
    using R = typename decltype(tr)::type;
    using X = typename decltype(tx)::type;
    using Y = typename decltype(ty)::type;
    backward(static_cast<const R*>(dresidual_out), static_cast<const Y*>(dy), static_cast<const R*>(residual_out), mean,
             rstd, scale, weight, static_cast<R*>(dresidual), static_cast<X*>(dx), dw_partial, db_partial, first,
             last, step, rows, N, C);
  });
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
