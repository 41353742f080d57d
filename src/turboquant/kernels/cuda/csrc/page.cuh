// A page of a chunk: where its rows come from, which tokens count, and its statistics by channel.
#pragma once
#include "rows.cuh"

static_assert(D <= THREADS, "a thread a channel");

struct Call {  // mirrored by `_Call` in append.py
  u8* pages;
  const int* table;
  i64 *length, *nonfinite, *starts;
  u16 *ring_k, *ring_v, *sink_k, *sink_v, *readers;
  float *tracker, *states;  // states: (batch, heads, pages of the chunk, 2, 3, D), statistics and factors of its keys
  u32* arrived;             // (2, batch, heads): pages that have statistics, a header; 0 before and after
  u64* masks;               // (batch, heads, pages of the chunk, 2): tokens that count in no statistic; not finite
  const u16 *q, *k, *v;
  i64 q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n;
  int pool, width, batch, heads, group, tokens, slots, sinks, samples, kept;  // kept: states of the tracker
  int several, front;  // pages of the chunk, 0 if at most one; tokens from its beginning that `store` looks at
};

DEVICE u16 narrow(float x) { return u16(two_16(x, 0)); }
DEVICE float finite(float x) { return x != x ? 0.f : fminf(fmaxf(x, -FP16_MAX), FP16_MAX); }
DEVICE void get_four(const float* from, float (&y)[4]) {
  const float4 x = *(const float4*)from;
  y[0] = x.x, y[1] = x.y, y[2] = x.z, y[3] = x.w;
}
DEVICE void put_four(const float (&y)[4], float* to) { *(float4*)to = make_float4(y[0], y[1], y[2], y[3]); }
DEVICE u16 fp16(float x) { return to_half(fminf(fmaxf(x, -FP16_MAX), FP16_MAX)); }
DEVICE void widened(const uint4& x, float* y) {
  const u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; i++) y[2 * i] = wide_low(w[i]), y[2 * i + 1] = wide_high(w[i]);
}
struct Page {
  i64 start, index;  // tokens before the chunk; number of the page in its sequence
  int b, h, at;      // at: number of the page in the chunk
};
DEVICE bool page_of(const Call& c, int b, int h, int at, Page& p) {
  p.b = b, p.h = h, p.at = at, p.start = c.length[b], p.index = p.start / P + at;
  return (p.index + 1) * P <= p.start + c.tokens;
}
DEVICE i64 head_of(const Call& c, const Page& p) { return i64(p.b) * c.heads + p.h; }
DEVICE i64 place(const Call& c, const Page& p) { return head_of(c, p) * c.several + p.at; }
DEVICE float* states_at(const Call& c, const Page& p) { return c.states + place(c, p) * 6 * D; }
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
// 8 or 16 bytes of each of N rows, under way together
template <class T, int N, class Row, class Channel>
DEVICE void load_rows(const Source& s, Row row, Channel channel, T (&x)[N]) {
  if (s.first == 0) {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = *(const T*)(s.chunk + row(i) * s.stride + channel(i));
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = *(const T*)(s.row(row(i)) + channel(i));
  }
}
// A page's rows as they come, sixteen neighbours of a row a thread and round; the next two rounds of them. Four rows and
// two neighbours of each lie in different banks.
struct Ahead {
  static constexpr bool FIXED = THREADS / 4 % SIXTEENS == 0;  // a thread's channels are always the same
  static constexpr int ROUNDS = (P * SIXTEENS + THREADS - 1) / THREADS;
  uint4 x[2][2];
  const u16* from;  // of the next round, if all rows are of the chunk
  DEVICE static int group(u32 i) { return int((FIXED ? threadIdx.x : i * THREADS + threadIdx.x) / 4 % SIXTEENS); }
  DEVICE static int row(u32 i) {
    const u32 tid = threadIdx.x;
    const u32 four = FIXED ? tid / (4 * SIXTEENS) + i * (THREADS / SIXTEENS / 4) : (i * THREADS + tid) / (4 * SIXTEENS);
    return int(4 * four + tid % 4);
  }
  DEVICE void next(const Source& s, int i) {
    x[0][0] = x[1][0], x[0][1] = x[1][1];
    if (i >= ROUNDS) return;
    const u16* at = from;
    if (FIXED && s.first == 0) from += 4 * (THREADS / SIXTEENS / 4) * s.stride;
    else at = s.row(P * SIXTEENS % THREADS ? min(row(i), P - 1) : row(i)) + 16 * group(i);
    x[1][0] = ((const uint4*)at)[0], x[1][1] = ((const uint4*)at)[1];
  }
  DEVICE void load(const Source& s) { from = s.chunk + row(0) * s.stride + 16 * group(0), next(s, 0), next(s, 1); }
};
struct Marks {
  u32 odd[2], bad[2];  // a bit a token: counts in no statistic; is not finite
  DEVICE u64 all() const { return odd[0] | u64(odd[1]) << 32; }
};
// which tokens of a page count, where some number of it is beyond what is stored; ends with a barrier
DEVICE void mark(const Call& c, const Page& p, Marks& m) {
  for (int i = threadIdx.x; i < 2 * P * OCTETS; i += THREADS) {
    const int t = i / OCTETS % P;
    const uint4 x = *(const uint4*)(Source(c, p, i >= P * OCTETS).row(t) + i % OCTETS * 8);
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
// A thread has four channels of every fourth token: the sum over the page of term(token, channel) in the order of
// lane_sum, which is tokens t, t + 16, t + 32, t + 48 for every t < 16, then by halves. Has a barrier.
constexpr int QUADS = D / 4, CLASSES = 4, TOKENS = P / CLASSES;
template <class Term> DEVICE void page_sum(float (*part)[D], Term term, float (&out)[4]) {
  const int ch = threadIdx.x % QUADS * 4;
  float acc[CLASSES][4];
#pragma unroll
  for (int i = 0; i < TOKENS; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) acc[i % 4][j] = i < 4 ? term(i, j) : acc[i % 4][j] + term(i, j);
#pragma unroll
  for (int j = 0; j < 4; j++) out[j] = (acc[0][j] + acc[2][j]) + (acc[1][j] + acc[3][j]);
  if (threadIdx.x < CLASSES * QUADS) put_four(out, part[threadIdx.x / QUADS] + ch);
  __syncthreads();
  float of[CLASSES][4];
#pragma unroll
  for (int i = 0; i < CLASSES; i++) get_four(part[i] + ch, of[i]);
#pragma unroll
  for (int j = 0; j < 4; j++) out[j] = (of[0][j] + of[2][j]) + (of[1][j] + of[3][j]);
}
// mean, variance and reader power of four channels, by the threads of classes 0, 1 and 2
template <bool ODD> DEVICE void own_stats(Sums& w, const uint2 (&k)[TOKENS], u64 odd, float (&own)[4]) {
  const int kind = threadIdx.x / QUADS, ch = threadIdx.x % QUADS * 4;
  const float n = float(max(P - __popcll(odd), 1));
  const auto key = [&](int i, int j) {
    const u32 pair = j / 2 ? k[i].y : k[i].x;
    return j % 2 ? wide_high(pair) : wide_low(pair);
  };
  const auto counts = [&](int i) { return !ODD || !(odd >> (4 * i + kind % CLASSES) & 1); };
  float mean[4];
  page_sum(w.part[0], [&](int i, int j) { return counts(i) ? key(i, j) : 0.f; }, mean);
#pragma unroll
  for (int j = 0; j < 4; j++) mean[j] = ODD ? mean[j] / n : mean[j] * (1.f / P);
  page_sum(w.part[1], [&](int i, int j) {
    const float x = counts(i) ? key(i, j) - mean[j] : 0.f;
    return x * x;
  }, own);
#pragma unroll
  for (int j = 0; j < 4; j++) own[j] = kind == 0 ? mean[j] : ODD ? own[j] / n : own[j] * (1.f / P);
  if (kind != 2) return;
  float x[P / STRIDE][4];
#pragma unroll
  for (int i = 0; i < P / STRIDE; i++) get_four(w.square[i] + ch, x[i]);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    own[j] = x[0][j];
#pragma unroll
    for (int i = 1; i < P / STRIDE; i++) own[j] += x[i][j];
    own[j] *= 1.f / (P / STRIDE);
  }
}
// the same from the page's rows; returns the tokens that count in none
DEVICE u64 page_stats(const Call& c, const Page& p, Sums& w, Marks& m, float (&own)[4]) {
  if (threadIdx.x < 2) {
    const i64 left = c.sinks - p.index * P - 32 * int(threadIdx.x);
    m.odd[threadIdx.x] = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0, m.bad[threadIdx.x] = 0;
  }
  const u32 tid = threadIdx.x;
  constexpr int LOADS = P * OCTETS / THREADS;
  uint2 k[TOKENS];
  uint4 v[LOADS];
  Samples samples;
  samples.load(c, p);
  load_rows(Source(c, p, false), [&](int i) { return int(4 * i + min(tid / QUADS, 3u)); },
            [&](int) { return int(tid % QUADS * 4); }, k);
  load_rows(Source(c, p, true), [&](u32 i) { return int((i * THREADS + tid) / OCTETS); },
            [&](u32 i) { return int((i * THREADS + tid) % OCTETS * 8); }, v);
  u32 top = 0;
#pragma unroll
  for (int i = 0; i < TOKENS; i++) top = larger(larger(top, k[i].x), k[i].y);
  samples.put(c, p, w.square);
#pragma unroll
  for (const uint4& x : v) top = larger(larger(larger(larger(top, x.x), x.y), x.z), x.w);
  if (__syncthreads_or(!(wide_low(top) <= FP16_MAX && wide_high(top) <= FP16_MAX))) mark(c, p, m);
  const u64 odd = m.all();
  if (odd) own_stats<true>(w, k, odd, own);
  else own_stats<false>(w, k, 0, own);
  return odd;
}
