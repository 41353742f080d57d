// Live codes as integers: levels are whole int8 multiples of one unit, so a dot product with them is exact once the other
// side is whole too. Query rows become two signed bytes in a 16-bit model and three in fp32, weights (probabilities times
// the tokens' scales, never negative) as many unsigned ones: as fine as the dtype itself. Sums of integers have no order,
// so a row's bits do not depend on the rows beside it.
#pragma once
#if defined(TQ_NEONDOT)
#include "neon.h"
#else
#include "softmax.h"

namespace tq {
namespace TQ_ISA {

#if defined(TQ_VNNI)

constexpr bool INTEGER = true;
constexpr int MAX_DIGITS = 3;

constexpr int LDW = MAX_PAGE + 64;  // bytes of a digit row

struct Digits {  // rows of numbers unit·(digit 0 + 256·digit 1 + ...)
  int8_t* digit;   // (rows, DIGITS, LDW)
  int32_t* start;  // of query rows: -128·sum of a row's numbers, where its sums start (a key's levels are level + 128)
  float* unit;     // 0 for a row that is not finite
  bool* finite;
  int groups;
};

struct IntegerScratch {
  uint8_t* tile;
  Digits x;
  int32_t start[ROWS * MAX_DIGITS];
  float unit[ROWS];
  bool finite[ROWS];
  explicit IntegerScratch(const Spec& s, float* p) {
    tile = (uint8_t*)p, p += integer_tile_floats(s);
    x.digit = (int8_t*)p, x.start = start, x.unit = unit, x.finite = finite;
  }
  bool all_finite(int rows) const {
    bool all = true;
    for (int r = 0; r < rows; r++) all &= finite[r];
    return all;
  }
};

// where the bytes of 64 numbers lie: of two registers of 16-bit words, and of two of 32-bit words (32 numbers, repeated);
// SPLIT: of eight numbers, those in even places first (nibbles.h)
template <bool SPLIT>
struct BytePlaces {
  alignas(64) uint8_t word[64], dword[64];
  constexpr BytePlaces() : word(), dword() {
    for (int j = 0; j < 64; j++) {  // vpackssdw interleaves its sources by 128 bits
      const int i = SPLIT ? j / 8 * 8 + j % 4 * 2 + j / 4 % 2 : j;
      word[j] = uint8_t(i / 32 * 64 + 2 * (i % 16 / 4 * 8 + i % 32 / 16 * 4 + i % 4));
      dword[j] = uint8_t(i % 32 / 16 * 64 + i % 16 * 4);
    }
  }
};

// Digit k of 64 whole numbers from 0 to 256^DIGITS - 1 goes to to[k·LDW].
template <int DIGITS>
TQ_INLINE void split64_unsigned(const __m512i (&n)[4], int8_t* to) {
  static constexpr BytePlaces<false> places;
  if (DIGITS == 2) {
    const __m512i a = _mm512_packus_epi32(n[0], n[1]), b = _mm512_packus_epi32(n[2], n[3]);
    const __m512i at = _mm512_load_si512(places.word);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi8(a, at, b));
    _mm512_storeu_si512(to + LDW, _mm512_permutex2var_epi8(a, _mm512_add_epi8(at, _mm512_set1_epi8(1)), b));
    return;
  }
  __m512i at = _mm512_load_si512(places.dword);
  for (int k = 0; k < DIGITS; k++, at = _mm512_add_epi8(at, _mm512_set1_epi8(1))) {
    const __m512i low = _mm512_permutex2var_epi8(n[0], at, n[1]), high = _mm512_permutex2var_epi8(n[2], at, n[3]);
    _mm512_storeu_si512(to + k * LDW, _mm512_mask_mov_epi64(low, 0xF0, high));
  }
}

// Signed digit k of 64 whole numbers; sums of them: of the numbers (2 digits), of each digit (3).
template <int DIGITS, bool SPLIT = false>
TQ_INLINE void split64(const __m512i (&n)[4], int8_t* to, __m512i (&sum)[DIGITS]) {
  static constexpr BytePlaces<SPLIT> places;
  if (DIGITS == 2) {
    const __m512i one = _mm512_set1_epi16(1), half = _mm512_set1_epi16(128), at = _mm512_load_si512(places.word);
    const __m512i a = _mm512_packs_epi32(n[0], n[1]), b = _mm512_packs_epi32(n[2], n[3]);
    sum[0] = _mm512_add_epi32(sum[0], _mm512_add_epi32(_mm512_madd_epi16(a, one), _mm512_madd_epi16(b, one)));
    _mm512_storeu_si512(to, _mm512_permutex2var_epi8(a, at, b));
    const __m512i next = _mm512_add_epi8(at, _mm512_set1_epi8(1));
    _mm512_storeu_si512(to + LDW, _mm512_permutex2var_epi8(_mm512_add_epi16(a, half), next, _mm512_add_epi16(b, half)));
    return;
  }
  // with 128 added to every digit no carry is left to be taken: bytes of the sum, less 128 each
  const __m512i one = _mm512_set1_epi8(1), half = _mm512_set1_epi8(-128), all = _mm512_set1_epi32(0x808080);
  __m512i m[4], at = _mm512_load_si512(places.dword);
  for (int v = 0; v < 4; v++) m[v] = _mm512_add_epi32(n[v], all);
  for (int k = 0; k < DIGITS; k++) {
    const __m512i low = _mm512_permutex2var_epi8(m[0], at, m[1]), high = _mm512_permutex2var_epi8(m[2], at, m[3]);
    const __m512i bytes = _mm512_xor_si512(_mm512_mask_mov_epi64(low, 0xF0, high), half);
    _mm512_storeu_si512(to + k * LDW, bytes);
    sum[k] = _mm512_dpbusd_epi32(sum[k], one, bytes);
    at = _mm512_add_epi8(at, one);
  }
}

TQ_INLINE __m512i magnitude(V16 x) { return _mm512_and_si512(_mm512_castps_si512(x.a), _mm512_set1_epi32(0x7FFFFFFF)); }

// the largest whole number: of signed digits that carry, and of unsigned ones less what rounding may add
template <int DIGITS, bool WEIGHTS>
constexpr float whole_of() {
  return WEIGHTS ? (DIGITS == 2 ? 65532.0f : 16777000.0f) : DIGITS == 2 ? 32639.0f : 8355000.0f;
}

// what a row whose largest magnitude has these bits is multiplied by
template <int DIGITS, bool WEIGHTS>
TQ_INLINE __m512 digit_gain(uint32_t bits, int r, Digits& x) {
  const float largest = bits_float(bits), whole = whole_of<DIGITS, WEIGHTS>();
  x.finite[r] = bits < 0x7F800000;
  const bool some = x.finite[r] && largest > 1e-30f;
  x.unit[r] = some ? largest / whole : 0.0f;
  return _mm512_set1_ps(some ? whole / largest : 0.0f);
}

template <int DIGITS>
TQ_INLINE void digit_starts(const __m512i (&sum)[DIGITS], int r, Digits& x) {
  int32_t* to = x.start + r * DIGITS;
  to[0] = -128 * _mm512_reduce_add_epi32(sum[0]);
  to[DIGITS - 1] = 0;
  if (DIGITS == 3) to[1] = -128 * _mm512_reduce_add_epi32(_mm512_add_epi32(sum[1], _mm512_slli_epi32(sum[DIGITS - 1], 8)));
}

template <int DIGITS, bool WEIGHTS>
TQ_INLINE void digits_of(const float* from, int ld, int rows, int length, Digits& x) {
  x.groups = length / 4;
  for (int r = 0; r < rows; r++) {
    const float* y = from + r * ld;
    __m512i top = _mm512_setzero_si512(), sum[DIGITS];
    for (int i = 0; i < length; i += 16) top = _mm512_max_epu32(top, magnitude(load(y + i)));
    const __m512 gain = digit_gain<DIGITS, WEIGHTS>(_mm512_reduce_max_epu32(top), r, x);
    for (int k = 0; k < DIGITS; k++) sum[k] = _mm512_setzero_si512();
    for (int i = 0; i < length; i += 64) {
      __m512i n[4];
      for (int v = 0; v < 4; v++) {
        const bool there = i + 16 * v < length;
        n[v] = there ? _mm512_cvtps_epi32(_mm512_mul_ps(load(y + i + 16 * v).a, gain)) : _mm512_setzero_si512();
      }
      int8_t* to = x.digit + r * DIGITS * LDW + i;
      if (WEIGHTS) {
        split64_unsigned<DIGITS>(n, to);
      } else {
        split64<DIGITS>(n, to, sum);
      }
    }
    if (!WEIGHTS) digit_starts<DIGITS>(sum, r, x);
  }
}

#else

constexpr bool INTEGER = false;
struct Digits {};
struct IntegerScratch {
  Digits x;
  IntegerScratch(const Spec&, float*) {}
};
template <int DIGITS, bool WEIGHTS>
static void digits_of(const float*, int, int, int, Digits&) {}

#endif

}  // namespace TQ_ISA
}  // namespace tq

#endif  // TQ_NEONDOT
