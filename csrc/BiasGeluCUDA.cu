// Bias and exact GELU for CUDA, without torch.
#include "cuda_gelu.h"
#include "cuda_rows.h"

namespace mimdet {
namespace {

// Most threads of a block, and rows that a thread of fwd takes.
constexpr int kThreads = 256;
constexpr int64_t kRows = 4;

// The V columns of a thread; may be past the last one.
template <int V>
__device__ __forceinline__ int64_t thread_column() {
  return (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
}

// x, y (rows, C); bias (C,). A block takes kRows rows of blockDim.x * V columns.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    fwd(const T* __restrict__ x, const float* __restrict__ bias, T* __restrict__ y, int64_t rows, int64_t C) {
  const int64_t column = thread_column<V>();
  if (column >= C) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t last = first + kRows < rows ? first + kRows : rows;
  float b[V];
  load_floats<V>(bias + column, b);
  for (int64_t row = first; row < last; ++row) {
    float h[V];
    load<V>(x + row * C + column, h);
#pragma unroll
    for (int i = 0; i < V; ++i) h[i] = gelu(h[i] + b[i]);
    store<V>(y + row * C + column, h);
  }
}

// dy, x, dx (rows, C); bias (C,); db_partial (gridDim.x, C). A block takes `step` rows of blockDim.x * V columns.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    bwd(const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ bias, T* __restrict__ dx,
        float* __restrict__ db_partial, int64_t rows, int64_t C, int64_t step) {
  const int64_t column = thread_column<V>();
  if (column >= C) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * step;
  const int64_t last = first + step < rows ? first + step : rows;
  float b[V], total[V] = {};
  load_floats<V>(bias + column, b);
  for (int64_t row = first; row < last; ++row) {
    float h[V], g[V];
    load<V>(x + row * C + column, h);
    load<V>(dy + row * C + column, g);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      h[i] += b[i];
      g[i] *= gelu_derivative(h[i]);
      total[i] += g[i];
    }
    store<V>(dx + row * C + column, g);
  }
  store_floats<V>(db_partial + blockIdx.x * C + column, total);
}

// Blocks of rows by blocks of columns, and the threads of a block: whole warps, as many in each block of columns.
struct Grid {
  dim3 blocks, threads;

  Grid(int64_t rows, int64_t rows_per_block, int64_t vectors) {
    const unsigned across = blocks_for(vectors, kThreads);
    blocks = dim3(blocks_for(rows, rows_per_block), across);
    threads = dim3(blocks_for(blocks_for(vectors, across), 32) * 32);
  }
};

}  // namespace
}  // namespace mimdet

MIMDET_CUDA_API int mimdet_bias_gelu_fwd(const void* x, const float* bias, void* y, int64_t rows, int64_t C,
                                         int64_t dtype, cudaStream_t stream) {
  using namespace mimdet;
  const auto wide = [&](int lanes) { return C % lanes == 0 && aligned(x) && aligned(bias) && aligned(y); };
  return by_dtype(dtype, wide, [&](auto element, auto lanes) {
    using T = decltype(element);
    constexpr int V = decltype(lanes)::value;
    const Grid grid(rows, kRows, C / V);
    fwd<T, V><<<grid.blocks, grid.threads, 0, stream>>>(static_cast<const T*>(x), bias, static_cast<T*>(y), rows, C);
  });
}

MIMDET_CUDA_API int mimdet_bias_gelu_bwd(const void* dy, const void* x, const float* bias, int64_t step, void* dx,
                                         float* db_partial, int64_t rows, int64_t C, int64_t dtype,
                                         cudaStream_t stream) {
  using namespace mimdet;
  const auto wide = [&](int lanes) {
    return C % lanes == 0 && aligned(dy) && aligned(x) && aligned(bias) && aligned(dx) && aligned(db_partial);
  };
  return by_dtype(dtype, wide, [&](auto element, auto lanes) {
    using T = decltype(element);
    constexpr int V = decltype(lanes)::value;
    const Grid grid(rows, step, C / V);
    bwd<T, V><<<grid.blocks, grid.threads, 0, stream>>>(static_cast<const T*>(dy), static_cast<const T*>(x), bias,
                                                        static_cast<T*>(dx), db_partial, rows, C, step);
  });
}
