// ROIAlign over all levels of a pyramid. A first kernel writes the separable weights of every ROI: see RoiAlignLevels.h.
#include "cuda_move.h"

namespace mimdet {
namespace {

constexpr int kMostLevels = 8;
constexpr int kGap = 3;
// Tiles of a map that a block of backward has: a warp has a row of it.
constexpr int kSide = 8;
constexpr int kThreads = 32 * kSide;

struct Maps {
  void* at[kMostLevels];
  int32_t height[kMostLevels], width[kMostLevels];
  float scale[kMostLevels];
  int32_t count;
};

__device__ __forceinline__ int64_t tiles(int64_t height, int64_t width) {
  return (height + kSide - 1) / kSide * ((width + kSide - 1) / kSide);
}

// Position of sample i of a bin.
__device__ __forceinline__ float sample(int i, float base, float bin, float count) {
  return base + (static_cast<float>(i) + 0.5f) * bin / count;
}

// Number of the sample at a position, within two; just outside of the samples where it is beyond them.
__device__ __forceinline__ int nearest(float position, float base, float step, float count) {
  return static_cast<int>(fminf(fmaxf((position - base) / step - 0.5f, -4.0f), count + 4.0f));
}

// A thread has a bin of one axis of one ROI: ranges (N, 2, size, 2), weights (N, 2, length).
__global__ void roi_align_axes_kernel(const float* boxes, const int32_t* levels, const int32_t* sizes, int32_t* ranges,
                                      float* weights, const __grid_constant__ Maps maps, int64_t rois, int64_t batch,
                                      int64_t slots, int64_t size, int64_t length, int64_t sampling_ratio) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t roi = thread / (2 * size), axis = thread / size % 2, b = thread % size;
  if (roi >= rois) return;
  int32_t* range = ranges + 2 * thread;
  range[0] = 0;
  range[1] = -1;
  const int level = levels[roi];
  if (level < 0 || level >= maps.count) return;
  const int most = sizes != nullptr ? sizes[2 * (level * batch + roi / slots) + axis]
                                    : axis ? maps.width[level] : maps.height[level];
  const float start = boxes[4 * roi + 1 - axis] * maps.scale[level] - 0.5f;
  const float stop = boxes[4 * roi + 3 - axis] * maps.scale[level] - 0.5f;
  const float bin = (stop - start) / static_cast<float>(size);
  const float count = sampling_ratio > 0 ? static_cast<float>(sampling_ratio) : ceilf(bin);
  const int grid = static_cast<int>(count);
  const float base = start + static_cast<float>(b) * bin;
  const float step = fmaxf(bin / count, 1e-20f), end = static_cast<float>(most);
  int first = min(max(nearest(-1.0f, base, step, count) - 2, 0), grid);
  int last = min(nearest(end, base, step, count) + 2, grid - 1);
  while (first <= last && sample(first, base, bin, count) < -1.0f) ++first;
  while (first <= last && sample(last, base, bin, count) > end) --last;
  if (first > last) {
    // On the side of the map where the samples are.
    if (grid > 0 && sample(grid - 1, base, bin, count) >= -1.0f) {
      range[0] = most;
      range[1] = most - 1;
    }
    return;
  }
  const auto position = [=](float at) { return min(static_cast<int>(fmaxf(at, 0.0f)), most - 1); };
  const int low = position(sample(first, base, bin, count));
  const int high = min(position(sample(last, base, bin, count)) + 1, most - 1);
  range[0] = low;
  range[1] = high;
  weights += (2 * roi + axis) * length + kGap * b;
  for (int p = low; p <= high; ++p) weights[p] = 0.0f;
  for (int i = first; i <= last; ++i) {
    const float at = fmaxf(sample(i, base, bin, count), 0.0f);
    const int below = position(at);
    const float fraction = below == most - 1 ? 0.0f : at - static_cast<float>(below);
    weights[below] += 1.0f - fraction;
    if (below < most - 1) weights[below + 1] += fraction;
  }
  for (int p = low; p <= high; ++p) weights[p] /= count;
}

// A block has a row of bins of one ROI, a warp every kRowsPerBlock-th of these bins.
template <int V, class T>
__global__ void roi_align_kernel(const __grid_constant__ Maps maps, const int32_t* levels, const int32_t* ranges,
                                 const float* weights, T* y, int64_t slots, int64_t channels, int64_t size,
                                 int64_t length) {
  const int64_t roi = blockIdx.x / size, row = blockIdx.x % size;
  const int level = max(levels[roi], 0) % kMostLevels;
  const int64_t width = maps.width[level];
  const T* map = static_cast<const T*>(maps.at[level]) + roi / slots * maps.height[level] * width * channels;
  const int32_t* of_rows = ranges + 4 * roi * size + 2 * row;
  const int low = of_rows[0], high = of_rows[1];
  const float* row_weights = weights + 2 * roi * length + kGap * row;
  for (int64_t b = threadIdx.y; b < size; b += kRowsPerBlock) {
    const int32_t* of_columns = ranges + (4 * roi + 2) * size + 2 * b;
    const int left = of_columns[0], right = of_columns[1];
    const float* column_weights = weights + (2 * roi + 1) * length + kGap * b;
    for (int64_t c = threadIdx.x * V; c < channels; c += 32 * V) {
      float total[V] = {};
      for (int p = low; p <= high; ++p) {
        const float row_weight = row_weights[p];
        for (int x = left; x <= right; ++x) {
          const float w = row_weight * column_weights[x];
          if (w == 0.0f) continue;  // between the points of a sparse grid
          float value[V];
          load<V>(map + (p * width + x) * channels + c, value);
#pragma unroll
          for (int i = 0; i < V; ++i) total[i] += w * value[i];
        }
      }
      store<V>(y + ((roi * size + row) * size + b) * channels + c, total);
    }
  }
}

// A block has a tile of one image's map of one level, and 32 * V channels; it adds up the ROIs over it in their order.
template <int V, class T>
__global__ void __launch_bounds__(kThreads)
    roi_align_backward_kernel(const __grid_constant__ Maps maps, const T* dy, const int32_t* levels,
                              const int32_t* ranges, const float* weights, int64_t all_tiles, int64_t slots,
                              int64_t channels, int64_t size, int64_t length) {
  __shared__ int chosen[kThreads];
  __shared__ int counts[kSide];
  const int64_t image = blockIdx.x / all_tiles;
  int64_t tile = blockIdx.x % all_tiles;
  int level = 0;
  for (; level < maps.count - 1; ++level) {
    const int64_t n = tiles(maps.height[level], maps.width[level]);
    if (tile < n) break;
    tile -= n;
  }
  const int64_t height = maps.height[level], width = maps.width[level];
  const int64_t across = (width + kSide - 1) / kSide;
  const int top = static_cast<int>(tile / across * kSide), left = static_cast<int>(tile % across * kSide);
  const int warp = threadIdx.y, lane = threadIdx.x, row = top + warp;
  const int64_t c = (int64_t(blockIdx.y) * 32 + lane) * V;
  float total[kSide][V] = {};
  for (int64_t start = 0; start < slots; start += kThreads) {
    const int64_t slot = start + warp * 32 + lane, roi = image * slots + slot;
    bool over = slot < slots && levels[roi] == level;
    if (over) {
      const int32_t* of_rows = ranges + 4 * roi * size;
      const int32_t* of_columns = of_rows + 2 * size;
      over = of_rows[0] < top + kSide && of_rows[2 * size - 1] >= top && of_columns[0] < left + kSide &&
             of_columns[2 * size - 1] >= left;
    }
    const unsigned ballot = __ballot_sync(~0u, over);
    if (lane == 0) counts[warp] = __popc(ballot);
    __syncthreads();
    int before = __popc(ballot & ((1u << lane) - 1)), n = 0;
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      if (i < warp) before += counts[i];
      n += counts[i];
    }
    if (over) chosen[before] = warp * 32 + lane;
    __syncthreads();
    for (int i = 0; i < n && c < channels; ++i) {
      const int64_t which = image * slots + start + chosen[i];
      const int32_t* of_rows = ranges + 4 * which * size;
      const int32_t* of_columns = of_rows + 2 * size;
      const float* row_weights = weights + 2 * which * length;
      const float* column_weights = row_weights + length;
      for (int64_t ph = 0; ph < size; ++ph) {
        if (row < of_rows[2 * ph] || row > of_rows[2 * ph + 1]) continue;
        const float row_weight = row_weights[row + kGap * ph];
        for (int64_t pw = 0; pw < size; ++pw) {
          const int first = of_columns[2 * pw], last = of_columns[2 * pw + 1];
          if (first >= left + kSide || last < left) continue;
          float grad[V];
          load<V>(dy + ((which * size + ph) * size + pw) * channels + c, grad);
#pragma unroll
          for (int x = 0; x < kSide; ++x) {
            const bool inside = left + x >= first && left + x <= last;
            const float w = inside ? row_weight * column_weights[left + x + kGap * pw] : 0.0f;
            if (w == 0.0f) continue;
#pragma unroll
            for (int v = 0; v < V; ++v) total[x][v] += w * grad[v];
          }
        }
      }
    }
    __syncthreads();  // the list has been read
  }
  if (row >= height || c >= channels) return;
  T* out = static_cast<T*>(maps.at[level]) + ((image * height + row) * width + left) * channels + c;
#pragma unroll
  for (int x = 0; x < kSide; ++x) {
    if (left + x < width) store<V>(out + x * channels, total[x]);
  }
}

