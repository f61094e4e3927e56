// LayerNorm over the channels of each position and exact GELU for CUDA, without torch.
//
// nhwc maps: a group of threads holds a row of channels in registers. nchw maps: a block reads the channels of a run of
// positions three times, for the mean, the variance and the result. No atomics: results repeat bitwise.
#include "cuda_image_norm.h"

namespace mimdet {
namespace {

// Elements of a row that a thread holds, and threads of a block: kThreads, kMost for rows that need more.
constexpr int kHeld = 8, kMost = 1024;

// Sum over the blockDim.x threads of a row: a power of two up to a warp, or all warps of a block.
__device__ __forceinline__ float row_sum(float x) {
  if (blockDim.x > 32) return block_sum(x);
  for (int offset = blockDim.x / 2; offset; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

__device__ __forceinline__ bool valid_row(const Maps& maps, int64_t row) {
  if (maps.sizes == nullptr) return true;
  return maps.is_valid(row / maps.positions(), static_cast<unsigned>(row % maps.positions()));
}

// x, y (rows, C); weight, bias (C,); mean, rstd (rows,). A block takes blockDim.y rows.
template <class T, int V, int kLimit>
__global__ void __launch_bounds__(kLimit, 1)
    forward_nhwc(const T* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                 T* __restrict__ y, float* __restrict__ mean, float* __restrict__ rstd, const Maps maps, int64_t rows,
                 float eps) {
  constexpr int kItems = kHeld / V;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, C = maps.C;
  const bool here = row < rows, use = here && valid_row(maps, row);
  const T* from = x + row * C;
  T* to = y + row * C;
  float value[kItems][V] = {};
  float sum = 0.0f, squares = 0.0f, rest = 0.0f;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int64_t c = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V;
    if (use && c < C) load<V>(from + c, value[k]);
#pragma unroll
    for (int i = 0; i < V; ++i) sum += value[k][i];
  }
  float x_mean = row_sum(sum) / C;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int64_t c = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V;
    if (!use || c >= C) break;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float x_centered = value[k][i] - x_mean;
      squares += x_centered * x_centered;
      rest += x_centered;
    }
  }
  squares = row_sum(squares);
  rest = row_sum(rest);
  // shift corrects both moments for the rounding of the mean.
  const float shift = rest / C;
  x_mean += shift;
  const float x_rstd = 1.0f / sqrtf((squares - rest * shift) / C + eps);
  if (!here) return;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int64_t c = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V;
    if (c >= C) break;
    float w[V], b[V];
    load_floats<V>(weight + c, w);
    load_floats<V>(bias + c, b);
#pragma unroll
    for (int i = 0; i < V; ++i) w[i] = use ? gelu((value[k][i] - x_mean) * x_rstd * w[i] + b[i]) : 0.0f;
    store<V>(to + c, w);
  }
  if (threadIdx.x == 0) {
    mean[row] = x_mean;
    rstd[row] = use ? x_rstd : 0.0f;
  }
}

// dy, x, dx (rows, C); mean, rstd (rows,); sums (gridDim.x, 2, C), of dz = dy * gelu'(z) and of dz * x_hat. A block
// takes step rows, blockDim.y at once.
template <class T, int V, int kLimit>
__global__ void __launch_bounds__(kLimit, 1)
    backward_nhwc(const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ weight,
                  const float* __restrict__ bias, const float* __restrict__ mean, const float* __restrict__ rstd,
                  T* __restrict__ dx, float* __restrict__ sums, const Maps maps, int64_t rows, int64_t step) {
  constexpr int kItems = kHeld / V;
  const int64_t first = blockIdx.x * step, last = first + step < rows ? first + step : rows, C = maps.C;
  float total[kItems][V] = {}, product[kItems][V] = {};
  // Warp shuffles need all threads of a warp, those without a row too.
  for (int64_t begin = first; begin < last; begin += blockDim.y) {
    const int64_t row = begin + threadIdx.y;
    const bool here = row < last, use = here && valid_row(maps, row);
    const float x_mean = use ? mean[row] : 0.0f, x_rstd = use ? rstd[row] : 0.0f;
    float x_hat[kItems][V] = {}, g[kItems][V] = {};
    float a = 0.0f, dot = 0.0f;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t c = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V;
      if (!use || c >= C) break;
      float w[V], b[V];
      load<V>(x + row * C + c, x_hat[k]);
      load<V>(dy + row * C + c, g[k]);
      load_floats<V>(weight + c, w);
      load_floats<V>(bias + c, b);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        x_hat[k][i] = (x_hat[k][i] - x_mean) * x_rstd;
        g[k][i] *= gelu_derivative(x_hat[k][i] * w[i] + b[i]);
        total[k][i] += g[k][i];
        product[k][i] += g[k][i] * x_hat[k][i];
        g[k][i] *= w[i];
        a += g[k][i];
        dot += g[k][i] * x_hat[k][i];
      }
    }
    a = row_sum(a) / C;
    dot = row_sum(dot) / C;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t c = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V;
      if (!here || c >= C) break;
