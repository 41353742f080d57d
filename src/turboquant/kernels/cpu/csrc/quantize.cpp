// Inputs of linear layers: rotate a row (signs, block Walsh-Hadamard) and round it to int8 with one scale, in one pass and
// in the arithmetic order of maths/rotation.py; behind a norm or a gate too, whose steps are rounded to the dtype where
// kernels/fused.py rounds them. Compiled once per instruction set, without contraction.
#include "round.h"
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

TQ_INLINE V16 activate(V16 x, int activation) {
  const V16 one = set1(1.0f);
  if (activation == SILU) {  // x / (1 + e^-x), for negative x as x·e^x / (1 + e^x)
    const V16 e = exp16(sub(zero(), max(x, sub(zero(), x))));
    const V16 over = add(keep_if_ge(x, 0.0f, one), sub(e, keep_if_ge(x, 0.0f, e)));
    return div(mul(x, over), add(one, e));
  }
  const V16 cube = mul(mul(x, x), x), inner = mul(set1(0.7978845608f), add(x, mul(set1(0.044715f), cube)));
  return mul(mul(set1(0.5f), x), add(one, tanh16(inner)));
}

// what is rotated of a row, in its dtype as fp32
static void load_row(const RowsToQuantize& a, int64_t row, float* y) {
  const int64_t from = row * a.stride;
  const int d = a.dtype;
  if (a.before == PLAIN) {
    for (int64_t i = 0; i < a.width; i += 16) store(y + i, load_as(a.x, d, from + i));
  } else if (a.before == GATE) {
    for (int64_t i = 0; i < a.width; i += 16) {
      const V16 gate = round_as(activate(load_as(a.x, d, from + i), a.activation), d);
      store(y + i, round_as(mul(gate, load_as(a.up, d, from + i)), d));
    }
  } else {
    V16 squares = zero();
    for (int64_t i = 0; i < a.width; i += 16) {
      const V16 x = load_as(a.x, d, from + i);
      store(y + i, x), squares = add(squares, mul(x, x));
    }
    const V16 r = set1(1.0f / std::sqrt(sum16(squares) / float(a.width) + a.eps)), shift = set1(a.shift);
    for (int64_t i = 0; i < a.width; i += 16) {
      const V16 x = mul(load(y + i), r), w = add(load_as(a.weight, d, i), shift);
      const V16 out = round_as(a.once ? mul(x, w) : mul(round_as(x, d), round_as(w, d)), d);
      store(y + i, out), store16_as(a.y, d, row * a.width + i, out);
    }
  }
}

static void quantize_row(const RowsToQuantize& a, int64_t row, float* y) {
  load_row(a, row, y);
  V16 top = zero(), bad = zero();
  for (int64_t at = 0; at < a.width; at += a.block) {
    float* b = y + at;
    for (int i = 0; i < a.block; i += 16) store(b + i, mul(load(b + i), load(a.signs + at + i)));
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
