// The products of a packed page: logits of its keys, and its values by their weights. Codes become int8 levels in
// registers, once for all rows.
#pragma once
#include "packed.cuh"

// Where a lane's octets of the key row of token(0, g) begin; of other tiles' tokens they lie TILE_KEYS apart.
constexpr int TILE_KEYS = 8 * KEY_ROW, TILE_VALUES = 8 * VALUE_ROW;
DEVICE const u8* key_place(const u8* page, int lane) {
  return page + AT_KEY_CODES + token(0, lane >> 2) * KEY_ROW + (D % 32 ? 0 : (lane & 3) * KS * KEY_BITS);
}
// levels of the key octets of a token's row that this lane holds, as bytes
DEVICE void key_levels(const Tables& tables, const u8* row, int t, u32 (&b)[KS][2]) {
#pragma unroll
  for (int s = 0; s < KS; s++) {
    const u8* at = row + (D % 32 ? min(s * 4 + t, OCTETS - 1) : s) * KEY_BITS;
    if constexpr (KEY_BITS == 8) {
      b[s][0] = *(const u32*)at + 0x01010101u, b[s][1] = *(const u32*)(at + 4) + 0x01010101u;
    } else {
      const u32 codes = nibbles<KEY_BITS>(at);
      b[s][0] = tables.levels4<KEY_BITS>(codes), b[s][1] = tables.levels4<KEY_BITS>(codes >> 16);
    }
  }
}
// The rows' A operands. With four rows those of a tile's upper half are free: they stand for the same rows and the second
// half of the tokens (or, of the values' product, channels), in a product of its own that goes to the same sums. So a
// lane has what belongs to half of the tokens; the other half's operand is zero.
DEVICE int half_of(int lane) { return HALVES > 1 ? lane / (4 * ROWS) : 0; }
struct QueryBytes {
  u32 a[HALVES][TILES][KS][4], hot[HALVES][TILES][2];
  DEVICE QueryBytes(const Scratch& x, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < HALVES; i++)
#pragma unroll
      for (int m = 0; m < TILES; m++) {
        const int r = half_of(lane) == i || HALVES == 1 ? m * ROWS + g % ROWS : R;
        hot[i][m][0] = *(const u32*)(x.turned.hot_hi[r] + 4 * t), hot[i][m][1] = *(const u32*)(x.turned.hot_lo[r] + 4 * t);
#pragma unroll
        for (int s = 0; s < KS; s++) {
          const uint4 q = *(const uint4*)(x.turned.query[r] + (s * 4 + t) * 4);
          u32(&to)[4] = a[i][m][s];
          if (KEY_BITS == 2) {  // bytes of channels as an octet's nibbles have them
            to[0] = prmt(q.x, q.z, 0x6420), to[1] = prmt(q.y, q.w, 0x6420);
            to[2] = prmt(q.x, q.z, 0x7531), to[3] = prmt(q.y, q.w, 0x7531);
          } else {
            to[0] = q.x, to[1] = q.y, to[2] = q.z, to[3] = q.w;
          }
        }
      }
  }
};

// logits[m][j][e] of token(j, 2t+e) of this lane's half
DEVICE void logits_of(const Tables& tables, const u8* page, const Scratch& x, int lane, float (&logits)[TILES][OWN_NT][2]) {
  const int g = lane >> 2, t = lane & 3;
  const QueryBytes q(x, lane);
  const u8* keys = key_place(page, lane);
  const u32* hot_row = x.hot[token(0, g)] + (t < HW ? t : 0);
  const float* scales = x.key_scale + 8 * half_of(lane) * OWN_NT + 2 * t;
  float4 row[TILES];
#pragma unroll
  for (int m = 0; m < TILES; m++) row[m] = *(const float4*)x.row[m * ROWS + g % ROWS];
#pragma unroll
  for (int j = 0; j < OWN_NT; j++) {
    int c[TILES][4], h[TILES][4];
#pragma unroll
    for (int i = 0; i < HALVES; i++) {
      u32 b[KS][2];
      key_levels(tables, keys + (i * OWN_NT + j) * TILE_KEYS, t, b);
      const u32 hot_codes = HOT ? hot_row[(i * OWN_NT + j) * 8 * HW] : 0;
#pragma unroll
      for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int s = 0; s < KS; s++) mma_u8(c[m], q.a[i][m][s], b[s][0], b[s][1], i == 0 && s == 0);
        if (HOT) mma_s8(h[m], q.hot[i][m], hot_codes, i == 0);
      }
    }
    const float2 scale = *(const float2*)(scales + 8 * j);
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float rest = fmaf(float(c[m][e] * 256 + c[m][2 + e]), row[m].x, row[m].w);
        const float more = HOT ? fmaf(float(h[m][e] * 256 + h[m][2 + e]), row[m].z, row[m].y) : row[m].y;
        logits[m][j][e] = fmaf(rest, e ? scale.y : scale.x, more);
      }
  }
}

