// The valid areas of padded feature maps, for the bindings of the CPU kernels.
#pragma once

#include <algorithm>

#include "binding.h"

namespace mimdet {

// Rows and columns at the top left of each map; without sizes, all of them.
class Areas {
 public:
  // x (B, C, H, W), sizes (B, 2) int32 of at least least, or none.
  Areas(const Tensor& x, const OptionalTensor& sizes, int64_t least = 1)
      : H_(x.size(2)), W_(x.size(3)), sizes_(sizes ? static_cast<const int32_t*>(sizes->data_ptr()) : nullptr) {
    for (int64_t i = 0; sizes_ && i < x.size(0); ++i) {
      // A size out of range would read outside of the tensor.
      STD_TORCH_CHECK(rows(i) >= least && rows(i) <= H_ && columns(i) >= least && columns(i) <= W_, "mimdet: sizes[",
                      i, "] is ", rows(i), ", ", columns(i), ", outside of ", least, " .. ", H_, " and ", least,
                      " .. ", W_);
    }
  }

  int64_t rows(int64_t sample) const { return sizes_ ? sizes_[2 * sample] : H_; }
  int64_t columns(int64_t sample) const { return sizes_ ? sizes_[2 * sample + 1] : W_; }
  int64_t positions(int64_t sample) const { return rows(sample) * columns(sample); }

  // Cuts n positions from first into runs that are all valid or all padding; calls f(first, n, is_valid) for each.
  template <class F>
  void each_run(int64_t sample, int64_t first, int64_t n, F f) const {
    const int64_t last = first + n, rows = this->rows(sample), columns = this->columns(sample);
    for (int64_t end; first < last; first = end) {
      const int64_t row = first / W_;
      const bool is_valid = row < rows && first % W_ < columns;
      if (row >= rows) {
        end = last;
      } else if (columns == W_) {
        end = rows * W_;
      } else {
        end = row * W_ + (is_valid ? columns : W_);
      }
      end = std::min(end, last);
      f(first, end - first, is_valid);
    }
  }

 private:
  int64_t H_, W_;
  const int32_t* sizes_;
};

}  // namespace mimdet
