// Attention of a tile's rows over one packed page. The query is rotated into the page's terms and quantized to 16 bit,
// as two int8 rows (hi·256 + lo) of one tensor-core tile; so are the weights of the values. Codes become int8 levels in
// registers, once for all rows.
#pragma once
#include "state.cuh"

struct Scratch {  // of a warp, in shared memory
  u8 buffer[BUFFERS][HALF];
  float s[D], mean[D];            // of the page: channel scales with the rotation's signs, 0 at hot channels; means
  float key_scale[P], value_scale[P];
  u32 hot[P][HW];                 // hot codes by token
  float row[R][4];                // scale of the quantized query, bias, scale of its hot part
  struct alignas(16) Turned {      // the quantized query; what is not written stays zero
    u32 query[R][QW];              // by octet: hi bytes of four channels, lo bytes, hi, lo
    u8 hot_hi[R][16], hot_lo[R][16];
  } turned;
  i64 bar[BUFFERS];
};

// token of accumulator column n of tile j: lanes that load together touch different banks
DEVICE int token(int j, int n) { return 8 * j + (n & 6) + ((n ^ n >> 1) & 1); }
DEVICE int row_channel(int i, int lane) { return i / RUN * BLOCK + (lane % LANES) * RUN + i % RUN; }

// this lane's part of a row, in pairs
DEVICE void load_query(const u16* from, int lane, u32 (&q)[E / 2]) {
  if constexpr (RUN % 8 == 0) {
#pragma unroll
    for (int i = 0; i < E; i += 8) {
      const uint4 four = *(const uint4*)(from + row_channel(i, lane));
      q[i / 2] = four.x, q[i / 2 + 1] = four.y, q[i / 2 + 2] = four.z, q[i / 2 + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < E; i += 2) q[i / 2] = *(const u32*)(from + row_channel(i, lane));
  }
}

// where the octet of channel c of a row lies in Scratch::query: lanes of one step next to each other
DEVICE int query_word(int c) {
  const int octet = c / 8, place = D % 32 ? octet : octet % KS * 4 + octet / KS;
  return place * 4 + c % 8 / 4 * 2;
}

// four numbers, scaled to ±TOP and MAGIC added, as bytes hi and lo
DEVICE void split4(float a, float b, float c, float d, u32& hi, u32& lo) {
  const u32 x = prmt(__float_as_uint(a), __float_as_uint(b), 0x5140);
  const u32 y = prmt(__float_as_uint(c), __float_as_uint(d), 0x5140);
  lo = prmt(x, y, 0x5410) ^ 0x80808080u, hi = prmt(x, y, 0x7632);
}

// the header of a page: per channel, per token of the keys, hot codes
DEVICE void read_header(const u8* page, Scratch& x, int lane, const float (&sign)[(D + 31) / 32]) {
  const float step = half_(*(const u16*)(page + AT_MEAN_STEP)), base = half_(*(const u16*)(page + AT_KEY_BASE));
#pragma unroll
  for (int i = 0; i < (D + 31) / 32; i++) {
    const int c = i * 32 + lane;
    if (c < D) {
      x.s[c] = sign[i] * exp2_(fmaf(float(page[AT_LOG_S + c]), 1.f / S_STEPS, -128.f / S_STEPS));
      x.mean[c] = sign[i] * float((signed char)page[AT_MEAN + c]) * step;
    }
  }
  const float unit = base * (KEY_UNIT * NORM);
  const u16 two = *(const u16*)(page + AT_KEY_SCALE + 2 * lane);
  const float a = (two & 255) == 255 ? 0.f : unit * exp2_(float(two & 255) * (-1.f / ROW_STEPS));
  const float b = two >> 8 == 255 ? 0.f : unit * exp2_(float(two >> 8) * (-1.f / ROW_STEPS));
  *(float2*)(x.key_scale + 2 * lane) = lane & 1 ? make_float2(b, a) : make_float2(a, b);
  if (HOT) {
    u32 even[HW], odd[HW];
#pragma unroll
    for (int i = 0; i < HW; i++) even[i] = odd[i] = 0;
#pragma unroll
    for (int h = 0; h < HOT; h++) {
      const u32 pair = *(const u16*)(page + AT_HOT_CODES + h * P + 2 * lane);
      even[h / 4] |= (pair & 255) << h % 4 * 8, odd[h / 4] |= (pair >> 8) << h % 4 * 8;
    }
#pragma unroll
    for (int i = 0; i < HW; i++) x.hot[2 * lane][i] = even[i], x.hot[2 * lane + 1][i] = odd[i];
  }
  __syncwarp();
  if (HOT && lane < HOT) x.s[page[AT_HOT_INDEX + lane]] = 0;
  __syncwarp();
}

// rows of tile m in the page's terms: R(q∘s) as bytes, q·mean and the hot channels' part
DEVICE void turn_query(const Call& c, const u16* from, const u8* page, Scratch& x, int m, int lane, const u32 (&q)[E / 2]) {
  const int r = m * ROWS + lane / LANES, u = lane % LANES;
  float y[E], dot[NB];
#pragma unroll
  for (int b = 0; b < NB; b++) {
    float part[RUN];
#pragma unroll
    for (int i = 0; i < RUN; i++) {
      const int at = row_channel(b * RUN + i, lane);
      const u32 pair = q[(b * RUN + i) / 2];
      y[b * RUN + i] = __fmul_rn(i % 2 ? wide_high(pair) : wide_low(pair), x.s[at]);
      part[i] = __fmul_rn(y[b * RUN + i], x.mean[at]);
    }
    // sums over neighbours, their neighbours and so on: the same tree however many lanes hold a row
#pragma unroll
    for (int n = 1; n < RUN; n *= 2)
#pragma unroll
      for (int i = 0; i < RUN; i += 2 * n) part[i] = __fadd_rn(part[i], part[i + n]);
    dot[b] = part[0];
#pragma unroll
    for (int i = 1; i < LANES; i *= 2) dot[b] = __fadd_rn(dot[b], __shfl_xor_sync(~0u, dot[b], i));
  }
  float bias = dot[0];
#pragma unroll
  for (int b = 1; b < NB; b++) bias = __fadd_rn(bias, dot[b]);
#pragma unroll
  for (int b = 0; b < NB; b++) {
#pragma unroll
    for (int n = 1; n < RUN; n *= 2)
#pragma unroll
      for (int i = 0; i < RUN; i++)
        if (!(i & n)) {
          const float a = y[b * RUN + i], z = y[b * RUN + i + n];
          y[b * RUN + i] = __fadd_rn(a, z), y[b * RUN + i + n] = __fsub_rn(a, z);
        }
  }
#pragma unroll
  for (int n = 1; n < LANES; n *= 2) {
    const float own = __uint_as_float(0x3F800000u | (u & n ? 0x80000000u : 0u));  // the upper lane gets other - y
#pragma unroll
    for (int i = 0; i < E; i++) y[i] = fmaf(y[i], own, __shfl_xor_sync(~0u, y[i], n));
  }
  float top = 0;
#pragma unroll
  for (int i = 0; i < E; i++) top = fmaxf(top, fabsf(y[i]));
#pragma unroll
  for (int n = 1; n < LANES; n *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, n));
  const float up = reciprocal(top) * TOP;
  if constexpr (RUN % 4 == 0) {
#pragma unroll
    for (int i = 0; i < E; i += 4) {
      u32 hi, lo;
      split4(fmaf(y[i], up, MAGIC), fmaf(y[i + 1], up, MAGIC), fmaf(y[i + 2], up, MAGIC), fmaf(y[i + 3], up, MAGIC), hi, lo);
      *(uint2*)(x.turned.query[r] + query_word(row_channel(i, lane))) = make_uint2(hi, lo);
    }
  } else {
#pragma unroll
    for (int i = 0; i < E; i += 2) {
      u32 hi, lo;
      split4(fmaf(y[i], up, MAGIC), fmaf(y[i + 1], up, MAGIC), 0, 0, hi, lo);
      const int ch = row_channel(i, lane);
      u16* to = (u16*)(x.turned.query[r] + query_word(ch)) + ch % 4 / 2;
      to[0] = u16(hi), to[2] = u16(lo);
    }
  }
  float hot_top = 0, z[HOT / LANES + 1];
#pragma unroll
  for (int i = 0; i * LANES < HOT; i++) {
    const int h = i * LANES + u;
    z[i] = 0;
    float offset = 0;
    if (h < HOT) {
      const float qh = wide(from[page[AT_HOT_INDEX + h]]);
      z[i] = qh * half_(*(const u16*)(page + AT_HOT_STEP + 2 * h));
      offset = __fmul_rn(qh, half_(*(const u16*)(page + AT_HOT_MEAN + 2 * h)));
    }
    hot_top = fmaxf(hot_top, fabsf(z[i]));
#pragma unroll
    for (int n = 1; n < LANES; n *= 2) offset = __fadd_rn(offset, __shfl_xor_sync(~0u, offset, n));
    bias = __fadd_rn(bias, offset);
  }
#pragma unroll
  for (int n = 1; n < LANES; n *= 2) hot_top = fmaxf(hot_top, __shfl_xor_sync(~0u, hot_top, n));
  const float hot_up = reciprocal(hot_top) * TOP;
#pragma unroll
  for (int i = 0; i * LANES < HOT; i++) {
    u32 hi, lo;
    split4(fmaf(z[i], hot_up, MAGIC), 0, 0, 0, hi, lo);
    const int h = i * LANES + u;
    if (h < HOT) x.turned.hot_hi[r][h] = u8(hi), x.turned.hot_lo[r][h] = u8(lo);
  }
  if (u == 0) *(float4*)x.row[r] = make_float4(top * (c.scale / TOP), bias * c.scale, hot_top * (c.scale / TOP), 0);
}

