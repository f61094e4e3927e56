// GroupNorm over whole samples and exact GELU for CUDA, without torch.
//
// Many blocks share a sample: each writes the moments of its part, and one block per sample combines them (Chan,
// Golub, LeVeque 1979); so it is with the gradients' sums. No atomics: results repeat bitwise.
#include "cuda_image_norm.h"

namespace mimdet {
namespace {

// Vectors that a thread holds at once.
template <int V>
constexpr int kHeld = V == 8 ? 2 : 4;
template <int V>
constexpr int64_t kChunk = kThreads * V * kHeld<V>;

// Channel and position of a sample's elements, counted from the first one of a block.
struct Location {
  unsigned inner, outer, rest;
  bool nhwc;

  __device__ Location(const Maps& maps, int64_t begin) : nhwc(maps.nhwc) {
    inner = static_cast<unsigned>(nhwc ? maps.C : maps.positions());
    outer = static_cast<unsigned>(static_cast<uint64_t>(begin) / inner);
    rest = static_cast<unsigned>(begin - static_cast<int64_t>(outer) * inner);
  }

  __device__ __forceinline__ void find(unsigned offset, unsigned& channel, unsigned& position) const {
    const unsigned at = rest + offset, quotient = at / inner, remainder = at - quotient * inner;
    channel = nhwc ? remainder : outer + quotient;
    position = nhwc ? outer + quotient : remainder;
  }
};

// Moments of all threads of a block of kThreads, for its first thread.
__device__ __forceinline__ Moments block_merge(Moments m) {
  __shared__ Moments warps[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) {
    const Moments other{__shfl_down_sync(0xffffffffu, m.count, offset), __shfl_down_sync(0xffffffffu, m.mean, offset),
                        __shfl_down_sync(0xffffffffu, m.rest, offset), __shfl_down_sync(0xffffffffu, m.m2, offset)};
    m = merge(m, other);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = m;
  __syncthreads();
  for (int i = 1; threadIdx.x == 0 && i < kThreads / 32; ++i) m = merge(m, warps[i]);
  return m;
}

// x -> parts (B, count): moments of per_part elements each.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    moments(const T* __restrict__ x, Moments* __restrict__ parts, const Maps maps, unsigned count, int64_t per_part) {
  const int64_t sample = blockIdx.x / count, begin = blockIdx.x % count * per_part;
  const int64_t left = maps.size() - begin;
  const unsigned end = static_cast<unsigned>(left < per_part ? left : per_part);
  const Location location(maps, begin);
  x += sample * maps.size() + begin;
  Moments all{};
  for (unsigned first = threadIdx.x * V; first < end; first += kChunk<V>) {
    float value[kHeld<V>][V];
    bool use[kHeld<V>];
    float n = 0.0f, sum = 0.0f, rest = 0.0f, m2 = 0.0f;
#pragma unroll
    for (int k = 0; k < kHeld<V>; ++k) {
      const unsigned at = first + k * kThreads * V;
      use[k] = at < end;
      if (use[k] && maps.sizes != nullptr) {
        unsigned channel, position;
        location.find(at, channel, position);
        use[k] = maps.is_valid(sample, position);
      }
      if (use[k]) load<V>(x + at, value[k]);
    }
#pragma unroll
    for (int k = 0; k < kHeld<V>; ++k) {
      if (!use[k]) continue;
      n += V;
#pragma unroll
      for (int i = 0; i < V; ++i) sum += value[k][i];
    }
    const float inverse = n > 0.0f ? __fdividef(1.0f, n) : 0.0f, mean = sum * inverse;
#pragma unroll
    for (int k = 0; k < kHeld<V>; ++k) {
      if (!use[k]) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float x_centered = value[k][i] - mean;
        rest += x_centered;
        m2 += x_centered * x_centered;
      }
    }
    rest *= inverse;
    all = merge(all, {n, mean, rest, m2 - n * rest * rest});
  }
  all = block_merge(all);
  if (threadIdx.x == 0) parts[blockIdx.x] = all;
}

// parts (gridDim.x, count) -> mean, rstd (gridDim.x,).
__global__ void __launch_bounds__(kThreads)
    statistics(const Moments* __restrict__ parts, float* __restrict__ mean, float* __restrict__ rstd, int64_t count,
               float eps) {
  Moments all{};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) all = merge(all, parts[blockIdx.x * count + i]);
  all = block_merge(all);
  if (threadIdx.x == 0) {
    mean[blockIdx.x] = all.mean + all.rest;
    rstd[blockIdx.x] = 1.0f / sqrtf(all.m2 / all.count + eps);
  }
}

