// Live codes as integers: levels are whole int8 multiples of one unit, so a dot product with them is exact once the other
// side is whole too. Query rows and weighted probabilities become two signed bytes in a 16-bit model and three in fp32,
// relative to their largest number: as fine as the dtype itself. One product serves keys and values, for both are tiles
// of groups of four summed numbers by sixteen lanes (keys: channels by tokens; values: tokens by channels).
// Sums of integers have no order, so a row's bits do not depend on the rows beside it.
#pragma once
#include <utility>

#include "softmax.h"

namespace tq {
namespace TQ_ISA {

#if defined(TQ_VNNI)

constexpr bool INTEGER = true;
constexpr int MAX_DIGITS = 3;

constexpr int LDW = MAX_PAGE + 64;  // bytes of a digit row

struct Digits {  // rows of numbers unit·(digit 0 + 256·digit 1 + ...)
  int8_t* digit;   // (rows, DIGITS, LDW)
  int32_t* start;  // -128·sum of a row's numbers, where its sums start: levels are stored as level + 128
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
};

// where the bytes of 64 numbers lie: of two registers of 16-bit words, and of two of 32-bit words (32 numbers, repeated)
struct BytePlaces {
  alignas(64) uint8_t word[64], dword[64];
  constexpr BytePlaces() : word(), dword() {
    for (int i = 0; i < 64; i++) {  // vpackssdw interleaves its sources by 128 bits
      word[i] = uint8_t(i / 32 * 64 + 2 * (i % 16 / 4 * 8 + i % 32 / 16 * 4 + i % 4));
      dword[i] = uint8_t(i % 32 / 16 * 64 + i % 16 * 4);
    }
  }
};

// Digit k of the 64 whole numbers goes to to[k·LDW]; sums of them: of the numbers (2 digits), of each digit (3).
template <int DIGITS>
TQ_INLINE void split64(const __m512i (&n)[4], int8_t* to, __m512i (&sum)[DIGITS]) {
  static constexpr BytePlaces places;
  if (DIGITS == 2) {
    const __m512i one = _mm512_set1_epi16(1), half = _mm512_set1_epi16(128), at = _mm512_load_si512(places.word);
    const __m512i a = _mm512_packs_epi32(n[0], n[1]), b = _mm512_packs_epi32(n[2], n[3]);
    sum[0] = _mm512_add_epi32(sum[0], _mm512_add_epi32(_mm512_madd_epi16(a, one), _mm512_madd_epi16(b, one)));
    _mm512_storeu_si512(to, _mm512_permutex2var_epi8(a, at, b));
    const __m512i next = _mm512_add_epi8(at, _mm512_set1_epi8(1));
    _mm512_storeu_si512(to + LDW, _mm512_permutex2var_epi8(_mm512_add_epi16(a, half), next, _mm512_add_epi16(b, half)));
    return;
  }
  const __m512i one = _mm512_set1_epi8(1);
  __m512i m[4], at = _mm512_load_si512(places.dword);
  for (int v = 0; v < 4; v++) m[v] = n[v];
  for (int k = 0; k < DIGITS; k++) {
    const __m512i low = _mm512_permutex2var_epi8(m[0], at, m[1]), high = _mm512_permutex2var_epi8(m[2], at, m[3]);
    const __m512i bytes = _mm512_mask_mov_epi64(low, 0xF0, high);
    _mm512_storeu_si512(to + k * LDW, bytes);
    sum[k] = _mm512_dpbusd_epi32(sum[k], one, bytes);
    const __m512i half = _mm512_set1_epi32(128 << 8 * k);  // carries into the next digit
    for (int v = 0; v < 4; v++) m[v] = _mm512_add_epi32(m[v], half);
    at = _mm512_add_epi8(at, one);
  }
}

TQ_INLINE __m512i magnitude(V16 x) { return _mm512_and_si512(_mm512_castps_si512(x.a), _mm512_set1_epi32(0x7FFFFFFF)); }

// what a row whose largest magnitude has these bits is multiplied by
template <int DIGITS>
TQ_INLINE __m512 digit_gain(uint32_t bits, int r, Digits& x) {
  const float largest = bits_float(bits), whole = DIGITS == 2 ? 32639.0f : 8355000.0f;
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

template <int DIGITS>
TQ_INLINE void digits_of(const float* from, int ld, int rows, int length, Digits& x) {
  x.groups = length / 4;
  for (int r = 0; r < rows; r++) {
    const float* y = from + r * ld;
    __m512i top = _mm512_setzero_si512(), sum[DIGITS];
    for (int i = 0; i < length; i += 16) top = _mm512_max_epu32(top, magnitude(load(y + i)));
    const __m512 gain = digit_gain<DIGITS>(_mm512_reduce_max_epu32(top), r, x);
    for (int k = 0; k < DIGITS; k++) sum[k] = _mm512_setzero_si512();
    for (int i = 0; i < length; i += 64) {
      __m512i n[4];
      for (int v = 0; v < 4; v++) {
        const bool there = i + 16 * v < length;
        n[v] = there ? _mm512_cvtps_epi32(_mm512_mul_ps(load(y + i + 16 * v).a, gain)) : _mm512_setzero_si512();
      }
      split64<DIGITS>(n, x.digit + r * DIGITS * LDW + i, sum);
    }
    digit_starts<DIGITS>(sum, r, x);
  }
}

// levels + 128 of codes, one a byte; bits above a code's do no harm
template <int BITS>
TQ_INLINE __m512i levels_of(__m512i codes, __m512i table) {
  return BITS == 8 ? _mm512_add_epi8(codes, _mm512_set1_epi8(1)) : _mm512_permutexvar_epi8(codes, table);
}

// tile[group of 4 channels][token][4]: `count` tokens, a multiple of 16
template <int BITS>
static void key_groups(const uint8_t* codes, int row, int count, int d, __m512i table, uint8_t* tile) {
  constexpr int K = codes_of_word<BITS>(), GROUPS = K / 4;
  alignas(64) uint8_t shift[GROUPS][64];
  for (int j = 0; j < GROUPS; j++)
    for (int i = 0; i < 64; i++) shift[j][i] = uint8_t(i / 4 % 2 * 32 + (4 * j + i % 4) * BITS);
  alignas(64) uint32_t words[MAX_D / K * 16];
  for (int t = 0; t < count; t += 16) {
    key_words16<BITS>(codes + int64_t(t) * row, row, d, words);
    for (int w = 0; w < d / K; w++) {
      const __m512i x = _mm512_load_si512(words + w * 16);
#pragma GCC unroll 4
      for (int j = 0; j < GROUPS; j++) {
        const __m512i c = BITS == 8 ? x : _mm512_multishift_epi64_epi8(_mm512_load_si512(shift[j]), x);
        _mm512_storeu_si512(tile + (int64_t(w) * GROUPS + j) * 4 * count + 4 * t, levels_of<BITS>(c, table));
      }
    }
  }
}

constexpr int padded(int d) { return (d + 63) / 64 * 64; }

// tile[group of 4 tokens][channel][4]: channels padded to 64
template <int BITS>
static void value_groups(const uint8_t* codes, int row, int count, int d, __m512i table, uint8_t* tile) {
  // byte 16·L + 4·i + m of a token is channel 16·i + 4·L + m: interleaving four tokens then leaves channels in order
  alignas(64) uint8_t from[64], shift[64];
  for (int b = 0; b < 64; b++) {
    const int first = 16 * (b % 16 / 4) + 4 * (b / 16), m = b % 4;  // the channel that the 4 bytes around b start with
    from[b] = uint8_t(first * BITS / 8 + m);
    shift[b] = uint8_t(b / 4 % 2 * 32 + first * BITS % 8 + m * BITS);
  }
  const __m512i take = _mm512_load_si512(from), by = _mm512_load_si512(shift);
  for (int c = 0; c < d; c += 64) {
    const int bytes = (d - c < 64 ? d - c : 64) * BITS / 8;
    const __mmask64 there = bytes == 64 ? ~0ull : (1ull << bytes) - 1;
    for (int t = 0; t < count; t += 4) {
      __m512i r[4], u[4];
      for (int i = 0; i < 4; i++) {
        const __m512i raw = _mm512_maskz_loadu_epi8(there, codes + int64_t(t + i) * row + c * BITS / 8);
        const __m512i x = _mm512_permutexvar_epi8(take, raw);
        r[i] = levels_of<BITS>(BITS == 8 ? x : _mm512_multishift_epi64_epi8(by, x), table);
      }
      for (int i = 0; i < 4; i += 2) {
        u[i] = _mm512_unpacklo_epi8(r[i], r[i + 1]), u[i + 1] = _mm512_unpackhi_epi8(r[i], r[i + 1]);
      }
      uint8_t* to = tile + int64_t(t) * padded(d) + 4 * c;
      _mm512_storeu_si512(to, _mm512_unpacklo_epi16(u[0], u[2]));
      _mm512_storeu_si512(to + 64, _mm512_unpackhi_epi16(u[0], u[2]));
      _mm512_storeu_si512(to + 128, _mm512_unpacklo_epi16(u[1], u[3]));
      _mm512_storeu_si512(to + 192, _mm512_unpackhi_epi16(u[1], u[3]));
    }
  }
}

// f(0), f(1), ... with the index known to the compiler: loops over arrays of registers, which gcc else keeps in memory
#define TQ_EACH(i, N) times(std::make_integer_sequence<int, N>(), [&](auto i) __attribute__((always_inline)) {
#define TQ_END });
template <class F, int... I>
TQ_INLINE void times(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>()), ...);
}

// sum += four u8·s8 products in each lane; written out, for gcc copies the sums of its intrinsic from register to register
TQ_INLINE void dpbusd(__m512i& sum, __m512i u8, __m512i s8) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "v"(s8)); }

