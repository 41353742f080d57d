// Codes multiplied as integers. One product serves keys and values, for both are tiles of groups of four summed numbers by
// sixteen lanes (keys: channels by tokens; values: tokens by channels). `vpdpbusd` multiplies unsigned by signed: a key's
// level + 128 with a query's digits, a weight's digits with a value's level.
#pragma once
#include <utility>

#include "digits.h"

namespace tq {
namespace TQ_ISA {

#if defined(TQ_VNNI)

// levels of codes as the table has them, one a byte; bits above a code's do no harm. Eight bits: the table is their offset
template <int BITS>
TQ_INLINE __m512i levels_of(__m512i codes, __m512i table) {
  return BITS == 8 ? _mm512_add_epi8(codes, table) : _mm512_permutexvar_epi8(codes, table);
}

template <bool WEIGHTS>
TQ_INLINE __m512i level_table(int bits, const uint8_t* bytes) {
  const __m512i t = bits == 8 ? _mm512_set1_epi8(1) : _mm512_loadu_si512(bytes);  // level + 128
  return WEIGHTS ? _mm512_sub_epi8(t, _mm512_set1_epi8(-128)) : t;
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

template <bool WEIGHTS>
TQ_INLINE void multiply(__m512i& sum, __m512i level, __m512i digit) {
  WEIGHTS ? dpbusd(sum, digit, level) : dpbusd(sum, level, digit);
}

TQ_INLINE __m512i four_digits(const int8_t* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, 4);
  return _mm512_set1_epi32(bytes);
}

template <int DIGITS, int RB, int NV, bool WEIGHTS>
TQ_INLINE void start_sums(const Digits& x, int first, __m512i (&acc)[RB * DIGITS][NV]) {
  TQ_EACH(i, RB * DIGITS)
    TQ_EACH(v, NV) acc[i][v] = WEIGHTS ? _mm512_setzero_si512() : _mm512_set1_epi32(x.start[first * DIGITS + i]); TQ_END
  TQ_END
}

// the sums of a row's digits as one number; a sum of one digit is below 2^24, of two signed ones (queries) below 2^31
template <int DIGITS, int NV, bool WEIGHTS>
TQ_INLINE V16 whole_sum(const __m512i (*acc)[NV], int v) {
  V16 f;
  if (WEIGHTS) {
    const V16 top = {_mm512_cvtepi32_ps(acc[DIGITS - 1][v])};
    f = fma(top, set1(256.0f), V16{_mm512_cvtepi32_ps(acc[DIGITS - 2][v])});
  } else {
    f = {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(acc[DIGITS - 1][v], 8), acc[DIGITS - 2][v]))};
  }
  return DIGITS == 3 ? fma(f, set1(256.0f), V16{_mm512_cvtepi32_ps(acc[0][v])}) : f;
}

// keep(r, lane, sum over the groups of digits·level) for RB rows from `first` and 16·NV lanes
template <int DIGITS, int RB, int NV, bool WEIGHTS, class Keep>
TQ_INLINE void product_block(const Digits& x, int first, const uint8_t* tile, int stride, Keep keep) {
  const int8_t* w = x.digit + int64_t(first) * DIGITS * LDW;
  const int groups = x.groups;
  __m512i acc[RB * DIGITS][NV];
  start_sums<DIGITS, RB, NV, WEIGHTS>(x, first, acc);
  for (int g = 0; g < groups; g++, tile += stride, w += 4) {
    __m512i level[NV];
    TQ_EACH(v, NV) level[v] = _mm512_loadu_si512(tile + 64 * v); TQ_END
    TQ_EACH(i, RB * DIGITS)
      const __m512i four = four_digits(w + i * LDW);
      TQ_EACH(v, NV) multiply<WEIGHTS>(acc[i][v], level[v], four); TQ_END
    TQ_END
  }
  TQ_EACH(r, RB)
    TQ_EACH(v, NV) keep(first + r, 16 * v, whole_sum<DIGITS, NV, WEIGHTS>(acc + r * DIGITS, v)); TQ_END
  TQ_END
}

template <int DIGITS, bool WEIGHTS>
struct TileProduct {  // of a tile in memory with the digits
  const Digits& x;
  const uint8_t* tile;
  int stride, lanes;
  template <int RB, class Keep>
  inline __attribute__((always_inline)) void rows(int first, Keep keep) const {
    int at = 0;
    const auto there = [&](int r, int i, V16 f) { keep(r, at + i, f); };
    for (; at + 32 <= lanes; at += 32) {
      product_block<DIGITS, RB, 2, WEIGHTS>(x, first, tile + 4 * at, stride, there);
    }
    for (; at < lanes; at += 16) {
      product_block<DIGITS, RB, 1, WEIGHTS>(x, first, tile + 4 * at, stride, there);
    }
  }
};

// p.rows<RB>(first, keep) over blocks of rows whose sums fit the registers
template <int DIGITS, class Product, class Keep>
TQ_INLINE void product(const Product& p, int rows, Keep keep) {
  constexpr int MOST = DIGITS == 2 ? 7 : 4;
  for (int r = 0; r < rows; r += MOST) {
    switch (rows - r < MOST ? rows - r : MOST) {
      case 1: p.template rows<1>(r, keep); break;
      case 2: p.template rows<2>(r, keep); break;
      case 3: p.template rows<3>(r, keep); break;
      case 4: p.template rows<4>(r, keep); break;
      case 5: p.template rows<MOST < 5 ? 1 : 5>(r, keep); break;
      case 6: p.template rows<MOST < 6 ? 1 : 6>(r, keep); break;
      default: p.template rows<MOST < 7 ? 1 : 7>(r, keep);
    }
  }
}

static void key_tile_of(const Spec& p, const uint8_t* codes, uint8_t* tile) {
  const __m512i table = level_table<false>(p.key_bits, p.key_bytes);
#define TQ_CALL(B) key_groups<B>(codes, p.key_row, p.page, p.d, table, tile)
  TQ_BY_BITS(p.key_bits, TQ_CALL)
#undef TQ_CALL
}

static void value_tile_of(const Spec& p, const uint8_t* codes, uint8_t* tile) {
  const __m512i table = level_table<true>(p.value_bits, p.value_bytes);
#define TQ_CALL(B) value_groups<B>(codes, p.value_row, p.page, p.d, table, tile)
  TQ_BY_BITS(p.value_bits, TQ_CALL)
#undef TQ_CALL
}

#endif

}  // namespace TQ_ISA
}  // namespace tq