// levels of the values: lane (g, t) gets channel n of octet 8·i+g for the tokens that its weights stand for
struct ValuePlace {  // of token(0, 2t) and token(0, 2t + 1), octet g
  const u8 *first, *second;
  DEVICE ValuePlace(const u8* codes, int lane) {
    const int t = lane & 3;
    first = codes + token(0, 2 * t) * VALUE_ROW, second = codes + token(0, 2 * t + 1) * VALUE_ROW;
    if (D % 64 == 0) first += (lane >> 2) * VALUE_BITS, second += (lane >> 2) * VALUE_BITS;
  }
};
DEVICE void value_levels(const Tables& tables, const ValuePlace& place, int i, int k, int lane, u32 (&b)[8][2]) {
  const int octet = (D % 64 ? min(value_octet(i, lane >> 2), OCTETS - 1) : 8 * i) * VALUE_BITS;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int j = (4 * k + 2 * half) * TILE_VALUES + octet;
    const u8* row[4] = {place.first + j, place.second + j, place.first + j + TILE_VALUES, place.second + j + TILE_VALUES};
    if constexpr (VALUE_BITS == 8) {
#pragma unroll
      for (int part = 0; part < 2; part++) {
        u32 w[4];
#pragma unroll
        for (int n = 0; n < 4; n++) w[n] = *(const u32*)(row[n] + 4 * part) + 0x01010101u;
        const u32 ab = prmt(w[0], w[1], 0x5140), cd = prmt(w[2], w[3], 0x5140);
        const u32 ab2 = prmt(w[0], w[1], 0x7362), cd2 = prmt(w[2], w[3], 0x7362);
        b[4 * part][half] = prmt(ab, cd, 0x5410), b[4 * part + 1][half] = prmt(ab, cd, 0x7632);
        b[4 * part + 2][half] = prmt(ab2, cd2, 0x5410), b[4 * part + 3][half] = prmt(ab2, cd2, 0x7632);
      }
    } else {
      u32 w[4];
#pragma unroll
      for (int n = 0; n < 4; n++) w[n] = nibbles<VALUE_BITS>(row[n]);
      // the 4×8 nibbles transposed: even nibbles of tokens 0 and 1 in bytes, and so on
      const u32 even01 = low_nibbles_of(w[0], w[1] << 4), odd01 = low_nibbles_of(w[0] >> 4, w[1]);
      const u32 even23 = low_nibbles_of(w[2], w[3] << 4), odd23 = low_nibbles_of(w[2] >> 4, w[3]);
      const u32 codes4[4] = {prmt(even01, even23, 0x5140), prmt(odd01, odd23, 0x5140), prmt(even01, even23, 0x7362),
                             prmt(odd01, odd23, 0x7362)};  // channels 0 and 2, 1 and 3, 4 and 6, 5 and 7
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const int first = (n & 2) * 2 + (n & 1);
        b[first][half] = tables.levels4<VALUE_BITS>(codes4[n]);
        b[first + 2][half] = tables.levels4<VALUE_BITS>(codes4[n] >> 16);
      }
    }
  }
}

DEVICE void read_value_scales(const u8* values, Scratch& x, int lane) {
  const u16 two = *(const u16*)(values + AT_VALUE_SCALE - VALUE_PART + 2 * lane);
  const float a = (two & 255) == 255 ? 0.f : TOP * exp2_(float(two & 255) * (-1.f / ROW_STEPS));
  const float b = two >> 8 == 255 ? 0.f : TOP * exp2_(float(two >> 8) * (-1.f / ROW_STEPS));
  *(float2*)(x.value_scale + 2 * lane) = lane & 1 ? make_float2(b, a) : make_float2(a, b);
  __syncwarp();
}

