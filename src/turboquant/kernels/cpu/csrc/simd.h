// V16: sixteen floats as one value, on whatever registers the instruction set has. Lane i means the same everywhere and
// sums across lanes follow one tree, so that a page's bytes are the same on every machine.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

#if defined(TQ_AVX512) || defined(TQ_AVX2)
#include <immintrin.h>
#endif

#define TQ_INLINE static inline __attribute__((always_inline))

namespace tq {
namespace TQ_ISA {

#if defined(TQ_AVX512)

constexpr int MAX_RB = 8, MAX_NV = 2;
struct V16 {
  __m512 a;
};
TQ_INLINE V16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
TQ_INLINE void store(float* p, V16 x) { _mm512_storeu_ps(p, x.a); }
TQ_INLINE V16 set1(float x) { return {_mm512_set1_ps(x)}; }
TQ_INLINE V16 add(V16 x, V16 y) { return {_mm512_add_ps(x.a, y.a)}; }
TQ_INLINE V16 sub(V16 x, V16 y) { return {_mm512_sub_ps(x.a, y.a)}; }
TQ_INLINE V16 mul(V16 x, V16 y) { return {_mm512_mul_ps(x.a, y.a)}; }
TQ_INLINE V16 div(V16 x, V16 y) { return {_mm512_div_ps(x.a, y.a)}; }
TQ_INLINE V16 fma(V16 x, V16 y, V16 z) { return {_mm512_fmadd_ps(x.a, y.a, z.a)}; }
TQ_INLINE V16 max(V16 x, V16 y) { return {_mm512_max_ps(x.a, y.a)}; }  // y where either is NaN
TQ_INLINE V16 min(V16 x, V16 y) { return {_mm512_min_ps(x.a, y.a)}; }
TQ_INLINE V16 rint(V16 x) { return {_mm512_roundscale_ps(x.a, 8)}; }
TQ_INLINE V16 times_pow2(V16 x, V16 n) { return {_mm512_scalef_ps(x.a, n.a)}; }
TQ_INLINE V16 keep_if_ge(V16 x, float bound, V16 y) {  // y where not x < bound, else 0
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.a, _mm512_set1_ps(bound), _CMP_NLT_UQ), y.a)};
}
TQ_INLINE V16 pick(uint16_t bits, V16 x, V16 y) { return {_mm512_mask_mov_ps(y.a, bits, x.a)}; }
template <int H>
TQ_INLINE V16 swap(V16 x) {
  if (H == 1) return {_mm512_permute_ps(x.a, 0xB1)};
  if (H == 2) return {_mm512_permute_ps(x.a, 0x4E)};
  if (H == 4) return {_mm512_shuffle_f32x4(x.a, x.a, 0xB1)};
  return {_mm512_shuffle_f32x4(x.a, x.a, 0x4E)};
}
TQ_INLINE float first(V16 x) { return _mm512_cvtss_f32(x.a); }
TQ_INLINE V16 from_u8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
TQ_INLINE V16 from_i8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
TQ_INLINE V16 from_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
TQ_INLINE V16 from_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }

#elif defined(TQ_AVX2)

constexpr int MAX_RB = 4, MAX_NV = 1;
struct V16 {
  __m256 a, b;
};
TQ_INLINE V16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TQ_INLINE void store(float* p, V16 x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
TQ_INLINE V16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
TQ_INLINE V16 add(V16 x, V16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
TQ_INLINE V16 sub(V16 x, V16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
TQ_INLINE V16 mul(V16 x, V16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
TQ_INLINE V16 div(V16 x, V16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
TQ_INLINE V16 fma(V16 x, V16 y, V16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
TQ_INLINE V16 max(V16 x, V16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
TQ_INLINE V16 min(V16 x, V16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
TQ_INLINE V16 rint(V16 x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
TQ_INLINE __m256 pow2_half(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
TQ_INLINE V16 times_pow2(V16 x, V16 n) { return mul(x, {pow2_half(n.a), pow2_half(n.b)}); }
TQ_INLINE V16 keep_if_ge(V16 x, float bound, V16 y) {
  const __m256 f = _mm256_set1_ps(bound);
  return {_mm256_and_ps(_mm256_cmp_ps(x.a, f, _CMP_NLT_UQ), y.a), _mm256_and_ps(_mm256_cmp_ps(x.b, f, _CMP_NLT_UQ), y.b)};
}
TQ_INLINE __m256 pick_half(int bits, __m256 x, __m256 y) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_blendv_ps(
      y, x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), bit), bit)));
}
TQ_INLINE V16 pick(uint16_t bits, V16 x, V16 y) { return {pick_half(bits, x.a, y.a), pick_half(bits >> 8, x.b, y.b)}; }
template <int H>
TQ_INLINE V16 swap(V16 x) {
  if (H == 1) return {_mm256_permute_ps(x.a, 0xB1), _mm256_permute_ps(x.b, 0xB1)};
  if (H == 2) return {_mm256_permute_ps(x.a, 0x4E), _mm256_permute_ps(x.b, 0x4E)};
  if (H == 4) return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
  return {x.b, x.a};
}
TQ_INLINE float first(V16 x) { return _mm256_cvtss_f32(x.a); }
TQ_INLINE V16 from_u8(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)))};
}
TQ_INLINE V16 from_i8(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)))};
}
TQ_INLINE __m256 bf16_half(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
TQ_INLINE V16 from_bf16(const uint16_t* p) { return {bf16_half(p), bf16_half(p + 8)}; }
TQ_INLINE V16 from_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}

#else  // any compiler with vector extensions: SSE2 on x86-64, NEON on aarch64

