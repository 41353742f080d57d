// Live codes as integers on aarch64 with dot products: `sdot` adds four products of signed bytes to a lane. So both sides are
// signed here: a level as it is, and the digits of query rows and of weights alike, two in a 16-bit model (2^-16 of a row's
// largest number) and three in fp32 (2^-24). A page becomes a tile of levels, quads of four lanes by four summed numbers.
#pragma once
#include <arm_neon.h>

#include "softmax.h"

namespace tq {
namespace TQ_ISA {

constexpr bool INTEGER = true;
constexpr int MAX_DIGITS = 3, LDW = MAX_PAGE + 64;  // bytes of a digit row
constexpr int ROWS_AT_ONCE = 4, MOST_LANES = MAX_PAGE > MAX_D ? MAX_PAGE : MAX_D;

struct Digits {  // rows of numbers unit·(digit 0 + 256·digit 1 + ...)
  int8_t* digit;  // (rows, DIGITS, LDW)
  float unit[ROWS];
  bool finite[ROWS];
  int groups;
};

struct IntegerScratch {
  int8_t* tile;
  Digits x;
  IntegerScratch(const Spec& s, float* p) : tile((int8_t*)p) { x.digit = (int8_t*)(p + integer_tile_floats(s)); }
  bool all_finite(int rows) const {
    bool all = true;
    for (int r = 0; r < rows; r++) all &= x.finite[r];
    return all;
  }
};

template <int DIGITS, bool WEIGHTS>
static void digits_of(const float* from, int ld, int rows, int length, Digits& x) {
  constexpr float WHOLE = DIGITS == 2 ? 32639.0f : 8355000.0f;  // of signed digits that carry, less what rounding may add
  x.groups = length / 4;
  for (int r = 0; r < rows; r++) {
    const float* y = from + r * ld;
    uint32_t top = 0;
    for (int i = 0; i < length; i++) {
      const uint32_t bits = float_bits(y[i]) & 0x7FFFFFFF;
      top = bits > top ? bits : top;
    }
    const float largest = bits_float(top);
    x.finite[r] = top < 0x7F800000;
    const bool some = x.finite[r] && largest > 1e-30f;
    x.unit[r] = some ? largest / WHOLE : 0.0f;
    const float gain = some ? WHOLE / largest : 0.0f;
    int8_t* to = x.digit + r * DIGITS * LDW;
    if (!some) {
      std::memset(to, 0, size_t(DIGITS) * LDW);
      continue;
    }
    for (int i = 0; i < length; i++) {
      int32_t n = int32_t(__builtin_nearbyintf(y[i] * gain));
      for (int k = 0; k < DIGITS; k++, n = (n + 128) >> 8) to[k * LDW + i] = int8_t(n & 255);
    }
  }
}

struct LevelTable {
  int8x16_t level;  // of codes of up to 4 bit
  LevelTable(int bits, const uint8_t* bytes) {  // level + 128
    int8_t some[16] = {};
    for (int i = 0; i < 16 && bits < 8; i++) some[i] = int8_t(bytes[i] - 128);
    level = vld1q_s8(some);
  }
};

// the levels of 16 codes from the c-th of a token
template <int BITS>
TQ_INLINE int8x16_t levels16(const uint8_t* row, int c, const LevelTable& t) {
  const uint8_t* p = row + c * BITS / 8;
  if (BITS == 8) return vreinterpretq_s8_u8(vsubq_u8(vld1q_u8(p), vdupq_n_u8(127)));
  if (BITS == 4) {
    const uint8x16_t x = vcombine_u8(vld1_u8(p), vld1_u8(p));
    return vqtbl1q_s8(t.level, vzip1q_u8(vandq_u8(x, vdupq_n_u8(15)), vshrq_n_u8(x, 4)));
  }
  uint8_t code[16];
  for (int i = 0; i < 16; i += 8) {
    uint32_t w = 0;
    for (int j = 0; j < BITS; j++) w |= uint32_t(p[i / 8 * BITS + j]) << 8 * j;
    for (int j = 0; j < 8; j++) code[i + j] = w >> BITS * j & ((1 << BITS) - 1);
  }
  return vqtbl1q_s8(t.level, vld1q_u8(code));
}

// keys: quad (t/4, c/4), channels first: tokens are lanes, channels are summed
template <int BITS>
static void key_quads(const Spec& s, const uint8_t* codes, const LevelTable& table, int8_t* tile) {
  for (int t = 0; t < s.page; t += 4, codes += 4 * s.key_row) {
    for (int c = 0; c < s.d; c += 16, tile += 64) {
      const auto at = [&](int i) { return vreinterpretq_u32_s8(levels16<BITS>(codes + i * s.key_row, c, table)); };
      const uint32x4x4_t four = {{at(0), at(1), at(2), at(3)}};
      vst4q_u32((uint32_t*)tile, four);
    }
  }
}

// values: quad (t/4, c/4), channels first: channels are lanes, tokens are summed
template <int BITS>
static void value_quads(const Spec& s, const uint8_t* codes, const LevelTable& table, int8_t* tile) {
  for (int t = 0; t < s.page; t += 4, codes += 4 * s.value_row) {
    for (int c = 0; c < s.d; c += 16, tile += 64) {
      const auto at = [&](int i) { return levels16<BITS>(codes + i * s.value_row, c, table); };
      const int8x16x4_t four = {{at(0), at(1), at(2), at(3)}};
      vst4q_s8(tile, four);
    }
  }
}

static void key_tile_of(const Spec& s, const uint8_t* codes, int8_t* tile) {
  const LevelTable table(s.key_bits, s.key_bytes);
#define TQ_CALL(B) key_quads<B>(s, codes, table, tile)
  TQ_BY_BITS(s.key_bits, TQ_CALL)
#undef TQ_CALL
}

static void value_tile_of(const Spec& s, const uint8_t* codes, int8_t* tile) {
  const LevelTable table(s.value_bits, s.value_bytes);
#define TQ_CALL(B) value_quads<B>(s, codes, table, tile)
  TQ_BY_BITS(s.value_bits, TQ_CALL)
#undef TQ_CALL
}

// Quads of a tile: those of the next lanes and of the next group of four summed numbers, in bytes.
struct Quads {
  const int8_t* tile;
  int64_t lane, group;
};

// sums[i·MOST_LANES + l] of N digit rows and 16 lanes; groups: of four numbers, a multiple of four
template <int N>
static void sums16(const int8_t* digit, int groups, Quads q, int32_t* sums) {
  int32x4_t acc[N][4];
  for (int i = 0; i < N; i++)
    for (int v = 0; v < 4; v++) acc[i][v] = vdupq_n_s32(0);
  const int8_t* from = q.tile;
  for (int g = 0; g < groups; g += 4) {
    int8x16_t x[N];
    for (int i = 0; i < N; i++) x[i] = vld1q_s8(digit + i * LDW + 4 * g);
#define TQ_GROUP(G)                                                                             \
  {                                                                                             \
    int8x16_t level[4];                                                                         \
    for (int v = 0; v < 4; v++) level[v] = vld1q_s8(from + v * q.lane);                         \
    for (int i = 0; i < N; i++)                                                                 \
      for (int v = 0; v < 4; v++) acc[i][v] = vdotq_laneq_s32(acc[i][v], level[v], x[i], G);     \
    from += q.group;                                                                            \
  }
    TQ_GROUP(0) TQ_GROUP(1) TQ_GROUP(2) TQ_GROUP(3)
#undef TQ_GROUP
  }
  for (int i = 0; i < N; i++)
    for (int v = 0; v < 4; v++) vst1q_s32(sums + i * MOST_LANES + 4 * v, acc[i][v]);
}

// keep(r, l, sum over the groups of digits·level) for all rows and lanes. A sum of one digit is below 2^24, of two below
// 2^31 (512 tokens).
template <int DIGITS, class Keep>
static void product(const Digits& x, int rows, int lanes, Quads q, Keep keep) {
  int32_t sums[ROWS_AT_ONCE * DIGITS * MOST_LANES];
  for (int first = 0; first < rows; first += ROWS_AT_ONCE) {
    const int some = rows - first < ROWS_AT_ONCE ? rows - first : ROWS_AT_ONCE, count = some * DIGITS;
    for (int l = 0; l < lanes; l += 16) {
      const Quads here{q.tile + l / 4 * q.lane, q.lane, q.group};
      for (int i = 0; i < count;) {
        const int8_t* digit = x.digit + (int64_t(first) * DIGITS + i) * LDW;
        int32_t* to = sums + i * MOST_LANES + l;
        switch (count - i) {
          case 1: sums16<1>(digit, x.groups, here, to), i += 1; break;
          case 2: sums16<2>(digit, x.groups, here, to), i += 2; break;
          case 3: sums16<3>(digit, x.groups, here, to), i += 3; break;
          default: sums16<4>(digit, x.groups, here, to), i += 4;
        }
      }
    }
    for (int r = 0; r < some; r++) {
      const int32_t* s = sums + r * DIGITS * MOST_LANES;
      for (int l = 0; l < lanes; l++) {
        const float high = float(s[(DIGITS - 1) * MOST_LANES + l] * 256 + s[(DIGITS - 2) * MOST_LANES + l]);
        keep(first + r, l, DIGITS == 3 ? high * 256.0f + float(s[l]) : high);
      }
    }
  }
}

// s[r·lds + t] = q[r·LD]·level of a page's tokens; w.x has the digits of q
template <int DIGITS>
static void integer_dot(const Spec& p, const float* q, int rows, const uint8_t* codes, float* s, int lds, bool,
                        IntegerScratch& w) {
  key_tile_of(p, codes, w.tile);
  product<DIGITS>(w.x, rows, p.page, {w.tile, 4 * p.d, 16}, [&](int r, int t, float f) __attribute__((always_inline)) {
    s[r * lds + t] = f * (w.x.unit[r] * p.key_unit);
  });
  if (w.all_finite(rows)) return;
  for (int r = 0; r < rows; r++) {
    for (int t = 0; t < p.page && !w.x.finite[r]; t++) {
      float sum = 0;
      for (int c = 0; c < p.d; c++) sum += q[r * LD + c] * float(w.tile[t / 4 * 4 * p.d + c / 4 * 16 + t % 4 * 4 + c % 4]);
      s[r * lds + t] = sum * p.key_unit;
    }
  }
}

// o[r·LD + c] += sum over t of x[r·ldx + t]·level; w.x has the digits of x
template <int DIGITS>
static void integer_mix(const Spec& p, const float* x, int ldx, int rows, const uint8_t* codes, float* o, bool,
                        IntegerScratch& w) {
  value_tile_of(p, codes, w.tile);
  product<DIGITS>(w.x, rows, p.d, {w.tile, 16, 4 * p.d}, [&](int r, int c, float f) __attribute__((always_inline)) {
    o[r * LD + c] += f * (w.x.unit[r] * p.value_unit);
  });
  if (w.all_finite(rows)) return;
  for (int r = 0; r < rows; r++) {
    for (int t = 0; t < p.page && !w.x.finite[r]; t++) {
      const float y = x[r * ldx + t] * p.value_unit;
      for (int c = 0; c < p.d; c++) o[r * LD + c] += y * float(w.tile[t / 4 * 4 * p.d + 4 * c + t % 4]);
    }
  }
}

}  // namespace TQ_ISA
}  // namespace tq