// Weight and bias of the channels of a vector of elements that begins at channel.
template <int V>
__device__ __forceinline__ void parameters(const float* weight, const float* bias, bool nhwc, unsigned channel,
                                           float (&w)[V], float (&b)[V]) {
  if (nhwc) {
    load_floats<V>(weight + channel, w);
    load_floats<V>(bias + channel, b);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      w[i] = weight[channel];
      b[i] = bias[channel];
    }
  }
}

// A block takes kChunk elements of a sample; a sample has `blocks` of them.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    forward(const T* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
            const float* __restrict__ mean, const float* __restrict__ rstd, T* __restrict__ y, const Maps maps,
            unsigned blocks) {
  const int64_t sample = blockIdx.x / blocks, begin = blockIdx.x % blocks * kChunk<V>;
  const int64_t left = maps.size() - begin;
  const Location location(maps, begin);
  const float x_mean = mean[sample], x_rstd = rstd[sample];
  x += sample * maps.size() + begin;
  y += sample * maps.size() + begin;
#pragma unroll
  for (int k = 0; k < kHeld<V>; ++k) {
    const unsigned at = (k * kThreads + threadIdx.x) * V;
    if (at >= left) break;
    unsigned channel, position;
    location.find(at, channel, position);
    float value[V] = {};
    if (maps.is_valid(sample, position)) {
      float w[V], b[V];
      load<V>(x + at, value);
      parameters<V>(weight, bias, maps.nhwc, channel, w, b);
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = gelu((value[i] - x_mean) * x_rstd * w[i] + b[i]);
    }
    store<V>(y + at, value);
  }
}

// Sums of dz = dy * gelu'(z) and of dz * x_hat -> sums (B, parts, 2, C), for nhwc maps. A block takes step positions,
// blockDim.y at once, and blockDim.x vectors of channels.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    sums_nhwc(const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ weight,
              const float* __restrict__ bias, const float* __restrict__ mean, const float* __restrict__ rstd,
              float* __restrict__ sums, const Maps maps, unsigned parts, int64_t step) {
  __shared__ float shared[2][kThreads * V];
  const int64_t sample = blockIdx.x / parts, first = blockIdx.x % parts * step;
  const int64_t last = first + step < maps.positions() ? first + step : maps.positions();
  const int64_t channel = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  float total[V] = {}, product[V] = {};
  if (channel < maps.C) {
    const float x_mean = mean[sample], x_rstd = rstd[sample];
    const int64_t base = sample * maps.size() + channel;
    float w[V], b[V];
    load_floats<V>(weight + channel, w);
    load_floats<V>(bias + channel, b);
#pragma unroll 2
    for (int64_t position = first + threadIdx.y; position < last; position += blockDim.y) {
      if (!maps.is_valid(sample, static_cast<unsigned>(position))) continue;
      float x_hat[V], dz[V];
      load<V>(x + base + position * maps.C, x_hat);
      load<V>(dy + base + position * maps.C, dz);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        x_hat[i] = (x_hat[i] - x_mean) * x_rstd;
        dz[i] *= gelu_derivative(x_hat[i] * w[i] + b[i]);
        total[i] += dz[i];
        product[i] += dz[i] * x_hat[i];
      }
    }
  }
  const int row = blockDim.x * V, mine = threadIdx.y * row + threadIdx.x * V;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    shared[0][mine + i] = total[i];
    shared[1][mine + i] = product[i];
  }
  __syncthreads();
  if (threadIdx.y != 0 || channel >= maps.C) return;
  for (int y = 1; y < blockDim.y; ++y) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      total[i] += shared[0][y * row + mine + i];
      product[i] += shared[1][y * row + mine + i];
    }
  }
  sums += blockIdx.x * 2 * maps.C + channel;
  store_floats<V>(sums, total);
  store_floats<V>(sums + maps.C, product);
}

