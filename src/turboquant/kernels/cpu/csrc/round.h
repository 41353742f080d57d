// Rounding of sixteen floats to the dtype of a tensor, as half.h rounds one.
#pragma once
#include "half.h"
#include "simd.h"

namespace tq {
namespace TQ_ISA {

#if defined(TQ_AVX512)

TQ_INLINE __m512i bf16_bits(V16 x) {  // of each number, in the upper half of its lane
  const __m512i u = _mm512_castps_si512(x.a), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i near = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.a, x.a, _CMP_UNORD_Q);
  const __m512i r = _mm512_mask_or_epi32(near, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_and_si512(r, _mm512_set1_epi32(int(0xFFFF0000)));
}

TQ_INLINE V16 round_as(V16 x, int dtype) {
  if (dtype == 0) return x;
  if (dtype == 1) return {_mm512_castsi512_ps(bf16_bits(x))};
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}

TQ_INLINE void store16_as(void* p, int dtype, int64_t i, V16 x) {  // x as it is in that dtype already
  if (dtype == 0) return store((float*)p + i, x);
  const __m256i h = dtype == 1 ? _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x.a), 16))
                               : _mm512_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256((__m256i*)((uint16_t*)p + i), h);
}

#else

TQ_INLINE V16 round_as(V16 x, int dtype) {
  if (dtype == 0) return x;
  float v[16];
  store(v, x);
  for (int i = 0; i < 16; i++) {
    v[i] = dtype == 1 ? bits_float(uint32_t(float_to_bf16(v[i])) << 16) : half_to_float(float_to_half(v[i]));
  }
  return load(v);
}

TQ_INLINE void store16_as(void* p, int dtype, int64_t i, V16 x) {
  float v[16];
  store(v, x);
  for (int j = 0; j < 16; j++) store_as(p, dtype, i + j, v[j]);
}

#endif

}  // namespace TQ_ISA
}  // namespace tq