#pragma unroll
      for (int i = 0; i < V; ++i) g[k][i] = x_rstd * (g[k][i] - a - x_hat[k][i] * dot);
      store<V>(dx + row * C + c, g[k]);
    }
  }
  // Long rows have a block to themselves.
  if constexpr (kLimit == kThreads) {
    __shared__ float shared[2][kThreads * kHeld];
    const int across = blockDim.x * kHeld, mine = threadIdx.y * across + threadIdx.x * kHeld;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        shared[0][mine + k * V + i] = total[k][i];
        shared[1][mine + k * V + i] = product[k][i];
      }
    }
    __syncthreads();
    if (threadIdx.y != 0) return;
    for (int y = 1; y < blockDim.y; ++y) {
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          total[k][i] += shared[0][mine + y * across + k * V + i];
          product[k][i] += shared[1][mine + y * across + k * V + i];
        }
      }
    }
  }
  sums += blockIdx.x * 2 * C;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int64_t c = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * V;
    if (c >= C) break;
    store_floats<V>(sums + c, total[k]);
    store_floats<V>(sums + C + c, product[k]);
  }
}

// Threads along the positions of a channel-major map: whole lines of the caches.
template <int V>
constexpr int kAcross = V == 1 ? 32 : 8;
template <int V>
constexpr int kPositions = kAcross<V>* V;

// Sums over threadIdx.y of x, for all of them. Always in one order.
template <int V>
__device__ __forceinline__ void column_sum(float (&x)[V]) {
  __shared__ float shared[kThreads * V];
  constexpr int kRows = kThreads / kAcross<V>;
  const int mine = threadIdx.x * V, thread = threadIdx.y * kAcross<V> + threadIdx.x;
#pragma unroll
  for (int i = 0; i < V; ++i) shared[threadIdx.y * kPositions<V> + mine + i] = x[i];
  __syncthreads();
  if (thread < kPositions<V>) {
    float sum = 0.0f;
    for (int row = 0; row < kRows; ++row) sum += shared[row * kPositions<V> + thread];
    shared[thread] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = shared[mine + i];
  __syncthreads();
}

// x, y (B, C, S); mean, rstd (B, S). A block takes kPositions of one sample; a sample has `blocks` of them.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    forward_nchw(const T* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                 T* __restrict__ y, float* __restrict__ mean, float* __restrict__ rstd, const Maps maps,
                 int64_t blocks, float eps) {
  const int64_t sample = blockIdx.x / blocks, S = maps.positions(), C = maps.C;
  const float inverse = 1.0f / C;
  const int64_t position = blockIdx.x % blocks * kPositions<V> + threadIdx.x * V;
  const bool here = position < S;
  const int64_t base = sample * maps.size() + position;
  bool use[V];
  float value[V], x_mean[V] = {}, squares[V] = {}, rest[V] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) use[i] = here && maps.is_valid(sample, static_cast<unsigned>(position + i));
  for (int64_t c = threadIdx.y; here && c < C; c += blockDim.y) {
    load<V>(x + base + c * S, value);
#pragma unroll
    for (int i = 0; i < V; ++i) x_mean[i] += use[i] ? value[i] : 0.0f;
  }
  column_sum<V>(x_mean);
