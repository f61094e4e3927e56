// Batch norm and ReLU for CUDA, without torch.
//
// The cells of a batch are counted through, map after map. Many blocks share a channel: each leaves the moments, or the
// gradients' sums, of its cells, which are combined in one order (Chan, Golub, LeVeque 1979). No atomics: results
// repeat bitwise.
#include "cuda_image_norm.h"

namespace mimdet {
namespace {

// Cells that a thread of forward and backward takes.
constexpr int kCells = 4;

// Where the threads of a block are: blockDim.x vectors of channels by blockDim.y cells (nhwc), or kThreads cells of the
// channel blockIdx.y.
struct Place {
  int64_t channel;
  unsigned lane, lanes;

  template <int V>
  static __device__ __forceinline__ Place make(const Maps& maps) {
    if (!maps.nhwc) return {static_cast<int64_t>(blockIdx.y), threadIdx.x, kThreads};
    return {(static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V, threadIdx.y, blockDim.y};
  }
};

// Offset of a cell's channel, and whether the cell is valid.
__device__ __forceinline__ int64_t find(const Maps& maps, unsigned cell, int64_t channel, bool& valid) {
  valid = true;
  if (maps.nhwc && maps.sizes == nullptr) return static_cast<int64_t>(cell) * maps.C + channel;
  const unsigned S = static_cast<unsigned>(maps.positions()), sample = cell / S, position = cell - sample * S;
  valid = maps.is_valid(sample, position);
  return maps.nhwc ? static_cast<int64_t>(cell) * maps.C + channel
                   : (static_cast<int64_t>(sample) * maps.C + channel) * maps.positions() + position;
}

// x -> parts (gridDim.x, C): moments of step cells.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    moments(const T* __restrict__ x, Moments* __restrict__ parts, const Maps maps, unsigned step) {
  __shared__ Moments shared[kThreads * V];
  const Place place = Place::make<V>(maps);
  const unsigned cells = static_cast<unsigned>(maps.B * maps.positions()), first = blockIdx.x * step;
  const unsigned last = first + step < cells ? first + step : cells;
  // x minus a thread's first value, exact where they are small.
  float count = 0.0f, center[V] = {}, sum[V] = {}, square[V] = {};
  if (place.channel < maps.C) {
#pragma unroll 4
    for (unsigned cell = first + place.lane; cell < last; cell += place.lanes) {
      bool valid;
      const int64_t at = find(maps, cell, place.channel, valid);
      if (!valid) continue;
      float value[V];
      load<V>(x + at, value);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (count == 0.0f) center[i] = value[i];
        const float d = value[i] - center[i];
        sum[i] += d;
        square[i] += d * d;
      }
      count += 1.0f;
    }
  }
  // The threads of one channel: those of one threadIdx.x (nhwc), else all.
  const unsigned mine = threadIdx.y * blockDim.x + threadIdx.x;
  const float inverse = count > 0.0f ? __fdividef(1.0f, count) : 0.0f;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float rest = sum[i] * inverse;
    shared[mine * V + i] = {count, center[i], rest, square[i] - sum[i] * rest};
  }
  __syncthreads();
  const unsigned apart = maps.nhwc ? blockDim.x * V : V;
  unsigned others = maps.nhwc ? blockDim.y : kThreads;
  // Halving an odd number leaves its middle for the next round.
  while (others > 1) {
    const unsigned half = (others + 1) / 2;
    if (place.lane < others - half) {
#pragma unroll
      for (int i = 0; i < V; ++i) shared[mine * V + i] = merge(shared[mine * V + i], shared[mine * V + i + half * apart]);
    }
    __syncthreads();
    others = half;
  }
  if (place.lane != 0 || place.channel >= maps.C) return;
  parts += static_cast<int64_t>(blockIdx.x) * maps.C + place.channel;
#pragma unroll
  for (int i = 0; i < V; ++i) parts[i] = shared[mine * V + i];
}

// parts (count, C) -> moments (2 * C + 1,). A block of 32 x 32 threads takes 32 channels.
__global__ void __launch_bounds__(1024)
    combine(const Moments* __restrict__ parts, float* __restrict__ moments, int64_t count, int64_t C) {
  __shared__ Moments shared[32][33];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  Moments all{};
  for (int64_t part = threadIdx.y; channel < C && part < count; part += 32) {
    all = merge(all, parts[part * C + channel]);
  }
  shared[threadIdx.y][threadIdx.x] = all;
  for (int half = 16; half; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
      all = merge(all, shared[threadIdx.y + half][threadIdx.x]);
      shared[threadIdx.y][threadIdx.x] = all;
    }
  }
  if (threadIdx.y != 0 || channel >= C) return;
  moments[channel] = all.mean + all.rest;
  moments[C + channel] = all.m2;
  if (channel == 0) moments[2 * C] = all.count;
}

