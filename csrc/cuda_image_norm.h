// Valid areas and sums of partial gradients, for the CUDA norms of feature maps. No torch.
#pragma once

#include "cuda_gelu.h"
#include "cuda_rows.h"

namespace mimdet {
namespace {

constexpr int kThreads = 256;

// A batch of feature maps: (B, H, W, C) if nhwc else (B, C, H, W). sizes (B, 2) int32 are the rows and columns of each
// sample's valid area, or null: all of them.
struct Maps {
  int64_t B, C, H, W;
  bool nhwc;
  const int32_t* sizes;

  __host__ __device__ int64_t positions() const { return H * W; }
  __host__ __device__ int64_t size() const { return C * H * W; }

  __device__ __forceinline__ bool is_valid(int64_t sample, unsigned position) const {
    if (sizes == nullptr) return true;
    const unsigned w = static_cast<unsigned>(W), row = position / w;
    return row < static_cast<unsigned>(sizes[2 * sample]) &&
           position - row * w < static_cast<unsigned>(sizes[2 * sample + 1]);
  }

  // Valid elements of a sample.
  __device__ __forceinline__ float count(int64_t sample) const {
    const float positions = sizes == nullptr ? static_cast<float>(H) * static_cast<float>(W)
                                             : static_cast<float>(sizes[2 * sample]) * sizes[2 * sample + 1];
    return positions * static_cast<float>(C);
  }
};

// The mean is mean + rest: rounding a large mean to float would lose as much as small values of x_centered.
struct alignas(16) Moments {
  float count, mean, rest, m2;
};

__device__ __forceinline__ Moments merge(const Moments& a, const Moments& b) {
  if (a.count == 0.0f) return b;
  // __fdividef is off by up to two ulp: those of delta, which is as small as values of x_centered.
  const float both = a.count + b.count, share = __fdividef(b.count, both);
  const float delta = b.mean - a.mean + (b.rest - a.rest), step = delta * share;
  // Knuth's sum: mean + lost is a.mean + step exactly.
  const float mean = a.mean + step, part = mean - a.mean, lost = a.mean - (mean - part) + (step - part);
  return {both, mean, a.rest + lost, a.m2 + b.m2 + delta * delta * a.count * share};
}

// sums (samples, parts, 2, C) -> totals (samples, 2, C) unless null, and over the samples dbias and dweight (C,).
// A block of 32 x 32 threads takes 32 of the 2 * C columns; always adds in one order.
__global__ void __launch_bounds__(1024)
    add_up(const float* __restrict__ sums, float* __restrict__ totals, float* __restrict__ dbias,
           float* __restrict__ dweight, int64_t samples, int64_t parts, int64_t C) {
  __shared__ float shared[32][33];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float all = 0.0f;
  for (int64_t sample = 0; sample < samples; ++sample) {
    float sum = 0.0f;
    if (column < 2 * C) {
#pragma unroll 4
      for (int64_t part = threadIdx.y; part < parts; part += 32) sum += sums[(sample * parts + part) * 2 * C + column];
    }
    __syncthreads();  // the last sample's sums have been read
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < 2 * C) {
      sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 32; ++i) sum += shared[i][threadIdx.x];
      if (totals != nullptr) totals[sample * 2 * C + column] = sum;
      all += sum;
    }
  }
  if (threadIdx.y == 0 && column < 2 * C) (column < C ? dbias[column] : dweight[column - C]) = all;
}

inline void launch_add_up(const float* sums, float* totals, float* dbias, float* dweight, int64_t samples,
                          int64_t parts, int64_t C, cudaStream_t stream) {
  add_up<<<blocks_for(2 * C, 32), dim3(32, 32), 0, stream>>>(sums, totals, dbias, dweight, samples, parts, C);
}

}  // namespace
}  // namespace mimdet
