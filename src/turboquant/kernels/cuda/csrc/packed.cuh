// Attention of a tile's rows over one packed page. The query is rotated into the page's terms and quantized to 16 bit,
// as two int8 rows (hi·256 + lo) of one tensor-core tile; so are the weights of the values.
#pragma once
#include "state.cuh"

struct Scratch {  // of a warp, in shared memory
  u8 buffer[BUFFERS][HALF];
  alignas(16) float s[D], mean[D];  // of the page: channel scales with the rotation's signs, 0 at hot channels; means
  float key_scale[P], value_scale[P];
  u32 hot[P][HW];                 // hot codes by token
  float row[R][4];                // scale of the quantized query, bias, scale of its hot part, what 128 a level adds
  struct alignas(16) Turned {      // the quantized query; what is not written stays zero
    u32 query[R + HALVES - 1][QW];  // by octet: hi bytes of four channels, lo bytes, hi, lo
    u8 hot_hi[R + HALVES - 1][16], hot_lo[R + HALVES - 1][16];
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

// the header of a page: per channel, per token of the keys, hot codes; all is read before anything is written
constexpr int FOURS = (D + 127) / 128;  // of channels, of a lane
DEVICE void read_header(const u8* page, Scratch& x, int lane, const float (&sign)[FOURS][4]) {
  static_assert(AT_MEAN % 4 == 0 && AT_LOG_S % 4 == 0 && D % 4 == 0, "four channels are read at once");
  u32 mean[FOURS], log_s[FOURS], pair[HOT + 1];
#pragma unroll
  for (int i = 0; i < FOURS; i++) {
    const int c = min(i * 128 + 4 * lane, D - 4);
    mean[i] = *(const u32*)(page + AT_MEAN + c), log_s[i] = *(const u32*)(page + AT_LOG_S + c);
  }
  const float step = half_(*(const u16*)(page + AT_MEAN_STEP)), base = half_(*(const u16*)(page + AT_KEY_BASE));
  const u16 two = *(const u16*)(page + AT_KEY_SCALE + 2 * lane);
#pragma unroll
  for (int h = 0; h < HOT; h++) pair[h] = *(const u16*)(page + AT_HOT_CODES + h * P + 2 * lane);
  const int hot = HOT ? page[AT_HOT_INDEX + min(lane, HOT - 1)] : 0;
#pragma unroll
  for (int i = 0; i < FOURS; i++) {
    const int c = i * 128 + 4 * lane;
    float s[4], m[4];
#pragma unroll
    for (int n = 0; n < 4; n++) {
      s[n] = sign[i][n] * exp2_(fmaf(float(log_s[i] >> 8 * n & 255), 1.f / S_STEPS, -128.f / S_STEPS));
      m[n] = sign[i][n] * float((signed char)(mean[i] >> 8 * n)) * step;
    }
    if (c < D) *(float4*)(x.s + c) = make_float4(s[0], s[1], s[2], s[3]), *(float4*)(x.mean + c) = make_float4(m[0], m[1], m[2], m[3]);
  }
  const float unit = base * (KEY_UNIT * NORM);
  const float a = (two & 255) == 255 ? 0.f : unit * exp2_(float(two & 255) * (-1.f / ROW_STEPS));
  const float b = two >> 8 == 255 ? 0.f : unit * exp2_(float(two >> 8) * (-1.f / ROW_STEPS));
  *(float2*)(x.key_scale + 2 * lane) = lane & 1 ? make_float2(b, a) : make_float2(a, b);
  if (HOT) {
    u32 even[HW], odd[HW];
#pragma unroll
    for (int i = 0; i < HW; i++) even[i] = odd[i] = 0;
#pragma unroll
    for (int h = 0; h < HOT; h++) even[h / 4] |= (pair[h] & 255) << h % 4 * 8, odd[h / 4] |= (pair[h] >> 8) << h % 4 * 8;
#pragma unroll
    for (int i = 0; i < HW; i++) x.hot[2 * lane][i] = even[i], x.hot[2 * lane + 1][i] = odd[i];
  }
  __syncwarp();
  if (HOT && lane < HOT) x.s[hot] = 0;
  __syncwarp();
}

// rows of tile m in the page's terms: R(q∘s) as bytes, q·mean and the hot channels' part
DEVICE void turn_query(const Call& c, const u16* from, const u8* page, Scratch& x, int m, int lane, const u32 (&q)[E / 2]) {
  const int r = m * ROWS + lane / LANES, u = lane % LANES;
  float y[E], dot[NB], z[HOT / LANES + 1], offset[HOT / LANES + 1];
#pragma unroll
  for (int i = 0; i * LANES < HOT; i++) {
    const int h = i * LANES + u;
    z[i] = offset[i] = 0;
    if (h < HOT) {
      const float qh = wide(from[page[AT_HOT_INDEX + h]]);
      z[i] = qh * half_(*(const u16*)(page + AT_HOT_STEP + 2 * h));
      offset[i] = __fmul_rn(qh, half_(*(const u16*)(page + AT_HOT_MEAN + 2 * h)));
    }
  }
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
  float most[E];
#pragma unroll
  for (int i = 0; i < E; i++) most[i] = fabsf(y[i]);
#pragma unroll
  for (int n = 1; n < E; n *= 2)
#pragma unroll
    for (int i = 0; i + n < E; i += 2 * n) most[i] = fmaxf(most[i], most[i + n]);
  float top = most[0];
#pragma unroll
  for (int n = 1; n < LANES; n *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, n));
  const float up = reciprocal(top) * TOP;
  int high = 0, low = 0;
  if constexpr (RUN % 4 == 0) {
#pragma unroll
    for (int i = 0; i < E; i += 4) {
      u32 hi, lo;
      split4(fmaf(y[i], up, MAGIC), fmaf(y[i + 1], up, MAGIC), fmaf(y[i + 2], up, MAGIC), fmaf(y[i + 3], up, MAGIC), hi, lo);
      high = __dp4a(int(hi), 0x01010101, high), low = __dp4a(int(lo), 0x01010101, low);
      *(uint2*)(x.turned.query[r] + query_word(row_channel(i, lane))) = make_uint2(hi, lo);
    }
  } else {
#pragma unroll
    for (int i = 0; i < E; i += 2) {
      u32 hi, lo;
      split4(fmaf(y[i], up, MAGIC), fmaf(y[i + 1], up, MAGIC), 0, 0, hi, lo);
      high = __dp4a(int(hi), 0x0101, high), low = __dp4a(int(lo), 0x0101, low);
      const int ch = row_channel(i, lane);
      u16* to = (u16*)(x.turned.query[r] + query_word(ch)) + ch % 4 / 2;
      to[0] = u16(hi), to[2] = u16(lo);
    }
  }
  float hot_top = 0;
#pragma unroll
  for (int i = 0; i * LANES < HOT; i++) {
    hot_top = fmaxf(hot_top, fabsf(z[i]));
#pragma unroll
    for (int n = 1; n < LANES; n *= 2) offset[i] = __fadd_rn(offset[i], __shfl_xor_sync(~0u, offset[i], n));
    bias = __fadd_rn(bias, offset[i]);
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
  int excess = high * 256 + low;
#pragma unroll
  for (int n = 1; n < LANES; n *= 2) excess += __shfl_xor_sync(~0u, excess, n);
  const float unit = top * (c.scale / TOP);
  if (u == 0) *(float4*)x.row[r] = make_float4(unit, bias * c.scale, hot_top * (c.scale / TOP), float(excess) * -128.f * unit);
}

static_assert(sizeof(Scratch) == SCRATCH_BYTES, "scratch_bytes in attention.py differs");
