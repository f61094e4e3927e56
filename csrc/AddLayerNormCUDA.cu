// Residual addition and LayerNorm for CUDA, without torch. A block holds a row in registers between the passes.
#include "cuda_rows.h"

namespace mimdet {
namespace {

// Vectors of V elements that a thread holds: rows of up to kWidest channels.
template <int V>
constexpr int kItems = 8 / V;
constexpr int64_t kWidest = 8192;

struct Forward {
  const void *residual, *x;
  const float *scale, *weight, *bias;
  void *residual_out, *y;
  float *mean, *rstd;
  int64_t N, C;
  float eps;
};

struct Backward {
  const void *dresidual_out, *dy, *residual_out;
  const float *mean, *rstd, *scale, *weight;
  void *dresidual, *dx;
  float *dw_partial, *db_partial;
  int64_t rows, N, C, step;
};

// residual, x, residual_out, y (rows, C); scale (rows / N,); weight, bias (C,); mean, rstd (rows,). A block takes one
// row.
template <class R, class X, class Y, int V>
__global__ void __launch_bounds__(1024) fwd(const Forward p) {
  const int64_t row = blockIdx.x, at = row * p.C;
  float x[kItems<V>][V];
  float total = 0.0f, square = 0.0f;
  const float s = p.scale ? p.scale[row / p.N] : 1.0f;
#pragma unroll
  for (int k = 0; k < kItems<V>; ++k) {
    const int64_t c = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V;
    if (c >= p.C) break;
    load<V>(static_cast<const R*>(p.residual) + at + c, x[k]);
    if (p.x) {
      float added[V];
      load<V>(static_cast<const X*>(p.x) + at + c, added);
#pragma unroll
      // Backward sees only the rounded sum, so the statistics are those of the rounded sum.
      for (int i = 0; i < V; ++i) x[k][i] = to_float(from_float<R>(x[k][i] + s * added[i]));
      store<V>(static_cast<R*>(p.residual_out) + at + c, x[k]);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) total += x[k][i];
  }
  const float row_mean = block_sum(total) / p.C;
#pragma unroll
  for (int k = 0; k < kItems<V>; ++k) {
    if ((static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V >= p.C) break;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[k][i] -= row_mean;
      square += x[k][i] * x[k][i];
    }
  }
  const float row_rstd = 1.0f / sqrtf(block_sum(square) / p.C + p.eps);
#pragma unroll
  for (int k = 0; k < kItems<V>; ++k) {
    const int64_t c = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V;
    if (c >= p.C) break;
    float w[V], b[V];
    load<V>(p.weight + c, w);
    load<V>(p.bias + c, b);
#pragma unroll
    for (int i = 0; i < V; ++i) w[i] = x[k][i] * row_rstd * w[i] + b[i];
    store<V>(static_cast<Y*>(p.y) + at + c, w);
  }
  if (threadIdx.x == 0) {
    p.mean[row] = row_mean;
    p.rstd[row] = row_rstd;
  }
}

// d*, residual_out (rows, C); mean, rstd (rows,); weight (C,); *_partial (gridDim.x, C). A block takes `step` rows.
template <class R, class X, class Y, int V>
__global__ void __launch_bounds__(1024) bwd(const Backward p) {
  float dw[kItems<V>][V] = {}, db[kItems<V>][V] = {};
  const int64_t first = blockIdx.x * p.step;
  const int64_t last = first + p.step < p.rows ? first + p.step : p.rows;
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = row * p.C;
    const float row_mean = p.mean[row], row_rstd = p.rstd[row];
    float x_hat[kItems<V>][V], g[kItems<V>][V];
    float sum = 0.0f, dot = 0.0f;
#pragma unroll
    for (int k = 0; k < kItems<V>; ++k) {
      const int64_t c = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V;
      if (c >= p.C) break;
      float w[V];
      load<V>(static_cast<const R*>(p.residual_out) + at + c, x_hat[k]);
      load<V>(static_cast<const Y*>(p.dy) + at + c, g[k]);
      load<V>(p.weight + c, w);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        x_hat[k][i] = (x_hat[k][i] - row_mean) * row_rstd;
        dw[k][i] += g[k][i] * x_hat[k][i];
        db[k][i] += g[k][i];
        g[k][i] *= w[i];
        sum += g[k][i];
        dot += g[k][i] * x_hat[k][i];
      }
    }
    sum = block_sum(sum) / p.C;
    dot = block_sum(dot) / p.C;
    const float s = p.scale ? p.scale[row / p.N] : 1.0f;
#pragma unroll
    for (int k = 0; k < kItems<V>; ++k) {
      const int64_t c = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V;
      if (c >= p.C) break;
      float passed[V] = {};
      if (p.dresidual_out) load<V>(static_cast<const R*>(p.dresidual_out) + at + c, passed);
#pragma unroll
      for (int i = 0; i < V; ++i) passed[i] += row_rstd * (g[k][i] - sum - x_hat[k][i] * dot);
      store<V>(static_cast<R*>(p.dresidual) + at + c, passed);
      if (p.dx) {
#pragma unroll
        for (int i = 0; i < V; ++i) passed[i] *= s;
        store<V>(static_cast<X*>(p.dx) + at + c, passed);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kItems<V>; ++k) {
    const int64_t c = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V;
    if (c >= p.C) break;
    store<V>(p.dw_partial + blockIdx.x * p.C + c, dw[k]);
    store<V>(p.db_partial + blockIdx.x * p.C + c, db[k]);
  }
}

// Whole warps, at most 1024 threads.
unsigned threads(int64_t C, int V) {
  const int64_t count = (C + V * 32 - 1) / (V * 32) * 32;
  return static_cast<unsigned>(count < 1024 ? count : 1024);
}

template <class R, class X, class Y>
int launch(const Forward& p, int64_t rows, bool wide, cudaStream_t stream) {
  if (wide) {
    fwd<R, X, Y, 4><<<static_cast<unsigned>(rows), threads(p.C, 4), 0, stream>>>(p);
  } else {
    fwd<R, X, Y, 1><<<static_cast<unsigned>(rows), threads(p.C, 1), 0, stream>>>(p);
  }
  return cudaGetLastError();
}

template <class R, class X, class Y>
int launch(const Backward& p, int64_t, bool wide, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((p.rows + p.step - 1) / p.step);
  if (wide) {
    bwd<R, X, Y, 4><<<blocks, threads(p.C, 4), 0, stream>>>(p);
  } else {
    bwd<R, X, Y, 1><<<blocks, threads(p.C, 1), 0, stream>>>(p);
  }
  return cudaGetLastError();
}

// One 16-bit type L beside float: everything L, or a float residual with x and y of either type.
template <class L, class P>
int with_types(const P& p, int64_t rows, bool wide, int64_t r, int64_t x, int64_t y, cudaStream_t stream) {
  if (r == kFloat) {
    if (x == kFloat) {
      return y == kFloat ? launch<float, float, float>(p, rows, wide, stream)
                         : launch<float, float, L>(p, rows, wide, stream);
    }
    return y == kFloat ? launch<float, L, float>(p, rows, wide, stream) : launch<float, L, L>(p, rows, wide, stream);
  }
  if (x == kFloat || y == kFloat) return cudaErrorInvalidValue;
  return launch<L, L, L>(p, rows, wide, stream);
}

template <class P>
int dispatch(const P& p, int64_t rows, bool wide, int64_t r, int64_t x, int64_t y, cudaStream_t stream) {
  const bool has_half = r == kHalf || x == kHalf || y == kHalf;
  const bool has_bfloat16 = r == kBfloat16 || x == kBfloat16 || y == kBfloat16;
  if (p.C > kWidest || (has_half && has_bfloat16)) return cudaErrorInvalidValue;
  return has_half ? with_types<__half>(p, rows, wide, r, x, y, stream)
                  : with_types<__nv_bfloat16>(p, rows, wide, r, x, y, stream);
}

}  // namespace
}  // namespace mimdet

