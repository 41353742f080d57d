// Products with a page of 64 tokens in 4 bits. Codes go from the page into the multiply-adds, which are what the processor
// runs out of: unpacking beside them costs nothing, and no tile of levels is written. A byte is two codes: its lower half
// is looked up as it is, the upper one after a shift, so keys are groups of four channels in even places and four in odd
// ones (the digits of queries lie likewise, `BytePlaces<true>`), and sums of values are of even and of odd channels.
#pragma once
#include "integer.h"

namespace tq {
namespace TQ_ISA {

#if defined(TQ_VNNI)

constexpr int NIBBLE_PAGE = 64;

// four rows of 16 bytes, `row` bytes apart
TQ_INLINE __m512i four_rows(const uint8_t* p, int64_t row) {
  const auto at = [p](int64_t i) __attribute__((always_inline)) { return _mm_loadu_si128((const __m128i*)(p + i)); };
  __m512i x = _mm512_castsi128_si512(at(0));
  x = _mm512_mask_broadcast_i32x4(x, 0x00F0, at(row));
  x = _mm512_mask_broadcast_i32x4(x, 0x0F00, at(2 * row));
  return _mm512_mask_broadcast_i32x4(x, 0xF000, at(3 * row));
}

// words[(t / 16·d/8 + w)·16 + t % 16]: word w (8 codes) of token t
static void nibble_words(const uint8_t* codes, int row, uint32_t* words) {
  for (int t = 0; t < NIBBLE_PAGE; t += 16, codes += 16 * row) {
    for (int byte = 0; byte < row; byte += 16, words += 64) {
      __m512i r[4];  // tokens i, 4 + i, 8 + i, 12 + i in the quarters of r[i]
      for (int i = 0; i < 4; i++) r[i] = four_rows(codes + int64_t(i) * row + byte, 4 * row);
      const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
      const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
      _mm512_storeu_si512(words, _mm512_unpacklo_epi64(a, c));
      _mm512_storeu_si512(words + 16, _mm512_unpackhi_epi64(a, c));
      _mm512_storeu_si512(words + 32, _mm512_unpacklo_epi64(b, d));
      _mm512_storeu_si512(words + 48, _mm512_unpackhi_epi64(b, d));
    }
  }
}

template <int DIGITS>
struct NibbleKeys {
  const Digits& x;
  const uint32_t* words;
  __m512i table;
  int count;  // words of a token
  template <int RB, class Keep>
  inline __attribute__((always_inline)) void rows(int first, Keep keep) const {
    for (int t = 0; t < NIBBLE_PAGE; t += 32) {
      const int8_t* w = x.digit + int64_t(first) * DIGITS * LDW;
      const uint32_t* from = words + t * count;
      __m512i acc[RB * DIGITS][2];
      start_sums<DIGITS, RB, 2, false>(x, first, acc);
      for (int k = 0; k < count; k++, from += 16, w += 8) {
        TQ_EACH(odd, 2)
          __m512i level[2];
          TQ_EACH(v, 2)
            const __m512i codes = _mm512_loadu_si512(from + v * 16 * count);
            level[v] = _mm512_permutexvar_epi8(odd ? _mm512_srli_epi32(codes, 4) : codes, table);
          TQ_END
          TQ_EACH(i, RB * DIGITS)
            const __m512i four = four_digits(w + 4 * odd + i * LDW);
            TQ_EACH(v, 2) multiply<false>(acc[i][v], level[v], four); TQ_END
          TQ_END
        TQ_END
      }
      TQ_EACH(r, RB)
        TQ_EACH(v, 2) keep(first + r, t + 16 * v, whole_sum<DIGITS, 2, false>(acc + r * DIGITS, v)); TQ_END
      TQ_END
    }
  }
};

struct NibblePlaces {
  alignas(64) uint8_t byte[64];               // byte j of four rows side by side
  alignas(64) uint32_t low[16], high[16];     // even and odd channels in order
  constexpr NibblePlaces() : byte(), low(), high() {
    for (int i = 0; i < 64; i++) byte[i] = uint8_t(i % 4 * 16 + i / 4);
    for (int i = 0; i < 16; i++) low[i] = uint32_t(i % 2 * 16 + i / 2), high[i] = low[i] + 8;
  }
};

template <int DIGITS>
struct NibbleValues {
  const Digits& x;
  const uint8_t* codes;
  __m512i table;
  int row;  // bytes of a token
  template <int RB, class Keep>
  inline __attribute__((always_inline)) void rows(int first, Keep keep) const {
    static constexpr NibblePlaces places;
    const __m512i low = _mm512_load_si512(places.low), high = _mm512_load_si512(places.high);
    for (int byte = 0; byte < row; byte += 16) {
      const int8_t* w = x.digit + int64_t(first) * DIGITS * LDW;
      const uint8_t* from = codes + byte;
      __m512i acc[RB * DIGITS][2];
      start_sums<DIGITS, RB, 2, true>(x, first, acc);
      for (int t = 0; t < NIBBLE_PAGE; t += 4, from += 4 * row, w += 4) {
        const __m512i both = _mm512_permutexvar_epi8(_mm512_load_si512(places.byte), four_rows(from, row));
        const __m512i even = _mm512_permutexvar_epi8(both, table);
        const __m512i odd = _mm512_permutexvar_epi8(_mm512_srli_epi32(both, 4), table);
        TQ_EACH(i, RB * DIGITS)
          const __m512i four = four_digits(w + i * LDW);
          multiply<true>(acc[i][0], even, four);
          multiply<true>(acc[i][1], odd, four);
        TQ_END
      }
      TQ_EACH(r, RB)
        const __m512 e = whole_sum<DIGITS, 2, true>(acc + r * DIGITS, 0).a;
        const __m512 o = whole_sum<DIGITS, 2, true>(acc + r * DIGITS, 1).a;
        keep(first + r, 2 * byte, V16{_mm512_permutex2var_ps(e, low, o)});
        keep(first + r, 2 * byte + 16, V16{_mm512_permutex2var_ps(e, high, o)});
      TQ_END
    }
  }
};

// s[r·lds + t] = q[r·LD]·level of a page's tokens; w.x has the digits of q, in split order if `nibbles`
template <int DIGITS>
static void integer_dot(const Spec& p, const float* q, int rows, const uint8_t* codes, float* s, int lds, bool nibbles,
                        IntegerScratch& w) {
  const auto keep = [&](int r, int t, V16 f) __attribute__((always_inline)) {
    store(s + r * lds + t, mul(f, set1(w.x.unit[r] * p.key_unit)));
  };
  if (nibbles) {
    nibble_words(codes, p.key_row, (uint32_t*)w.tile);
    const __m512i table = level_table<false>(4, p.key_bytes);
    product<DIGITS>(NibbleKeys<DIGITS>{w.x, (const uint32_t*)w.tile, table, p.d / 8}, rows, keep);
  } else {
    key_tile_of(p, codes, w.tile);
    product<DIGITS>(TileProduct<DIGITS, false>{w.x, w.tile, 4 * p.page, p.page}, rows, keep);
  }
  if (w.all_finite(rows)) return;
  if (nibbles) key_tile_of(p, codes, w.tile);
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
static void integer_mix(const Spec& p, const float* x, int ldx, int rows, const uint8_t* codes, float* o, bool nibbles,
                        IntegerScratch& w) {
  const int d = padded(p.d);
  const auto keep = [&](int r, int c, V16 f) __attribute__((always_inline)) {
    float* to = o + r * LD + c;
    store(to, fma(f, set1(w.x.unit[r] * p.value_unit), load(to)));
  };
  if (nibbles) {
    product<DIGITS>(NibbleValues<DIGITS>{w.x, codes, level_table<true>(4, p.value_bytes), p.value_row}, rows, keep);
  } else {
    value_tile_of(p, codes, w.tile);
    product<DIGITS>(TileProduct<DIGITS, true>{w.x, w.tile, 4 * d, p.d}, rows, keep);
  }
  if (w.all_finite(rows)) return;
  if (nibbles) value_tile_of(p, codes, w.tile);
  for (int r = 0; r < rows; r++) {
    for (int t = 0; t < p.page && !w.x.finite[r]; t++) {
      const float y = x[r * ldx + t] * p.value_unit;
      for (int c = 0; c < p.d; c++) o[r * LD + c] += y * float(int8_t(w.tile[(t / 4 * d + c) * 4 + t % 4]));
    }
  }
}

#elif !defined(TQ_NEONDOT)

template <int DIGITS>
static void integer_dot(const Spec&, const float*, int, const uint8_t*, float*, int, bool, IntegerScratch&) {}
template <int DIGITS>
static void integer_mix(const Spec&, const float*, int, int, const uint8_t*, float*, bool, IntegerScratch&) {}

#endif

}  // namespace TQ_ISA
}  // namespace tq