// keep(r, v, sum over the groups of digits·level) for RB rows from `first` and 16·NV lanes
template <int DIGITS, int RB, int NV, class Keep>
TQ_INLINE void product_block(const Digits& x, int first, const uint8_t* tile, int stride, Keep keep) {
  const int8_t* w = x.digit + int64_t(first) * DIGITS * LDW;
  const int groups = x.groups;
  __m512i acc[RB * DIGITS][NV];
  TQ_EACH(i, RB * DIGITS)
    TQ_EACH(v, NV) acc[i][v] = _mm512_set1_epi32(x.start[first * DIGITS + i]); TQ_END
  TQ_END
  for (int g = 0; g < groups; g++, tile += stride, w += 4) {
    __m512i level[NV];
    TQ_EACH(v, NV) level[v] = _mm512_loadu_si512(tile + 64 * v); TQ_END
    TQ_EACH(i, RB * DIGITS)
      int32_t bytes;
      std::memcpy(&bytes, w + i * LDW, 4);
      const __m512i four = _mm512_set1_epi32(bytes);
      TQ_EACH(v, NV) dpbusd(acc[i][v], level[v], four); TQ_END
    TQ_END
  }
  TQ_EACH(r, RB)
    TQ_EACH(v, NV)
      constexpr int TOP = r * DIGITS + DIGITS - 1;  // two digits together fit 32 bits
      V16 f = {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(acc[TOP][v], 8), acc[TOP - 1][v]))};
      if (DIGITS == 3) f = fma(f, set1(256.0f), V16{_mm512_cvtepi32_ps(acc[r * DIGITS][v])});
      keep(first + r, 16 * v, f);
    TQ_END
  TQ_END
}

