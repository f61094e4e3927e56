// Greedy non-maximum suppression, equal to torchvision's. This file is compiled without contraction of a * b + c: fused,
// a union would be rounded once where torchvision rounds twice.
#include "NmsSlots.h"

#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "binding.h"

namespace mimdet {
namespace {

// The first row from `row` on that is valid, else `rows`.
int64_t next_valid(const uint8_t* valid, int64_t row, int64_t rows) {
  for (; row + 8 <= rows; row += 8) {
    uint64_t eight;
    std::memcpy(&eight, valid + row, 8);
    if (eight != 0) break;
  }
  while (row < rows && !valid[row]) ++row;
  return row;
}

// Whether a box of the group has an IoU above the threshold with `box`.
bool overlaps(const float* a, const float* box, float threshold) {
  const float x0 = box[0], y0 = box[1], x1 = box[2], y1 = box[3], area = box[4];
  int any = 0;
  for (int64_t i = 0; i < kGroup; ++i) {
    const float left = a[i] < x0 ? x0 : a[i], top = a[kGroup + i] < y0 ? y0 : a[kGroup + i];
    const float right = x1 < a[2 * kGroup + i] ? x1 : a[2 * kGroup + i];
    const float bottom = y1 < a[3 * kGroup + i] ? y1 : a[3 * kGroup + i];
    const float width = right - left, height = bottom - top;
    const float intersection = (0.0f < width ? width : 0.0f) * (0.0f < height ? height : 0.0f);
    any |= intersection / (a[4 * kGroup + i] + area - intersection) > threshold;
  }
  return any != 0;
}

// Empty places of a group: they overlap nothing.
void clear(float* group) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < kGroup; ++i) {
    group[i] = group[kGroup + i] = group[4 * kGroup + i] = kInfinity;
    group[2 * kGroup + i] = group[3 * kGroup + i] = -kInfinity;
  }
}

// One problem from its first valid row on; keep is zeros. groups: scratch for the boxes that are kept.
void suppress(const float* boxes, const uint8_t* valid, uint8_t* keep, int64_t row, int64_t rows, float threshold,
              int64_t stop_at, float* groups) {
  const auto search = MIMDET_PICK_ISA(nms_slots_search);
  // IoU > t is intersection > t / (1 + t) * (sum of areas). A little less leaves room for rounding, and a threshold that
  // is almost 0 has no such room: everything is compared exactly then.
  const float share = threshold > 1e-30f ? static_cast<float>(threshold / (1.0 + threshold) * (1.0 - 1e-5)) : 0.0f;
  int64_t kept = 0;
  for (; row < rows && kept < stop_at; row = next_valid(valid, row + 1, rows)) {
    const float* at = boxes + 4 * row;
    const float box[5] = {at[0], at[1], at[2], at[3], (at[2] - at[0]) * (at[3] - at[1])};
    const int64_t count = (kept + kGroup - 1) / kGroup;
    int64_t group = search(groups, 0, count, box, share);
    while (group < count && !overlaps(groups + group * 5 * kGroup, box, threshold)) {
      group = search(groups, group + 1, count, box, share);
    }
    if (group < count) continue;
    keep[row] = 1;
    float* last = groups + kept / kGroup * 5 * kGroup;
    if (kept % kGroup == 0) clear(last);
    for (int64_t i = 0; i < 5; ++i) last[i * kGroup + kept % kGroup] = box[i];
    ++kept;
  }
}

// boxes (Z, n, 4) float32, valid (Z, n) bool, a threshold that is a float32 -> keep (Z, n) bool; all contiguous.
void fwd(const Tensor& boxes, const Tensor& valid, double iou_threshold, int64_t stop_at, Tensor keep) {
  const float* boxes_at = floats(boxes);
  const auto* valid_at = static_cast<const uint8_t*>(valid.data_ptr());
  auto* keep_at = static_cast<uint8_t*>(keep.data_ptr());
  const int64_t problems = keep.size(0), rows = keep.size(1);
  const float threshold = static_cast<float>(iou_threshold);
  std::memset(keep_at, 0, problems * rows);
  // Most classes of a detector have no box: threads share only the problems that have one.
  struct Problem {
    int64_t number, first;
  };
  std::vector<Problem> todo;
  for (int64_t z = 0; z < problems; ++z) {
    const int64_t first = next_valid(valid_at + z * rows, 0, rows);
    if (first < rows) todo.push_back({z, first});
  }
  const Problem* todo_at = todo.data();
  const int64_t most = (stop_at < rows ? stop_at : rows) / kGroup + 1;
  const int64_t grain = kGrain / (rows * rows / 32 + 1) + 1;
  torch::stable::parallel_for(0, todo.size(), grain, [=](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> groups(new float[most * 5 * kGroup]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = todo_at[i].number * rows;
      suppress(boxes_at + 4 * first, valid_at + first, keep_at + first, todo_at[i].first, rows, threshold, stop_at,
               groups.get());
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def("nms_slots_fwd(Tensor boxes, Tensor valid, float iou_threshold, int stop_at, Tensor(a!) keep) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) { m.impl("nms_slots_fwd", TORCH_BOX(&fwd)); }

}  // namespace mimdet
