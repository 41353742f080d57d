// Codes to tiles of levels. A key tile is transposed (channel, token), so that a dot product needs no sum across
// lanes; a value tile is (token, channel). Code i of a row occupies bits i·b ... i·b+b-1, little-endian.
#pragma once
#include "rows.h"
#include "spec.h"

// CALL with the bits of a code as a constant
#define TQ_BY_BITS(bits, CALL)  \
  switch (bits) {               \
    case 2: CALL(2); break;     \
    case 3: CALL(3); break;     \
    case 4: CALL(4); break;     \
    default: CALL(8);           \
  }

namespace tq {
namespace TQ_ISA {

constexpr int LOOKUP8 = 9;  // kind of 8-bit codes whose 256 levels are not uniform; the other kinds are the bits

struct Table {  // levels by code; 16 entries with shorter tables repeated, so that higher bits of an index do no harm
  float level[16];
  const float* all;
  int kind;
};

TQ_INLINE Table make_table(const float* levels, int bits, bool uniform8) {
  Table t;
  t.all = levels, t.kind = bits == 8 && !uniform8 ? LOOKUP8 : bits;
  for (int i = 0; i < 16; i++) t.level[i] = levels[i & ((1 << (bits < 4 ? bits : 4)) - 1)];
  return t;
}

template <int KIND>
constexpr int bits_of() {
  return KIND == LOOKUP8 ? 8 : KIND;
}

#if defined(TQ_AVX512)

template <int KIND>
TQ_INLINE V16 level_of(__m512i codes, __m512 table, const float* all) {  // lowest code of each lane
  if (KIND == LOOKUP8) return {_mm512_i32gather_ps(_mm512_and_si512(codes, _mm512_set1_epi32(255)), all, 4)};
  if (KIND == 8) {
    const __m512i c = _mm512_sub_epi32(_mm512_and_si512(codes, _mm512_set1_epi32(255)), _mm512_set1_epi32(127));
    return {_mm512_div_ps(_mm512_cvtepi32_ps(c), _mm512_set1_ps(127))};
  }
  return {_mm512_permutexvar_ps(codes, table)};
}

template <int KIND>
TQ_INLINE V16 value16(const uint8_t* p, __m512 table, const float* all) {  // sixteen consecutive codes
  constexpr int BITS = bits_of<KIND>();
  if (KIND == LOOKUP8) {
    return {_mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)), all, 4)};
  }
  if (BITS == 8) {
    const __m512i c = _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)), _mm512_set1_epi32(127));
    return {_mm512_div_ps(_mm512_cvtepi32_ps(c), _mm512_set1_ps(127))};
  }
  int32_t lo, hi;
  std::memcpy(&lo, p, 4);
  if (BITS == 2) {
    const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return {_mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32(lo), at), table)};
  }
  std::memcpy(&hi, BITS == 4 ? p + 4 : p + 2, 4);
  const __m512i at = BITS == 4 ? _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28)
                               : _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 8, 11, 14, 17, 20, 23, 26, 29);
  const __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(lo), 0xFF00, hi);
  return {_mm512_permutexvar_ps(_mm512_srlv_epi32(both, at), table)};
}

// 8 words of K codes each from one token's row; words beyond `count` are zero
template <int BITS>
TQ_INLINE __m256i words8(const uint8_t* p, int count) {
  if (BITS != 3) return _mm256_maskz_loadu_epi32(__mmask8((1 << count) - 1), p);
  const __m256i raw = _mm256_maskz_loadu_epi8(__mmask32((1u << (3 * count)) - 1), p);  // 3 bytes are 8 codes
  const __m256i halves = _mm256_permutevar8x32_epi32(raw, _mm256_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0));
  const char z = char(128);
  return _mm256_shuffle_epi8(halves, _mm256_setr_epi8(0, 1, 2, z, 3, 4, 5, z, 6, 7, 8, z, 9, 10, 11, z, 0, 1, 2, z, 3, 4,
                                                      5, z, 6, 7, 8, z, 9, 10, 11, z));
}

template <int BITS>
constexpr int codes_of_word() {
  return BITS == 2 ? 16 : BITS == 8 ? 4 : 8;
}

// words[i·16 + t]: word i of token t, for 16 tokens whose rows lie `row` bytes apart
template <int BITS>
TQ_INLINE void key_words16(const uint8_t* codes, int row, int d, uint32_t* words) {
  constexpr int K = codes_of_word<BITS>(), BYTES = BITS == 3 ? 3 : 4;
  for (int w = 0; w < d / K; w += 8) {
    const int count = d / K - w < 8 ? d / K - w : 8;
    __m512i r[8], u[8];
    for (int t = 0; t < 8; t++) {
      const __m256i a = words8<BITS>(codes + int64_t(t) * row + w * BYTES, count);
      const __m256i b = words8<BITS>(codes + int64_t(t + 8) * row + w * BYTES, count);
      r[t] = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    }
    for (int t = 0; t < 8; t += 2) {  // 8x8 transposes of words in both halves
      u[t] = _mm512_unpacklo_epi32(r[t], r[t + 1]);
      u[t + 1] = _mm512_unpackhi_epi32(r[t], r[t + 1]);
    }
    for (int t = 0; t < 8; t += 4) {
      r[t] = _mm512_unpacklo_epi64(u[t], u[t + 2]);
      r[t + 1] = _mm512_unpackhi_epi64(u[t], u[t + 2]);
      r[t + 2] = _mm512_unpacklo_epi64(u[t + 1], u[t + 3]);
      r[t + 3] = _mm512_unpackhi_epi64(u[t + 1], u[t + 3]);
    }
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    for (int t = 0; t < 4; t++) {
      u[t] = _mm512_permutex2var_epi64(r[t], low, r[t + 4]);
      u[t + 4] = _mm512_permutex2var_epi64(r[t], high, r[t + 4]);
    }
    for (int i = 0; i < count; i++) _mm512_storeu_si512(words + (w + i) * 16, u[i]);
  }
}

