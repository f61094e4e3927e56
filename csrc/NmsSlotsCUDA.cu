// Greedy non-maximum suppression, equal to torchvision's on a CPU: bits of all pairs, a block for every 64 x 64 of them,
// then one block a problem, which goes through its rows. Bits are joined by OR: any order gives the same.
#include "cuda_rows.h"

namespace mimdet {
namespace {

constexpr int kWord = 64;  // rows of a problem whose bits are one word
constexpr int kMostWords = 1024;
constexpr int kThreads = 256;

struct Box {
  float x0, y0, x1, y1, area;
};

// The intrinsics keep the compiler from fusing a product with a sum, which would round once where torchvision rounds
// twice, and from dividing by a reciprocal.
__device__ __forceinline__ Box load_box(const float* boxes, int64_t row) {
  const float x0 = boxes[4 * row], y0 = boxes[4 * row + 1], x1 = boxes[4 * row + 2], y1 = boxes[4 * row + 3];
  return {x0, y0, x1, y1, __fmul_rn(__fsub_rn(x1, x0), __fsub_rn(y1, y0))};
}

// Whether the IoU of two boxes is above the threshold.
__device__ __forceinline__ bool overlaps(const Box& a, const Box& b, float threshold) {
  const float width = __fsub_rn(fminf(a.x1, b.x1), fmaxf(a.x0, b.x0));
  const float height = __fsub_rn(fminf(a.y1, b.y1), fmaxf(a.y0, b.y0));
  const float intersection = __fmul_rn(fmaxf(width, 0.0f), fmaxf(height, 0.0f));
  return __fdiv_rn(intersection, __fsub_rn(__fadd_rn(a.area, b.area), intersection)) > threshold;
}

// words (problems, rows, count): bit j of word w says that the row suppresses row 64 w + j. Words before the diagonal,
// and those of rows that are not valid, are never read.
__global__ void __launch_bounds__(kWord)
    nms_slots_pairs_kernel(const float* boxes, const bool* valid, uint64_t* words, int64_t rows, int64_t count,
                           float threshold) {
  __shared__ Box later[kWord];
  const int64_t word = blockIdx.x % count, block = blockIdx.x / count % count, problem = blockIdx.x / count / count;
  if (word < block) return;
  boxes += problem * rows * 4;
  valid += problem * rows;
  const int64_t row = block * kWord + threadIdx.x, first = word * kWord;
  const bool is_valid = row < rows && valid[row];
  if (!__syncthreads_or(is_valid)) return;
  if (first + threadIdx.x < rows) later[threadIdx.x] = load_box(boxes, first + threadIdx.x);
  __syncthreads();
  if (!is_valid) return;
  const Box box = load_box(boxes, row);
  const int end = static_cast<int>(min(static_cast<int64_t>(kWord), rows - first));
  uint64_t bits = 0;
  for (int j = word == block ? threadIdx.x + 1 : 0; j < end; ++j) {
    bits |= static_cast<uint64_t>(overlaps(box, later[j], threshold)) << j;
  }
  words[(problem * rows + row) * count + word] = bits;
}

// words: as above; keep (problems, rows).
__global__ void __launch_bounds__(kThreads)
    nms_slots_kernel(const bool* valid, const uint64_t* words, bool* keep, int64_t rows, int64_t count,
                     int64_t stop_at) {
  __shared__ unsigned long long suppressed[kMostWords];
  __shared__ uint64_t diagonal[kWord], kept_rows;
  __shared__ unsigned halves[kWord / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t problem = blockIdx.x;
  valid += problem * rows;
  words += problem * rows * count;
  keep += problem * rows;
  for (int64_t w = threadIdx.x; w < count; w += kThreads) suppressed[w] = 0;
  int64_t room = stop_at, first = 0;
  for (int64_t block = 0; block < count && room > 0; ++block, first += kWord) {
    const int64_t row = first + threadIdx.x;
    __syncthreads();  // the last block's words are joined
    if (threadIdx.x < kWord) {
      const bool is_candidate = row < rows && valid[row] && !(suppressed[block] >> threadIdx.x & 1);
      const unsigned half = __ballot_sync(~0u, is_candidate);
      if (lane == 0) halves[warp] = half;
      if (is_candidate) diagonal[threadIdx.x] = words[row * count + block];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      uint64_t candidates = halves[0] | static_cast<uint64_t>(halves[1]) << 32, kept = 0;
      for (int64_t left = room; candidates != 0 && left > 0; --left) {
        const uint64_t lowest = candidates & (~candidates + 1);
        kept |= lowest;
        candidates &= ~(diagonal[__ffsll(static_cast<long long>(candidates)) - 1] | lowest);
      }
      kept_rows = kept;
    }
    __syncthreads();
    const uint64_t kept = kept_rows;
    room -= __popcll(kept);
    if (threadIdx.x < kWord && row < rows) keep[row] = kept >> threadIdx.x & 1;
    if (kept == 0) continue;
    // Every warp joins the words of some of the rows.
    constexpr int kRows = kWord / (kThreads / 32);
    for (int64_t w = block + 1 + lane; w < count; w += 32) {
      uint64_t bits = 0;
#pragma unroll
      for (int r = warp * kRows; r < (warp + 1) * kRows; ++r) {
        if (kept >> r & 1) bits |= words[(first + r) * count + w];
      }
      if (bits != 0) atomicOr(suppressed + w, static_cast<unsigned long long>(bits));
    }
  }
  for (int64_t row = first + threadIdx.x; row < rows; row += kThreads) keep[row] = false;
}

}  // namespace
}  // namespace mimdet

// boxes (problems, rows, 4), valid (problems, rows), words (problems, rows, rows / 64 rounded up) of scratch -> keep
// (problems, rows); at most 65536 rows.
MIMDET_CUDA_API int mimdet_nms_slots_fwd(
    const float* boxes, const bool* valid, float iou_threshold, int64_t stop_at, bool* keep, int64_t* words,
    int64_t problems, int64_t rows, cudaStream_t stream) {
  auto* bits = reinterpret_cast<uint64_t*>(words);
  const int64_t count = (rows + mimdet::kWord - 1) / mimdet::kWord;
  mimdet::nms_slots_pairs_kernel<<<static_cast<unsigned>(problems * count * count), mimdet::kWord, 0, stream>>>(
      boxes, valid, bits, rows, count, iou_threshold);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  mimdet::nms_slots_kernel<<<static_cast<unsigned>(problems), mimdet::kThreads, 0, stream>>>(valid, bits, keep, rows,
                                                                                          count, stop_at);
  return cudaGetLastError();
}