// parts (P, 2 * C + 1) -> statistics (3 * C + 1,): mean, rstd, variance to keep, 1 / total. In double, part by part.
__global__ void __launch_bounds__(kThreads)
    merge_parts(const float* __restrict__ parts, float* __restrict__ statistics, int64_t P, int64_t C, float eps,
                bool unbiased) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = 2 * C + 1;
  if (channel >= C) return;
  double total = 0.0, mean = 0.0, m2 = 0.0;
  for (int64_t part = 0; part < P; ++part) {
    const double weight = parts[part * row + 2 * C];
    total += weight;
    mean += weight * parts[part * row + channel];
  }
  const double inverse = total > 0.0 ? 1.0 / total : 0.0;
  mean *= inverse;
  for (int64_t part = 0; part < P; ++part) {
    const double off = parts[part * row + channel] - mean;
    m2 += parts[part * row + C + channel] + parts[part * row + 2 * C] * off * off;
  }
  const double variance = m2 * inverse;
  statistics[channel] = static_cast<float>(mean);
  statistics[C + channel] = 1.0f / sqrtf(static_cast<float>(variance) + eps);
  statistics[2 * C + channel] = static_cast<float>(unbiased ? m2 / (total > 2.0 ? total - 1.0 : 1.0) : variance);
  if (channel == 0) statistics[3 * C] = static_cast<float>(inverse);
}

struct Parameters {
  const float *weight, *bias, *mean, *rstd;
};

// Those of V channels; gain = weight * rstd.
template <int V>
struct Channels {
  float gain[V], bias[V], mean[V], rstd[V];

  __device__ __forceinline__ Channels(const Parameters& p, int64_t channel) {
    load_floats<V>(p.weight + channel, gain);
    load_floats<V>(p.bias + channel, bias);
    load_floats<V>(p.mean + channel, mean);
    load_floats<V>(p.rstd + channel, rstd);
#pragma unroll
    for (int i = 0; i < V; ++i) gain[i] *= rstd[i];
  }

  // dy before the ReLU, centered is x minus the mean.
  __device__ __forceinline__ float before_relu(int i, float dy, float centered, bool relu) const {
    return relu && centered * gain[i] + bias[i] <= 0.0f ? 0.0f : dy;
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    forward(const T* __restrict__ x, const Parameters parameters, T* __restrict__ y, const Maps maps, bool relu) {
  const Place place = Place::make<V>(maps);
  if (place.channel >= maps.C) return;
  const unsigned cells = static_cast<unsigned>(maps.B * maps.positions());
  const Channels<V> channels(parameters, place.channel);
  const unsigned first = blockIdx.x * (kCells * place.lanes) + place.lane;
#pragma unroll
  for (int k = 0; k < kCells; ++k) {
    const unsigned cell = first + k * place.lanes;
    if (cell >= cells) break;
    bool valid;
    const int64_t at = find(maps, cell, place.channel, valid);
    float value[V] = {};
    if (valid) {
      load<V>(x + at, value);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        value[i] = (value[i] - channels.mean[i]) * channels.gain[i] + channels.bias[i];
        if (relu && value[i] < 0.0f) value[i] = 0.0f;
      }
    }
    store<V>(y + at, value);
  }
}

// Sums of dz and of dz * x_hat over step cells -> parts (gridDim.x, 2, C).
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    gradient_sums(const T* __restrict__ dy, const T* __restrict__ x, const Parameters parameters,
                  float* __restrict__ parts, const Maps maps, unsigned step, bool relu) {
  __shared__ float shared[2][kThreads * V];
  const Place place = Place::make<V>(maps);
  const unsigned cells = static_cast<unsigned>(maps.B * maps.positions()), first = blockIdx.x * step;
  const unsigned last = first + step < cells ? first + step : cells;
  float total[V] = {}, product[V] = {};
  if (place.channel < maps.C) {
    const Channels<V> channels(parameters, place.channel);
#pragma unroll 2
    for (unsigned cell = first + place.lane; cell < last; cell += place.lanes) {
      bool valid;
      const int64_t at = find(maps, cell, place.channel, valid);
      if (!valid) continue;
      float value[V], dz[V];
      load<V>(x + at, value);
      load<V>(dy + at, dz);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        value[i] -= channels.mean[i];
        dz[i] = channels.before_relu(i, dz[i], value[i], relu);
        total[i] += dz[i];
        product[i] += dz[i] * (value[i] * channels.rstd[i]);
      }
    }
  }
  if (!maps.nhwc) {
    total[0] = block_sum(total[0]);
    product[0] = block_sum(product[0]);
  } else {
    const unsigned row = blockDim.x * V, mine = threadIdx.y * row + threadIdx.x * V;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      shared[0][mine + i] = total[i];
      shared[1][mine + i] = product[i];
    }
    __syncthreads();
    for (unsigned y = 1; place.lane == 0 && y < blockDim.y; ++y) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        total[i] += shared[0][y * row + mine + i];
        product[i] += shared[1][y * row + mine + i];
      }
    }
  }
  if (place.lane != 0 || place.channel >= maps.C) return;
  parts += static_cast<int64_t>(blockIdx.x) * 2 * maps.C + place.channel;
  store_floats<V>(parts, total);
  store_floats<V>(parts + maps.C, product);
}