// dtypes are codes of Dtype. x and scale may be null.
MIMDET_CUDA_API int mimdet_add_layer_norm_fwd(const void* residual, const void* x, const float* scale,
                                              const float* weight, const float* bias, float eps, void* residual_out,
                                              void* y, float* mean, float* rstd, int64_t rows, int64_t N, int64_t C,
                                              int64_t residual_dtype, int64_t x_dtype, int64_t y_dtype,
                                              cudaStream_t stream) {
  using namespace mimdet;
  const Forward p{residual, x, scale, weight, bias, residual_out, y, mean, rstd, N, C, eps};
  const bool wide = C % 4 == 0 && aligned(residual) && aligned(x) && aligned(weight) && aligned(bias) &&
                    aligned(residual_out) && aligned(y);
  return dispatch(p, rows, wide, residual_dtype, x_dtype, y_dtype, stream);
}

// dresidual_out, scale and dx may be null.
MIMDET_CUDA_API int mimdet_add_layer_norm_bwd(const void* dresidual_out, const void* dy, const void* residual_out,
                                              const float* mean, const float* rstd, const float* scale,
                                              const float* weight, int64_t step, void* dresidual, void* dx,
                                              float* partials, int64_t rows, int64_t N, int64_t C,
                                              int64_t residual_dtype, int64_t x_dtype, int64_t y_dtype,
                                              cudaStream_t stream) {
  using namespace mimdet;
  float *db_partial = partials, *dw_partial = partials + (rows + step - 1) / step * C;
  const Backward p{dresidual_out, dy, residual_out, mean, rstd, scale, weight, dresidual, dx, dw_partial, db_partial,
                   rows, N, C, step};
  const bool wide = C % 4 == 0 && aligned(dresidual_out) && aligned(dy) && aligned(residual_out) && aligned(weight) &&
                    aligned(dresidual) && aligned(dx) && aligned(dw_partial) && aligned(db_partial);
  return dispatch(p, rows, wide, residual_dtype, x_dtype, y_dtype, stream);
}