// weights of one tile's rows, as bytes for the values' product, and their sum's correction
struct Weights {
  u32 a[KC / HALVES][4];
  float scale;  // of the integer products, without the values' unit
};
template <class S> DEVICE void weigh(const Scratch& x, int lane, float (&logits)[OWN_NT][2], float unit, S& soft, int m, Weights& w) {
  const int t = lane & 3;
  float most[OWN_NT];
#pragma unroll
  for (int j = 0; j < OWN_NT; j++) most[j] = fmaxf(logits[j][0], logits[j][1]);
#pragma unroll
  for (int n = 1; n < OWN_NT; n *= 2)
#pragma unroll
    for (int j = 0; j < OWN_NT; j += 2 * n) most[j] = fmaxf(most[j], most[j + n]);
  float top = max4(most[0]);
  if (HALVES > 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
  const float base = soft.raise(m, top), own = top == NEG ? 0.f : top;
  w.scale = exp2_(top - base);
  const float* scales = x.value_scale + 8 * half_of(lane) * OWN_NT + 2 * t;
#pragma unroll
  for (int k = 0; k < KC / HALVES; k++) {  // of each half of the tokens a sum of its own, added at the end
    float sum = 0;
    int high = 0, low = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float p[4];
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const int j = 4 * k + 2 * half + n / 2;
        const float2 scale = *(const float2*)(scales + 8 * j);
        const float one = exp2_(logits[j][n & 1] - own);
        sum += one, p[n] = fmaf(one, n & 1 ? scale.y : scale.x, MAGIC);
      }
      split4(p[0], p[1], p[2], p[3], w.a[k][2 * half], w.a[k][2 * half + 1]);
      high = __dp4a(int(w.a[k][2 * half]), 0x01010101, high);
      low = __dp4a(int(w.a[k][2 * half + 1]), 0x01010101, low);
    }
    soft.sum[m][k] = fmaf(sum, w.scale, soft.sum[m][k]);
    // the levels' 128 too many, taken off at the end; a lane's share, as of the sum
    soft.excess[m][k] = fmaf(float(high * 256 + low) * -128.f, w.scale * unit, soft.excess[m][k]);
  }
}
template <class S> DEVICE void add_values(const Tables& tables, const u8* codes, Scratch& x, int lane, const Weights (&w)[TILES], float unit, S& soft) {
  u32 a[HALVES][TILES][KC][4];
  if constexpr (HALVES > 1) {  // a row's halves to all its lanes, through the memory of what the page's keys needed
    uint4* all = (uint4*)x.s;
    const u32(&own)[4] = w[0].a[0];
    const int row = lane % 16;
    all[lane] = make_uint4(own[0], own[1], own[2], own[3]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < HALVES; i++)
#pragma unroll
      for (int k = 0; k < KC; k++) {
        const uint4 q = *(half_of(lane) == i ? all + 16 * k + row : (const uint4*)x.turned.query[R]);
        a[i][0][k][0] = q.x, a[i][0][k][1] = q.y, a[i][0][k][2] = q.z, a[i][0][k][3] = q.w;
      }
  } else {
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int k = 0; k < KC; k++)
#pragma unroll
        for (int n = 0; n < 4; n++) a[0][m][k][n] = w[m].a[k % (KC / HALVES)][n];
  }
  const ValuePlace place(codes, lane);
#pragma unroll
  for (int i = 0; i < NV; i += HALVES) {
    int c[TILES][8][4];
#pragma unroll
    for (int half = 0; half < HALVES && i + half < NV; half++)
#pragma unroll
      for (int k = 0; k < KC; k++) {
        u32 b[8][2];
        value_levels(tables, place, i + half, k, lane, b);
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
          for (int n = 0; n < 8; n++) mma_u8(c[m][n], a[half][m][k], b[n][0], b[n][1], half == 0 && k == 0);
      }
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      const float scale = w[m].scale * unit;
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& out = soft.out[m][8 * (i / HALVES) + n][e];
          out = fmaf(float(c[m][n][e] * 256 + c[m][n][2 + e]), scale, out);
        }
    }
  }
}
