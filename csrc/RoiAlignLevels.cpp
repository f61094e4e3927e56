#include "RoiAlignLevels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "binding.h"

namespace mimdet {
namespace {

// Tasks are rows and ROIs of unlike cost in an order that tells nothing of it: a thread gets every kParts-th.
constexpr int64_t kParts = 256;

// Calls f(i) for all 0 <= i < n.
template <class F>
void parallel(int64_t n, F f) {
  torch::stable::parallel_for(0, std::min(n, kParts), 1, [=](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t i = part; i < n; i += kParts) f(i);
    }
  });
}

// Weights of one axis of an ROI from `start` to `stop` on a map of `length` positions; weights is zero before.
void axis_weights(float start, float stop, int64_t size, int64_t sampling_ratio, int64_t length, int32_t* ranges,
                  float* weights) {
  const float extent = stop - start, bin = extent / static_cast<float>(size);
  // As many samples as positions; below 2**24, so that float counts them.
  const int64_t grid = sampling_ratio > 0 ? sampling_ratio : static_cast<int64_t>(std::ceil(bin));
  const float most = static_cast<float>(length), count = static_cast<float>(grid);
  for (int64_t b = 0; b < size; ++b, ranges += 2, weights += kGap) {
    const float base = start + static_cast<float>(b) * bin;
    const auto sample = [=](int64_t i) { return base + (static_cast<float>(i) + 0.5f) * bin / count; };
    // The first and the last sample on the map; beyond, and on a box of any size, there may be any number of others.
    int64_t first = 0, last = grid - 1;
    if (grid > 4 * length) {
      const float step = std::max(bin / count, 1e-20f);
      const auto nearest = [=](float position) {
        return static_cast<int64_t>(std::clamp((position - base) / step - 0.5f, -2.0f, count + 2.0f));
      };
      first = std::clamp<int64_t>(nearest(-1.0f) - 2, 0, grid);
      last = std::clamp<int64_t>(nearest(most) + 2, -1, grid - 1);
    }
    while (first <= last && sample(first) < -1.0f) ++first;
    while (first <= last && sample(last) > most) --last;
    if (first > last) {
      // On the side of the map where the samples are.
      const bool after = grid > 0 && sample(grid - 1) >= -1.0f;
      ranges[0] = after ? length : 0;
      ranges[1] = ranges[0] - 1;
      continue;
    }
    const auto position = [=](float at) {
      return std::min<int64_t>(static_cast<int64_t>(std::max(at, 0.0f)), length - 1);
    };
    ranges[0] = position(sample(first));
    ranges[1] = std::min<int64_t>(position(sample(last)) + 1, length - 1);
    for (int64_t i = first; i <= last; ++i) {
      const float at = std::max(sample(i), 0.0f);
      const int64_t low = position(at);
      const float high_weight = low == length - 1 ? 0.0f : at - static_cast<float>(low);
      weights[low] += 1.0f - high_weight;
      if (low < length - 1) weights[low + 1] += high_weight;
    }
    for (int64_t p = ranges[0]; p <= ranges[1]; ++p) weights[p] /= count;
  }
}

// Ranges and weights of both axes of all ROIs.
class Tables {
 public:
  // boxes (B, S, 4), levels (B, S), sizes (L, B, 2) or none; maps: the levels, (B, C, H, W).
  Tables(const Tensor& boxes, const Tensor& levels, const std::optional<Tensor>& sizes,
         const std::vector<double>& scales, const std::vector<Tensor>& maps, int64_t size, int64_t sampling_ratio)
      : size_(size), levels_(static_cast<const int32_t*>(levels.data_ptr())), count_(static_cast<int64_t>(maps.size())) {
    const int64_t batch = boxes.size(0), slots = boxes.size(1), n = batch * slots;
    for (const Tensor& map : maps) length_ = std::max({length_, map.size(2), map.size(3)});
    length_ += kGap * size;
    ranges_.reset(new int32_t[n * 4 * size]);
    weights_.reset(new float[n * 2 * length_]());
    const auto* areas = sizes ? static_cast<const int32_t*>(sizes->data_ptr()) : nullptr;
    for (int64_t i = 0; areas && i < count_ * batch; ++i) {
      // Reading outside of a tensor is worse than what this takes.
      const int64_t H = maps[i / batch].size(2), W = maps[i / batch].size(3), h = areas[2 * i], w = areas[2 * i + 1];
      STD_TORCH_CHECK(h >= 1 && h <= H && w >= 1 && w <= W, "roi_align_levels: sizes[", i / batch, ", ", i % batch,
                      "] is ", h, ", ", w, ", outside of 1 .. ", H, " and 1 .. ", W);
    }
    const float* box = floats(boxes);
    std::vector<int64_t> shapes;
    for (const Tensor& map : maps) {
      shapes.push_back(map.size(2));
      shapes.push_back(map.size(3));
    }
    const std::vector<float> factors(scales.begin(), scales.end());
    const float* factor = factors.data();
    const int64_t* shape = shapes.data();
    int32_t* ranges = ranges_.get();
    float* weights = weights_.get();
    const int64_t length = length_;
    const int32_t* levels_at = levels_;
    const int64_t count = count_;
    parallel(n, [=](int64_t i) {
      const int64_t level = levels_at[i];
      if (level < 0 || level >= count) return;
      for (int64_t axis = 0; axis < 2; ++axis) {  // rows, columns
        const float start = box[4 * i + 1 - axis] * factor[level] - 0.5f;
        const float stop = box[4 * i + 3 - axis] * factor[level] - 0.5f;
        const int64_t most = areas ? areas[2 * (level * batch + i / slots) + axis] : shape[2 * level + axis];
        axis_weights(start, stop, size, sampling_ratio, most, ranges + (2 * i + axis) * 2 * size,
                     weights + (2 * i + axis) * length);
      }
    });
  }

