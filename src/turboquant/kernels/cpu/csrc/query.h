// What both parts of attention need: scratch memory and query rows as fp32.
#pragma once
#include "softmax.h"

namespace tq {
namespace TQ_ISA {
namespace {

struct Scratch {
  float *q, *s, *tile, *scale, *mean, *rows, *hot, *integer;
  explicit Scratch(const Spec& spec, float* p) {
    q = p, p += 2 * ROWS * LD;
    s = p, p += ROWS * (spec.page > EXACT ? spec.page : EXACT);
    tile = p, p += TILE * MAX_D + 16 * MAX_D;
    scale = p, p += MAX_D;
    mean = p, p += MAX_D;
    rows = p, p += 16 * MAX_D;
    hot = p, p += spec.hot * spec.page;
    integer = p;
  }
};

TQ_INLINE const char* at(const void* base, int dtype, int64_t element) {
  return (const char*)base + element * (dtype == F32 ? 4 : 2);
}

// query row r = column·group + member, as fp32
TQ_INLINE void load_query(const Call& c, int b, int h, int r, float* dst) {
  const int i = r / c.group, g = r % c.group;
  const void* src = at(c.q.data, c.q.dtype, b * c.q.sb + (h * c.group + g) * c.q.sh + i * c.q.sn);
  for (int k = 0; k < c.spec->d; k += 16) store(dst + k, load_as(src, c.q.dtype, k));
}

}  // namespace
}  // namespace TQ_ISA
}  // namespace tq