// levels of the key octets of a token's row that this lane holds, as bytes
DEVICE void key_levels(const Tables& tables, const u8* row, int t, u32 (&b)[KS][2]) {
#pragma unroll
  for (int s = 0; s < KS; s++) {
    const int octet = D % 32 ? min(s * 4 + t, OCTETS - 1) : t * KS + s;
    if constexpr (KEY_BITS == 8) {
      b[s][0] = *(const u32*)(row + 8 * octet) + 0x01010101u, b[s][1] = *(const u32*)(row + 8 * octet + 4) + 0x01010101u;
    } else {
      const u32 codes = nibbles<KEY_BITS>(row, octet);
      b[s][0] = tables.levels4<KEY_BITS>(codes), b[s][1] = tables.levels4<KEY_BITS>(codes >> 16);
    }
  }
}
// the rows' A operand; returns what the levels' 128 too many add to every product of row g
DEVICE float query_bytes(const Scratch& x, int m, int g, int t, u32 (&a)[KS][4]) {
  const int r = m * ROWS + g % ROWS;
  int high = 0, low = 0;
#pragma unroll
  for (int s = 0; s < KS; s++) {
    const uint4 q = *(const uint4*)(x.turned.query[r] + (s * 4 + t) * 4);
    if (KEY_BITS == 2) {  // bytes of channels as an octet's nibbles have them
      a[s][0] = prmt(q.x, q.z, 0x6420), a[s][1] = prmt(q.y, q.w, 0x6420);
      a[s][2] = prmt(q.x, q.z, 0x7531), a[s][3] = prmt(q.y, q.w, 0x7531);
    } else {
      a[s][0] = q.x, a[s][1] = q.y, a[s][2] = q.z, a[s][3] = q.w;
    }
    high = __dp4a(int(q.x), 0x01010101, __dp4a(int(q.z), 0x01010101, high));
    low = __dp4a(int(q.y), 0x01010101, __dp4a(int(q.w), 0x01010101, low));
  }
  return float(sum4(high * 256 + low)) * -128.f;
}

