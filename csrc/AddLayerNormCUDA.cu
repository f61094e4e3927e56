// Residual addition and LayerNorm for CUDA, without torch. A block holds a row in registers between the passes.
#include "cuda_rows.h"

namespace mimdet {
namespace {

// Vectors of V elements that a thread holds: rows of up to kWidest channels.
template <int V>
constexpr int kItems = 8 / V;
constexpr int64_t kWidest = 8192;

struct Forward {
  const void *r, *branch;
  const float *scale, *weight, *bias;
  void *r_new, *y;
  float *mean, *rstd;
  int64_t N, C;
  float eps;
};

struct Backward {
  const void *grad_r_new, *grad_y, *r_new;
  const float *mean, *rstd, *scale, *weight;
  void *grad_r, *grad_branch;
  float *partial_w, *partial_b;
  int64_t rows, N, C, step;
};

// r, branch, r_new, y (rows, C); scale (rows / N,); weight, bias (C,); mean, rstd (rows,). A block takes one row.
template <class R, class B, class Y, int V>
__global__ void __launch_bounds__(1024) fwd(const Forward p) {
  const int64_t row = blockIdx.x, at = row * p.C;
  float x[kItems<V>][V];
  float total = 0.0f, square = 0.0f;
  const float s = p.scale ? p.scale[row / p.N] : 1.0f;
#pragma unroll
  for (int k = 0; k < kItems<V>; ++k) {
    const int64_t c = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V;
    if (c >= p.C) break;
    load<V>(static_cast<const R*>(p.r) + at + c, x[k]);
    if (p.branch) {
      float added[V];
      load<V>(static_cast<const B*>(p.branch) + at + c, added);
#pragma unroll
      // Backward knows only the rounded sum, so the statistics are those of the rounded sum.
      for (int i = 0; i < V; ++i) x[k][i] = to_float(from_float<R>(x[k][i] + s * added[i]));
      store<V>(static_cast<R*>(p.r_new) + at + c, x[k]);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) total += x[k][i];
  }
  const float mu = block_sum(total) / p.C;
#pragma unroll
  for (int k = 0; k < kItems<V>; ++k) {
    if ((static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V >= p.C) break;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[k][i] -= mu;
      square += x[k][i] * x[k][i];
    }
  }
  const float inverse = 1.0f / sqrtf(block_sum(square) / p.C + p.eps);
#pragma unroll
  for (int k = 0; k < kItems<V>; ++k) {
    const int64_t c = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V;
    if (c >= p.C) break;
    float w[V], b[V];
    load<V>(p.weight + c, w);
    load<V>(p.bias + c, b);
#pragma unroll
    for (int i = 0; i < V; ++i) w[i] = x[k][i] * inverse * w[i] + b[i];
    store<V>(static_cast<Y*>(p.y) + at + c, w);
  }
  if (threadIdx.x == 0) {
    p.mean[row] = mu;
    p.rstd[row] = inverse;
  }
}

// grad_*, r_new (rows, C); mean, rstd (rows,); weight (C,); partial_* (gridDim.x, C). A block takes `step` rows.
template <class R, class B, class Y, int V>
__global__ void __launch_bounds__(1024) bwd(const Backward p) {
  float total_w[kItems<V>][V] = {}, total_b[kItems<V>][V] = {};
  const int64_t first = blockIdx.x * p.step;
  const int64_t last = first + p.step < p.rows ? first + p.step : p.rows;
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = row * p.C;
    const float mu = p.mean[row], inverse = p.rstd[row];
    float hat[kItems<V>][V], g[kItems<V>][V];
    float sum = 0.0f, dot = 0.0f;
#pragma unroll
    for (int k = 0; k < kItems<V>; ++k) {
      const int64_t c = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V;
      if (c >= p.C) break;
      float w[V];
      load<V>(static_cast<const R*>(p.r_new) + at + c, hat[k]);
      load<V>(static_cast<const Y*>(p.grad_y) + at + c, g[k]);
      load<V>(p.weight + c, w);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        hat[k][i] = (hat[k][i] - mu) * inverse;
        total_w[k][i] += g[k][i] * hat[k][i];
        total_b[k][i] += g[k][i];
        g[k][i] *= w[i];
        sum += g[k][i];
        dot += g[k][i] * hat[k][i];
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
      if (p.grad_r_new) load<V>(static_cast<const R*>(p.grad_r_new) + at + c, passed);
#pragma unroll
      for (int i = 0; i < V; ++i) passed[i] += inverse * (g[k][i] - sum - hat[k][i] * dot);
      store<V>(static_cast<R*>(p.grad_r) + at + c, passed);
      if (p.grad_branch) {
#pragma unroll
        for (int i = 0; i < V; ++i) passed[i] *= s;
        store<V>(static_cast<B*>(p.grad_branch) + at + c, passed);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kItems<V>; ++k) {
    const int64_t c = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V;
    if (c >= p.C) break;
    store<V>(p.partial_w + blockIdx.x * p.C + c, total_w[k]);
    store<V>(p.partial_b + blockIdx.x * p.C + c, total_b[k]);
  }
}

// Whole warps, at most 1024 threads.
unsigned threads(int64_t C, int V) {
  const int64_t wanted = (C + V * 32 - 1) / (V * 32) * 32;
  return static_cast<unsigned>(wanted < 1024 ? wanted : 1024);
}

template <class R, class B, class Y>
int launch(const Forward& p, int64_t rows, bool wide, cudaStream_t stream) {
  if (wide) {
    fwd<R, B, Y, 4><<<static_cast<unsigned>(rows), threads(p.C, 4), 0, stream>>>(p);
  } else {
    fwd<R, B, Y, 1><<<static_cast<unsigned>(rows), threads(p.C, 1), 0, stream>>>(p);
  }
  return cudaGetLastError();
}

template <class R, class B, class Y>
int launch(const Backward& p, int64_t, bool wide, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((p.rows + p.step - 1) / p.step);
  if (wide) {
    bwd<R, B, Y, 4><<<blocks, threads(p.C, 4), 0, stream>>>(p);
  } else {
    bwd<R, B, Y, 1><<<blocks, threads(p.C, 1), 0, stream>>>(p);
  }
  return cudaGetLastError();
}

// One 16-bit type L beside float: everything L, or a float stream with branch and y of either type.
template <class L, class P>
int with_types(const P& p, int64_t rows, bool wide, int64_t r, int64_t branch, int64_t y, cudaStream_t stream) {
  if (r == kFloat) {
    if (branch == kFloat) {
      return y == kFloat ? launch<float, float, float>(p, rows, wide, stream)
                         : launch<float, float, L>(p, rows, wide, stream);
    }
    return y == kFloat ? launch<float, L, float>(p, rows, wide, stream) : launch<float, L, L>(p, rows, wide, stream);
  }
  if (branch == kFloat || y == kFloat) return cudaErrorInvalidValue;
  return launch<L, L, L>(p, rows, wide, stream);
}

template <class P>
int dispatch(const P& p, int64_t rows, bool wide, int64_t r, int64_t branch, int64_t y, cudaStream_t stream) {
  const bool has_half = r == kHalf || branch == kHalf || y == kHalf;
  const bool has_bfloat16 = r == kBfloat16 || branch == kBfloat16 || y == kBfloat16;
  if (p.C > kWidest || (has_half && has_bfloat16)) return cudaErrorInvalidValue;
  return has_half ? with_types<__half>(p, rows, wide, r, branch, y, stream)
                  : with_types<__nv_bfloat16>(p, rows, wide, r, branch, y, stream);
}

}  // namespace
}  // namespace mimdet

// dtypes are codes of Dtype. branch and scale may be null.
MIMDET_CUDA_API int mimdet_add_layer_norm_fwd(const void* r, const void* branch, const float* scale,
                                              const float* weight, const float* bias, void* r_new, void* y,
                                              float* mean, float* rstd, int64_t rows, int64_t N, int64_t C, float eps,
                                              int64_t r_dtype, int64_t branch_dtype, int64_t y_dtype,
                                              cudaStream_t stream) {
  using namespace mimdet;
  const Forward p{r, branch, scale, weight, bias, r_new, y, mean, rstd, N, C, eps};
  const bool wide = C % 4 == 0 && aligned(r) && aligned(branch) && aligned(weight) && aligned(bias) &&
                    aligned(r_new) && aligned(y);
  return dispatch(p, rows, wide, r_dtype, branch_dtype, y_dtype, stream);
}

// grad_r_new, scale and grad_branch may be null.
MIMDET_CUDA_API int mimdet_add_layer_norm_bwd(const void* grad_r_new, const void* grad_y, const void* r_new,
                                              const float* mean, const float* rstd, const float* scale,
                                              const float* weight, void* grad_r, void* grad_branch, float* partial_w,
                                              float* partial_b, int64_t rows, int64_t N, int64_t C, int64_t step,
                                              int64_t r_dtype, int64_t branch_dtype, int64_t y_dtype,
                                              cudaStream_t stream) {
  using namespace mimdet;
  const Backward p{grad_r_new, grad_y, r_new, mean, rstd, scale, weight, grad_r, grad_branch, partial_w, partial_b,
                   rows, N, C, step};
  const bool wide = C % 4 == 0 && aligned(grad_r_new) && aligned(grad_y) && aligned(r_new) && aligned(weight) &&
                    aligned(grad_r) && aligned(grad_branch) && aligned(partial_w) && aligned(partial_b);
  return dispatch(p, rows, wide, r_dtype, branch_dtype, y_dtype, stream);
}
