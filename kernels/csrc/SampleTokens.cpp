#include "SampleTokens.h"

#include <cstring>
#include <memory>

#include "binding.h"

namespace mimdet {
namespace {

// Unsigned integers in the order of argsort: padding as infinity, -0 equal to 0, NaN last.
inline uint32_t sort_key(float noise, bool valid) {
  if (!valid) return 0xff800000u;
  uint32_t bits;
  std::memcpy(&bits, &noise, 4);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0xffffffffu;
  if (magnitude == 0) return 0x80000000u;
  return bits == magnitude ? bits | 0x80000000u : ~bits;
}

// The k-th smallest (k >= 1) of n keys, by counting 11, 11 and 10 bits. `below` becomes the number of smaller keys.
// Shuffles the keys.
uint32_t kth_smallest(uint32_t* keys, int64_t n, int64_t k, int64_t* below) {
  constexpr int kShifts[] = {21, 10, 0};
  constexpr int kBits[] = {11, 11, 10};
  uint32_t prefix = 0;
  *below = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const uint32_t mask = (1u << kBits[pass]) - 1;
    int64_t counts[2048] = {};
    for (int64_t i = 0; i < n; ++i) ++counts[(keys[i] >> kShifts[pass]) & mask];
    uint32_t digit = 0;
    while (*below + counts[digit] < k) *below += counts[digit++];
    // Keys of other digits are settled; the rest goes on.
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = keys[i];
      keys[left] = key;
      left += ((key >> kShifts[pass]) & mask) == digit;
    }
    n = left;
    prefix |= digit << kShifts[pass];
  }
  return prefix;
}

}  // namespace

void sample_tokens_row(const float* noise, const bool* valid, int64_t length, int64_t count, int64_t* keep,
                       int64_t* drop, int64_t* restore, uint32_t* scratch) {
  uint32_t* keys = scratch;
  for (int64_t i = 0; i < length; ++i) keys[i] = sort_key(noise[i], valid[i]);
  uint32_t last = 0;
  int64_t ties = 0;  // how many keys equal to the last one are kept: the first ones
  if (count > 0) {
    std::memcpy(scratch + length, keys, sizeof(uint32_t) * length);
    int64_t below;
    last = kth_smallest(scratch + length, length, count, &below);
    ties = count - below;
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < length; ++i) {
    const bool equal = keys[i] == last;
    const bool take = keys[i] < last || (equal && ties > 0);
    ties -= equal;
    const int64_t dropped = i - kept;
    *(take ? keep + kept : drop + dropped) = i;
    restore[i] = take ? kept : count + dropped;
    kept += take;
  }
}

// noise (B, L) float32, valid (B, L) bool -> keep (B, K), drop (B, L - K), restore (B, L) int64; all contiguous.
void sample_tokens(const Tensor& noise, const Tensor& valid, Tensor keep, Tensor drop, Tensor restore) {
  const int64_t length = noise.size(1), count = keep.size(1);
  const float* noise_at = floats(noise);
  const auto* valid_at = static_cast<const bool*>(valid.data_ptr());
  auto* keep_at = static_cast<int64_t*>(keep.data_ptr());
  auto* drop_at = static_cast<int64_t*>(drop.data_ptr());
  auto* restore_at = static_cast<int64_t*>(restore.data_ptr());
  // A token costs about as much as eight elements of a row.
  const int64_t grain = kGrain / 8 / (length + 1) + 1;
  torch::stable::parallel_for(0, noise.size(0), grain, [=](int64_t begin, int64_t end) {
    const std::unique_ptr<uint32_t[]> scratch(new uint32_t[2 * length]);
    for (int64_t b = begin; b < end; ++b) {
      sample_tokens_row(noise_at + b * length, valid_at + b * length, length, count, keep_at + b * count,
                        drop_at + b * (length - count), restore_at + b * length, scratch.get());
    }
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def("sample_tokens(Tensor noise, Tensor valid, Tensor(a!) keep, Tensor(b!) drop, Tensor(c!) restore) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) { m.impl("sample_tokens", TORCH_BOX(&sample_tokens)); }

}  // namespace mimdet