// logits[m][j][e] of token(j, 2t+e)
DEVICE void logits_of(const Tables& tables, const u8* page, const Scratch& x, int lane, float (&logits)[TILES][NT][2]) {
  const int g = lane >> 2, t = lane & 3;
  u32 a[TILES][KS][4], hot[TILES][2];
  float excess[TILES];
  float4 row[TILES];
#pragma unroll
  for (int m = 0; m < TILES; m++) {
    const int r = m * ROWS + g % ROWS;
    excess[m] = query_bytes(x, m, g, t, a[m]);
    hot[m][0] = *(const u32*)(x.turned.hot_hi[r] + 4 * t), hot[m][1] = *(const u32*)(x.turned.hot_lo[r] + 4 * t);
    
    row[m] = *(const float4*)x.row[r];
    excess[m] *= row[m].x;
  }
#pragma unroll
  for (int j = 0; j < NT; j++) {
    u32 b[KS][2];
    key_levels(tables, page + AT_KEY_CODES + token(j, g) * KEY_ROW, t, b);
    const u32 hot_codes = HOT ? x.hot[token(j, g)][t < HW ? t : 0] : 0;
    const float2 scale = *(const float2*)(x.key_scale + 8 * j + 2 * t);
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      int c[4] = {0, 0, 0, 0}, h[4] = {0, 0, 0, 0};
#pragma unroll
      for (int s = 0; s < KS; s++) mma_u8(c, a[m][s], b[s][0], b[s][1], s == 0);
      if (HOT) mma_s8(h, hot[m], hot_codes);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float rest = fmaf(float(c[e] * 256 + c[2 + e]), row[m].x, excess[m]);
        const float more = HOT ? fmaf(float(h[e] * 256 + h[2 + e]), row[m].z, row[m].y) : row[m].y;
        logits[m][j][e] = fmaf(rest, e ? scale.y : scale.x, more);
      }
    }
  }
}

