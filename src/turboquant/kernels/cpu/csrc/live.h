// A page of 64 tokens of a live recipe, head_dim 64 or 128: a row of it stays in registers from the turned query to its
// digits and from the logits to the digits of the probabilities. The same arithmetic as the loops in attend.cpp.
#pragma once
#include "exact.h"
#include "integer.h"

namespace tq {
namespace TQ_ISA {
namespace {

#if defined(TQ_AVX512)
TQ_INLINE __m512i code16(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
#endif

// 16 entries of s_table
TQ_INLINE V16 channel_scale16(const Spec& s, const uint8_t* code) {
#if defined(TQ_AVX512)
  if (s.octaves) {  // a gather costs as much as ten of these
    const __m512i c = code16(code), f = _mm512_castps_si512(_mm512_permutexvar_ps(c, load(s.s_table + 128).a));
    const __m512i octave = _mm512_sub_epi32(_mm512_srli_epi32(c, 4), _mm512_set1_epi32(8));
    return {_mm512_castsi512_ps(_mm512_add_epi32(f, _mm512_slli_epi32(octave, 23)))};
  }
#endif
  return lookup(s.s_table, code);
}

// 16 entries of a_table
TQ_INLINE V16 token_scale16(const Spec& s, const uint8_t* code) {
#if defined(TQ_AVX512)
  if (s.octaves) {
    const __m512i c = code16(code);
    const __m512i f = _mm512_castps_si512(_mm512_permutex2var_ps(load(s.a_table).a, c, load(s.a_table + 16).a));
    const __m512i x = _mm512_sub_epi32(f, _mm512_slli_epi32(_mm512_srli_epi32(c, 5), 23));
    return {_mm512_castsi512_ps(_mm512_maskz_mov_epi32(_mm512_cmpneq_epi32_mask(c, _mm512_set1_epi32(255)), x))};
  }
#endif
  return lookup(s.a_table, code);
}

struct Span {  // tokens lo <= j < hi that a row reads
  int64_t lo, hi;
};

struct PageRows {  // a page and its rows
  const float *key_scale, *value_scale, *hot, *constant;
  const float (*q_hot)[MAX_HOT];
  const Span* span;
  int64_t from;  // position of its first token
  int hot_count, d;
};

#if defined(TQ_VNNI)

// f over the lanes of four values at once, in the tree of `sum16`: a chain of eight steps for each would be waited for
template <class F>
TQ_INLINE __m128 reduce4(__m512 a, __m512 b, __m512 c, __m512 d, F f) {
  const __m512 ab = f(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  const __m512 cd = f(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
  __m512 x = f(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
  x = f(x, _mm512_permute_ps(x, 0x4E)), x = f(x, _mm512_permute_ps(x, 0xB1));
  return _mm512_castps512_ps128(_mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), x));
}

template <int RB, class T>
TQ_INLINE __m128 sum_rows(const T (&x)[RB]) {
  const auto f = [](__m512 p, __m512 q) __attribute__((always_inline)) { return _mm512_add_ps(p, q); };
  return reduce4(x[0].a, x[1 % RB].a, x[2 % RB].a, x[3 % RB].a, f);
}

template <int RB>
TQ_INLINE __m128i sum_rows(const __m512i (&x)[RB]) {
  const auto f = [](__m512 p, __m512 q) __attribute__((always_inline)) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_castps_si512(q)));
  };
  const auto c = [](__m512i p) __attribute__((always_inline)) { return _mm512_castsi512_ps(p); };
  return _mm_castps_si128(reduce4(c(x[0]), c(x[1 % RB]), c(x[2 % RB]), c(x[3 % RB]), f));
}

template <int RB>
TQ_INLINE __m128i max_rows(const __m512i (&x)[RB]) {  // of unsigned numbers
  const auto f = [](__m512 p, __m512 q) __attribute__((always_inline)) {
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(p), _mm512_castps_si512(q)));
  };
  const auto c = [](__m512i p) __attribute__((always_inline)) { return _mm512_castsi512_ps(p); };
  return _mm_castps_si128(reduce4(c(x[0]), c(x[1 % RB]), c(x[2 % RB]), c(x[3 % RB]), f));
}

