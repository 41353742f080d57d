// Inputs of linear layers: rotate a row (signs, block Walsh-Hadamard) and round it to int8 with one scale, in one pass and
// in the arithmetic order of maths/rotation.py. Compiled once per instruction set, without contraction.
#include "rows.h"
#include "spec.h"

namespace tq {
namespace TQ_ISA {

namespace {

TQ_INLINE void store_i8(int8_t* p, V16 x) {  // whole numbers from -127 to 127; NaN is 0
#if defined(TQ_AVX512)
  const __mmask16 number = _mm512_cmp_ps_mask(x.a, x.a, _CMP_ORD_Q);
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_maskz_cvtps_epi32(number, x.a)));
#else
  float v[16];
  store(v, x);
  for (int i = 0; i < 16; i++) p[i] = v[i] == v[i] ? int8_t(v[i]) : 0;
#endif
}

static void quantize_row(const RowsToQuantize& a, int64_t row, float* y) {
  const int64_t from = row * a.stride;
  V16 top = zero(), bad = zero();
  for (int64_t at = 0; at < a.width; at += a.block) {
    float* b = y + at;
    for (int i = 0; i < a.block; i += 16) store(b + i, mul(load_as(a.x, a.dtype, from + at + i), load(a.signs + at + i)));
    hadamard(b, a.block, a.block, a.norm);
    for (int i = 0; i < a.block; i += 16) {
      const V16 x = load(b + i);
      top = max(top, max(x, sub(zero(), x))), bad = add(bad, mul(x, zero()));
    }
  }
  const float broken = sum16(bad);  // 0, or NaN
  const float unit = max16(top) / 127.0f, scale = broken == broken ? (unit > 1e-30f ? unit : 1e-30f) : broken;
  a.scale[row] = scale;
  const V16 s = set1(scale), most = set1(127.0f), least = set1(-127.0f);
  for (int64_t i = 0; i < a.width; i += 16) {
    const V16 x = div(load(y + i), s);
    store_i8(a.codes + row * a.width + i, broken == broken ? min(max(rint(x), least), most) : zero());
  }
}

}  // namespace

extern const Quantizer quantizer;
const Quantizer quantizer{quantize_row};

}  // namespace TQ_ISA
}  // namespace tq
