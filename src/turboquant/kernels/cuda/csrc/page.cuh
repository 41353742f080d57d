// A page of a chunk: where its rows come from, which tokens count, and its statistics by channel.
#pragma once
#include "rows.cuh"

constexpr int STATES = 2;  // kept of the tracker
static_assert(D <= THREADS, "a thread a channel");

struct Call {  // mirrored by `_Call` in append.py
  u8* pages;
  const int* table;
  i64 *length, *nonfinite, *starts;
  u16 *ring_k, *ring_v, *sink_k, *sink_v, *readers;
  float *tracker, *states;  // states: (batch, heads, pages of the chunk, 3, D), what each page is encoded with
  u64* masks;               // (batch, heads, pages of the chunk, 2): tokens that count in no statistic; not finite
  const u16 *q, *k, *v;
  i64 q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n;
  int pool, width, batch, heads, group, tokens, slots, sinks, samples;
  int several, front;  // pages of the chunk, 0 if at most one; tokens from its beginning that `store` looks at
  int parts;           // of a page that `encode` sees to: VALUES, KEYS or both
};
constexpr int VALUES = 1, KEYS = 2;

DEVICE u16 narrow(float x) { return u16(two_16(x, 0)); }
DEVICE float finite(float x) { return x != x ? 0.f : fminf(fmaxf(x, -FP16_MAX), FP16_MAX); }
DEVICE float sum8(float x) {  // over eight lanes, by halves
  for (int n = 4; n; n >>= 1) x += __shfl_xor_sync(~0u, x, n);
  return x;
}
DEVICE float max_of(const float* x, int lane) {  // of D numbers, by each warp
  float top = x[lane];
  for (int i = lane + 32; i < D; i += 32) top = fmaxf(top, x[i]);
  for (int n = 16; n; n >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, n));
  return top;
}
DEVICE float sum_of(const float* x, int lane) {  // of D numbers, in the order of lane_sum
  float sum = x[lane & 15];
  for (int i = 16; i < D; i += 16) sum += x[(lane & 15) + i];
  return sum8(sum + __shfl_xor_sync(~0u, sum, 8));
}
DEVICE u16 fp16(float x) { return to_half(fminf(fmaxf(x, -FP16_MAX), FP16_MAX)); }
DEVICE void widened(const uint4& x, float* y) {
  const u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; i++) y[2 * i] = wide_low(w[i]), y[2 * i + 1] = wide_high(w[i]);
}
struct Page {
  i64 start, index;  // tokens before the chunk; number of the page in its sequence
  int b, h;
};
DEVICE bool page_of(const Call& c, Page& p) {
  p.b = blockIdx.z, p.h = blockIdx.y, p.start = c.length[p.b], p.index = p.start / P + blockIdx.x;
  return (p.index + 1) * P <= p.start + c.tokens;
}
DEVICE i64 place(const Call& c, const Page& p) { return (i64(p.b) * c.heads + p.h) * c.several + blockIdx.x; }
struct Source {  // rows of keys or values of a page: from the chunk, those before it from the ring
  const u16 *chunk, *ring;
  i64 stride;
  int first, slot, slots;  // tokens of the ring; the first one's slot
  DEVICE Source(const Call& c, const Page& p, bool values) {
    const i64 begin = p.index * P;
    stride = values ? c.v_n : c.k_n, slots = c.slots;
    first = int(p.start > begin ? p.start - begin : 0), slot = first ? int(u32(begin) % u32(slots)) : 0;
    chunk = values ? c.v + p.b * c.v_b + p.h * c.v_h : c.k + p.b * c.k_b + p.h * c.k_h;
    chunk += (begin - p.start) * stride;
    ring = (values ? c.ring_v : c.ring_k) + (i64(p.b) * c.heads + p.h) * slots * D;
  }
  DEVICE const u16* row(int t) const {
    if (t >= first) return chunk + t * stride;
    const int at = slot + t;
    return ring + (at < slots ? at : at - slots) * D;
  }
};
// 16 bytes of each of N rows, under way together
template <int N, class Row, class Channel> DEVICE void load_rows(const Source& s, Row row, Channel channel, uint4 (&x)[N]) {
  if (s.first == 0) {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = *(const uint4*)(s.chunk + row(i) * s.stride + channel(i));
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = *(const uint4*)(s.row(row(i)) + channel(i));
  }
}
struct Marks {
  u32 odd[2], bad[2];  // a bit a token: counts in no statistic; is not finite
  DEVICE u64 all() const { return odd[0] | u64(odd[1]) << 32; }
};
// keys to shared memory, and which tokens count, for which values are looked at too; begins and ends with a barrier
DEVICE void load_keys(const Call& c, const Page& p, u16 (*keys)[PITCH], Marks& m) {
  if (threadIdx.x < 2) {
    const i64 left = c.sinks - p.index * P - 32 * int(threadIdx.x);
    m.odd[threadIdx.x] = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0, m.bad[threadIdx.x] = 0;
  }
  __syncthreads();
  constexpr int LOADS = P * (D / 8) / THREADS;
  constexpr bool FIXED = THREADS % (D / 8) == 0;  // a thread's channels are always the same
  const u32 tid = threadIdx.x;
  const auto row = [&](u32 i) { return int(FIXED ? tid / (D / 8) + i * (THREADS / (D / 8)) : (i * THREADS + tid) / (D / 8)); };
  const auto channel = [&](u32 i) { return int((FIXED ? tid : i * THREADS + tid) % (D / 8) * 8); };
  u32 beyond = 0;  // the sign of a half is set where a magnitude is above FP16_MAX
#pragma unroll
  for (int part = 0; part < 2; part++) {
    uint4 x[LOADS];
    load_rows(Source(c, p, part), row, channel, x);
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      if (part == 0) *(uint4*)(keys[row(i)] + channel(i)) = x[i];
      for (u32 w : {x[i].x, x[i].y, x[i].z, x[i].w}) beyond |= (w & 0x7FFF7FFFu) + (BF16 ? 0x38803880u : 0x04000400u);
    }
  }
  if (beyond & 0x80008000u)
