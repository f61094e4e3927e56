#include "NmsSlots.h"

#include "vec.h"

namespace mimdet {
namespace MIMDET_ISA {

int64_t nms_slots_search(const float* groups, int64_t group, int64_t count, const float* box, float share) {
  const float x0 = box[0], y0 = box[1], x1 = box[2], y1 = box[3], area = box[4];
  for (; group < count; ++group) {
    const float* a = groups + group * 5 * kGroup;
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t i = 0; i < kGroup; ++i) {
      const float left = a[i] < x0 ? x0 : a[i], top = a[kGroup + i] < y0 ? y0 : a[kGroup + i];
      const float right = x1 < a[2 * kGroup + i] ? x1 : a[2 * kGroup + i];
      const float bottom = y1 < a[3 * kGroup + i] ? y1 : a[3 * kGroup + i];
      const float width = right - left, height = bottom - top;
      const float intersection = (0.0f < width ? width : 0.0f) * (0.0f < height ? height : 0.0f);
      any |= !(intersection < share * (a[4 * kGroup + i] + area));
    }
    if (any) break;
  }
  return group;
}

}  // namespace MIMDET_ISA
}  // namespace mimdet