// The same for nchw maps: a block takes step positions of one channel.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    sums_nchw(const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ weight,
              const float* __restrict__ bias, const float* __restrict__ mean, const float* __restrict__ rstd,
              float* __restrict__ sums, const Maps maps, unsigned parts, int64_t step) {
  const unsigned plane = blockIdx.x / parts, channels = static_cast<unsigned>(maps.C);
  const int64_t part = blockIdx.x % parts, sample = plane / channels, channel = plane % channels;
  const int64_t last = (part + 1) * step < maps.positions() ? (part + 1) * step : maps.positions();
  const float x_mean = mean[sample], x_rstd = rstd[sample], w = weight[channel], b = bias[channel];
  x += static_cast<int64_t>(plane) * maps.positions();
  dy += static_cast<int64_t>(plane) * maps.positions();
  float total = 0.0f, product = 0.0f;
  for (int64_t position = part * step + threadIdx.x * V; position < last; position += kThreads * V) {
    if (!maps.is_valid(sample, static_cast<unsigned>(position))) continue;
    float x_hat[V], dz[V];
    load<V>(x + position, x_hat);
    load<V>(dy + position, dz);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x_hat[i] = (x_hat[i] - x_mean) * x_rstd;
      dz[i] *= gelu_derivative(x_hat[i] * w + b);
      total += dz[i];
      product += dz[i] * x_hat[i];
    }
  }
  total = block_sum(total);
  product = block_sum(product);
  if (threadIdx.x == 0) {
    sums += (sample * parts + part) * 2 * maps.C + channel;
    sums[0] = total;
    sums[maps.C] = product;
  }
}

// totals (B, 2, C) -> means (B, 2) of weight * dz and of weight * dz * x_hat. A block takes a sample.
__global__ void __launch_bounds__(kThreads)
    gradient_means(const float* __restrict__ totals, const float* __restrict__ weight, float* __restrict__ means,
                   const Maps maps) {
  const int64_t sample = blockIdx.x;
  totals += sample * 2 * maps.C;
  float a = 0.0f, k = 0.0f;
  for (int64_t channel = threadIdx.x; channel < maps.C; channel += kThreads) {
    a += totals[channel] * weight[channel];
    k += totals[maps.C + channel] * weight[channel];
  }
  a = block_sum(a);
  k = block_sum(k);
  if (threadIdx.x == 0) {
    means[2 * sample] = a / maps.count(sample);
    means[2 * sample + 1] = k / maps.count(sample);
  }
}

// dx = rstd * (weight * dz - mean(weight * dz) - x_hat * mean(weight * dz * x_hat)). Blocks as in forward.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    gradient(const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ weight,
             const float* __restrict__ bias, const float* __restrict__ mean, const float* __restrict__ rstd,
             const float* __restrict__ means, T* __restrict__ dx, const Maps maps, unsigned blocks) {
  const int64_t sample = blockIdx.x / blocks, begin = blockIdx.x % blocks * kChunk<V>;
  const int64_t left = maps.size() - begin;
  const Location location(maps, begin);
  const float x_mean = mean[sample], x_rstd = rstd[sample], a = means[2 * sample], k = means[2 * sample + 1];
  dy += sample * maps.size() + begin;
  x += sample * maps.size() + begin;
  dx += sample * maps.size() + begin;
#pragma unroll
  for (int n = 0; n < kHeld<V>; ++n) {
    const unsigned at = (n * kThreads + threadIdx.x) * V;
    if (at >= left) break;
    unsigned channel, position;
    location.find(at, channel, position);
    float out[V] = {};
    if (maps.is_valid(sample, position)) {
      float value[V], w[V], b[V];
      load<V>(dy + at, out);
      load<V>(x + at, value);
      parameters<V>(weight, bias, maps.nhwc, channel, w, b);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float x_hat = (value[i] - x_mean) * x_rstd;
        out[i] = x_rstd * (out[i] * gelu_derivative(x_hat * w[i] + b[i]) * w[i] - a - x_hat * k);
      }
    }
    store<V>(dx + at, out);
  }
}

