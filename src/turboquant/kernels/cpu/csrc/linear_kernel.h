// Integer vectors for the product with packed weights: 32-bit lanes, one output each. Not used by the portable build.
#pragma once
#if defined(TQ_NEONDOT)
#include "linear_neon.h"
#endif
#include "half.h"
#include "simd.h"

#define TQ_MEMBER inline __attribute__((always_inline))

namespace tq {
namespace TQ_ISA {

#if defined(TQ_AVX512)

constexpr int LANES = 16, BLOCK = 12;
using I = __m512i;
using F = __m512;
TQ_INLINE I zero_i() { return _mm512_setzero_si512(); }
TQ_INLINE I set_i(int32_t x) { return _mm512_set1_epi32(x); }
TQ_INLINE I word(const int8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
TQ_INLINE I load_i(const void* p) { return _mm512_load_si512(p); }
TQ_INLINE void store_i(void* p, I x) { _mm512_store_si512(p, x); }
TQ_INLINE I add_i(I x, I y) { return _mm512_add_epi32(x, y); }
TQ_INLINE I minus_product(I x, I y, I z) { return _mm512_sub_epi32(x, _mm512_mullo_epi32(y, z)); }
TQ_INLINE I low4(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
TQ_INLINE I high4(I x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
TQ_INLINE I join4(I high, I low) {  // 16·high + low of bytes below 16
  return _mm512_or_si512(_mm512_slli_epi16(high, 4), low);
}
TQ_INLINE F zero_f() { return _mm512_setzero_ps(); }
TQ_INLINE F load_f(const float* p) { return _mm512_loadu_ps(p); }
TQ_INLINE void store_f(float* p, F x) { _mm512_storeu_ps(p, x); }
TQ_INLINE F add_scaled(F sum, I x, F scale) { return _mm512_add_ps(sum, _mm512_mul_ps(_mm512_cvtepi32_ps(x), scale)); }
TQ_INLINE F mul_f(F x, float y) { return _mm512_mul_ps(x, _mm512_set1_ps(y)); }
TQ_INLINE I load_some(const uint8_t* p, int bytes) {  // the rest is 0
  return _mm512_maskz_loadu_epi8(bytes >= 64 ? ~0ull : (1ull << bytes) - 1, p);
}
TQ_INLINE I halves_to_floats(const uint16_t* p, int count) {
  return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(count >= 16 ? 0xFFFF : (1u << count) - 1, p)));
}
TQ_INLINE I bytes_to_words(const uint8_t* p, int count) {
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(count >= 16 ? 0xFFFF : (1u << count) - 1, p));
}
TQ_INLINE I mul_bits(I x, float y) { return _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(x), _mm512_set1_ps(y))); }

TQ_INLINE void transpose(I (&r)[LANES]) {
  I t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // r[i + c], quarter q: word 4q + c of rows i to i + 3
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    const I p = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), q = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const I s = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xDD), u = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xDD);
    t[c] = _mm512_shuffle_i32x4(p, q, 0x88), t[8 + c] = _mm512_shuffle_i32x4(p, q, 0xDD);
    t[4 + c] = _mm512_shuffle_i32x4(s, u, 0x88), t[12 + c] = _mm512_shuffle_i32x4(s, u, 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = t[i];
}

TQ_INLINE I pairs_of_four(I codes, I x, int factor) {  // factor·Σ code·x of four bytes; codes below 16
  return _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), _mm512_set1_epi16(int16_t(factor)));
}

#elif defined(TQ_AVX2)

constexpr int LANES = 8, BLOCK = 4;
using I = __m256i;
using F = __m256;
TQ_INLINE I zero_i() { return _mm256_setzero_si256(); }
TQ_INLINE I set_i(int32_t x) { return _mm256_set1_epi32(x); }
TQ_INLINE I word(const int8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}
TQ_INLINE I load_i(const void* p) { return _mm256_load_si256((const __m256i*)p); }
TQ_INLINE void store_i(void* p, I x) { _mm256_store_si256((__m256i*)p, x); }
TQ_INLINE I add_i(I x, I y) { return _mm256_add_epi32(x, y); }
TQ_INLINE I minus_product(I x, I y, I z) { return _mm256_sub_epi32(x, _mm256_mullo_epi32(y, z)); }
TQ_INLINE I low4(I x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
TQ_INLINE I high4(I x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
TQ_INLINE I join4(I high, I low) { return _mm256_or_si256(_mm256_slli_epi16(high, 4), low); }
TQ_INLINE F zero_f() { return _mm256_setzero_ps(); }
TQ_INLINE F load_f(const float* p) { return _mm256_loadu_ps(p); }
TQ_INLINE void store_f(float* p, F x) { _mm256_storeu_ps(p, x); }
TQ_INLINE F add_scaled(F sum, I x, F scale) { return _mm256_add_ps(sum, _mm256_mul_ps(_mm256_cvtepi32_ps(x), scale)); }
TQ_INLINE F mul_f(F x, float y) { return _mm256_mul_ps(x, _mm256_set1_ps(y)); }
TQ_INLINE I load_some(const uint8_t* p, int bytes) {
  if (bytes >= 32) return _mm256_loadu_si256((const __m256i*)p);
  alignas(32) uint8_t some[32] = {};
  std::memcpy(some, p, size_t(bytes));
  return load_i(some);
}
TQ_INLINE I halves_to_floats(const uint16_t* p, int count) {
  alignas(16) uint16_t some[8] = {};
  std::memcpy(some, p, 2 * size_t(count < 8 ? count : 8));
  return _mm256_castps_si256(_mm256_cvtph_ps(_mm_load_si128((const __m128i*)some)));
}
TQ_INLINE I bytes_to_words(const uint8_t* p, int count) {
  uint8_t some[8] = {};
  std::memcpy(some, p, size_t(count < 8 ? count : 8));
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)some));
}
TQ_INLINE I mul_bits(I x, float y) { return _mm256_castps_si256(_mm256_mul_ps(_mm256_castsi256_ps(x), _mm256_set1_ps(y))); }

TQ_INLINE void transpose(I (&r)[LANES]) {
  I t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    t[c] = _mm256_permute2x128_si256(r[c], r[4 + c], 0x20), t[4 + c] = _mm256_permute2x128_si256(r[c], r[4 + c], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = t[i];
}

TQ_INLINE I pairs_of_four(I codes, I x, int factor) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(int16_t(factor)));
}

#endif

#if defined(TQ_AVX512) || defined(TQ_AVX2)
// sum + Σ code·x of the four bytes of a lane. Two products of codes below 16 fit 16 bit, of 8-bit codes they do not: those
// go through their two halves, or through VNNI.
template <int S>
TQ_INLINE I dot(I sum, I codes, I x) {
#if defined(TQ_VNNI)
  return _mm512_dpbusd_epi32(sum, codes, x);
#else
  if (S == 1) return add_i(sum, pairs_of_four(codes, x, 1));
  return add_i(add_i(sum, pairs_of_four(high4(codes), x, 16)), pairs_of_four(low4(codes), x, 1));
#endif
}
#endif

}  // namespace TQ_ISA
}  // namespace tq