// digits of RB rows in registers, from row r on, as `digits_of`; returns which rows are finite, as bits
template <int DIGITS, int RB, int NV>
TQ_INLINE int digits_rows(const V16 (&y)[RB][NV], int r, Digits& x) {
  constexpr float WHOLE = DIGITS == 2 ? 32639.0f : 8355000.0f;
  constexpr __mmask8 ALL = (1 << RB) - 1;
  __m512i top[RB], sum[RB][DIGITS];
  for (int i = 0; i < RB; i++) {
    top[i] = magnitude(y[i][0]);
    for (int v = 1; v < NV; v++) top[i] = _mm512_max_epu32(top[i], magnitude(y[i][v]));
    for (int k = 0; k < DIGITS; k++) sum[i][k] = _mm512_setzero_si512();
  }
  const __m128i bits = max_rows<RB>(top);
  const __m128 largest = _mm_castsi128_ps(bits), whole = _mm_set1_ps(WHOLE);
  const __mmask8 finite = ALL & _mm_cmplt_epu32_mask(bits, _mm_set1_epi32(0x7F800000));
  const __mmask8 some = finite & _mm_cmp_ps_mask(largest, _mm_set1_ps(1e-30f), _CMP_GT_OQ);
  _mm_mask_storeu_ps(x.unit + r, ALL, _mm_maskz_div_ps(some, largest, whole));
  alignas(16) float gain[4];
  _mm_store_ps(gain, _mm_maskz_div_ps(some, whole, largest));
  for (int i = 0; i < RB; i++) {
    x.finite[r + i] = finite >> i & 1;
    for (int j = 0; j < NV; j += 4) {
      __m512i n[4];
      for (int v = 0; v < 4; v++) n[v] = _mm512_cvtps_epi32(_mm512_mul_ps(y[i][j + v].a, _mm512_set1_ps(gain[i])));
      split64<DIGITS>(n, x.digit + (r + i) * DIGITS * LDW + 16 * j, sum[i]);
    }
  }
  __m512i low[RB], high[RB];
  alignas(16) int32_t first[4], second[4];
  for (int i = 0; i < RB; i++) low[i] = sum[i][0], high[i] = _mm512_add_epi32(sum[i][1], _mm512_slli_epi32(sum[i][DIGITS - 1], 8));
  _mm_store_si128((__m128i*)first, _mm_mullo_epi32(sum_rows<RB>(low), _mm_set1_epi32(-128)));
  if (DIGITS == 3) _mm_store_si128((__m128i*)second, _mm_mullo_epi32(sum_rows<RB>(high), _mm_set1_epi32(-128)));
  for (int i = 0; i < RB; i++) {
    int32_t* to = x.start + (r + i) * DIGITS;
    to[0] = first[i];
    if (DIGITS == 3) to[1] = second[i];
    to[DIGITS - 1] = 0;
  }
  x.groups = 4 * NV;
  return finite;
}

// digits of R(q∘s) of RB rows; constant = (q∘s)·mean. y is written only where a number is not finite
template <int DIGITS, int RB, int NV>
TQ_INLINE void turn_block(const float* q, const float* scale, const float* mean, float* y, float* constant, int r, Digits& digits) {
  V16 sum[RB], x[RB][NV];
  for (int j = 0; j < RB; j++) {
    sum[j] = zero();
    for (int i = 0; i < NV; i++) {
      x[j][i] = load(q + (r + j) * LD + 16 * i);
      sum[j] = fma(x[j][i], load(mean + 16 * i), sum[j]);
      x[j][i] = mul(x[j][i], load(scale + 16 * i));
    }
    hadamard_block<NV>(x[j]);
  }
  _mm_mask_storeu_ps(constant + r, (1 << RB) - 1, sum_rows<RB>(sum));
  const int finite = digits_rows<DIGITS, RB, NV>(x, r, digits);
  for (int j = 0; j < RB; j++) {
    for (int i = 0; i < NV && !(finite >> j & 1); i++) store(y + (r + j) * LD + 16 * i, x[j][i]);
  }
}