template <int DIGITS, int RB, class Keep>
static void product_rows(const Digits& x, int first, const uint8_t* tile, int stride, int lanes, Keep keep) {
  int at = 0;
  for (; at + 32 <= lanes; at += 32) {
    product_block<DIGITS, RB, 2>(x, first, tile + 4 * at, stride, [&](int r, int i, V16 f) { keep(r, at + i, f); });
  }
  for (; at < lanes; at += 16) {
    product_block<DIGITS, RB, 1>(x, first, tile + 4 * at, stride, [&](int r, int i, V16 f) { keep(r, at + i, f); });
  }
}

template <int DIGITS, class Keep>
TQ_INLINE void product(const Digits& x, int rows, const uint8_t* tile, int stride, int lanes, Keep keep) {
  constexpr int MOST = DIGITS == 2 ? 7 : 4;  // rows whose sums fit the registers
  for (int r = 0; r < rows; r += MOST) {
    switch (rows - r < MOST ? rows - r : MOST) {
      case 1: product_rows<DIGITS, 1>(x, r, tile, stride, lanes, keep); break;
      case 2: product_rows<DIGITS, 2>(x, r, tile, stride, lanes, keep); break;
      case 3: product_rows<DIGITS, 3>(x, r, tile, stride, lanes, keep); break;
      case 4: product_rows<DIGITS, 4>(x, r, tile, stride, lanes, keep); break;
      case 5: product_rows<DIGITS, MOST < 5 ? 1 : 5>(x, r, tile, stride, lanes, keep); break;
      case 6: product_rows<DIGITS, MOST < 6 ? 1 : 6>(x, r, tile, stride, lanes, keep); break;
      default: product_rows<DIGITS, MOST < 7 ? 1 : 7>(x, r, tile, stride, lanes, keep);
    }
  }
}

