#include "MatchBoxes.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "binding.h"

namespace mimdet {
namespace {

// boxes (B, G, 4) and candidates (N, 4) or (B, N, 4) float32, counts (B) int32, outside (B, N) bool -> index (B, N)
// int32, label (B, N) int8; maxima (B, G) float32: each box's best overlap, whose candidates become label 1.
void fwd(const Tensor& boxes, const Tensor& counts, const Tensor& candidates, std::vector<double> thresholds,
         std::vector<int64_t> labels, OptionalTensor outside, OptionalTensor maxima, Tensor index, Tensor label) {
  const int64_t batch = index.size(0), count = index.size(1), slots = boxes.size(1);
  const int64_t stride = candidates.dim() == 3 ? 4 * count : 0, blocks = (count + kMatchBlock - 1) / kMatchBlock;
  const float *boxes_at = floats(boxes), *candidates_at = floats(candidates);
  const auto* counts_at = static_cast<const int32_t*>(counts.data_ptr());
  const auto* outside_at = outside ? static_cast<const bool*>(outside->data_ptr()) : nullptr;
  auto* index_at = static_cast<int32_t*>(index.data_ptr());
  auto* label_at = static_cast<int8_t*>(label.data_ptr());
  int64_t most = 0;  // real boxes of an image
  for (int64_t b = 0; b < batch; ++b) {
    // Reading outside of a tensor is worse than the microsecond that this takes.
    STD_TORCH_CHECK(counts_at[b] >= 0 && counts_at[b] <= slots, "match_boxes: counts[", b, "] is ", counts_at[b],
                    ", outside of 0 .. ", slots);
    most = std::max<int64_t>(most, counts_at[b]);
  }
  const std::vector<float> limits(thresholds.begin(), thresholds.end());
  const std::vector<int8_t> of_bands(labels.begin(), labels.end());
  const MatchBands bands = {limits.data(), of_bands.data(), static_cast<int64_t>(limits.size())};
  // Best overlaps of the real boxes within each block: the second pass looks only where a box's best one is.
  const std::unique_ptr<float[]> in_block(new float[batch * blocks * most + 1]);
  float* in_block_at = in_block.get();
  const auto match = MIMDET_PICK_ISA(match_boxes_block);
  const int64_t grain = kGrain / kMatchBlock / (most + 1) + 1;
  torch::stable::parallel_for(0, batch * blocks, grain, [=](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, first = task % blocks * kMatchBlock, at = b * count + first;
      match(candidates_at + b * stride + 4 * first, outside_at ? outside_at + at : nullptr,
            std::min(kMatchBlock, count - first), boxes_at + 4 * b * slots, counts_at[b], bands, index_at + at,
            label_at + at, in_block_at + task * most);
    }
  });
  if (!maxima) return;
  float* maxima_at = floats(*maxima);
  const auto ties = MIMDET_PICK_ISA(match_boxes_ties);
  torch::stable::parallel_for(0, batch, 1, [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const float* highest = in_block_at + b * blocks * most;
      bool untouched = false;  // all candidates tie for a box that none of them overlaps
      for (int64_t g = 0; g < counts_at[b]; ++g) {
        float best = 0.0f;
        for (int64_t k = 0; k < blocks; ++k) best = std::max(best, highest[k * most + g]);
        maxima_at[b * slots + g] = best;
        untouched |= best == 0.0f;
        for (int64_t k = 0; k < blocks && best > 0.0f; ++k) {
          if (highest[k * most + g] != best) continue;
          const int64_t first = k * kMatchBlock, at = b * count + first;
          ties(candidates_at + b * stride + 4 * first, outside_at ? outside_at + at : nullptr,
               std::min(kMatchBlock, count - first), boxes_at + 4 * (b * slots + g), best, label_at + at);
        }
      }
      for (int64_t i = b * count; untouched && i < (b + 1) * count; ++i) {
        label_at[i] = outside_at && outside_at[i] ? -1 : 1;
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def(
      "match_boxes_fwd(Tensor boxes, Tensor counts, Tensor candidates, float[] thresholds, int[] labels, "
      "Tensor? outside, Tensor(a!)? maxima, Tensor(b!) index, Tensor(c!) label) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) { m.impl("match_boxes_fwd", TORCH_BOX(&fwd)); }

}  // namespace mimdet
