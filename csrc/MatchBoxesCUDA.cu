// Matching of candidates with ground-truth boxes, one thread a candidate.
#include "cuda_rows.h"

namespace mimdet {
namespace {

constexpr int kThreads = 256;
constexpr int kMostThresholds = 8;

struct Bands {
  float thresholds[kMostThresholds];
  int8_t labels[kMostThresholds + 1];
  int count;
};

struct Box {
  float x0, y0, x1, y1, area;
};

// The intrinsics keep the compiler from fusing a product with a sum: every operation is rounded once.
__device__ __forceinline__ Box load_box(const float* p) {
  const Box b = {p[0], p[1], p[2], p[3], 0.0f};
  return {b.x0, b.y0, b.x1, b.y1, __fmul_rn(__fsub_rn(b.x1, b.x0), __fsub_rn(b.y1, b.y0))};
}

// 0 instead of NaN: fminf and fmaxf drop that of a coordinate, but it is in the area. Both kernels must compute the
// same bits.
__device__ __forceinline__ float overlap(const Box& a, const Box& b) {
  const float w = __fsub_rn(fminf(a.x1, b.x1), fmaxf(a.x0, b.x0));
  const float h = __fsub_rn(fminf(a.y1, b.y1), fmaxf(a.y0, b.y0));
  if (!(w > 0.0f && h > 0.0f)) return 0.0f;
  const float shared = __fmul_rn(w, h);
  const float quotient = __fdiv_rn(shared, __fsub_rn(__fadd_rn(a.area, b.area), shared));
  return quotient > 0.0f ? quotient : 0.0f;
}

// maxima (B, G): bits of each box's best overlap. They rise with the overlap, which is not negative, and a maximum is
// the same in any order.
__global__ void __launch_bounds__(kThreads)
    match_boxes_maxima_kernel(const float* boxes, const int32_t* counts, const float* candidates, const bool* outside,
                              int* maxima, int64_t blocks, int64_t slots, int64_t count, int64_t image_stride) {
  const int64_t image = blockIdx.x / blocks, n = blockIdx.x % blocks * kThreads + threadIdx.x;
  const bool here = n < count && !(outside && outside[image * count + n]);
  Box candidate = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  if (here) candidate = load_box(candidates + image * image_stride + 4 * n);
  const int64_t real = min(static_cast<int64_t>(counts[image]), slots);
  for (int64_t g = 0; g < real; ++g) {
    int highest = __float_as_int(overlap(load_box(boxes + 4 * (image * slots + g)), candidate));
    if (!__any_sync(~0u, highest > 0)) continue;
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) highest = max(highest, __shfl_xor_sync(~0u, highest, offset));
    if (threadIdx.x % 32 == 0) atomicMax(maxima + image * slots + g, highest);
  }
}

__global__ void __launch_bounds__(kThreads)
    match_boxes_kernel(const float* boxes, const int32_t* counts, const float* candidates, Bands bands,
                       const bool* outside, const float* maxima, int32_t* index, int8_t* label, int64_t blocks,
                       int64_t slots, int64_t count, int64_t image_stride) {
  const int64_t image = blockIdx.x / blocks, n = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (n >= count) return;
  const int64_t place = image * count + n;
  if (outside && outside[place]) {
    index[place] = 0;
    label[place] = -1;
    return;
  }
  const Box candidate = load_box(candidates + image * image_stride + 4 * n);
  const int64_t real = min(static_cast<int64_t>(counts[image]), slots);
  float best = 0.0f;
  int slot = 0;
  bool low = false;
  for (int64_t g = 0; g < real; ++g) {
    const float now = overlap(load_box(boxes + 4 * (image * slots + g)), candidate);
    if (now > best) {
      best = now;
      slot = static_cast<int>(g);
    }
    low |= maxima && now == maxima[image * slots + g];
  }
  int8_t band = bands.labels[0];
#pragma unroll
  for (int k = 0; k < kMostThresholds; ++k) {
    if (k < bands.count && best >= bands.thresholds[k]) band = bands.labels[k + 1];
  }
  index[place] = slot;
  label[place] = low ? 1 : band;
}

}  // namespace
}  // namespace mimdet

// boxes (batch, slots, 4), counts (batch), candidates: an image's image_stride after the last one's, outside (batch,
// count) or null, maxima (batch, slots) zeros, or null without low-quality matches -> index, label (batch, count).
MIMDET_CUDA_API int mimdet_match_boxes_fwd(
    const float* boxes, const int32_t* counts, const float* candidates, const float* thresholds, const int64_t* labels,
    const bool* outside, float* maxima, int32_t* index, int8_t* label, int64_t num_thresholds, int64_t batch,
    int64_t slots, int64_t count, int64_t image_stride, cudaStream_t stream) {
  mimdet::Bands bands = {};
  bands.count = static_cast<int>(num_thresholds);
  for (int k = 0; k < bands.count; ++k) bands.thresholds[k] = thresholds[k];
  for (int k = 0; k <= bands.count; ++k) bands.labels[k] = static_cast<int8_t>(labels[k]);
  const int64_t blocks = (count + mimdet::kThreads - 1) / mimdet::kThreads;
  const auto grid = static_cast<unsigned>(batch * blocks);
  if (maxima) {
    mimdet::match_boxes_maxima_kernel<<<grid, mimdet::kThreads, 0, stream>>>(
        boxes, counts, candidates, outside, reinterpret_cast<int*>(maxima), blocks, slots, count, image_stride);
  }
  mimdet::match_boxes_kernel<<<grid, mimdet::kThreads, 0, stream>>>(
      boxes, counts, candidates, bands, outside, maxima, index, label, blocks, slots, count, image_stride);
  return cudaGetLastError();
}
