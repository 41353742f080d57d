// Arithmetic on rows: exponential, tanh, and the block Walsh-Hadamard transform in exactly maths/rotation.py's order.
#pragma once
#include "simd.h"

namespace tq {
namespace TQ_ISA {

// e^x for x <= 0 to 2 units in the last place; exactly 1 at 0, exactly 0 below -87, NaN stays
TQ_INLINE V16 exp16(V16 x) {
  const V16 y = max(set1(-88.0f), min(set1(88.0f), x));
  const V16 n = rint(mul(y, set1(1.44269504089f)));
  V16 r = fma(n, set1(-0.693359375f), y);
  r = fma(n, set1(2.12194440e-4f), r);
  V16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(mul(r, r), p, r), set1(1.0f));
  return keep_if_ge(x, -87.0f, mul(p, pow2(n)));
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
TQ_INLINE V16 butterfly(V16 x) {  // lanes without bit H: x + partner; with it: partner - x
  constexpr uint16_t with = H == 1 ? 0xAAAA : H == 2 ? 0xCCCC : H == 4 ? 0xF0F0 : 0xFF00;
  const V16 y = swap<H>(x);
  return pick(with, sub(y, x), add(x, y));
}

// x <- blockdiag(H)·x·norm over blocks of a power of two >= 16; stages of half 1, 2, 4, ... as the reference
TQ_INLINE void hadamard(float* x, int d, int block, float norm) {
  const V16 f = set1(norm);
  for (int i = 0; i < d; i += 16) {
    V16 y = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(x + i)))));
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

}  // namespace TQ_ISA
}  // namespace tq