// kt[c·ld + t] for 16 tokens
template <int KIND>
TQ_INLINE void key_tile16(const uint8_t* codes, int row, int d, const Table& tab, float* kt, int ld) {
  constexpr int BITS = bits_of<KIND>(), K = codes_of_word<BITS>();
  const __m512 table = _mm512_loadu_ps(tab.level);
  alignas(64) uint32_t words[MAX_D / K * 16];
  key_words16<BITS>(codes, row, d, words);
  for (int w = 0; w < d / K; w++) {
    const __m512i x = _mm512_load_si512(words + w * 16);
#pragma GCC unroll 16
    for (int c = 0; c < K; c++, kt += ld) store(kt, level_of<KIND>(_mm512_srli_epi32(x, c * BITS), table, tab.all));
  }
}

template <int KIND>
TQ_INLINE void value_row(const uint8_t* codes, int d, const Table& tab, float* out) {
  const __m512 table = _mm512_loadu_ps(tab.level);
  for (int c = 0; c < d; c += 16) store(out + c, value16<KIND>(codes + c * bits_of<KIND>() / 8, table, tab.all));
}

#else

template <int KIND>
TQ_INLINE void value_row(const uint8_t* codes, int d, const Table& tab, float* out) {
  constexpr int BITS = bits_of<KIND>();
  for (int c = 0; c < d; c += 8) {
    const uint8_t* p = codes + c * BITS / 8;
    if (KIND == LOOKUP8) {
      for (int i = 0; i < 8; i++) out[c + i] = tab.all[p[i]];
    } else if (BITS == 8) {
      for (int i = 0; i < 8; i++) out[c + i] = float(int(p[i]) - 127) / 127.0f;
    } else {
      uint32_t w = 0;
      for (int i = 0; i < BITS; i++) w |= uint32_t(p[i]) << (8 * i);
      for (int i = 0; i < 8; i++) out[c + i] = tab.level[w >> (BITS * i) & ((1 << BITS) - 1)];
    }
  }
}

#endif

// kt[c·ld + t] = rows[t·from + c] for 16 tokens
TQ_INLINE void transpose16(const float* rows, int from, int d, float* kt, int ld) {
#if defined(TQ_AVX512)
  for (int c = 0; c < d; c += 16) {
    __m512 r[16], u[16];
    for (int t = 0; t < 16; t++) r[t] = _mm512_loadu_ps(rows + t * from + c);
    for (int t = 0; t < 16; t += 2) {
      u[t] = _mm512_unpacklo_ps(r[t], r[t + 1]);
      u[t + 1] = _mm512_unpackhi_ps(r[t], r[t + 1]);
    }
    for (int t = 0; t < 16; t += 4) {
      const __m512d a = _mm512_castps_pd(u[t]), b = _mm512_castps_pd(u[t + 1]);
      const __m512d e = _mm512_castps_pd(u[t + 2]), f = _mm512_castps_pd(u[t + 3]);
      r[t] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, e)), r[t + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, e));
      r[t + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, f)), r[t + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, f));
    }
    for (int t = 0; t < 16; t += 8) {
      for (int i = 0; i < 4; i++) {
        u[t + i] = _mm512_shuffle_f32x4(r[t + i], r[t + i + 4], 0x88);
        u[t + i + 4] = _mm512_shuffle_f32x4(r[t + i], r[t + i + 4], 0xDD);
      }
    }
    for (int i = 0; i < 8; i++) {
      _mm512_storeu_ps(kt + (c + i) * ld, _mm512_shuffle_f32x4(u[i], u[i + 8], 0x88));
      _mm512_storeu_ps(kt + (c + i + 8) * ld, _mm512_shuffle_f32x4(u[i], u[i + 8], 0xDD));
    }
  }
#else
  for (int c = 0; c < d; c++) {
    for (int t = 0; t < 16; t++) kt[c * ld + t] = rows[t * from + c];
  }
#endif
}

#if !defined(TQ_AVX512)
template <int KIND>
TQ_INLINE void key_tile16(const uint8_t* codes, int row, int d, const Table& tab, float* kt, int ld) {
  float rows[16 * MAX_D];
  for (int t = 0; t < 16; t++) value_row<KIND>(codes + int64_t(t) * row, d, tab, rows + t * d);
  transpose16(rows, d, d, kt, ld);
}
#endif

}  // namespace TQ_ISA
}  // namespace tq
