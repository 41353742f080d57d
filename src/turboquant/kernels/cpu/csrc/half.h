// Scalar fp16 and bf16, rounding to nearest even, the same on every machine.
#pragma once
#include <cstdint>
#include <cstring>

namespace tq {

static inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

static inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, e = h >> 10 & 31, f = h & 1023;
  if (e == 0) return (sign ? -1.0f : 1.0f) * float(f) * 5.9604644775390625e-08f;
  return bits_float(sign | (e == 31 ? 0x7F800000u : (e + 112) << 23) | f << 13);
}

static inline uint16_t float_to_half(float x) {
  const uint32_t u = float_bits(x), a = u & 0x7FFFFFFF;
  const uint16_t sign = uint16_t(u >> 16 & 0x8000);
  if (a > 0x7F800000) return sign | 0x7E00;
  if (a >= 0x477FF000) return sign | 0x7C00;  // rounds to 65536 or more
  if (a < 0x38800000) {                       // subnormal: the sum with 0.5 rounds at the place that stays
    return sign | uint16_t(float_bits(bits_float(a) + 0.5f) - float_bits(0.5f));
  }
  return sign | uint16_t((a - 0x38000000 + 0xFFF + (a >> 13 & 1)) >> 13);
}

static inline uint16_t float_to_bf16(float x) {
  const uint32_t u = float_bits(x);
  return (u & 0x7FFFFFFF) > 0x7F800000 ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

static inline void store_as(void* p, int dtype, int64_t i, float x) {
  if (dtype == 0) {
    ((float*)p)[i] = x;
  } else {
    ((uint16_t*)p)[i] = dtype == 1 ? float_to_bf16(x) : float_to_half(x);
  }
}

static inline float scalar_as(const void* p, int dtype, int64_t i) {
  if (dtype == 0) return ((const float*)p)[i];
  const uint16_t h = ((const uint16_t*)p)[i];
  return dtype == 1 ? bits_float(uint32_t(h) << 16) : half_to_float(h);
}

static inline float header_half(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return half_to_float(h);
}

}  // namespace tq
