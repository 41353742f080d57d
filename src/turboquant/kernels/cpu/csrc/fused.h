// Few query rows (a decode step): codes go from the page through a register table into the multiply-adds, and no tile of
// levels is written. The order of every row's sums is that of the tiles in softmax.h, so the bits are the same.
#pragma once
#include "softmax.h"

namespace tq {
namespace TQ_ISA {

#if defined(TQ_AVX512)

// s[r·lds + t] = q[r]·level of 16·NV tokens
template <int KIND, int RB, int NV>
TQ_INLINE void dot_codes_block(const float* q, const uint8_t* codes, int row, int d, const Table& tab, float* s, int lds) {
  constexpr int BITS = bits_of<KIND>(), K = codes_of_word<BITS>();
  alignas(64) uint32_t words[NV][MAX_D / K][16];
  for (int v = 0; v < NV; v++) key_words16<BITS>(codes + int64_t(16 * v) * row, row, d, words[v][0]);
  const __m512 table = _mm512_loadu_ps(tab.level);
  for (int w0 = 0; w0 < d / K; w0 += CHAIN / K) {
    V16 acc[RB][NV];
    for (int r = 0; r < RB; r++)
      for (int v = 0; v < NV; v++) acc[r][v] = zero();
    for (int w = w0; w < d / K && w < w0 + CHAIN / K; w++, q += K) {
      __m512i x[NV];
      for (int v = 0; v < NV; v++) x[v] = _mm512_load_si512(words[v][w]);
#pragma GCC unroll 16
      for (int c = 0; c < K; c++) {
        V16 level[NV];
        for (int v = 0; v < NV; v++) level[v] = level_of<KIND>(_mm512_srli_epi32(x[v], c * BITS), table, tab.all);
#pragma GCC unroll 8
        for (int r = 0; r < RB; r++) {
          const V16 y = set1(q[r * LD + c]);
          for (int v = 0; v < NV; v++) acc[r][v] = fma(y, level[v], acc[r][v]);
        }
      }
    }
    keep_dot<RB, NV>(acc, s, lds, w0 == 0);
  }
}

// o[r·LD + c] += sum over t of p[r·ldp + t]·level of 16·NV channels
template <int KIND, int RB, int NV>
TQ_INLINE void mix_codes_block(const float* p, int ldp, const uint8_t* codes, int row, int count, const Table& tab,
                               float* o) {
  constexpr int BITS = bits_of<KIND>();
  const __m512 table = _mm512_loadu_ps(tab.level);
  V16 acc[RB][NV];
  for (int r = 0; r < RB; r++)
    for (int v = 0; v < NV; v++) acc[r][v] = load(o + r * LD + 16 * v);
  for (int t = 0; t < count; t++, codes += row) {
    V16 level[NV];
    if (KIND == 4 && NV == 2) {  // 16 bytes in every quarter; each half of a vector takes its word
      const __m512 raw = _mm512_castsi512_ps(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)codes)));
      const __m512i at = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
      for (int v = 0; v < NV; v++) {
        const __m512i word = _mm512_mask_set1_epi32(_mm512_set1_epi32(2 * v), 0xFF00, 2 * v + 1);
        level[v] = {_mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_castps_si512(_mm512_permutevar_ps(raw, word)), at), table)};
      }
    } else {
      for (int v = 0; v < NV; v++) level[v] = value16<KIND>(codes + v * 2 * BITS, table, tab.all);
    }
#pragma GCC unroll 8
    for (int r = 0; r < RB; r++) {
      const V16 w = set1(p[r * ldp + t]);
      for (int v = 0; v < NV; v++) acc[r][v] = fma(w, level[v], acc[r][v]);
    }
  }
  for (int r = 0; r < RB; r++)
    for (int v = 0; v < NV; v++) store(o + r * LD + 16 * v, acc[r][v]);
}

template <int KIND, int RB>
static void dot_codes(const float* q, const uint8_t* codes, int row, int count, int d, const Table& tab, float* s, int lds) {
  int t = 0;
  for (; t + 32 <= count; t += 32) dot_codes_block<KIND, RB, 2>(q, codes + int64_t(t) * row, row, d, tab, s + t, lds);
  for (; t < count; t += 16) dot_codes_block<KIND, RB, 1>(q, codes + int64_t(t) * row, row, d, tab, s + t, lds);
}

template <int KIND, int RB>
static void mix_codes(const float* p, int ldp, const uint8_t* codes, int row, int count, int d, const Table& tab, float* o) {
  constexpr int BITS = bits_of<KIND>();
  int c = 0;
  for (; c + 32 <= d; c += 32) mix_codes_block<KIND, RB, 2>(p, ldp, codes + c * BITS / 8, row, count, tab, o + c);
  for (; c < d; c += 16) mix_codes_block<KIND, RB, 1>(p, ldp, codes + c * BITS / 8, row, count, tab, o + c);
}

#define TQ_FUSED_ROWS(KIND, CALL)                                                                   \
  switch (rows) {                                                                                   \
    case 1: return CALL(KIND, 1);                                                                   \
    case 2: return CALL(KIND, 2);                                                                   \
    case 3: return CALL(KIND, 3);                                                                   \
    case 4: return CALL(KIND, 4);                                                                   \
    case 5: return CALL(KIND, 5);                                                                   \
    case 6: return CALL(KIND, 6);                                                                   \
    case 7: return CALL(KIND, 7);                                                                   \
    default: return CALL(KIND, 8);                                                                  \
  }
#define TQ_FUSED(CALL)                   \
  switch (tab.kind) {                    \
    case 2: TQ_FUSED_ROWS(2, CALL)       \
    case 3: TQ_FUSED_ROWS(3, CALL)       \
    case 4: TQ_FUSED_ROWS(4, CALL)       \
    case 8: TQ_FUSED_ROWS(8, CALL)       \
    default: TQ_FUSED_ROWS(LOOKUP8, CALL) \
  }

// both for at most 8 rows and whole pages
static void fused_dot(const float* q, int rows, const uint8_t* codes, int row, int count, int d, const Table& tab, float* s,
                      int lds) {
#define TQ_CALL(KIND, RB) dot_codes<KIND, RB>(q, codes, row, count, d, tab, s, lds)
  TQ_FUSED(TQ_CALL)
#undef TQ_CALL
}

static void fused_mix(const float* p, int ldp, int rows, const uint8_t* codes, int row, int count, int d, const Table& tab,
                      float* o) {
#define TQ_CALL(KIND, RB) mix_codes<KIND, RB>(p, ldp, codes, row, count, d, tab, o)
  TQ_FUSED(TQ_CALL)
#undef TQ_CALL
}

constexpr int FUSED_ROWS = 8;

#else

constexpr int FUSED_ROWS = 0;
static inline void fused_dot(const float*, int, const uint8_t*, int, int, int, const Table&, float*, int) {}
static inline void fused_mix(const float*, int, int, const uint8_t*, int, int, int, const Table&, float*) {}

#endif

}  // namespace TQ_ISA
}  // namespace tq