// dx = weight * rstd * (dz - means[0] - x_hat * means[1]), means (2, C).
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    gradient(const T* __restrict__ dy, const T* __restrict__ x, const Parameters parameters,
             const float* __restrict__ means, T* __restrict__ dx, const Maps maps, bool relu) {
  const Place place = Place::make<V>(maps);
  if (place.channel >= maps.C) return;
  const unsigned cells = static_cast<unsigned>(maps.B * maps.positions());
  const Channels<V> channels(parameters, place.channel);
  float a[V], k[V];
  load_floats<V>(means + place.channel, a);
  load_floats<V>(means + maps.C + place.channel, k);
  const unsigned first = blockIdx.x * (kCells * place.lanes) + place.lane;
#pragma unroll
  for (int n = 0; n < kCells; ++n) {
    const unsigned cell = first + n * place.lanes;
    if (cell >= cells) break;
    bool valid;
    const int64_t at = find(maps, cell, place.channel, valid);
    float out[V] = {};
    if (valid) {
      float value[V];
      load<V>(dy + at, out);
      load<V>(x + at, value);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float centered = value[i] - channels.mean[i];
        out[i] = channels.before_relu(i, out[i], centered, relu);
        out[i] = channels.gain[i] * (out[i] - a[i] - centered * channels.rstd[i] * k[i]);
      }
    }
    store<V>(dx + at, out);
  }
}

// Calls f(element, Lanes, block, across, lanes): threads of a block, blocks over the channels, cells that a block takes
// at once. Vectors are of channels, so of nhwc maps alone.
template <class F>
int over_cells(const Maps& maps, int64_t dtype, bool are_aligned, F f) {
  const auto wide = [&](int lanes) { return maps.nhwc && maps.C % lanes == 0 && are_aligned; };
  return by_dtype(dtype, wide, [&](auto element, auto lanes) {
    constexpr int V = decltype(lanes)::value;
    if (!maps.nhwc) return f(element, lanes, dim3(kThreads), static_cast<unsigned>(maps.C), unsigned{kThreads});
    const int64_t vectors = maps.C / V;
    const unsigned x = static_cast<unsigned>(vectors < 32 ? vectors : 32), y = kThreads / x;
    f(element, lanes, dim3(x, y), blocks_for(vectors, x), y);
  });
}

}  // namespace
}  // namespace mimdet

// scratch: (count, C, 4), of step cells each.
MIMDET_CUDA_API int mimdet_batch_norm_moments(const void* x, const int32_t* sizes, int64_t nhwc, float* moments_out,
                                              float* scratch, int64_t B, int64_t C, int64_t H, int64_t W, int64_t count,
                                              int64_t step, int64_t dtype, cudaStream_t stream) {
  using namespace mimdet;
  const Maps maps{B, C, H, W, nhwc != 0, sizes};
  return over_cells(maps, dtype, aligned(x), [&](auto element, auto lanes, dim3 block, unsigned across, unsigned) {
    using T = decltype(element);
    constexpr int V = decltype(lanes)::value;
    auto* parts = reinterpret_cast<Moments*>(scratch);
    const dim3 grid(static_cast<unsigned>(count), across);
    moments<T, V><<<grid, block, 0, stream>>>(static_cast<const T*>(x), parts, maps, static_cast<unsigned>(step));
    combine<<<blocks_for(C, 32), dim3(32, 32), 0, stream>>>(parts, moments_out, count, C);
  });
}

