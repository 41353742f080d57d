// Matrix tiles and the running softmax. Every row's sums run in one order, whatever other rows share its block: that
// is what makes a row of a verify step bit-identical to the same row alone.
#pragma once
#include "tiles.h"

namespace tq {
namespace TQ_ISA {

constexpr int CHAIN = 32;  // channels summed in one chain; longer ones round more than torch's dot product does

template <int RB, int NV>
TQ_INLINE void keep_dot(V16 (&acc)[RB][NV], float* s, int lds, bool first_) {
  for (int r = 0; r < RB; r++) {
    for (int v = 0; v < NV; v++) {
      float* to = s + r * lds + 16 * v;
      store(to, first_ ? acc[r][v] : add(load(to), acc[r][v]));
    }
  }
}

// s[r·lds + t] = sum over c of q[r·LD + c]·kt[c·TILE + t], 16·NV tokens
template <int RB, int NV>
TQ_INLINE void dot_block(const float* q, const float* kt, int d, float* s, int lds) {
  for (int c0 = 0; c0 < d; c0 += CHAIN) {
    V16 acc[RB][NV];
    for (int r = 0; r < RB; r++)
      for (int v = 0; v < NV; v++) acc[r][v] = zero();
    for (int c = c0; c < d && c < c0 + CHAIN; c++) {
      V16 k[NV];
      for (int v = 0; v < NV; v++) k[v] = load(kt + c * TILE + 16 * v);
      for (int r = 0; r < RB; r++) {
        const V16 x = set1(q[r * LD + c]);
        for (int v = 0; v < NV; v++) acc[r][v] = fma(x, k[v], acc[r][v]);
      }
    }
    keep_dot<RB, NV>(acc, s, lds, c0 == 0);
  }
}

// o[r·LD + c] += sum over t of p[r·ldp + t]·vt[t·d + c], 16·NV channels
template <int RB, int NV>
TQ_INLINE void mix_block(const float* p, int ldp, const float* vt, int count, int d, float* o) {
  V16 acc[RB][NV];
  for (int r = 0; r < RB; r++)
    for (int v = 0; v < NV; v++) acc[r][v] = load(o + r * LD + 16 * v);
  for (int t = 0; t < count; t++) {
    V16 x[NV];
    for (int v = 0; v < NV; v++) x[v] = load(vt + t * d + 16 * v);
    for (int r = 0; r < RB; r++) {
      const V16 w = set1(p[r * ldp + t]);
      for (int v = 0; v < NV; v++) acc[r][v] = fma(w, x[v], acc[r][v]);
    }
  }
  for (int r = 0; r < RB; r++)
    for (int v = 0; v < NV; v++) store(o + r * LD + 16 * v, acc[r][v]);
}

template <int RB>
static void dot_rows(const float* q, const float* kt, int count, int d, float* s, int lds) {
  int t = 0;
  for (; t + 16 * MAX_NV <= count; t += 16 * MAX_NV) dot_block<RB, MAX_NV>(q, kt + t, d, s + t, lds);
  for (; t < count; t += 16) dot_block<RB, 1>(q, kt + t, d, s + t, lds);
}

template <int RB>
static void mix_rows(const float* p, int ldp, const float* vt, int count, int d, float* o) {
  int c = 0;
  for (; c + 16 * MAX_NV <= d; c += 16 * MAX_NV) mix_block<RB, MAX_NV>(p, ldp, vt + c, count, d, o + c);
  for (; c < d; c += 16) mix_block<RB, 1>(p, ldp, vt + c, count, d, o + c);
}

// f<RB>(r) over rows in blocks of at most MAX_RB
#define TQ_ROW_BLOCKS(rows, CALL)                      \
  for (int r = 0; r < (rows);) {                       \
    int left = (rows)-r;                               \
    if (left > MAX_RB) left = MAX_RB;                  \
    switch (left) {                                    \
      case 1: CALL(1) break;                           \
      case 2: CALL(2) break;                           \
      case 3: CALL((MAX_RB < 3 ? 2 : 3)) break;        \
      case 4: CALL((MAX_RB < 4 ? 2 : 4)) break;        \
      case 5: CALL((MAX_RB < 5 ? 2 : 5)) break;        \
      case 6: CALL((MAX_RB < 6 ? 2 : 6)) break;        \
      case 7: CALL((MAX_RB < 7 ? 2 : 7)) break;        \
      default: CALL((MAX_RB < 8 ? 2 : 8)) break;       \
    }                                                  \
    r += left;                                         \
  }

TQ_INLINE void dot_tile(const float* q, int rows, const float* kt, int count, int d, float* s, int lds) {
#define TQ_DOT(RB) dot_rows<RB>(q + r * LD, kt, count, d, s + r * lds, lds);
  TQ_ROW_BLOCKS(rows, TQ_DOT)
#undef TQ_DOT
}

TQ_INLINE void mix_tile(const float* p, int ldp, int rows, const float* vt, int count, int d, float* o) {
#define TQ_MIX(RB) mix_rows<RB>(p + r * ldp, ldp, vt, count, d, o + r * LD);
  TQ_ROW_BLOCKS(rows, TQ_MIX)
#undef TQ_MIX
}

TQ_INLINE void scale_row(float* o, int d, float f) {
  const V16 x = set1(f);
  for (int c = 0; c < d; c += 16) store(o + c, mul(load(o + c), x));
}

// One row: logits s (count, a multiple of 16; -inf where masked) become probabilities times `gain`; m, l, o move along.
TQ_INLINE void softmax_row(float* s, const float* gain, int count, int d, float softcap, float& m, float& l, float* o) {
  V16 top = set1(-INFINITY);
  if (softcap > 0) {
    const V16 cap = set1(softcap), inv = set1(1.0f / softcap);
    for (int t = 0; t < count; t += 16) {
      const V16 x = load(s + t);
      // a masked logit stays -inf: tanh would make it -softcap
      store(s + t, sub(mul(tanh16(mul(x, inv)), cap), keep_if_ge(mul(x, set1(-1.0f)), 3e38f, set1(INFINITY))));
    }
  }
  for (int t = 0; t < count; t += 16) top = max(load(s + t), top);
  const float now = max16(top);
  if (now == -INFINITY && m == -INFINITY) {
    bool nan = false;
    for (int t = 0; t < count; t++) nan |= s[t] != s[t];
    if (!nan) {
      for (int t = 0; t < count; t++) s[t] = 0;
      return;
    }
  }
  const float base = now > m ? now : m;
  const V16 x = set1(base);
  V16 sum = zero();
  for (int t = 0; t < count; t += 16) {
    const V16 p = exp16(sub(load(s + t), x));
    sum = add(sum, p);
    store(s + t, gain ? mul(p, load(gain + t)) : p);
  }
  if (base != m) {
    const float f = m == -INFINITY ? 0.0f : exp1(m - base);
    l *= f;
    scale_row(o, d, f);
    m = base;
  }
  l += sum16(sum);
}

static void merge(const Spec& s, int rows, Rows total, Rows part) {
  for (int r = 0; r < rows; r++) {
    if (part.l[r] == 0) continue;
    float *a = total.o + r * LD, *b = part.o + r * LD;
    if (total.l[r] == 0) {
      total.m[r] = part.m[r], total.l[r] = part.l[r];
      std::memcpy(a, b, sizeof(float) * s.d);
      continue;
    }
    const float m = total.m[r] > part.m[r] ? total.m[r] : part.m[r];
    const float fa = exp1(total.m[r] - m), fb = exp1(part.m[r] - m);
    total.m[r] = m, total.l[r] = total.l[r] * fa + part.l[r] * fb;
    for (int c = 0; c < s.d; c += 16) store(a + c, fma(load(a + c), set1(fa), mul(load(b + c), set1(fb))));
  }
}

}  // namespace TQ_ISA
}  // namespace tq