#pragma unroll 1
    for (int n = 0; n < 2 * LOADS; n++) {
      const int t = row(n / 2);
      const uint4 x = *(const uint4*)(Source(c, p, n & 1).row(t) + channel(n / 2));
      bool fine = true, good = true;
      for (u32 w : {x.x, x.y, x.z, x.w}) {
        const float a = fabsf(wide_low(w)), b = fabsf(wide_high(w));
        fine &= a <= FP16_MAX && b <= FP16_MAX, good &= a < -NEG && b < -NEG;
      }
      if (!fine) atomicOr(&m.odd[t / 32], 1u << (t & 31));
      if (!good) atomicOr(&m.bad[t / 32], 1u << (t & 31));
    }
  __syncthreads();
}
constexpr int QUERIES = 4;  // query heads of a group whose loads are under way at a time
// those from g on, of eight channels from ch on at a position of the chunk
DEVICE void load_queries(const Call& c, int b, int h, i64 n, int ch, int g, uint4 (&q)[QUERIES]) {
  const u16* from = c.q + b * c.q_b + (h * c.group + g) * c.q_h + n * c.q_n + ch;
#pragma unroll
  for (int i = 0; i < QUERIES; i++)
    if (g + i < c.group) q[i] = *(const uint4*)(from + i * c.q_h);
}
// root mean square of a KV head's queries, as the readers keep it, given the first of them
DEVICE uint4 sample(const Call& c, int b, int h, i64 n, int ch, uint4 (&raw)[QUERIES]) {
  float sum[8];
  for (int from = 0; from < c.group; from += QUERIES) {
    if (from) load_queries(c, b, h, n, ch, from, raw);
#pragma unroll
    for (int g = 0; g < QUERIES; g++) {
      if (from + g >= c.group) break;
      float q[8];
      widened(raw[g], q);
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] = from + g ? sum[i] + q[i] * q[i] : q[i] * q[i];
    }
  }
  u32 out[4] = {};
  const float part = 1.f / float(c.group);  // exact for powers of two
  const bool whole = !(c.group & (c.group - 1));