#pragma unroll
  for (int i = 0; i < V; ++i) x_mean[i] *= inverse;
  for (int64_t c = threadIdx.y; here && c < C; c += blockDim.y) {
    load<V>(x + base + c * S, value);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float x_centered = use[i] ? value[i] - x_mean[i] : 0.0f;
      squares[i] += x_centered * x_centered;
      rest[i] += x_centered;
    }
  }
  column_sum<V>(squares);
  column_sum<V>(rest);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    // shift corrects both moments for the rounding of the mean.
    const float shift = rest[i] * inverse;
    x_mean[i] += shift;
    squares[i] = use[i] ? rsqrtf((squares[i] - rest[i] * shift) * inverse + eps) : 0.0f;
  }
  if (!here) return;
  for (int64_t c = threadIdx.y; c < C; c += blockDim.y) {
    load<V>(x + base + c * S, value);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      value[i] = use[i] ? gelu((value[i] - x_mean[i]) * squares[i] * weight[c] + bias[c]) : 0.0f;
    }
    store<V>(y + base + c * S, value);
  }
  if (threadIdx.y == 0) {
    store_floats<V>(mean + sample * S + position, x_mean);
    store_floats<V>(rstd + sample * S + position, squares);
  }
}

// dy, x, dx (B, C, S); mean, rstd (B, S); sums (gridDim.x, 2, C), of dz = dy * gelu'(z) and of dz * x_hat. A block
// takes step runs of kPositions; a sample has `blocks` of them, the batch `tiles`.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    backward_nchw(const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ weight,
                  const float* __restrict__ bias, const float* __restrict__ mean, const float* __restrict__ rstd,
                  T* __restrict__ dx, float* sums, const Maps maps, int64_t blocks, int64_t tiles, int64_t step) {
  const int64_t S = maps.positions(), C = maps.C, first = blockIdx.x * step;
  const float inverse = 1.0f / C;
  const int64_t last = first + step < tiles ? first + step : tiles;
  sums += blockIdx.x * 2 * C;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t sample = tile / blocks, position = tile % blocks * kPositions<V> + threadIdx.x * V;
    const bool here = position < S;
    const int64_t base = sample * maps.size() + position;
    bool use[V];
    float x_mean[V] = {}, x_rstd[V] = {}, a[V] = {}, k[V] = {}, x_hat[V], g[V];
    if (here) {
      load_floats<V>(mean + sample * S + position, x_mean);
      load_floats<V>(rstd + sample * S + position, x_rstd);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) use[i] = here && maps.is_valid(sample, static_cast<unsigned>(position + i));
    // Warp shuffles need all threads of a warp.
    for (int64_t begin = 0; begin < C; begin += blockDim.y) {
      const int64_t c = begin + threadIdx.y;
      float total = 0.0f, product = 0.0f;
      if (here && c < C) {
        const float w = weight[c], b = bias[c];
        load<V>(x + base + c * S, x_hat);
        load<V>(dy + base + c * S, g);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          x_hat[i] = use[i] ? (x_hat[i] - x_mean[i]) * x_rstd[i] : 0.0f;
          g[i] = use[i] ? g[i] * gelu_derivative(x_hat[i] * w + b) : 0.0f;
          total += g[i];
          product += g[i] * x_hat[i];
          g[i] *= w;
          a[i] += g[i];
          k[i] += g[i] * x_hat[i];
        }
      }
#pragma unroll
      for (int offset = kAcross<V> / 2; offset; offset >>= 1) {
        total += __shfl_xor_sync(0xffffffffu, total, offset);
        product += __shfl_xor_sync(0xffffffffu, product, offset);
      }
      // One thread owns a channel's sums.
      if (threadIdx.x == 0 && c < C) {
        sums[c] = tile == first ? total : sums[c] + total;
        sums[C + c] = tile == first ? product : sums[C + c] + product;
      }
    }
    column_sum<V>(a);
    column_sum<V>(k);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      a[i] *= inverse;
      k[i] *= inverse;
    }
    for (int64_t c = threadIdx.y; here && c < C; c += blockDim.y) {
      const float w = weight[c], b = bias[c];
      load<V>(x + base + c * S, x_hat);
      load<V>(dy + base + c * S, g);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        x_hat[i] = (x_hat[i] - x_mean[i]) * x_rstd[i];
        g[i] = g[i] * gelu_derivative(x_hat[i] * w + b) * w;
        g[i] = use[i] ? x_rstd[i] * (g[i] - a[i] - x_hat[i] * k[i]) : 0.0f;
      }
      store<V>(dx + base + c * S, g);
    }
  }
}

// Threads of a row and rows of a block.
dim3 row_block(int64_t C) {
  const int64_t threads = (C + kHeld - 1) / kHeld;
  if (threads > 32) return dim3(static_cast<unsigned>((threads + 31) / 32 * 32));
  unsigned across = 1;
  while (across < threads) across *= 2;
  return dim3(across, kThreads / across);
}

