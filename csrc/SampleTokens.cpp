#include <cstring>
#include <memory>

#include "binding.h"

namespace mimdet {
namespace {

constexpr uint32_t kOutside = 0xffffffffu, kNan = 0xfffffffeu, kInfinity = 0xff800000u;

// Unsigned integers in the order of argsort: -0 equal to 0, NaN last.
inline uint32_t sort_key(float noise) {
  uint32_t bits;
  std::memcpy(&bits, &noise, 4);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return kNan;
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
    // Only keys with this digit go on to the next pass.
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

// Outputs of one image, and the numbers of its tokens and rows.
struct Part {
  int64_t count;  // tokens to keep
  int64_t *ids_keep, *ids_mask, *ids_restore;
  int64_t token, kept_row, masked_row;  // numbers of its first token, kept row and masked row
};

// noise, valid_mask: (length,); keys: scratch of 2 * length.
void sample_image(const float* noise, const bool* valid_mask, int64_t length, uint32_t padding, const Part& to,
                  uint32_t* keys) {
  for (int64_t i = 0; i < length; ++i) keys[i] = valid_mask[i] ? sort_key(noise[i]) : padding;
  uint32_t last = 0;  // no key is 0
  int64_t ties = 0;   // how many keys equal to the last one are kept: the first ones
  if (to.count > 0) {
    std::memcpy(keys + length, keys, sizeof(uint32_t) * length);
    int64_t below;
    last = kth_smallest(keys + length, length, to.count, &below);
    ties = to.count - below;
  }
  int64_t kept = 0, masked = 0, nowhere;
  for (int64_t i = 0; i < length; ++i) {
    const bool equal = keys[i] == last, member = keys[i] != kOutside;
    const bool take = keys[i] < last || (equal && ties > 0);
    ties -= equal;
    *(take ? to.ids_keep + kept : member ? to.ids_mask + masked : &nowhere) = to.token + i;
    to.ids_restore[i] = take ? to.kept_row + kept : member ? to.masked_row + masked : -1;
    kept += take;
    masked += member && !take;
  }
}

// noise (B, L) float32, valid_mask (B, L) bool -> ids_restore (B, L); without offsets ids_keep (B, K), ids_mask
// (B, L - K), with offsets (2, B + 1) int32 ids_keep (T,), ids_mask (D,); outputs int64, all contiguous.
void fwd(const Tensor& noise, const Tensor& valid_mask, OptionalTensor offsets, Tensor ids_keep, Tensor ids_mask,
         Tensor ids_restore) {
  const int64_t batch = noise.size(0), length = noise.size(1), kept = ids_keep.size(-1), masked = ids_mask.size(-1);
  const float* noise_at = floats(noise);
  const auto* valid_mask_at = static_cast<const bool*>(valid_mask.data_ptr());
  const auto* starts = offsets ? static_cast<const int32_t*>(offsets->data_ptr()) : nullptr;
  auto* ids_keep_at = static_cast<int64_t*>(ids_keep.data_ptr());
  auto* ids_mask_at = static_cast<int64_t*>(ids_mask.data_ptr());
  auto* ids_restore_at = static_cast<int64_t*>(ids_restore.data_ptr());
  // A token costs about as much as eight elements of a row.
  const int64_t grain = kGrain / 8 / (length + 1) + 1;
  torch::stable::parallel_for(0, batch, grain, [=](int64_t begin, int64_t end) {
    const std::unique_ptr<uint32_t[]> keys(new uint32_t[2 * length]);
    for (int64_t b = begin; b < end; ++b) {
      Part to;
      if (starts == nullptr) {
        to = {kept, ids_keep_at + b * kept, ids_mask_at + b * masked, nullptr, 0, 0, kept};
      } else {
        const int64_t first = starts[b], second = starts[batch + 1 + b];
        to = {starts[b + 1] - first, ids_keep_at + first, ids_mask_at + second, nullptr, b * length, first,
              kept + second};
      }
      to.ids_restore = ids_restore_at + b * length;
      sample_image(noise_at + b * length, valid_mask_at + b * length, length, starts ? kOutside : kInfinity, to,
                   keys.get());
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mimdet_cpu, m) {
  m.def(
      "sample_tokens_fwd(Tensor noise, Tensor valid_mask, Tensor? offsets, Tensor(a!) ids_keep, Tensor(b!) ids_mask, "
      "Tensor(c!) ids_restore) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mimdet_cpu, CPU, m) { m.impl("sample_tokens_fwd", TORCH_BOX(&fwd)); }

}  // namespace mimdet