#pragma unroll
  for (int i = 0; i < 8; i++) sum[i] = whole ? sum[i] * part : sum[i] / float(c.group);
#pragma unroll
  for (int i = 0; i < 8; i++) out[i / 2] |= u32(narrow(finite(__fsqrt_rn(sum[i])))) << (i % 2 * 16);
  return uint4{out[0], out[1], out[2], out[3]};
}
// A page's reader samples, eight channels of one a thread: from the readers, or as queries of the chunk.
struct Samples {
  uint4 raw[QUERIES];
  i64 pos;
  int n, ch;
  DEVICE void load(const Call& c, const Page& p) {
    n = threadIdx.x / (D / 8), ch = threadIdx.x % (D / 8) * 8, pos = p.index * P + n * STRIDE + STRIDE - 1;
    if (n >= P / STRIDE) return;
    const i64 at = ((i64(p.b) * c.heads + p.h) * c.samples + u32(pos) / STRIDE % u32(c.samples)) * D + ch;
    if (pos < p.start) raw[0] = *(const uint4*)(c.readers + at);
    else load_queries(c, p.b, p.h, pos - p.start, ch, 0, raw);
  }
  DEVICE void put(const Call& c, const Page& p, float (*square)[D]) {
    if (n >= P / STRIDE) return;
    float r[8];
    widened(pos < p.start ? raw[0] : sample(c, p.b, p.h, pos - p.start, ch, raw), r);
#pragma unroll
    for (int j = 0; j < 8; j++) square[n][ch + j] = r[j] * r[j];
  }
};
struct Own {
  float mean, var, power;
};
// The statistics of channels ch and ch + 1 over the page, by two neighbouring threads, of which each takes every other
// token; each returns one of the channels.
template <bool ODD> DEVICE Own own_stats(const Work& w, u64 odd, int ch) {
  constexpr int ROUNDS = P / 16;  // lane_sum: tokens m, m + 16, m + 32, m + 48 for every m < 16, then by halves
  const int g = threadIdx.x & 1;
  const float n = float(max(P - __popcll(odd), 1));
  const auto pass = [&](auto term, float (&out)[2]) {
    float acc[2][8];
#pragma unroll
    for (int i = 0; i < 8; i++) acc[0][i] = acc[1][i] = -0.f;  // to which adding is exact, whatever the sign of a zero
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round++) {
      const u32 none = ODD ? u32(odd >> (16 * round + g)) : 0;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const u32 pair = *(const u32*)(w.keys[16 * round + 2 * i + g] + ch);
        const float x[2] = {wide_low(pair), wide_high(pair)};
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float y = none >> (2 * i) & 1 ? 0.f : term(x[j], j);
          acc[j][i] += y;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
      for (int m = 4; m; m /= 2)
#pragma unroll
        for (int i = 0; i < m; i++) acc[j][i] += acc[j][i + m];
      out[j] = (acc[j][0] + __shfl_xor_sync(~0u, acc[j][0], 1)) / n;
    }
  };
  float average[2], var[2];
  pass([&](float x, int) { return x; }, average);
  pass([&](float x, int j) { return (x - average[j]) * (x - average[j]); }, var);
  Own own{g ? average[1] : average[0], g ? var[1] : var[0], w.square[0][ch + g]};
#pragma unroll
  for (int i = 1; i < P / STRIDE; i++) own.power += w.square[i][ch + g];
  own.power /= float(P / STRIDE);
  return own;
}
