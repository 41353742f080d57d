// The integer vectors of linear_kernel.h on aarch64 with dot products: four lanes. Vector extensions but for `sdot`.
#pragma once
#include <arm_neon.h>

#include "half.h"
#include "simd.h"

namespace tq {
namespace TQ_ISA {

constexpr int LANES = 4, BLOCK = 4;
typedef int32_t I __attribute__((vector_size(16)));
typedef float F __attribute__((vector_size(16)));
typedef uint8_t B __attribute__((vector_size(16)));

template <class T>
TQ_INLINE T load_as_is(const void* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
TQ_INLINE I zero_i() { return I{}; }
TQ_INLINE I set_i(int32_t x) { return I{x, x, x, x}; }
TQ_INLINE I word(const int8_t* p) { return set_i(load_as_is<int32_t>(p)); }
TQ_INLINE I load_i(const void* p) { return load_as_is<I>(p); }
TQ_INLINE void store_i(void* p, I x) { std::memcpy(p, &x, sizeof x); }
TQ_INLINE I add_i(I x, I y) { return x + y; }
TQ_INLINE I minus_product(I x, I y, I z) { return x - y * z; }
TQ_INLINE I low4(I x) { return I(B(x) & 15); }
TQ_INLINE I high4(I x) { return I(B(x) >> 4); }
TQ_INLINE I join4(I high, I low) { return I(B(high) << 4 | B(low)); }
TQ_INLINE F zero_f() { return F{}; }
TQ_INLINE F load_f(const float* p) { return load_as_is<F>(p); }
TQ_INLINE void store_f(float* p, F x) { std::memcpy(p, &x, sizeof x); }
TQ_INLINE F add_scaled(F sum, I x, F scale) { return sum + __builtin_convertvector(x, F) * scale; }
TQ_INLINE I load_some(const uint8_t* p, int bytes) {
  if (bytes >= 16) return load_i(p);
  uint8_t some[16] = {};
  std::memcpy(some, p, size_t(bytes));
  return load_i(some);
}
TQ_INLINE I halves_to_floats(const uint16_t* p, int count) {
  float some[4] = {};
  for (int i = 0; i < count && i < 4; i++) some[i] = half_to_float(p[i]);
  return load_i(some);
}
TQ_INLINE I bytes_to_words(const uint8_t* p, int count) {
  I x{};
  for (int i = 0; i < count && i < 4; i++) x[i] = p[i];
  return x;
}
TQ_INLINE I mul_bits(I x, float y) { return I(F(x) * y); }

TQ_INLINE void transpose(I (&r)[LANES]) {
  I t[4];
  for (int i = 0; i < 4; i++)
    for (int c = 0; c < 4; c++) t[c][i] = r[i][c];
  for (int i = 0; i < 4; i++) r[i] = t[i];
}

TQ_INLINE I dot_signed(I sum, I x, I y) { return I(vdotq_s32(int32x4_t(sum), int8x16_t(x), int8x16_t(y))); }

// sum + Σ code·x of the four bytes of a lane; codes are unsigned, so those of 8 bit go through their two halves
template <int S>
TQ_INLINE I dot(I sum, I codes, I x) {
  if (S == 1) return dot_signed(sum, codes, x);
  return dot_signed(sum, low4(codes), x) + (dot_signed(zero_i(), high4(codes), x) << 4);
}

}  // namespace TQ_ISA
}  // namespace tq