// Runs call(V, T) for the dtype, V elements at a time where all maps and y allow it; says whether the launch worked.
template <class F>
int by_type(int64_t type, const Maps& maps, const void* y, int64_t channels, F f) {
  const auto with = [&](auto t) {
    using T = decltype(t);
    constexpr int V = kPack<T, T>;
    bool whole = packs<V>(y, channels);
    for (int i = 0; i < maps.count; ++i) whole = whole && aligned(maps.at[i]);
    by_pack<V>(whole, [&](auto pack) { f(pack, t); });
  };
  if (type == kFloat) with(float());
  else if (type == kBfloat16) with(__nv_bfloat16());
  else if (type == kHalf) with(__half());
  else return cudaErrorInvalidValue;
  return cudaGetLastError();
}

Maps maps_of(const void* const* at, const float* scales, const int64_t* heights, const int64_t* widths,
             int64_t count) {
  Maps maps = {};
  maps.count = static_cast<int32_t>(count);
  for (int i = 0; i < count; ++i) {
    maps.at[i] = const_cast<void*>(at[i]);
    maps.height[i] = static_cast<int32_t>(heights[i]);
    maps.width[i] = static_cast<int32_t>(widths[i]);
    maps.scale[i] = scales[i];
  }
  return maps;
}

void write_axes(const float* boxes, const int32_t* levels, const int32_t* sizes, int32_t* ranges, float* weights,
                const Maps& maps, int64_t batch, int64_t slots, int64_t size, int64_t length, int64_t sampling_ratio,
                cudaStream_t stream) {
  const int64_t rois = batch * slots, threads = rois * 2 * size;
  roi_align_axes_kernel<<<static_cast<unsigned>((threads + 127) / 128), 128, 0, stream>>>(
      boxes, levels, sizes, ranges, weights, maps, rois, batch, slots, size, length, sampling_ratio);
}

}  // namespace
}  // namespace mimdet