bool divides(const Maps& maps, int lanes) { return (maps.nhwc ? maps.C : maps.positions()) % lanes == 0; }

}  // namespace
}  // namespace mimdet

MIMDET_CUDA_API int mimdet_layer_norm_gelu_fwd(const void* x, const float* weight, const float* bias,
                                               const int32_t* sizes, float eps, int64_t nhwc, void* y, float* mean,
                                               float* rstd, int64_t B, int64_t C, int64_t H, int64_t W, int64_t dtype,
                                               cudaStream_t stream) {
  using namespace mimdet;
  const Maps maps{B, C, H, W, nhwc != 0, sizes};
  if (maps.nhwc && C > kHeld * kMost) return cudaErrorInvalidValue;
  const auto wide = [&](int lanes) {
    return divides(maps, lanes) && aligned(x) && aligned(weight) && aligned(bias) && aligned(y) && aligned(mean) &&
           aligned(rstd);
  };
  return by_dtype(dtype, wide, [&](auto element, auto lanes) {
    using T = decltype(element);
    constexpr int V = decltype(lanes)::value;
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    const int64_t rows = B * maps.positions();
    if (!maps.nhwc) {
      const unsigned blocks = blocks_for(maps.positions(), kPositions<V>);
      const dim3 block(kAcross<V>, kThreads / kAcross<V>);
      forward_nchw<T, V><<<static_cast<unsigned>(B * blocks), block, 0, stream>>>(from, weight, bias, to, mean, rstd,
                                                                                maps, blocks, eps);
      return;
    }
    const dim3 block = row_block(C);
    const auto run = block.x <= kThreads ? forward_nhwc<T, V, kThreads> : forward_nhwc<T, V, kMost>;
    run<<<blocks_for(rows, block.y), block, 0, stream>>>(from, weight, bias, to, mean, rstd, maps, rows, eps);
  });
}

// Scratch: sums (parts, 2, C), where parts blocks share the work evenly.
MIMDET_CUDA_API int mimdet_layer_norm_gelu_bwd(const void* dy, const void* x, const float* weight, const float* bias,
                                               const int32_t* sizes, const float* mean, const float* rstd,
                                               int64_t nhwc, float* sums, void* dx, float* dparameters,
                                               int64_t B, int64_t C, int64_t H, int64_t W, int64_t parts,
                                               int64_t dtype, cudaStream_t stream) {
  using namespace mimdet;
  const Maps maps{B, C, H, W, nhwc != 0, sizes};
  if (maps.nhwc && C > kHeld * kMost) return cudaErrorInvalidValue;
  const auto wide = [&](int lanes) {
    return divides(maps, lanes) && aligned(dy) && aligned(x) && aligned(weight) && aligned(bias) && aligned(mean) &&
           aligned(rstd) && aligned(dx) && aligned(sums);
  };
  return by_dtype(dtype, wide, [&](auto element, auto lanes) {
    using T = decltype(element);
    constexpr int V = decltype(lanes)::value;
    const auto *grad = static_cast<const T*>(dy), *from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(dx);
    const int64_t rows = B * maps.positions();
    int64_t grid;
    if (!maps.nhwc) {
      const int64_t blocks = blocks_for(maps.positions(), kPositions<V>), tiles = B * blocks;
      const int64_t step = blocks_for(tiles, parts);
      const dim3 block(kAcross<V>, kThreads / kAcross<V>);
      grid = blocks_for(tiles, step);
      backward_nchw<T, V><<<static_cast<unsigned>(grid), block, 0, stream>>>(grad, from, weight, bias, mean, rstd, to,
                                                                           sums, maps, blocks, tiles, step);
    } else {
      const int64_t step = blocks_for(rows, parts);
      grid = blocks_for(rows, step);
      const dim3 block = row_block(C);
      const auto run = block.x <= kThreads ? backward_nhwc<T, V, kThreads> : backward_nhwc<T, V, kMost>;
      run<<<static_cast<unsigned>(grid), block, 0, stream>>>(grad, from, weight, bias, mean, rstd, to, sums, maps,
                                                             rows, step);
    }
    launch_add_up(sums, nullptr, dparameters, dparameters + C, 1, grid, C, stream);
  });
}