// s: products of codes. Logits, running softmax as `softmax_row`, digits of the probabilities times the tokens' scales;
// those themselves go to s only where one is not finite. A row reads no tokens but lo <= t < hi.
template <int DIGITS, int RB>
TQ_INLINE void softmax_block(const PageRows& p, float* s, int r, Rows run, Digits& digits) {
  V16 y[RB][4], top[RB], sum[RB];
  const V16 none = set1(-INFINITY);
  for (int j = 0; j < RB; j++) {
    for (int v = 0; v < 4; v++) y[j][v] = fma(load(s + (r + j) * 64 + 16 * v), load(p.key_scale + 16 * v), set1(p.constant[r + j]));
  }
  for (int i = 0; i < p.hot_count; i++) {
    for (int v = 0; v < 4; v++) {
      const V16 hot = load(p.hot + i * 64 + 16 * v);
      for (int j = 0; j < RB; j++) y[j][v] = fma(set1(p.q_hot[r + j][i]), hot, y[j][v]);
    }
  }
  int higher = 0;
  for (int j = 0; j < RB; j++) {
    const int64_t lo = p.span[r + j].lo - p.from, hi = p.span[r + j].hi - p.from;
    if (lo > 0 || hi < 64) {
      const uint64_t seen = bits_between(lo, hi);
      for (int v = 0; v < 4; v++) y[j][v] = pick(uint16_t(seen >> 16 * v), y[j][v], none);
    }
    top[j] = none;
    for (int v = 0; v < 4; v++) top[j] = max(y[j][v], top[j]);
    higher |= _mm512_cmp_ps_mask(top[j].a, _mm512_set1_ps(run.m[r + j]), _CMP_GT_OQ);
  }
  float base[RB];
  for (int j = 0; j < RB; j++) base[j] = run.m[r + j];
  int dead = 0;  // rows without a token so far
  if (higher) {
    for (int j = 0; j < RB; j++) {
      const float now = max16(top[j]);
      base[j] = now > base[j] ? now : base[j];
    }
  }
  for (int j = 0; j < RB; j++) {
    if (base[j] != -INFINITY) continue;
    int nan = 0;
    for (int v = 0; v < 4; v++) nan |= _mm512_cmp_ps_mask(y[j][v].a, y[j][v].a, _CMP_UNORD_Q);
    dead |= (nan == 0) << j;
  }
  for (int j = 0; j < RB; j++) sum[j] = zero();
  for (int v = 0; v < 4; v++) {
    const V16 gain = load(p.value_scale + 16 * v);
    for (int j = 0; j < RB; j++) {
      const V16 e = exp16(sub(y[j][v], set1(base[j])));
      sum[j] = add(sum[j], e), y[j][v] = mul(e, gain);
    }
  }
  for (int j = 0; j < RB && dead; j++) {
    if (!(dead >> j & 1)) continue;
    sum[j] = zero();
    for (int v = 0; v < 4; v++) y[j][v] = zero();
  }
  for (int j = 0; j < RB && higher; j++) {
    float& m = run.m[r + j];
    if (base[j] == m) continue;
    const float f = m == -INFINITY ? 0.0f : exp1(m - base[j]);
    run.l[r + j] *= f, m = base[j];
    scale_row(run.o + (r + j) * LD, p.d, f);
  }
  constexpr __mmask8 ALL = (1 << RB) - 1;
  _mm_mask_storeu_ps(run.l + r, ALL, _mm_add_ps(_mm_maskz_loadu_ps(ALL, run.l + r), sum_rows<RB>(sum)));
  const int finite = digits_rows<DIGITS, RB, 4>(y, r, digits);
  for (int j = 0; j < RB; j++) {
    for (int v = 0; v < 4 && !(finite >> j & 1); v++) store(s + (r + j) * 64 + 16 * v, y[j][v]);
  }
}

// f<RB>(r) over rows in blocks of at most MOST
#define TQ_FEW_ROWS(rows, MOST, CALL)                    \
  for (int r = 0; r < (rows); r += MOST) {               \
    switch ((rows) - r < MOST ? (rows) - r : MOST) {     \
      case 1: CALL(1); break;                            \
      case 2: CALL(2); break;                            \
      case 3: CALL((MOST < 3 ? 1 : 3)); break;           \
      default: CALL((MOST < 4 ? 1 : 4));                 \
    }                                                    \
  }

template <int DIGITS, int NV>
static void turn_digits(const float* q, const float* scale, const float* mean, float* y, float* constant, int rows, Digits& x) {
  constexpr int MOST = NV == 4 ? 4 : 2;
#define TQ_CALL(RB) turn_block<DIGITS, RB, NV>(q, scale, mean, y, constant, r, x)
  TQ_FEW_ROWS(rows, MOST, TQ_CALL)
#undef TQ_CALL
}

template <int DIGITS>
static void softmax_digits(const PageRows& p, float* s, int rows, Rows run, Digits& x) {
#define TQ_CALL(RB) softmax_block<DIGITS, RB>(p, s, r, run, x)
  TQ_FEW_ROWS(rows, 4, TQ_CALL)
#undef TQ_CALL
}

#else

template <int DIGITS, int NV>
static void turn_digits(const float*, const float*, const float*, float*, float*, int, Digits&) {}
template <int DIGITS>
static void softmax_digits(const PageRows&, float*, int, Rows, Digits&) {}

#endif

}  // namespace
}  // namespace TQ_ISA
}  // namespace tq
