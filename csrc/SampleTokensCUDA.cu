// Token sampling, one block an image: the k-th smallest key by radix selection, then a prefix sum in raster order.
// The shared counters are integers, so the order of their updates does not matter.
#include "cuda_rows.h"

namespace mimdet {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kCached = 8192;  // keys that a block keeps; images of more tokens are read again in every round
constexpr int kBins = 256;
constexpr uint32_t kOutside = 0xffffffffu, kNan = 0xfffffffeu, kInfinity = 0xff800000u;

// Unsigned integers in the order of argsort: -0 equal to 0, NaN last.
__device__ inline uint32_t sort_key(float noise) {
  const uint32_t bits = __float_as_uint(noise), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return kNan;
  if (magnitude == 0) return 0x80000000u;
  return bits == magnitude ? bits | 0x80000000u : ~bits;
}

// Three counters of up to 1024 in one number.
__device__ inline uint64_t three(uint64_t a, uint64_t b, uint64_t c) { return a | b << 20 | c << 40; }
__device__ inline int part(uint64_t counters, int which) { return counters >> 20 * which & 0xfffffu; }

// How many earlier threads of the block have each flag set; `total` becomes the count over all of them.
__device__ inline uint64_t earlier(bool a, bool b, bool c, uint64_t* warps, uint64_t* total) {
  const unsigned ballot_a = __ballot_sync(~0u, a), ballot_b = __ballot_sync(~0u, b), ballot_c = __ballot_sync(~0u, c);
  const unsigned lower = (1u << threadIdx.x % 32) - 1;
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = three(__popc(ballot_a), __popc(ballot_b), __popc(ballot_c));
  __syncthreads();
  uint64_t before = three(__popc(ballot_a & lower), __popc(ballot_b & lower), __popc(ballot_c & lower)), all = 0;
#pragma unroll 8
  for (int w = 0; w < kWarps; ++w) {
    if (w < threadIdx.x / 32) before += warps[w];
    all += warps[w];
  }
  __syncthreads();
  *total = all;
  return before;
}

template <bool Cached>
__global__ void __launch_bounds__(kThreads)
    sample_tokens_kernel(const float* noise, const bool* valid_mask, const int32_t* offsets, int64_t* ids_keep,
                         int64_t* ids_mask, int64_t* ids_restore, int64_t length, int64_t kept, int64_t masked) {
  __shared__ uint32_t cache[Cached ? kCached : 1];
  __shared__ int histogram[kBins + 1];
  __shared__ uint64_t warps[kWarps];
  __shared__ uint32_t shared_digit;
  __shared__ int64_t shared_below;
  const int64_t b = blockIdx.x;
  noise += b * length;
  valid_mask += b * length;
  ids_restore += b * length;
  // Outputs of this image, and the numbers of its first token, kept row and masked row.
  int64_t count = kept, token = 0, kept_row = 0, masked_row = kept;
  if (offsets == nullptr) {
    ids_keep += b * kept;
    ids_mask += b * masked;
  } else {
    const int64_t first = offsets[b], second = offsets[gridDim.x + 1 + b];
    count = offsets[b + 1] - first;
    ids_keep += first;
    ids_mask += second;
    token = b * length;
    kept_row = first;
    masked_row = kept + second;
  }
  const uint32_t padding = offsets == nullptr ? kInfinity : kOutside;

  const auto read = [=](int64_t i) { return i >= length ? kOutside : valid_mask[i] ? sort_key(noise[i]) : padding; };
  if (Cached) {
    for (int64_t i = threadIdx.x; i < length; i += kThreads) cache[i] = read(i);  // read by the same thread alone
  }
  const auto key = [&](int64_t i) { return Cached && i < length ? cache[i] : read(i); };

  const int lane = threadIdx.x % 32;
  uint32_t last = 0;  // no key is 0
  int64_t below = 0;
  for (int shift = 24; shift >= 0 && count > 0; shift -= 8) {
    if (threadIdx.x < kBins) histogram[threadIdx.x] = 0;
    __syncthreads();
    const uint32_t settled = shift == 24 ? 0u : ~0u << (shift + 8);
    for (int64_t start = 0; start < length; start += kThreads) {
      const int64_t i = start + threadIdx.x;
      const uint32_t k = key(i);
      const int bin = i < length && (k & settled) == last ? k >> shift & (kBins - 1) : kBins;
      // One atomic per distinct bin of a warp: the first digits of uniform noise are almost all the same.
      const unsigned same = __match_any_sync(~0u, bin);
      if ((same & ((1u << lane) - 1)) == 0 && bin < kBins) atomicAdd(histogram + bin, __popc(same));
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      int sum = 0;
      for (int j = 0; j < kBins / 32; ++j) sum += histogram[lane * (kBins / 32) + j];
      int upto = sum;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(~0u, upto, distance);
        if (lane >= distance) upto += other;
      }
      int64_t before = below + upto - sum;
      if (before < count && count <= before + sum) {
        uint32_t digit = lane * (kBins / 32);
        while (before + histogram[digit] < count) before += histogram[digit++];
        shared_digit = digit;
        shared_below = before;
      }
    }
    __syncthreads();
    last |= shared_digit << shift;
    below = shared_below;
  }

  // Of the keys equal to the last one, the first ones fill up the count.
  const int64_t ties = count - below;
  int64_t smaller = 0, equal = 0, members = 0;
  for (int64_t start = 0; start < length; start += kThreads) {
    const int64_t i = start + threadIdx.x;
    const uint32_t k = key(i);
    const bool member = k != kOutside;
    uint64_t all;
    const uint64_t before = earlier(k < last, k == last, member, warps, &all);
    const int64_t tie = equal + part(before, 1);
    const int64_t place = smaller + part(before, 0) + (tie < ties ? tie : ties);
    const int64_t other = members + part(before, 2) - place;
    const bool take = k < last || (k == last && tie < ties);
    if (take) ids_keep[place] = token + i;
    else if (member) ids_mask[other] = token + i;
    if (i < length) ids_restore[i] = take ? kept_row + place : member ? masked_row + other : -1;
    smaller += part(all, 0);
    equal += part(all, 1);
    members += part(all, 2);
  }
}

}  // namespace
}  // namespace mimdet

// noise (B, L) float32, valid_mask (B, L) bool -> ids_restore (B, L); without offsets ids_keep (B, kept), ids_mask
// (B, masked), with offsets (2, B + 1) ids_keep (kept,), ids_mask (masked,).
MIMDET_CUDA_API int mimdet_sample_tokens_fwd(
    const float* noise, const bool* valid_mask, const int32_t* offsets, int64_t* ids_keep, int64_t* ids_mask,
    int64_t* ids_restore, int64_t batch, int64_t length, int64_t kept, int64_t masked, cudaStream_t stream) {
  const auto kernel =
      length <= mimdet::kCached ? mimdet::sample_tokens_kernel<true> : mimdet::sample_tokens_kernel<false>;
  kernel<<<static_cast<unsigned>(batch), mimdet::kThreads, 0, stream>>>(noise, valid_mask, offsets, ids_keep, ids_mask,
                                                                       ids_restore, length, kept, masked);
  return cudaGetLastError();
}
