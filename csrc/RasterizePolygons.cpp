// Bitmaps of polygons inside boxes, equal to pycocotools' rleFrPoly and rleMerge. This file is compiled without
// contraction of a * b + c: fused, a sum would be rounded once where pycocotools rounds twice.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "binding.h"

namespace mimdet {
namespace {

constexpr double kFar = (1 << 30) - 1;  // differences of two positions fit int32

// On the grid of fifths of a pixel; NaN and what is too far is moved to the grid's end.
inline int32_t position(double p, double corner, double scale) {
  p = 5.0 * ((p - corner) * scale) + 0.5;
  p = p > -kFar ? p : -kFar;
  return static_cast<int32_t>(p < kFar ? p : kFar);
}

struct Edge {
  int32_t x0, y0, x1, y1;
};

// Flips, in every column c that the edge crosses between 5c + 2 and 5c + 3, the cell from which on pixels change:
// row ceil((v - 2) / 5) of a crossing at height v. flips: (size + 1, size). Returns whether there was one.
bool cross_columns(Edge e, int32_t size, uint8_t* flips) {
  const int32_t low = e.x0 < e.x1 ? e.x0 : e.x1, high = e.x0 < e.x1 ? e.x1 : e.x0;
  const int32_t first = low <= 2 ? 0 : (low + 2) / 5;
  int32_t last = high < 3 ? -1 : (high - 3) / 5;
  if (last >= size) last = size - 1;
  if (first > last) return false;
  const bool flat = std::abs(e.x1 - e.x0) >= std::abs(e.y1 - e.y0);
  // The axis on which the edge is longer is walked upwards, the other one is rounded.
  if (flat ? e.x0 > e.x1 : e.y0 > e.y1) e = {e.x1, e.y1, e.x0, e.y0};
  const int32_t run = flat ? e.x1 - e.x0 : e.y1 - e.y0;
  const double slope = static_cast<double>(flat ? e.y1 - e.y0 : e.x1 - e.x0) / run;
  const double begin = flat ? e.y0 : e.x0;
  const auto rounded = [=](int32_t t) { return static_cast<int32_t>(begin + slope * t + 0.5); };
  for (int32_t c = first; c <= last; ++c) {
    const int32_t at = 5 * c + 2;
    int32_t v;
    if (flat) {
      const int32_t a = rounded(at - e.x0), b = rounded(at - e.x0 + 1);
      v = a < b ? a : b;
    } else {
      // The first step across the column, from its real number, which is not a step from the exact one.
      const auto beyond = [=](int32_t t) { return slope > 0 ? rounded(t) > at : rounded(t) <= at; };
      int32_t t = static_cast<int32_t>(std::ceil((at + 0.5 - begin) / slope)) - 1;
      t = t < 1 ? 1 : t > run ? run : t;
      if (!beyond(t) && !beyond(++t)) ++t;
      v = e.y0 + t - 1;
    }
    const int32_t row = v <= 2 ? 0 : (v + 2) / 5 < size ? (v + 2) / 5 : size;
    flips[static_cast<int64_t>(row) * size + c] ^= 1;
  }
  return true;
}

// Joins the polygon of these points to `mask`, (size, size). flips: (size + 1, size), zeros, as they are left.
void join_polygon(const double* points, int64_t count, const double* box, const double* scale, int32_t size,
                  uint8_t* flips, uint8_t* inside, uint8_t* mask) {
  const auto x = [=](int64_t i) { return position(points[2 * i], box[0], scale[0]); };
  const auto y = [=](int64_t i) { return position(points[2 * i + 1], box[1], scale[1]); };
  bool any = false;
  Edge e = {0, 0, x(count - 1), y(count - 1)};
  for (int64_t i = 0; i < count; ++i) {
    e = {e.x1, e.y1, x(i), y(i)};
    any |= cross_columns(e, size, flips);
  }
  if (!any) return;
  std::memset(inside, 0, size);
  for (int32_t r = 0; r < size; ++r, flips += size, mask += size) {
    for (int32_t c = 0; c < size; ++c) {
      inside[c] ^= flips[c];
      mask[c] |= inside[c];
      flips[c] = 0;
    }
  }
  std::memset(flips, 0, size);
}

// Reading outside of a tensor is worse than the few microseconds that this takes.
void check_starts(const int32_t* starts, int64_t count, int64_t total, const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(starts[i] >= (i ? starts[i - 1] : 0) && starts[i] <= total, "rasterize_polygons: ", name, "[", i,
                    "] is ", starts[i], "; they must ascend from 0 to ", total);
  }
}

// points (P, 2) and boxes (R, 4) float64, starts int32, index (R) int64 -> masks (R, size, size) bool; all contiguous.
void fwd(const Tensor& points, const Tensor& polygon_starts, const Tensor& instance_starts, const Tensor& index,
         const Tensor& boxes, Tensor masks) {
  const auto* points_at = static_cast<const double*>(points.data_ptr());
  const auto* polygons = static_cast<const int32_t*>(polygon_starts.data_ptr());
  const auto* instances = static_cast<const int32_t*>(instance_starts.data_ptr());
  const auto* index_at = static_cast<const int64_t*>(index.data_ptr());
  const auto* boxes_at = static_cast<const double*>(boxes.data_ptr());
  auto* masks_at = static_cast<uint8_t*>(masks.data_ptr());
  const int64_t known = instance_starts.numel() - 1;
  const int32_t size = static_cast<int32_t>(masks.size(1));
  check_starts(polygons, polygon_starts.numel(), points.size(0), "polygon_starts");
  check_starts(instances, known + 1, polygon_starts.numel() - 1, "instance_starts");
  for (int64_t r = 0; r < index.numel(); ++r) {
    STD_TORCH_CHECK(index_at[r] >= 0 && index_at[r] < known, "rasterize_polygons: index[", r, "] is ", index_at[r],
                    ", outside of 0 .. N - 1 with N = ", known);
  }
  const int64_t pixels = static_cast<int64_t>(size) * size;
  torch::stable::parallel_for(0, index.numel(), kGrain / 8 / (pixels + 1) + 1, [=](int64_t begin, int64_t end) {
    const std::unique_ptr<uint8_t[]> scratch(new uint8_t[pixels + 2 * size]());
    for (int64_t r = begin; r < end; ++r) {
      const double* box = boxes_at + 4 * r;
      double scale[2];
      for (int i = 0; i < 2; ++i) scale[i] = size / (box[i + 2] - box[i] > 0.1 ? box[i + 2] - box[i] : 0.1);
      uint8_t* mask = masks_at + r * pixels;
      std::memset(mask, 0, pixels);
      for (int32_t p = instances[index_at[r]]; p < instances[index_at[r] + 1]; ++p) {
        const int64_t first = polygons[p], count = polygons[p + 1] - first;
        if (count == 0) continue;
        join_polygon(points_at + 2 * first, count, box, scale, size, scratch.get(), scratch.get() + pixels + size,
                     mask);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def(
      "rasterize_polygons_fwd(Tensor points, Tensor polygon_starts, Tensor instance_starts, Tensor index, "
      "Tensor boxes, Tensor(a!) masks) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) { m.impl("rasterize_polygons_fwd", TORCH_BOX(&fwd)); }

}  // namespace mimdet