// levels of the values: lane (g, t) gets channel n of octet 8·i+g for the tokens that its weights stand for
DEVICE void value_levels(const Tables& tables, const u8* codes, int i, int lane, u32 (&b)[KC][8][2]) {
  const int octet = min(value_octet(i, lane >> 2), OCTETS - 1), t = lane & 3;
#pragma unroll
  for (int k = 0; k < KC; k++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int j = 4 * k + 2 * half;
      const u8* row[4] = {codes + token(j, 2 * t) * VALUE_ROW, codes + token(j, 2 * t + 1) * VALUE_ROW,
                          codes + token(j + 1, 2 * t) * VALUE_ROW, codes + token(j + 1, 2 * t + 1) * VALUE_ROW};
      if constexpr (VALUE_BITS == 8) {
#pragma unroll
        for (int part = 0; part < 2; part++) {
          u32 w[4];
#pragma unroll
          for (int n = 0; n < 4; n++) w[n] = *(const u32*)(row[n] + 8 * octet + 4 * part) + 0x01010101u;
          const u32 ab = prmt(w[0], w[1], 0x5140), cd = prmt(w[2], w[3], 0x5140);
          const u32 ab2 = prmt(w[0], w[1], 0x7362), cd2 = prmt(w[2], w[3], 0x7362);
          b[k][4 * part][half] = prmt(ab, cd, 0x5410), b[k][4 * part + 1][half] = prmt(ab, cd, 0x7632);
          b[k][4 * part + 2][half] = prmt(ab2, cd2, 0x5410), b[k][4 * part + 3][half] = prmt(ab2, cd2, 0x7632);
        }
      } else {
        u32 w[4];
#pragma unroll
        for (int n = 0; n < 4; n++) w[n] = nibbles<VALUE_BITS>(row[n], octet);
        // the 4×8 nibbles transposed: even nibbles of tokens 0 and 1 in bytes, and so on
        const u32 even01 = low_nibbles_of(w[0], w[1] << 4), odd01 = low_nibbles_of(w[0] >> 4, w[1]);
        const u32 even23 = low_nibbles_of(w[2], w[3] << 4), odd23 = low_nibbles_of(w[2] >> 4, w[3]);
        const u32 codes4[4] = {prmt(even01, even23, 0x5140), prmt(odd01, odd23, 0x5140), prmt(even01, even23, 0x7362),
                               prmt(odd01, odd23, 0x7362)};  // channels 0 and 2, 1 and 3, 4 and 6, 5 and 7
#pragma unroll
        for (int n = 0; n < 4; n++) {
          const int first = (n & 2) * 2 + (n & 1);
          b[k][first][half] = tables.levels4<VALUE_BITS>(codes4[n]);
          b[k][first + 2][half] = tables.levels4<VALUE_BITS>(codes4[n] >> 16);
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
  u32 a[KC][4];
  float scale;  // of the integer products, without the values' unit
};
DEVICE void weigh(const Scratch& x, int lane, float (&logits)[NT][2], float unit, Softmax& soft, int m, Weights& w) {
  const int t = lane & 3;
  float top = NEG;
#pragma unroll
  for (int j = 0; j < NT; j++) top = fmaxf(top, fmaxf(logits[j][0], logits[j][1]));
  top = max4(top);
  const float base = soft.raise(m, top), own = top == NEG ? 0.f : top;
  w.scale = exp2_(top - base);
  float sum = 0;
  int high = 0, low = 0;
#pragma unroll
  for (int k = 0; k < KC; k++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float p[4];
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const int j = 4 * k + 2 * half + n / 2;
        const float2 scale = *(const float2*)(x.value_scale + 8 * j + 2 * t);
        const float one = exp2_(logits[j][n & 1] - own);
        sum += one, p[n] = fmaf(one, n & 1 ? scale.y : scale.x, MAGIC);
      }
      split4(p[0], p[1], p[2], p[3], w.a[k][2 * half], w.a[k][2 * half + 1]);
      high = __dp4a(int(w.a[k][2 * half]), 0x01010101, high);
      low = __dp4a(int(w.a[k][2 * half + 1]), 0x01010101, low);
    }
  soft.sum[m] = fmaf(sum, w.scale, soft.sum[m]);
  // the levels' 128 too many, taken off at the end; a lane's share, as of the sum
  soft.excess[m] = fmaf(float(high * 256 + low) * -128.f, w.scale * unit, soft.excess[m]);
}
DEVICE void add_values(const Tables& tables, const u8* codes, int lane, const Weights (&w)[TILES], float unit, Softmax& soft) {
#pragma unroll
  for (int i = 0; i < NV; i++) {
    u32 b[KC][8][2];
    value_levels(tables, codes, i, lane, b);
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      const float scale = w[m].scale * unit;
#pragma unroll
      for (int n = 0; n < 8; n++) {
        int c[4] = {0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < KC; k++) {
          const u32 a[4] = {w[m].a[k][0], w[m].a[k][1], w[m].a[k][2], w[m].a[k][3]};
          mma_u8(c, a, b[k][n][0], b[k][n][1], k == 0);
        }
#pragma unroll
        for (int e = 0; e < 2; e++)
          soft.out[m][8 * i + n][e] = fmaf(float(c[e] * 256 + c[2 + e]), scale, soft.out[m][8 * i + n][e]);
      }
    }
  }
}
static_assert(sizeof(Scratch) == SCRATCH_BYTES, "scratch_bytes in attention.py differs");
