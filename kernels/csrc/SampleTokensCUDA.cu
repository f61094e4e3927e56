// Token sampling, one block a picture: the k-th smallest key by radix selection, then a prefix sum in raster order.
// The shared counters are integers, so the order of their updates does not show.
#include "cuda_rows.h"

namespace mimdet {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

// Unsigned integers in the order of argsort: padding as infinity, -0 equal to 0, NaN last.
__device__ inline uint32_t sort_key(float noise, bool valid) {
  if (!valid) return 0xff800000u;
  const uint32_t bits = __float_as_uint(noise), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0xffffffffu;
  if (magnitude == 0) return 0x80000000u;
  return bits == magnitude ? bits | 0x80000000u : ~bits;
}

// How many earlier threads of the block have `flag` set; `total` becomes the count over all of them.
__device__ inline int earlier(bool flag, int* warp_counts, int* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned ballot = __ballot_sync(~0u, flag);
  if (lane == 0) warp_counts[warp] = __popc(ballot);
  __syncthreads();
  int before = __popc(ballot & ((1u << lane) - 1)), all = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_counts[w];
    all += warp_counts[w];
  }
  __syncthreads();
  *total = all;
  return before;
}

__global__ void __launch_bounds__(kThreads)
    sample_tokens_kernel(const float* noise, const bool* valid, int64_t* keep, int64_t* drop, int64_t* restore,
                         int64_t length, int64_t count) {
  __shared__ int histogram[256];
  __shared__ int warp_counts[kWarps];
  __shared__ uint32_t shared_digit;
  __shared__ int64_t shared_below;
  const int64_t b = blockIdx.x;
  noise += b * length;
  valid += b * length;
  keep += b * count;
  drop += b * (length - count);
  restore += b * length;

  uint32_t last = 0;
  int64_t below = 0;
  for (int shift = 24; shift >= 0 && count > 0; shift -= 8) {
    if (threadIdx.x < 256) histogram[threadIdx.x] = 0;
    __syncthreads();
    const uint32_t settled = shift == 24 ? 0u : ~0u << (shift + 8);
    for (int64_t i = threadIdx.x; i < length; i += kThreads) {
      const uint32_t key = sort_key(noise[i], valid[i]);
      if ((key & settled) == last) atomicAdd(histogram + (key >> shift & 255u), 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      uint32_t digit = 0;
      while (below + histogram[digit] < count) below += histogram[digit++];
      shared_digit = digit;
      shared_below = below;
    }
    __syncthreads();
    last |= shared_digit << shift;
    below = shared_below;
  }

  // Of the keys equal to the last one, the first ones fill up the count.
  const int64_t ties = count - below;
  int64_t kept = 0, tied = 0;
  for (int64_t start = 0; start < length; start += kThreads) {
    const int64_t i = start + threadIdx.x;
    const bool inside = i < length;
    const uint32_t key = inside ? sort_key(noise[i], valid[i]) : 0u;
    const bool equal = inside && count > 0 && key == last;
    int all_equal, all_taken;
    const int64_t tie = tied + earlier(equal, warp_counts, &all_equal);
    const bool take = inside && (key < last || (equal && tie < ties));
    const int64_t place = kept + earlier(take, warp_counts, &all_taken);
    if (inside) {
      if (take) keep[place] = i;
      else drop[i - place] = i;
      restore[i] = take ? place : count + i - place;
    }
    tied += all_equal;
    kept += all_taken;
  }
}

}  // namespace
}  // namespace mimdet

// noise (B, L) float32, valid (B, L) bool -> keep (B, count), drop (B, L - count), restore (B, L).
MIMDET_CUDA_API int mimdet_sample_tokens(
    const float* noise, const bool* valid, int64_t* keep, int64_t* drop, int64_t* restore, int64_t batch,
    int64_t length, int64_t count, cudaStream_t stream) {
  mimdet::sample_tokens_kernel<<<static_cast<unsigned>(batch), mimdet::kThreads, 0, stream>>>(
      noise, valid, keep, drop, restore, length, count);
  return cudaGetLastError();
}
