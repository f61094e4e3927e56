// Element types, vectors of elements and sums over a block, for all CUDA kernels. No torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace mimdet {

// Dtype codes of kernels/library.py.
enum Dtype : int64_t { kFloat = 0, kBfloat16 = 1, kHalf = 2 };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

// V consecutive elements at p, in one access.
template <int V, class T>
__device__ __forceinline__ void load(const T* p, float (&x)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(p);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = to_float(pack.at[i]);
}

template <int V, class T>
__device__ __forceinline__ void store(T* p, const float (&x)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.at[i] = from_float<T>(x[i]);
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// Sum over all threads of a block of whole warps, at most 1024 threads; every thread gets it. Always in one order.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float warps[32];
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  if (blockDim.x == 32) return x;
  __syncthreads();  // the last sum has been read
  if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = x;
  __syncthreads();
  x = (threadIdx.x & 31) < (blockDim.x >> 5) ? warps[threadIdx.x & 31] : 0.0f;
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace mimdet

#define MIMDET_CUDA_API extern "C" __attribute__((visibility("default")))
