// A page of 64 tokens of a live recipe, head_dim 64 or 128: a row of it stays in registers from the turned query to its
// digits and from the logits to the digits of the weights. Logits are in powers of two here (queries carry log2 e), and a
// page's probabilities are relative to its own largest, so that no digit is idle: what they are of the row's largest goes
// into the unit of the digits.
#pragma once
#include "exact.h"
#include "nibbles.h"

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
  const float (*q_hot)[ROWS];  // (hot, rows), times the step
  const Span* span;
  int64_t from;  // position of its first token
  int hot_count, d;
};

constexpr float LOG2_E = 1.44269504f, LOG2_E_REST = 1.92596303e-8f, LN_2 = 0.693147181f;

// 16 numbers that were stored by fours: a wider load would have to wait until they are out of the processor
TQ_INLINE V16 load_quads(const float* p) {
#if defined(TQ_AVX512)
  const auto at = [p](int i) __attribute__((always_inline)) { return _mm_loadu_ps(p + i); };
  __m512 x = _mm512_insertf32x4(_mm512_castps128_ps512(at(0)), at(4), 1);
  x = _mm512_insertf32x4(x, at(8), 2);
  return {_mm512_insertf32x4(x, at(12), 3)};
#else
  return load(p);
#endif
}

#if defined(TQ_VNNI)

constexpr bool IN_REGISTERS = true;