// Whether rows of channels (nhwc) or positions divide into vectors. Those of positions may not straddle a valid area.
bool divides(const Maps& maps, int lanes) {
  return maps.nhwc ? maps.C % lanes == 0 : maps.sizes == nullptr && maps.positions() % lanes == 0;
}

}  // namespace
}  // namespace mimdet

// scratch: (B, count, 4). per_part: a multiple of 4096, at most 2**24.
MIMDET_CUDA_API int mimdet_group_norm_gelu_fwd(const void* x, const float* weight, const float* bias,
                                               const int32_t* sizes, float eps, int64_t nhwc, float* scratch, void* y,
                                               float* mean, float* rstd, int64_t B, int64_t C, int64_t H, int64_t W,
                                               int64_t count, int64_t per_part, int64_t dtype, cudaStream_t stream) {
  using namespace mimdet;
  const Maps maps{B, C, H, W, nhwc != 0, sizes};
  const auto wide = [&](int lanes) {
    return divides(maps, lanes) && aligned(x) && aligned(weight) && aligned(bias) && aligned(y);
  };
  return by_dtype(dtype, wide, [&](auto element, auto lanes) {
    using T = decltype(element);
    constexpr int V = decltype(lanes)::value;
    const auto* from = static_cast<const T*>(x);
    auto* parts = reinterpret_cast<Moments*>(scratch);
    const unsigned blocks = blocks_for(maps.size(), kChunk<V>);
    moments<T, V><<<static_cast<unsigned>(B * count), kThreads, 0, stream>>>(from, parts, maps,
                                                                          static_cast<unsigned>(count), per_part);
    statistics<<<static_cast<unsigned>(B), kThreads, 0, stream>>>(parts, mean, rstd, count, eps);
    forward<T, V><<<static_cast<unsigned>(B * blocks), kThreads, 0, stream>>>(from, weight, bias, mean, rstd,
                                                                            static_cast<T*>(y), maps, blocks);
  });
}

// Scratch: sums (B, parts, 2, C), totals (B, 2, C), means (B, 2). parts of step positions make a map; step: for nchw
// a multiple of 2048.
MIMDET_CUDA_API int mimdet_group_norm_gelu_bwd(const void* dy, const void* x, const float* weight, const float* bias,
                                               const int32_t* sizes, const float* mean, const float* rstd,
                                               int64_t nhwc, float* sums, float* totals, float* means, void* dx,
                                               float* dparameters, int64_t B, int64_t C, int64_t H,
                                               int64_t W, int64_t parts, int64_t step, int64_t dtype,
                                               cudaStream_t stream) {
  using namespace mimdet;
  const Maps maps{B, C, H, W, nhwc != 0, sizes};
  const auto wide = [&](int lanes) {
    return divides(maps, lanes) && aligned(dy) && aligned(x) && aligned(weight) && aligned(bias) && aligned(dx) &&
           aligned(sums);
  };
  return by_dtype(dtype, wide, [&](auto element, auto lanes) {
    using T = decltype(element);
    constexpr int V = decltype(lanes)::value;
    const auto *grad = static_cast<const T*>(dy), *from = static_cast<const T*>(x);
    const unsigned blocks = blocks_for(maps.size(), kChunk<V>);
    if (maps.nhwc) {
      const int64_t vectors = C / V;
      const unsigned across = static_cast<unsigned>(vectors < kThreads ? vectors : kThreads);
      const dim3 grid(static_cast<unsigned>(B * parts), blocks_for(vectors, across));
      const dim3 block(across, kThreads / across);
      sums_nhwc<T, V><<<grid, block, 0, stream>>>(grad, from, weight, bias, mean, rstd, sums, maps, parts, step);
    } else {
      const unsigned grid = static_cast<unsigned>(B * C * parts);
      sums_nchw<T, V><<<grid, kThreads, 0, stream>>>(grad, from, weight, bias, mean, rstd, sums, maps, parts, step);
    }
    launch_add_up(sums, totals, dparameters, dparameters + C, B, parts, C, stream);
    gradient_means<<<static_cast<unsigned>(B), kThreads, 0, stream>>>(totals, weight, means, maps);
    gradient<T, V><<<static_cast<unsigned>(B * blocks), kThreads, 0, stream>>>(grad, from, weight, bias, mean, rstd,
                                                                             means, static_cast<T*>(dx), maps, blocks);
  });
}