#define TQ_BY_BITS(bits, CALL)  \
  switch (bits) {               \
    case 2: CALL(2); break;     \
    case 3: CALL(3); break;     \
    case 4: CALL(4); break;     \
    default: CALL(8);           \
  }

// s[r·lds + t] = q[r·LD]·level of P tokens
template <int DIGITS>
static void integer_dot(const Spec& p, const float* q, int rows, const uint8_t* codes, float* s, int lds, IntegerScratch& w) {
  const __m512i table = _mm512_loadu_si512(p.key_bytes);
#define TQ_CALL(B) key_groups<B>(codes, p.key_row, p.page, p.d, table, w.tile)
  TQ_BY_BITS(p.key_bits, TQ_CALL)
#undef TQ_CALL
  product<DIGITS>(w.x, rows, w.tile, 4 * p.page, p.page,
                  [&](int r, int t, V16 f) { store(s + r * lds + t, mul(f, set1(w.x.unit[r] * p.key_unit))); });
  for (int r = 0; r < rows; r++) {
    for (int t = 0; t < p.page && !w.x.finite[r]; t++) {
      float sum = 0;
      for (int c = 0; c < p.d; c++) sum += q[r * LD + c] * float(int(w.tile[(c / 4 * p.page + t) * 4 + c % 4]) - 128);
      s[r * lds + t] = sum * p.key_unit;
    }
  }
}

// o[r·LD + c] += sum over t of x[r·ldx + t]·level; w.x has the digits of x
template <int DIGITS>
static void integer_mix(const Spec& p, const float* x, int ldx, int rows, const uint8_t* codes, float* o, IntegerScratch& w) {
  const __m512i table = _mm512_loadu_si512(p.value_bytes);
  const int d = padded(p.d);
#define TQ_CALL(B) value_groups<B>(codes, p.value_row, p.page, p.d, table, w.tile)
  TQ_BY_BITS(p.value_bits, TQ_CALL)
#undef TQ_CALL
  product<DIGITS>(w.x, rows, w.tile, 4 * d, p.d, [&](int r, int c, V16 f) {
    float* to = o + r * LD + c;
    store(to, fma(f, set1(w.x.unit[r] * p.value_unit), load(to)));
  });
  for (int r = 0; r < rows; r++) {
    for (int t = 0; t < p.page && !w.x.finite[r]; t++) {
      const float y = x[r * ldx + t] * p.value_unit;
      for (int c = 0; c < p.d; c++) o[r * LD + c] += y * float(int(w.tile[(t / 4 * d + c) * 4 + t % 4]) - 128);
    }
  }
}

#else

constexpr bool INTEGER = false;
struct Digits {};
struct IntegerScratch {
  Digits x;
  IntegerScratch(const Spec&, float*) {}
};
template <int DIGITS>
static void digits_of(const float*, int, int, int, Digits&) {}
template <int DIGITS>
static void integer_dot(const Spec&, const float*, int, const uint8_t*, float*, int, IntegerScratch&) {}
template <int DIGITS>
static void integer_mix(const Spec&, const float*, int, int, const uint8_t*, float*, IntegerScratch&) {}

#endif

}  // namespace TQ_ISA
}  // namespace tq
