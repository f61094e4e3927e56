// Bias and exact GELU for CUDA, without torch.
#include "cuda_gelu.h"
#include "cuda_rows.h"

namespace mimdet {
namespace {

constexpr int kThreads = 256;

// x, y (count / C, C); bias (C,).
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    fwd(const T* __restrict__ x, const float* __restrict__ bias, T* __restrict__ y, int64_t count, int64_t C) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (at >= count) return;
  float h[V], b[V];
  load<V>(x + at, h);
  load<V>(bias + at % C, b);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    h[i] += b[i];
    h[i] = gelu<T>(h[i]);
  }
  store<V>(y + at, h);
}

// dy, x, dx (rows, C); bias (C,); db_partial (gridDim.x, C). A block takes `step` rows of kThreads * V columns.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    bwd(const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ bias, T* __restrict__ dx,
        float* __restrict__ db_partial, int64_t rows, int64_t C, int64_t step) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * V;
  if (column >= C) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * step;
  const int64_t last = first + step < rows ? first + step : rows;
  float b[V], total[V] = {};
  load<V>(bias + column, b);
  for (int64_t row = first; row < last; ++row) {
    float h[V], g[V];
    load<V>(x + row * C + column, h);
    load<V>(dy + row * C + column, g);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      h[i] += b[i];
      g[i] *= gelu_derivative<T>(h[i]);
      total[i] += g[i];
    }
    store<V>(dx + row * C + column, g);
  }
  store<V>(db_partial + blockIdx.x * C + column, total);
}

template <class T, int V>
int run_fwd(const void* x, const float* bias, void* y, int64_t rows, int64_t C, cudaStream_t stream) {
  const int64_t count = rows * C, work = kThreads * V;
  fwd<T, V><<<static_cast<unsigned>((count + work - 1) / work), kThreads, 0, stream>>>(
      static_cast<const T*>(x), bias, static_cast<T*>(y), count, C);
  return cudaGetLastError();
}

template <class T, int V>
int run_bwd(const void* dy, const void* x, const float* bias, void* dx, float* db_partial, int64_t rows,
            int64_t C, int64_t step, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((rows + step - 1) / step),
                  static_cast<unsigned>((C + kThreads * V - 1) / (kThreads * V)));
  bwd<T, V><<<grid, kThreads, 0, stream>>>(static_cast<const T*>(dy), static_cast<const T*>(x), bias,
                                           static_cast<T*>(dx), db_partial, rows, C, step);
  return cudaGetLastError();
}

}  // namespace
}  // namespace mimdet

MIMDET_CUDA_API int mimdet_bias_gelu_fwd(const void* x, const float* bias, void* y, int64_t rows, int64_t C,
                                         int64_t dtype, cudaStream_t stream) {
  using namespace mimdet;
  const bool wide = C % 4 == 0 && aligned(x) && aligned(bias) && aligned(y);
  switch (dtype) {
    case kFloat:
      return (wide ? run_fwd<float, 4> : run_fwd<float, 1>)(x, bias, y, rows, C, stream);
    case kBfloat16:
      return (wide ? run_fwd<__nv_bfloat16, 4> : run_fwd<__nv_bfloat16, 1>)(x, bias, y, rows, C, stream);
    case kHalf:
      return (wide ? run_fwd<__half, 4> : run_fwd<__half, 1>)(x, bias, y, rows, C, stream);
  }
  return cudaErrorInvalidValue;
}

MIMDET_CUDA_API int mimdet_bias_gelu_bwd(const void* dy, const void* x, const float* bias, int64_t step, void* dx,
                                         float* db_partial, int64_t rows, int64_t C, int64_t dtype,
                                         cudaStream_t stream) {
  using namespace mimdet;
  const bool wide =
      C % 4 == 0 && aligned(dy) && aligned(x) && aligned(bias) && aligned(dx) && aligned(db_partial);
  switch (dtype) {
    case kFloat:
      return (wide ? run_bwd<float, 4> : run_bwd<float, 1>)(dy, x, bias, dx, db_partial, rows, C, step, stream);
    case kBfloat16:
      return (wide ? run_bwd<__nv_bfloat16, 4> : run_bwd<__nv_bfloat16, 1>)(dy, x, bias, dx, db_partial, rows, C,
                                                                           step, stream);
    case kHalf:
      return (wide ? run_bwd<__half, 4> : run_bwd<__half, 1>)(dy, x, bias, dx, db_partial, rows, C, step,
                                                              stream);
  }
  return cudaErrorInvalidValue;
}