// f over the lanes of four values at once, in the tree of `sum16`: a chain of eight steps for each would be waited for
template <class F>
TQ_INLINE __m128 reduce4(__m512 a, __m512 b, __m512 c, __m512 d, F f) {
  const __m512 ab = f(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  const __m512 cd = f(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
  __m512 x = f(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
  x = f(x, _mm512_permute_ps(x, 0x4E)), x = f(x, _mm512_permute_ps(x, 0xB1));
  const __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_castps512_ps128(_mm512_permutexvar_ps(quarters, x));
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

template <int RB>
TQ_INLINE __m128 max_rows(const V16 (&x)[RB]) {
  const auto f = [](__m512 p, __m512 q) __attribute__((always_inline)) { return _mm512_max_ps(p, q); };
  return reduce4(x[0].a, x[1 % RB].a, x[2 % RB].a, x[3 % RB].a, f);
}

// 2^x for x <= 0, relative error below 2^-18 and 2^-22; exactly 1 at 0, 0 at -inf, NaN stays
template <int DIGITS>
TQ_INLINE __m512 exp2_16(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 9);  // what is above the next smaller whole number
  const auto c = [](float k) __attribute__((always_inline)) { return _mm512_set1_ps(k); };
  __m512 p;
  if (DIGITS == 2) {
    p = _mm512_fmadd_ps(c(1.34266866e-2f), f, c(5.22424690e-2f));
    p = _mm512_fmadd_ps(p, f, c(2.41280213e-1f));
    p = _mm512_fmadd_ps(p, f, c(6.93044841e-1f));
  } else {
    p = _mm512_fmadd_ps(c(1.86713040e-3f), f, c(9.01702978e-3f));
    p = _mm512_fmadd_ps(p, f, c(5.57999127e-2f));
    p = _mm512_fmadd_ps(p, f, c(2.40164444e-1f));
    p = _mm512_fmadd_ps(p, f, c(6.93151295e-1f));
  }
  return _mm512_scalef_ps(_mm512_fmadd_ps(p, f, c(1.0f)), x);  // times 2^floor(x)
}

// y = R(q∘s) of RB rows; constant = (q∘s)·mean; top: bits of the largest magnitude
template <int RB, int NV>
TQ_INLINE void turn_block(const float* q, const float* scale, const float* mean, float* y, float* constant, uint32_t* top,
                          int r) {
  V16 sum[RB];
  __m512i most[RB];
  for (int j = 0; j < RB; j++) {
    V16 x[NV];
    sum[j] = zero();
    for (int i = 0; i < NV; i++) {
      x[i] = load(q + (r + j) * LD + 16 * i);
      sum[j] = fma(x[i], load(mean + 16 * i), sum[j]);
      x[i] = mul(x[i], load(scale + 16 * i));
    }
    hadamard_block<NV>(x);
    most[j] = magnitude(x[0]);
    for (int i = 0; i < NV; i++) {
      most[j] = _mm512_max_epu32(most[j], magnitude(x[i]));
      store(y + (r + j) * LD + 16 * i, x[i]);
    }
  }
  _mm_storeu_ps(constant + r, sum_rows<RB>(sum));
  _mm_storeu_si128((__m128i*)(top + r), max_rows<RB>(most));
}

// units of rows whose largest magnitudes have these bits, and what the rows are multiplied by
template <int DIGITS>
TQ_INLINE void units(const uint32_t* top, int rows, float* gain, Digits& x) {
  for (int r = 0; r < rows; r += 16) {
    const __m512i bits = _mm512_castps_si512(load_quads((const float*)(top + r)).a);
    const __m512 largest = _mm512_castsi512_ps(bits), whole = _mm512_set1_ps(whole_of<DIGITS, false>());
    const __mmask16 finite = _mm512_cmplt_epu32_mask(bits, _mm512_set1_epi32(0x7F800000));
    const __mmask16 some = finite & _mm512_cmp_ps_mask(largest, _mm512_set1_ps(1e-30f), _CMP_GT_OQ);
    _mm512_storeu_ps(x.unit + r, _mm512_maskz_div_ps(some, largest, whole));
    _mm512_storeu_ps(gain + r, _mm512_maskz_div_ps(some, whole, largest));
    _mm_storeu_si128((__m128i*)(x.finite + r), _mm_maskz_set1_epi8(finite, 1));
  }
}

// digits of RB rows of 16·NV numbers, as `digits_of`
template <int DIGITS, int RB, int NV, bool SPLIT>
TQ_INLINE void digits_block(const float* y, const float* gain, int r, Digits& x) {
  __m512i sum[RB][DIGITS], low[RB], high[RB];
  for (int i = 0; i < RB; i++) {
    for (int k = 0; k < DIGITS; k++) sum[i][k] = _mm512_setzero_si512();
    for (int j = 0; j < NV; j += 4) {
      __m512i n[4];
      for (int v = 0; v < 4; v++) n[v] = _mm512_cvtps_epi32(mul(load(y + (r + i) * LD + 16 * (j + v)), set1(gain[r + i])).a);
      split64<DIGITS, SPLIT>(n, x.digit + (r + i) * DIGITS * LDW + 16 * j, sum[i]);
    }
    low[i] = sum[i][0], high[i] = _mm512_add_epi32(sum[i][1], _mm512_slli_epi32(sum[i][DIGITS - 1], 8));
  }
  alignas(16) int32_t first[4], second[4];
  _mm_store_si128((__m128i*)first, _mm_mullo_epi32(sum_rows<RB>(low), _mm_set1_epi32(-128)));
  if (DIGITS == 3) _mm_store_si128((__m128i*)second, _mm_mullo_epi32(sum_rows<RB>(high), _mm_set1_epi32(-128)));
  for (int i = 0; i < RB; i++) {
    int32_t* to = x.start + (r + i) * DIGITS;
    to[0] = first[i];
    if (DIGITS == 3) to[1] = second[i];
    to[DIGITS - 1] = 0;
  }
}

// s: products of codes, which become logits of RB rows; here: the largest. A row reads no tokens but lo <= t < hi.
template <int RB>
TQ_INLINE void logits_block(const PageRows& p, float* s, float* here, int r) {
  V16 y[RB][4], top[RB];
  for (int j = 0; j < RB; j++) {
    const float* x = s + (r + j) * 64;
    for (int v = 0; v < 4; v++) y[j][v] = fma(load(x + 16 * v), load(p.key_scale + 16 * v), set1(p.constant[r + j]));
  }
  for (int i = 0; i < p.hot_count; i++) {
    for (int v = 0; v < 4; v++) {
      const V16 hot = load(p.hot + i * 64 + 16 * v);
      for (int j = 0; j < RB; j++) y[j][v] = fma(set1(p.q_hot[i][r + j]), hot, y[j][v]);
    }
  }
  for (int j = 0; j < RB; j++) {
    const int64_t lo = p.span[r + j].lo - p.from, hi = p.span[r + j].hi - p.from;
    if (lo > 0 || hi < 64) {
      const uint64_t seen = bits_between(lo, hi);
      for (int v = 0; v < 4; v++) y[j][v] = pick(uint16_t(seen >> 16 * v), y[j][v], set1(-INFINITY));
    }
    for (int v = 0; v < 4; v++) store(s + (r + j) * 64 + 16 * v, y[j][v]);
    top[j] = max(max(y[j][0], y[j][1]), max(y[j][2], y[j][3]));
  }
  _mm_storeu_ps(here + r, max_rows<RB>(top));
}

// probabilities of RB rows, relative to `here`: their sums, and the digits of weight·probability
template <int DIGITS, int RB>
TQ_INLINE void weights_block(const float* s, const V16 (&weight)[4], const float* here, float* total, int r, Digits& x) {
  V16 sum[RB];
  for (int j = 0; j < RB; j++) {
    V16 e[4];
    __m512i n[4];
    for (int v = 0; v < 4; v++) e[v] = {exp2_16<DIGITS>(sub(load(s + (r + j) * 64 + 16 * v), set1(here[r + j])).a)};
    sum[j] = add(add(e[0], e[1]), add(e[2], e[3]));
    for (int v = 0; v < 4; v++) n[v] = _mm512_cvtps_epi32(mul(e[v], weight[v]).a);
    split64_unsigned<DIGITS>(n, x.digit + (r + j) * DIGITS * LDW);
  }
  _mm_storeu_ps(total + r, sum_rows<RB>(sum));
}

// a row whose probabilities have no finite sum: it reads no token here, or a number that is not finite, and then it is
// multiplied in floats, from s
static void odd_row(const PageRows& p, float* s, int r, Rows run, Digits& x) {
  bool reads = false;
  for (int t = 0; t < 64; t++) reads |= !(s[t] == -INFINITY), s[t] *= LN_2;
  x.unit[r] = 0, x.finite[r] = !reads;
  if (!reads) return;
  float m = run.m[r] * LN_2;
  softmax_row(s, p.value_scale, 64, p.d, 0.0f, m, run.l[r], run.o + r * LD);
  run.m[r] = m * LOG2_E;
}

// The running softmax moves on by a page's sums, up to 16 rows from r. unit: what a weight's digit is.
TQ_INLINE void run_on(const PageRows& p, float* s, const float* here_, const float* total_, float unit, int r, int rows,
                      Rows run, Digits& x) {
  const __mmask16 all = _cvtu32_mask16(rows - r < 16 ? (1u << (rows - r)) - 1 : 0xFFFF);
  const __m512 here = load_quads(here_ + r).a, total = load_quads(total_ + r).a;
  const __m512 old = _mm512_maskz_loadu_ps(all, run.m + r), now = _mm512_max_ps(here, old);
  const __m512 of_here = exp2_16<3>(_mm512_sub_ps(here, now)), of_old = exp2_16<3>(_mm512_sub_ps(old, now));
  const __mmask16 fine = all & _mm512_cmp_ps_mask(total, _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
  const __m512 l = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(all, run.l + r), of_old, _mm512_mul_ps(total, of_here));
  _mm512_mask_storeu_ps(run.m + r, fine, now);
  _mm512_mask_storeu_ps(run.l + r, fine, l);
  _mm512_storeu_ps(x.unit + r, _mm512_mul_ps(of_here, _mm512_set1_ps(unit)));
  _mm_storeu_si128((__m128i*)(x.finite + r), _mm_set1_epi8(1));
  int higher = fine & _mm512_cmp_ps_mask(now, old, _CMP_NEQ_UQ), odd = all & ~fine;
  if (!(higher | odd)) return;
  alignas(64) float rise[16];
  _mm512_store_ps(rise, of_old);
  for (; higher; higher &= higher - 1) {
    const int j = __builtin_ctz(higher);
    scale_row(run.o + (r + j) * LD, p.d, rise[j]);
  }
  for (; odd; odd &= odd - 1) {
    const int j = __builtin_ctz(odd);
    odd_row(p, s + (r + j) * 64, r + j, run, x);
  }
}

// f<RB>(r) over rows in blocks of at most four
#define TQ_FEW_ROWS(rows, CALL)                     \
  for (int r = 0; r < (rows); r += 4) {             \
    switch ((rows) - r < 4 ? (rows) - r : 4) {      \
      case 1: CALL(1); break;                       \
      case 2: CALL(2); break;                       \
      case 3: CALL(3); break;                       \
      default: CALL(4);                             \
    }                                               \
  }

// Digits of the turned rows. Each step goes over all rows before the next, which would wait for its last ones' sums.
template <int DIGITS, int NV>
static void turn_digits(const float* q, const float* scale, const float* mean, float* y, float* constant, int rows,
                        bool split, Digits& x) {
  uint32_t top[ROWS];
  float gain[ROWS];
#define TQ_CALL(RB) turn_block<RB, NV>(q, scale, mean, y, constant, top, r)
  TQ_FEW_ROWS(rows, TQ_CALL)
#undef TQ_CALL
  units<DIGITS>(top, rows, gain, x);
#define TQ_CALL(RB) \
  split ? digits_block<DIGITS, RB, NV, true>(y, gain, r, x) : digits_block<DIGITS, RB, NV, false>(y, gain, r, x)
  TQ_FEW_ROWS(rows, TQ_CALL)
#undef TQ_CALL
  x.groups = 4 * NV;
}

// s: products of codes. Running softmax, and the digits of the weights; s has the weights of rows that are not finite.
template <int DIGITS>
static void softmax_digits(const PageRows& p, float* s, int rows, Rows run, Digits& x) {
  constexpr float WHOLE = whole_of<DIGITS, true>();
  float here[ROWS], total[ROWS];
#define TQ_CALL(RB) logits_block<RB>(p, s, here, r)
  TQ_FEW_ROWS(rows, TQ_CALL)
#undef TQ_CALL
  V16 weight[4];
  for (int v = 0; v < 4; v++) weight[v] = load(p.value_scale + 16 * v);
  const float largest = max16(max(max(weight[0], weight[1]), max(weight[2], weight[3])));
  x.groups = 16;
  if (!(largest < INFINITY)) {
    for (int r = 0; r < rows; r++) odd_row(p, s + r * 64, r, run, x);
    return;
  }
  const V16 gain = set1(largest > 1e-30f ? WHOLE / largest : 0.0f);
  for (int v = 0; v < 4; v++) weight[v] = mul(weight[v], gain);
#define TQ_CALL(RB) weights_block<DIGITS, RB>(s, weight, here, total, r, x)
  TQ_FEW_ROWS(rows, TQ_CALL)
#undef TQ_CALL
  for (int r = 0; r < rows; r += 16) run_on(p, s, here, total, largest / WHOLE, r, rows, run, x);
}

// maxima in powers of two become natural ones; what a maximum is rounded by goes into the sums
static void natural(Rows run, int rows, int d) {
  for (int r = 0; r < rows; r++) {
    const float m = run.m[r] * LN_2;
    if (!(m - m == 0)) continue;  // -inf: no token; or not a number
    const float rest = std::fma(-m, LOG2_E_REST, std::fma(-m, LOG2_E, run.m[r]));
    const float f = std::fma(rest, LN_2, 1.0f);
    run.m[r] = m, run.l[r] *= f;
    scale_row(run.o + r * LD, d, f);
  }
}

#else

constexpr bool IN_REGISTERS = false;
template <int DIGITS, int NV>
static void turn_digits(const float*, const float*, const float*, float*, float*, int, bool, Digits&) {}
template <int DIGITS>
static void softmax_digits(const PageRows&, float*, int, Rows, Digits&) {}
static void natural(Rows, int, int) {}

#endif

}  // namespace
}  // namespace TQ_ISA
}  // namespace tq
