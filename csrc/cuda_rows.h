// Element types, vectors of elements and sums over a block, for all CUDA kernels. No torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

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

// A word, or a vector of words, of so many bytes.
template <int Bytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// V consecutive elements at p, which is aligned to V of them, in one access.
template <int V, class T>
__device__ __forceinline__ void load(const T* p, float (&x)[V]) {
  using W = typename Word<sizeof(T) * V>::type;
  const W word = *reinterpret_cast<const W*>(p);
  Pack<T, V> pack;
  memcpy(&pack, &word, sizeof(word));
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = to_float(pack.at[i]);
}

template <int V, class T>
__device__ __forceinline__ void store(T* p, const float (&x)[V]) {
  using W = typename Word<sizeof(T) * V>::type;
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.at[i] = from_float<T>(x[i]);
  W word;
  memcpy(&word, &pack, sizeof(word));
  // nvcc may split an assignment into stores of single words; the intrinsic is one instruction.
  __stwb(reinterpret_cast<W*>(p), word);
}

// V consecutive elements of an array of floats that is aligned to 16 bytes.
template <int V>
__device__ __forceinline__ void load_floats(const float* p, float (&x)[V]) {
  if constexpr (V == 1) {
    x[0] = *p;
  } else {
#pragma unroll
    for (int i = 0; i < V; i += 4) load<4>(p + i, reinterpret_cast<float(&)[4]>(x[i]));
  }
}

template <int V>
__device__ __forceinline__ void store_floats(float* p, const float (&x)[V]) {
  if constexpr (V == 1) {
    *p = x[0];
  } else {
#pragma unroll
    for (int i = 0; i < V; i += 4) store<4>(p + i, reinterpret_cast<const float(&)[4]>(x[i]));
  }
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

inline unsigned blocks_for(int64_t work, int64_t per_block) {
  return static_cast<unsigned>((work + per_block - 1) / per_block);
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <int V>
struct Lanes {
  static constexpr int value = V;
};

// Calls f(element, Lanes) for the dtype: as many lanes as 16 bytes hold where wide(lanes), else one.
template <class F, class Wide>
inline int by_dtype(int64_t dtype, Wide wide, F f) {
  const bool vectors = wide(dtype == kFloat ? 4 : 8);
  if (dtype == kFloat) vectors ? f(float(), Lanes<4>()) : f(float(), Lanes<1>());
  else if (dtype == kBfloat16) vectors ? f(__nv_bfloat16(), Lanes<8>()) : f(__nv_bfloat16(), Lanes<1>());
  else if (dtype == kHalf) vectors ? f(__half(), Lanes<8>()) : f(__half(), Lanes<1>());
  else return cudaErrorInvalidValue;
  return cudaGetLastError();
}

}  // namespace mimdet

#define MIMDET_CUDA_API extern "C" __attribute__((visibility("default")))
