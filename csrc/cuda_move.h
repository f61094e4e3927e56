// Copies of token rows on the GPU, one warp per row.
#pragma once

#include <type_traits>

#include "cuda_rows.h"

namespace mimdet {

constexpr int kRowsPerBlock = 8;

// This warp's row; may be past the last one.
__device__ __forceinline__ int64_t warp_row() { return int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y; }

// to = from + shift over one row by the lanes of a warp, V elements at a time; no shift where it is null.
template <int V, class In, class Out>
__device__ __forceinline__ void move_row(const In* from, const Out* shift, Out* to, int64_t channels) {
#pragma unroll 4
  for (int64_t c = threadIdx.x * V; c < channels; c += 32 * V) {
    float x[V];
    load<V>(from + c, x);
    if (shift != nullptr) {
      float add[V];
      load<V>(shift + c, add);
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] += add[i];
    }
    store<V>(to + c, x);
  }
}

// to = 0 over one row by the lanes of a warp.
template <int V, class Out>
__device__ __forceinline__ void clear_row(Out* to, int64_t channels) {
  const float zeros[V] = {};
  for (int64_t c = threadIdx.x * V; c < channels; c += 32 * V) store<V>(to + c, zeros);
}

// Elements of the wider type in 16 bytes.
template <class In, class Out>
constexpr int kPack = 16 / static_cast<int>(sizeof(In) > sizeof(Out) ? sizeof(In) : sizeof(Out));

// Whether rows at these element strides can be moved V elements at a time.
template <int V>
inline bool packs(const void* at, int64_t a, int64_t b = 0) {
  return aligned(at) && a % V == 0 && b % V == 0;
}

inline dim3 row_grid(int64_t rows) { return dim3(static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock)); }
inline dim3 row_block() { return dim3(32, kRowsPerBlock); }

// Calls f(V, a constant) if rows can be moved V elements at a time, else f(1).
template <int V, class F>
inline void by_pack(bool packed, F f) {
  if (packed) f(std::integral_constant<int, V>());
  else f(std::integral_constant<int, 1>());
}

// Calls f(In{}, Out{}) for the dtypes, then says whether the launch worked.
template <class F>
inline int dispatch(int64_t in, int64_t out, F f) {
  if (in == kFloat && out == kFloat) f(float(), float());
  else if (in == kBfloat16 && out == kBfloat16) f(__nv_bfloat16(), __nv_bfloat16());
  else if (in == kHalf && out == kHalf) f(__half(), __half());
  else if (in == kBfloat16 && out == kFloat) f(__nv_bfloat16(), float());
  else if (in == kHalf && out == kFloat) f(__half(), float());
  else if (in == kFloat && out == kBfloat16) f(float(), __nv_bfloat16());
  else if (in == kFloat && out == kHalf) f(float(), __half());
  else return cudaErrorInvalidValue;
  return cudaGetLastError();
}

}  // namespace mimdet
