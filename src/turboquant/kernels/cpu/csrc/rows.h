// Arithmetic on rows: exponential, tanh, and the block Walsh-Hadamard transform in exactly maths/rotation.py's order.
#pragma once
#include "simd.h"

namespace tq {
namespace TQ_ISA {

// e^x for x <= 0, relative error below (2 + |x|)·2^-24; exactly 1 at 0, exactly 0 below -87, NaN stays
TQ_INLINE V16 exp16(V16 x) {
  const V16 t = mul(max(set1(-88.0f), x), set1(1.44269504089f));  // max keeps the NaN of its second argument
  const V16 n = rint(t), f = sub(t, n);
  V16 p = set1(1.53707048e-4f);
  p = fma(p, f, set1(1.33998483e-3f));
  p = fma(p, f, set1(9.61837325e-3f));
  p = fma(p, f, set1(5.55032904e-2f));
  p = fma(p, f, set1(2.40226485e-1f));
  p = fma(p, f, set1(6.93147206e-1f));
  return keep_if_ge(x, -87.0f, times_pow2(fma(p, f, set1(1.0f)), n));
}

TQ_INLINE float exp1(float x) { return first(exp16(set1(x))); }

// tanh with small absolute and, near 0, small relative error
TQ_INLINE V16 tanh16(V16 x) {
  const V16 z = mul(x, x);
  const V16 a = max(x, sub(zero(), x));
  const V16 e = exp16(mul(set1(-2.0f), a));
  const V16 far = div(sub(set1(1.0f), e), add(set1(1.0f), e));
  V16 p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  p = fma(mul(p, z), a, a);
  float near_[16], far_[16], x_[16], out[16];
  store(near_, p), store(far_, far), store(x_, x);
  for (int i = 0; i < 16; i++) {
    const float t = std::fabs(x_[i]) < 0.625f ? near_[i] : far_[i];
    out[i] = x_[i] < 0 ? -t : t;
  }
  return load(out);
}

template <int H>
struct Signs {  // -1 where lane has bit H
  alignas(64) float of[16];
  constexpr Signs() : of() {
    for (int i = 0; i < 16; i++) of[i] = i & H ? -1.0f : 1.0f;
  }
};

template <int H>
TQ_INLINE V16 butterfly(V16 x) {  // lanes without bit H: partner + x; with it: partner - x; a product with 1 is exact
  static constexpr Signs<H> sign;
  return fma(x, load(sign.of), swap<H>(x));
}

TQ_INLINE V16 hadamard16(V16 x) { return butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(x)))); }

// x <- blockdiag(H)·x·norm over blocks of a power of two >= 16; stages of half 1, 2, 4, ... as the reference
TQ_INLINE void hadamard(float* x, int d, int block, float norm) {
  const V16 f = set1(norm);
  for (int i = 0; i < d; i += 16) {
    const V16 y = hadamard16(load(x + i));
    store(x + i, block == 16 ? mul(y, f) : y);
  }
  for (int half = 16; half < block; half *= 2) {
    const bool last = half * 2 == block;
    for (int i = 0; i < d; i += 2 * half) {
      for (int j = i; j < i + half; j += 16) {
        const V16 a = load(x + j), b = load(x + j + half);
        const V16 s = add(a, b), t = sub(a, b);
        store(x + j, last ? mul(s, f) : s), store(x + j + half, last ? mul(t, f) : t);
      }
    }
  }
}

// the same for 16·NV numbers that are one block, in registers
template <int NV>
TQ_INLINE void hadamard_block(V16 (&x)[NV]) {
#pragma GCC unroll 16
  for (int i = 0; i < NV; i++) x[i] = hadamard16(x[i]);
#pragma GCC unroll 4
  for (int half = 1; half < NV; half *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < NV; i++) {
      if (i & half) continue;
      const V16 a = x[i], b = x[i + half];
      x[i] = add(a, b), x[i + half] = sub(a, b);
    }
  }
}

}  // namespace TQ_ISA
}  // namespace tq