constexpr int MAX_RB = 2, MAX_NV = 1;
typedef float P4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Q4 __attribute__((vector_size(16)));
struct V16 {
  Q4 a, b, c, d;
};
TQ_INLINE Q4 q4(float x) { return Q4{x, x, x, x}; }
TQ_INLINE V16 load(const float* p) {
  return {*(const P4*)p, *(const P4*)(p + 4), *(const P4*)(p + 8), *(const P4*)(p + 12)};
}
TQ_INLINE void store(float* p, V16 x) {
  *(P4*)p = x.a, *(P4*)(p + 4) = x.b, *(P4*)(p + 8) = x.c, *(P4*)(p + 12) = x.d;
}
TQ_INLINE V16 set1(float x) { return {q4(x), q4(x), q4(x), q4(x)}; }
TQ_INLINE V16 add(V16 x, V16 y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
TQ_INLINE V16 sub(V16 x, V16 y) { return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d}; }
TQ_INLINE V16 mul(V16 x, V16 y) { return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
TQ_INLINE V16 div(V16 x, V16 y) { return {x.a / y.a, x.b / y.b, x.c / y.c, x.d / y.d}; }
TQ_INLINE V16 fma(V16 x, V16 y, V16 z) {  // contracted where the machine has it
  return {x.a * y.a + z.a, x.b * y.b + z.b, x.c * y.c + z.c, x.d * y.d + z.d};
}
template <class F>
TQ_INLINE V16 each(V16 x, V16 y, F f) {
  float p[16], q[16];
  store(p, x), store(q, y);
  for (int i = 0; i < 16; i++) p[i] = f(p[i], q[i]);
  return load(p);
}
TQ_INLINE V16 max(V16 x, V16 y) {
  return each(x, y, [](float a, float b) { return a > b ? a : b; });
}
TQ_INLINE V16 min(V16 x, V16 y) {
  return each(x, y, [](float a, float b) { return a < b ? a : b; });
}
TQ_INLINE V16 rint(V16 x) {  // |x| < 2^22: adding and taking away 1.5·2^23 rounds to nearest even
  const V16 big = set1(12582912.0f);
  return sub(add(x, big), big);
}
TQ_INLINE V16 times_pow2(V16 x, V16 n) {
  return each(x, n, [](float a, float b) {
    const uint32_t u = b == b ? uint32_t(int32_t(b) + 127) << 23 : 0;
    float r;
    std::memcpy(&r, &u, 4);
    return a * r;
  });
}
TQ_INLINE V16 keep_if_ge(V16 x, float bound, V16 y) {
  return each(x, y, [bound](float a, float b) { return a < bound ? 0.0f : b; });
}
TQ_INLINE V16 pick(uint16_t bits, V16 x, V16 y) {
  float p[16], q[16];
  store(p, x), store(q, y);
  for (int i = 0; i < 16; i++) p[i] = bits >> i & 1 ? p[i] : q[i];
  return load(p);
}
template <int H>
TQ_INLINE V16 swap(V16 x) {
  if (H == 8) return {x.c, x.d, x.a, x.b};
  if (H == 4) return {x.b, x.a, x.d, x.c};
  float p[16], r[16];
  store(p, x);
  for (int i = 0; i < 16; i++) r[i] = p[i ^ H];
  return load(r);
}
TQ_INLINE float first(V16 x) { return x.a[0]; }
TQ_INLINE V16 from_u8(const uint8_t* p) {
  float r[16];
  for (int i = 0; i < 16; i++) r[i] = p[i];
  return load(r);
}
TQ_INLINE V16 from_i8(const uint8_t* p) {
  float r[16];
  for (int i = 0; i < 16; i++) r[i] = int8_t(p[i]);
  return load(r);
}
TQ_INLINE V16 from_bf16(const uint16_t* p) {
  uint32_t u[16];
  for (int i = 0; i < 16; i++) u[i] = uint32_t(p[i]) << 16;
  float r[16];
  std::memcpy(r, u, 64);
  return load(r);
}
TQ_INLINE V16 from_f16(const uint16_t* p) {
  float r[16];
  for (int i = 0; i < 16; i++) r[i] = half_to_float(p[i]);
  return load(r);
}

#endif

TQ_INLINE V16 zero() { return set1(0.0f); }
TQ_INLINE float sum16(V16 x) {  // one tree on every machine
  x = add(x, swap<8>(x)), x = add(x, swap<4>(x)), x = add(x, swap<2>(x)), x = add(x, swap<1>(x));
  return first(x);
}
TQ_INLINE float max16(V16 x) {
  x = max(x, swap<8>(x)), x = max(x, swap<4>(x)), x = max(x, swap<2>(x)), x = max(x, swap<1>(x));
  return first(x);
}

TQ_INLINE V16 lookup(const float* table, const uint8_t* index) {
#if defined(TQ_AVX512)
  return {_mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)index)), table, 4)};
#else
  float r[16];
  for (int i = 0; i < 16; i++) r[i] = table[index[i]];
  return load(r);
#endif
}

TQ_INLINE float half_at(const uint8_t* p) {
#if defined(TQ_AVX512) || defined(TQ_AVX2)
  uint16_t h;
  std::memcpy(&h, p, 2);
  return _cvtsh_ss(h);
#else
  return header_half(p);
#endif
}

// sixteen elements of a 16-bit or fp32 row
TQ_INLINE V16 load_as(const void* p, int dtype, int64_t i) {
  if (dtype == 0) return load((const float*)p + i);
  return dtype == 1 ? from_bf16((const uint16_t*)p + i) : from_f16((const uint16_t*)p + i);
}

}  // namespace TQ_ISA
}  // namespace tq