  // -1 for none.
  int64_t level(int64_t roi) const { return levels_[roi] < count_ ? levels_[roi] : -1; }
  RoiAxis axis(int64_t roi, int64_t which) const {
    return {ranges_.get() + (2 * roi + which) * 2 * size_, weights_.get() + (2 * roi + which) * length_};
  }

 private:
  int64_t size_, length_ = 0;
  const int32_t* levels_;
  int64_t count_;
  std::unique_ptr<int32_t[]> ranges_;
  std::unique_ptr<float[]> weights_;
};

// features (B, C, H, W) channels_last, boxes (B, S, 4), levels (B, S) int32, sizes (L, B, 2) int32 or none
// -> y (B * S, C, size, size) channels_last.
void fwd(std::vector<Tensor> features, const Tensor& boxes, const Tensor& levels, std::optional<Tensor> sizes,
         std::vector<double> scales, int64_t sampling_ratio, Tensor y) {
  const int64_t channels = y.size(1), size = y.size(2), slots = boxes.size(1);
  const Tables tables(boxes, levels, sizes, scales, features, size, sampling_ratio);
  const bool bf16 = is_bfloat16(y);
  const int64_t element = bf16 ? 2 : 4, bytes = size * size * channels * element;
  char* y_at = static_cast<char*>(rows(y));
  const auto run = MIMDET_PICK_ISA(roi_align_pool);
  const Tables* table = &tables;
  const std::vector<Tensor>* maps = &features;
  parallel(y.size(0), [=](int64_t i) {
    char* to = y_at + i * bytes;
    const int64_t level = table->level(i);
    if (level < 0) {
      std::memset(to, 0, bytes);
      return;
    }
    thread_local std::vector<float> scratch;
    scratch.resize(size * 64);
    const Tensor& map = (*maps)[level];
    const int64_t image = map.size(2) * map.size(3) * channels * element;
    run(static_cast<const char*>(rows(map)) + i / slots * image, bf16, map.size(3), channels, size, table->axis(i, 0),
        table->axis(i, 1), to, scratch.data());
  });
}

// dy (B * S, C, size, size) channels_last, and what fwd took -> dfeatures (B, C, H, W) channels_last.
void bwd(const Tensor& dy, const Tensor& boxes, const Tensor& levels, std::optional<Tensor> sizes,
         std::vector<double> scales, int64_t sampling_ratio, std::vector<Tensor> dfeatures) {
  const int64_t channels = dy.size(1), size = dy.size(2), slots = boxes.size(1), batch = boxes.size(0);
  const Tables tables(boxes, levels, sizes, scales, dfeatures, size, sampling_ratio);
  const bool bf16 = is_bfloat16(dy);
  const int64_t element = bf16 ? 2 : 4, bytes = size * size * channels * element;
  const char* dy_at = static_cast<const char*>(rows(dy));
  const auto add = MIMDET_PICK_ISA(roi_align_add_row);
  const auto round = MIMDET_PICK_ISA(roi_align_round);
  const Tables* table = &tables;
  for (size_t l = 0; l < dfeatures.size(); ++l) {
    const int64_t level = static_cast<int64_t>(l), H = dfeatures[l].size(2), W = dfeatures[l].size(3);
    char* to = static_cast<char*>(rows(dfeatures[l]));
    // A task has one row of one image, and adds up the ROIs in their order.
    parallel(batch * H, [=](int64_t task) {
      thread_local std::vector<float> scratch, sums;
      scratch.resize(size * channels);
      char* out = to + task * W * channels * element;
      float* row = reinterpret_cast<float*>(out);
      if (bf16) {
        sums.resize(W * channels);
        row = sums.data();
      }
      std::memset(row, 0, sizeof(float) * W * channels);
      const int64_t image = task / H, p = task % H;
      for (int64_t i = image * slots; i < (image + 1) * slots; ++i) {
        if (table->level(i) != level) continue;
        const RoiAxis rows_of = table->axis(i, 0);
        if (p < rows_of.ranges[0] || p > rows_of.ranges[2 * size - 1]) continue;
        add(dy_at + i * bytes, bf16, channels, size, p, rows_of, table->axis(i, 1), row, scratch.data());
      }
      if (bf16) round(row, out, W * channels);
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def(
      "roi_align_levels_fwd(Tensor[] features, Tensor boxes, Tensor levels, Tensor? sizes, float[] scales, "
      "int sampling_ratio, Tensor(a!) y) -> ()");
  m.def(
      "roi_align_levels_bwd(Tensor dy, Tensor boxes, Tensor levels, Tensor? sizes, float[] scales, "
      "int sampling_ratio, Tensor(a!)[] dfeatures) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) {
  m.impl("roi_align_levels_fwd", TORCH_BOX(&fwd));
  m.impl("roi_align_levels_bwd", TORCH_BOX(&bwd));
}

}  // namespace mimdet
