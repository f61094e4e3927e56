// Bitmaps of polygons inside boxes, equal to pycocotools: one block a box. A lane has one column, or two, as a word of
// bits whose lowest is the top row; the warps share the edges. Words are joined by XOR: any order gives the same.
#include "cuda_rows.h"

namespace mimdet {
namespace {

constexpr int kWarps = 4;
constexpr double kFar = (1 << 30) - 1;  // differences of two positions fit int32

// On the grid of fifths of a pixel; NaN and what is too far is moved to the grid's end. The intrinsics keep the
// compiler from fusing a product with a sum, which would round once where pycocotools rounds twice.
__device__ __forceinline__ int position(double p, double corner, double scale) {
  p = __dadd_rn(__dmul_rn(5.0, __dmul_rn(__dsub_rn(p, corner), scale)), 0.5);
  p = p > -kFar ? p : -kFar;
  return __double2int_rz(p < kFar ? p : kFar);
}

// The other axis after t steps of an edge.
__device__ __forceinline__ int rounded(double begin, double slope, int t) {
  return __double2int_rz(__dadd_rn(__dadd_rn(begin, __dmul_rn(slope, t)), 0.5));
}

struct Edge {
  int x0, y0, x1, y1;  // the axis on which it is longer ascends
  double slope;
};

// The row from which on the edge flips the column of `at` = 5c + 2, which it crosses.
__device__ __forceinline__ int crossing(const Edge& e, int at, int size) {
  int v;
  if (e.x1 - e.x0 >= abs(e.y1 - e.y0)) {
    v = min(rounded(e.y0, e.slope, at - e.x0), rounded(e.y0, e.slope, at - e.x0 + 1));
  } else {
    // The first step across the column, from its real number, which is not a step from the exact one.
    const auto beyond = [&](int t) {
      const int u = rounded(e.x0, e.slope, t);
      return e.slope > 0 ? u > at : u <= at;
    };
    int t = __double2int_ru(__ddiv_rn(__dsub_rn(at + 0.5, e.x0), e.slope)) - 1;
    t = max(1, min(t, e.y1 - e.y0));
    if (!beyond(t) && !beyond(++t)) ++t;
    v = e.y0 + t - 1;
  }
  return v <= 2 ? 0 : min((v + 2) / 5, size);
}

// All pixels of a column from `row` on.
__device__ __forceinline__ uint64_t from_row(int row) { return row < 64 ? ~uint64_t{0} << row : 0; }

__global__ void __launch_bounds__(32 * kWarps)
    rasterize_polygons_kernel(const double* points, const int32_t* polygon_starts, const int32_t* instance_starts,
                              const int64_t* index, const double* boxes, uint8_t* masks, int size) {
  __shared__ uint64_t words[kWarps][64];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t r = blockIdx.x;
  const double left = boxes[4 * r], top = boxes[4 * r + 1];
  const double width = __dsub_rn(boxes[4 * r + 2], left), height = __dsub_rn(boxes[4 * r + 3], top);
  const double scale_x = __ddiv_rn(size, width > 0.1 ? width : 0.1);
  const double scale_y = __ddiv_rn(size, height > 0.1 ? height : 0.1);
  const int64_t instance = index[r];
  const int32_t end_polygon = instance_starts[instance + 1];
  uint64_t unions = 0;  // of column threadIdx.x, in the first 64 threads
  for (int32_t polygon = instance_starts[instance]; polygon < end_polygon; ++polygon) {
    const int32_t first = polygon_starts[polygon], count = polygon_starts[polygon + 1] - first;
    uint64_t inside[2] = {0, 0};
    for (int64_t start = 32 * warp; start < count; start += 32 * kWarps) {
      // Every lane prepares one edge; then all look at one after the other.
      Edge own = {0, 0, 0, 0, 0};
      bool crosses = false;
      if (start + lane < count) {
        const double* one = points + 2 * (first + start + lane);
        const double* other = start + lane + 1 < count ? one + 2 : points + 2 * int64_t{first};
        own.x0 = position(one[0], left, scale_x);
        own.y0 = position(one[1], top, scale_y);
        own.x1 = position(other[0], left, scale_x);
        own.y1 = position(other[1], top, scale_y);
        const bool flat = abs(own.x1 - own.x0) >= abs(own.y1 - own.y0);
        if (flat ? own.x0 > own.x1 : own.y0 > own.y1) own = {own.x1, own.y1, own.x0, own.y0, 0};
        const int run = flat ? own.x1 - own.x0 : own.y1 - own.y0;
        if (run > 0) own.slope = __ddiv_rn(flat ? own.y1 - own.y0 : own.x1 - own.x0, run);
        crosses = max(own.x0, own.x1) > 2 && min(own.x0, own.x1) <= 5 * size - 3;
      }
      for (unsigned left_over = __ballot_sync(~0u, crosses); left_over; left_over &= left_over - 1) {
        const int from = __ffs(left_over) - 1;
        Edge e;
        e.x0 = __shfl_sync(~0u, own.x0, from);
        e.y0 = __shfl_sync(~0u, own.y0, from);
        e.x1 = __shfl_sync(~0u, own.x1, from);
        e.y1 = __shfl_sync(~0u, own.y1, from);
        e.slope = __shfl_sync(~0u, own.slope, from);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = lane + 32 * half, at = 5 * column + 2;
          if (column < size && min(e.x0, e.x1) <= at && at < max(e.x0, e.x1)) {
            inside[half] ^= from_row(crossing(e, at, size));
          }
        }
      }
    }
    words[warp][lane] = inside[0];
    words[warp][lane + 32] = inside[1];
    __syncthreads();
    if (threadIdx.x < 64) {
      uint64_t word = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) word ^= words[w][threadIdx.x];
      unions |= word;
    }
    __syncthreads();
  }
  if (threadIdx.x < 64) words[0][threadIdx.x] = unions;
  __syncthreads();
  masks += r * size * size;
  for (int pixel = threadIdx.x; pixel < size * size; pixel += 32 * kWarps) {
    masks[pixel] = words[0][pixel % size] >> (pixel / size) & 1;
  }
}

}  // namespace
}  // namespace mimdet

// points (P, 2), starts, index (rois), boxes (rois, 4) -> masks (rois, size, size), size at most 64.
MIMDET_CUDA_API int mimdet_rasterize_polygons_fwd(
    const double* points, const int32_t* polygon_starts, const int32_t* instance_starts, const int64_t* index,
    const double* boxes, bool* masks, int64_t rois, int64_t size, cudaStream_t stream) {
  mimdet::rasterize_polygons_kernel<<<static_cast<unsigned>(rois), 32 * mimdet::kWarps, 0, stream>>>(
      points, polygon_starts, instance_starts, index, boxes, reinterpret_cast<uint8_t*>(masks), static_cast<int>(size));
  return cudaGetLastError();
}