using namespace mimdet;

// features: `count` maps (batch, H, W, channels); boxes: (batch, slots, 4); levels: (batch, slots); sizes: (count, batch,
// 2) or null; y: (batch * slots, size, size, channels); scratch: ranges (batch * slots, 2, size, 2) and weights
// (batch * slots, 2, length). features, scales, heights and widths are the host's.
MIMDET_CUDA_API int mimdet_roi_align_levels_fwd(
    const void* const* features, const float* boxes, const int32_t* levels, const int32_t* sizes, const float* scales,
    int64_t sampling_ratio, void* y, int32_t* ranges, float* weights, const int64_t* heights, const int64_t* widths,
    int64_t count, int64_t batch, int64_t slots, int64_t channels, int64_t size, int64_t length, int64_t type,
    cudaStream_t stream) {
  if (count > kMostLevels) return cudaErrorInvalidValue;
  const Maps maps = maps_of(features, scales, heights, widths, count);
  write_axes(boxes, levels, sizes, ranges, weights, maps, batch, slots, size, length, sampling_ratio, stream);
  return by_type(type, maps, y, channels, [&](auto v, auto t) {
    using T = decltype(t);
    roi_align_kernel<v><<<static_cast<unsigned>(batch * slots * size), row_block(), 0, stream>>>(
        maps, levels, ranges, weights, static_cast<T*>(y), slots, channels, size, length);
  });
}

// dy: (batch * slots, size, size, channels); dfeatures: `count` maps (batch, H, W, channels); all else as forward.
MIMDET_CUDA_API int mimdet_roi_align_levels_bwd(
    const void* dy, const float* boxes, const int32_t* levels, const int32_t* sizes, const float* scales,
    int64_t sampling_ratio, void* const* dfeatures, int32_t* ranges, float* weights, const int64_t* heights,
    const int64_t* widths, int64_t count, int64_t batch, int64_t slots, int64_t channels, int64_t size, int64_t length,
    int64_t type, cudaStream_t stream) {
  if (count > kMostLevels) return cudaErrorInvalidValue;
  const Maps maps = maps_of(dfeatures, scales, heights, widths, count);
  write_axes(boxes, levels, sizes, ranges, weights, maps, batch, slots, size, length, sampling_ratio, stream);
  int64_t all_tiles = 0;
  for (int i = 0; i < count; ++i) {
    all_tiles += (heights[i] + kSide - 1) / kSide * ((widths[i] + kSide - 1) / kSide);
  }
  return by_type(type, maps, dy, channels, [&](auto v, auto t) {
    using T = decltype(t);
    const int64_t share = 32 * v;
    const dim3 grid(static_cast<unsigned>(batch * all_tiles), static_cast<unsigned>((channels + share - 1) / share));
    roi_align_backward_kernel<v><<<grid, dim3(32, kSide), 0, stream>>>(
        maps, static_cast<const T*>(dy), levels, ranges, weights, all_tiles, slots, channels, size, length);
  });
}
