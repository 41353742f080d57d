// The intrinsics that the dot-product sources for aarch64 use (csrc/neon.h, linear_neon.h), number by number, so that any
// machine can run them. Written from Arm's reference of the intrinsics, not from the sources under test.
#pragma once
#include <cstdint>
#include <cstring>

typedef int8_t int8x16_t __attribute__((vector_size(16)));
typedef uint8_t uint8x16_t __attribute__((vector_size(16)));
typedef uint8_t uint8x8_t __attribute__((vector_size(8)));
typedef int32_t int32x4_t __attribute__((vector_size(16)));
typedef uint32_t uint32x4_t __attribute__((vector_size(16)));
struct uint32x4x4_t {
  uint32x4_t val[4];
};
struct int8x16x4_t {
  int8x16_t val[4];
};

template <class V>
static inline V neon_load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline int8x16_t vld1q_s8(const int8_t* p) { return neon_load<int8x16_t>(p); }
static inline uint8x16_t vld1q_u8(const uint8_t* p) { return neon_load<uint8x16_t>(p); }
static inline uint8x8_t vld1_u8(const uint8_t* p) { return neon_load<uint8x8_t>(p); }
static inline void vst1q_s32(int32_t* p, int32x4_t v) { std::memcpy(p, &v, sizeof v); }
static inline void vst4q_u32(uint32_t* p, uint32x4x4_t v) {
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) p[4 * i + j] = v.val[j][i];
}
static inline void vst4q_s8(int8_t* p, int8x16x4_t v) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++) p[4 * i + j] = v.val[j][i];
}

static inline uint8x16_t vdupq_n_u8(uint8_t x) { return uint8x16_t{} + x; }
static inline int32x4_t vdupq_n_s32(int32_t x) { return int32x4_t{} + x; }
static inline uint8x16_t vcombine_u8(uint8x8_t low, uint8x8_t high) {
  uint8x16_t v;
  for (int i = 0; i < 8; i++) v[i] = low[i], v[8 + i] = high[i];
  return v;
}
static inline int8x16_t vreinterpretq_s8_u8(uint8x16_t x) { return (int8x16_t)x; }
static inline uint32x4_t vreinterpretq_u32_s8(int8x16_t x) { return (uint32x4_t)x; }

static inline uint8x16_t vandq_u8(uint8x16_t x, uint8x16_t y) { return x & y; }
static inline uint8x16_t vsubq_u8(uint8x16_t x, uint8x16_t y) { return x - y; }
static inline uint8x16_t vshrq_n_u8(uint8x16_t x, int n) { return x >> n; }
static inline uint8x16_t vzip1q_u8(uint8x16_t x, uint8x16_t y) {  // x0 y0 x1 y1 ... of the lower halves
  uint8x16_t v;
  for (int i = 0; i < 8; i++) v[2 * i] = x[i], v[2 * i + 1] = y[i];
  return v;
}
static inline int8x16_t vqtbl1q_s8(int8x16_t table, uint8x16_t at) {  // 0 beyond the table
  int8x16_t v;
  for (int i = 0; i < 16; i++) v[i] = at[i] < 16 ? table[at[i]] : 0;
  return v;
}

static inline int32x4_t vdotq_s32(int32x4_t sum, int8x16_t x, int8x16_t y) {
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) sum[i] += int32_t(x[4 * i + j]) * int32_t(y[4 * i + j]);
  return sum;
}
static inline int32x4_t vdotq_laneq_s32(int32x4_t sum, int8x16_t x, int8x16_t y, int lane) {  // the lane's four bytes of y
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) sum[i] += int32_t(x[4 * i + j]) * int32_t(y[4 * lane + j]);
  return sum;
}
