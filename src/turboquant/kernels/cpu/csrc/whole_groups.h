// Up to FEW rows times weights whose groups are whole vectors of 128 codes, with AVX-512: a load is 128 codes of one
// output, which meet the rows where they lie; what sixteen outputs have gathered in a group is then added across lanes.
// Fewer shuffles than transposing the codes; the integers are exact, so the bits are those of `few` in linear.cpp.
#pragma once
#include "linear_kernel.h"
#include "product.h"

namespace tq {
namespace TQ_ISA {

#if defined(TQ_AVX512)

constexpr int64_t CODES = 128, AHEAD_BYTES = 7168;  // codes of a load; how far the weight is fetched ahead

TQ_INLINE I load_any(const void* p) { return _mm512_loadu_si512(p); }

// the codes of even and of odd k, of the 8-bit grid where there are two stages
template <int S>
TQ_INLINE void unpack_codes(const uint8_t* codes, int64_t stage, I& even, I& odd) {
  const I a = load_any(codes), low = _mm512_set1_epi8(15);
  if (S == 1) {
    even = low4(a), odd = high4(a);
    return;
  }
  const I b = load_any(codes + stage);
  even = _mm512_ternarylogic_epi32(low, b, _mm512_slli_epi16(a, 4), 0xCA);  // low ? b : a << 4
  odd = _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(b, 4), a, 0xCA);
}

// sums of the lanes of sixteen vectors, by three kinds of steps: every quarter of the third's outcome is four sums
TQ_INLINE I add_pairs32(I a, I b) { return add_i(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); }
TQ_INLINE I add_pairs64(I a, I b) { return add_i(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)); }
TQ_INLINE I add_quarters(I a, I b) {
  return add_i(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
}

// r[i]: eight words of outputs i and 8 + i -> r[g]: word g of sixteen outputs
TQ_INLINE void transpose_words(__m256i (&r)[8]) {
  __m256i t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi16(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_epi16(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi32(t[i], t[i + 2]), r[i + 1] = _mm256_unpackhi_epi32(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi32(t[i + 1], t[i + 3]), r[i + 3] = _mm256_unpackhi_epi32(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_epi64(r[i], r[4 + i]), t[2 * i + 1] = _mm256_unpackhi_epi64(r[i], r[4 + i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = t[i];
}

// as `fields` of linear.cpp, eight groups at a time
static void fields_of_eights(const Weight& w, int64_t n, float* scale, int32_t* zero) {
  for (int64_t g = 0; g < w.groups; g += 8) {
    const int count = int(w.groups - g < 8 ? w.groups - g : 8);
    const __mmask8 some = __mmask8((1u << count) - 1);
    __m128i s[LANES], z[LANES];
    for (int i = 0; i < LANES; i++) {
      const int64_t at = (n + i < w.n ? n + i : w.n - 1) * w.groups + g;
      if (at + 8 <= w.n * w.groups) {  // what is read beyond the groups is the next output's
        s[i] = _mm_loadu_si128((const __m128i*)(w.scale + at));
        z[i] = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)(w.zero + at)));
      } else {
        s[i] = _mm_maskz_loadu_epi16(some, w.scale + at);
        z[i] = _mm_cvtepu8_epi16(_mm_maskz_loadu_epi8(some, w.zero + at));
      }
    }
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i++) {
      a[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(s[i]), s[8 + i], 1);
      b[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(z[i]), z[8 + i], 1);
    }
    transpose_words(a), transpose_words(b);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      if (i >= count) break;
      F f = _mm512_cvtph_ps(a[i]);
      I whole = _mm512_cvtepu16_epi32(b[i]);
      if (w.stages == 2) f = mul_f(f, 0.0625f), whole = add_i(_mm512_slli_epi32(whole, 4), set_i(8));
      store_f(scale + (g + i) * LANES, f), store_i(zero + (g + i) * LANES, whole);
    }
  }
}

template <int S, int M, class Write>
static void whole_groups(const Product& p, int64_t first, int64_t last, uint8_t* scratch, const Write& write) {
  const Weight& w = p.w;
  const int64_t half = w.k / 2, stage = w.n * half, per = w.group() / CODES, panel = LANES * half;
  const int64_t ahead = (AHEAD_BYTES + panel - 1) / panel * panel;
  float* scale = (float*)scratch;
  int32_t* zero = (int32_t*)(scale + w.groups * LANES);
  uint8_t* rows = (uint8_t*)(zero + w.groups * LANES);  // [k/128][M] vectors of even and of odd k
  for (int64_t at = 0; at < w.k / 8; at++) {
    for (int m = 0; m < 2 * M; m++) {  // even ones of each row, then odd ones
      std::memcpy(rows + ((at / 16 * M + m % M) * 2 + m / M) * 64 + at % 16 * 4, p.x + (at * 2 * M + m) * 4, 4);
    }
  }
  const uint8_t* end = w.codes + last * half;
  for (int64_t n = first; n < last; n += LANES) {
    fields_of_eights(w, n, scale, zero);
    const uint8_t* codes[LANES];
    for (int i = 0; i < LANES; i++) codes[i] = w.codes + (n + i < w.n ? n + i : w.n - 1) * half;
    const uint8_t* next = codes[0] + ahead;
    F sum[M];
    for (int m = 0; m < M; m++) sum[m] = zero_f();
    const uint8_t* x = rows;
    for (int64_t g = 0, at = 0; g < w.groups; g++, at += per * 64, x += per * M * 128) {
      for (int s = 0; s < S; s++) {
        for (int64_t i = at * LANES; i < (at + per * 64) * LANES && next + i < end; i += 64) {
          __builtin_prefetch(next + s * stage + i, 0, 2);
        }
      }
      I four[M][4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++) {
        I v[M][4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          I even, odd;
          unpack_codes<S>(codes[4 * q + i] + at, stage, even, odd);
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) {
            const uint8_t* y = x + m * 128;
            v[m][i] = dot<S>(dot<S>(zero_i(), even, load_any(y)), odd, load_any(y + 64));
          }
          for (int64_t j = 1; j < per; j++) {
            unpack_codes<S>(codes[4 * q + i] + at + j * 64, stage, even, odd);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
              const uint8_t* y = x + (j * M + m) * 128;
              v[m][i] = dot<S>(dot<S>(v[m][i], even, load_any(y)), odd, load_any(y + 64));
            }
          }
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
          four[m][q] = add_pairs64(add_pairs32(v[m][0], v[m][1]), add_pairs32(v[m][2], v[m][3]));
        }
      }
      const F f = load_f(scale + g * LANES);
      const I z = load_i(zero + g * LANES);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        const I all = add_quarters(add_quarters(four[m][0], four[m][1]), add_quarters(four[m][2], four[m][3]));
        sum[m] = add_scaled(sum[m], minus_product(all, z, set_i(p.sums[m * w.groups + g])), f);
      }
    }
    alignas(64) float y[LANES];
    for (int m = 0; m < M; m++) {
      store_f(y, sum[m]);
      write(p, m, n, int(last - n < LANES ? last - n : LANES), y);
    }
  }
}

#endif

}  // namespace TQ_ISA
}  // namespace tq