MIMDET_CUDA_API int mimdet_batch_norm_statistics(const float* parts, float eps, int64_t unbiased, float* statistics,
                                                 int64_t P, int64_t C, cudaStream_t stream) {
  using namespace mimdet;
  merge_parts<<<blocks_for(C, kThreads), kThreads, 0, stream>>>(parts, statistics, P, C, eps, unbiased != 0);
  return cudaGetLastError();
}

MIMDET_CUDA_API int mimdet_batch_norm_fwd(const void* x, const float* weight, const float* bias, const float* mean,
                                          const float* rstd, const int32_t* sizes, int64_t relu, int64_t nhwc, void* y,
                                          int64_t B, int64_t C, int64_t H, int64_t W, int64_t dtype,
                                          cudaStream_t stream) {
  using namespace mimdet;
  const Maps maps{B, C, H, W, nhwc != 0, sizes};
  const Parameters parameters{weight, bias, mean, rstd};
  const bool are_aligned = aligned(x) && aligned(weight) && aligned(bias) && aligned(mean) && aligned(rstd) && aligned(y);
  return over_cells(maps, dtype, are_aligned, [&](auto element, auto lanes, dim3 block, unsigned across, unsigned cells) {
    using T = decltype(element);
    constexpr int V = decltype(lanes)::value;
    const dim3 grid(blocks_for(B * H * W, kCells * cells), across);
    forward<T, V><<<grid, block, 0, stream>>>(static_cast<const T*>(x), parameters, static_cast<T*>(y), maps, relu != 0);
  });
}

// Scratch: parts (count, 2, C), of step cells each; sums (2, C).
MIMDET_CUDA_API int mimdet_batch_norm_sums(const void* dy, const void* x, const float* weight, const float* bias,
                                           const float* mean, const float* rstd, const int32_t* sizes, int64_t relu,
                                           int64_t nhwc, float* sums, float* parts, int64_t B, int64_t C, int64_t H,
                                           int64_t W, int64_t count, int64_t step, int64_t dtype, cudaStream_t stream) {
  using namespace mimdet;
  const Maps maps{B, C, H, W, nhwc != 0, sizes};
  const Parameters parameters{weight, bias, mean, rstd};
  const bool are_aligned = aligned(dy) && aligned(x) && aligned(weight) && aligned(bias) && aligned(mean) &&
                           aligned(rstd) && aligned(parts);
  return over_cells(maps, dtype, are_aligned, [&](auto element, auto lanes, dim3 block, unsigned across, unsigned) {
    using T = decltype(element);
    constexpr int V = decltype(lanes)::value;
    const dim3 grid(static_cast<unsigned>(count), across);
    gradient_sums<T, V><<<grid, block, 0, stream>>>(static_cast<const T*>(dy), static_cast<const T*>(x), parameters,
                                                    parts, maps, static_cast<unsigned>(step), relu != 0);
    launch_add_up(parts, nullptr, sums, sums + C, 1, count, C, stream);
  });
}

MIMDET_CUDA_API int mimdet_batch_norm_bwd(const void* dy, const void* x, const float* weight, const float* bias,
                                          const float* mean, const float* rstd, const float* means,
                                          const int32_t* sizes, int64_t relu, int64_t nhwc, void* dx, int64_t B,
                                          int64_t C, int64_t H, int64_t W, int64_t dtype, cudaStream_t stream) {
  using namespace mimdet;
  const Maps maps{B, C, H, W, nhwc != 0, sizes};
  const Parameters parameters{weight, bias, mean, rstd};
  const bool are_aligned = aligned(dy) && aligned(x) && aligned(weight) && aligned(bias) && aligned(mean) &&
                           aligned(rstd) && aligned(means) && aligned(dx);
  return over_cells(maps, dtype, are_aligned, [&](auto element, auto lanes, dim3 block, unsigned across, unsigned cells) {
    using T = decltype(element);
    constexpr int V = decltype(lanes)::value;
    const dim3 grid(blocks_for(B * H * W, kCells * cells), across);
    gradient<T, V><<<grid, block, 0, stream>>>(static_cast<const T*>(dy), static_cast<const T*>(x), parameters, means,
                                               static_cast<T*>(dx), maps, relu != 0);
  });
}
