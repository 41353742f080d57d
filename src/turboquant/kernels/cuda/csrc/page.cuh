// A page of a chunk: where its rows come from, which tokens count, and its statistics by channel.
#pragma once
#include "rows.cuh"

constexpr int STRIDE = 8, STATES = 2;  // of the reader samples; states kept of the tracker
constexpr int PITCH = D + 8;           // of rows in shared memory: four rows lie in different banks

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
};

DEVICE u16 narrow(float x) { return u16(two_16(x, 0)); }
DEVICE float finite(float x) { return x != x ? 0.f : fminf(fmaxf(x, -FP16_MAX), FP16_MAX); }
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
struct Page {
  i64 start, index;  // tokens before the chunk; number of the page in its sequence
  int b, h;
};
DEVICE bool page_of(const Call& c, Page& p, int b) {
  p.b = b, p.h = blockIdx.y, p.start = c.length[b], p.index = p.start / P + blockIdx.x;
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
    first = int(p.start > begin ? p.start - begin : 0), slot = first ? int(begin % slots) : 0;
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
// rows of keys or values to shared memory
DEVICE void load_rows(const Call& c, const Page& p, bool values, u16 (*rows)[PITCH]) {
  const Source source(c, p, values);
#pragma unroll
  for (int i = threadIdx.x; i < P * (D / 8); i += THREADS) {
    const int t = i / (D / 8), at = i % (D / 8) * 8;
    *(uint4*)(rows[t] + at) = *(const uint4*)(source.row(t) + at);
  }
}
struct Marks {
  u32 odd[2], bad[2];  // a bit a token: counts in no statistic; is not finite
  DEVICE u64 all() const { return odd[0] | u64(odd[1]) << 32; }
};
// the same of one part, and which tokens count, for which both parts are looked at; begins and ends with a barrier
DEVICE void load_page(const Call& c, const Page& p, bool values, u16 (*rows)[PITCH], Marks& m) {
  if (threadIdx.x < 2) {
    const i64 left = c.sinks - p.index * P - 32 * int(threadIdx.x);
    m.odd[threadIdx.x] = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0, m.bad[threadIdx.x] = 0;
  }
  __syncthreads();
  for (int part = 0; part < 2; part++) {
    const Source source(c, p, part);
    for (int i = threadIdx.x; i < P * (D / 8); i += THREADS) {
      const int t = i / (D / 8), at = i % (D / 8) * 8;
      const uint4 x = *(const uint4*)(source.row(t) + at);
      if (part == values) *(uint4*)(rows[t] + at) = x;
      bool fine = true, good = true;
      for (u32 w : {x.x, x.y, x.z, x.w}) {
        const float a = fabsf(wide_low(w)), b = fabsf(wide_high(w));
        fine &= a <= FP16_MAX && b <= FP16_MAX, good &= a < -NEG && b < -NEG;
      }
      if (!fine) atomicOr(&m.odd[t / 32], 1u << (t & 31));
      if (!good) atomicOr(&m.bad[t / 32], 1u << (t & 31));
    }
  }
  __syncthreads();
}
// root mean square of a KV head's queries at a position of the chunk, as the readers keep it
DEVICE u16 sample(const Call& c, int b, int h, i64 n, int ch) {
  float sum = 0;
  for (int g = 0; g < c.group; g++) {
    const float q = wide(c.q[b * c.q_b + (h * c.group + g) * c.q_h + n * c.q_n + ch]);
    sum = g ? sum + q * q : q * q;
  }
  return narrow(finite(__fsqrt_rn(sum / float(c.group))));
}

struct Samples {  // the squares of a channel's reader samples g, g + 4 of a page
  float square[P / STRIDE / 4];
};
DEVICE Samples samples_of(const Call& c, const Page& p, int ch) {
  const int g = threadIdx.x & 3;
  Samples s;
#pragma unroll
  for (int i = 0; i < P / STRIDE / 4; i++) {
    const i64 pos = p.index * P + (4 * i + g) * STRIDE + STRIDE - 1, j = pos / STRIDE;
    const i64 at = ((i64(p.b) * c.heads + p.h) * c.samples + j % c.samples) * D + ch;
    const float r = wide(pos < p.start ? c.readers[at] : sample(c, p.b, p.h, pos - p.start, ch));
    s.square[i] = r * r;
  }
  return s;
}
struct Own {
  float mean, var, power;
};
// a channel's statistics over the page, by four threads, of which each takes every fourth token
DEVICE Own own_stats(const Samples& s, const u16 (*rows)[PITCH], u64 odd, int ch) {
  const int g = threadIdx.x & 3;
  const float n = float(max(P - __popcll(odd), 1));
  float x[P / 4];
#pragma unroll
  for (int i = 0; i < P / 4; i++) x[i] = odd >> (4 * i + g) & 1 ? 0.f : wide(rows[4 * i + g][ch]);
  auto mean = [&](auto term) {  // tokens g, g + 4, g + 8, g + 12 of every sixteen, then by halves
    float acc[4];
#pragma unroll
    for (int i = 0; i < P / 4; i++) acc[i % 4] = i < 4 ? term(i) : acc[i % 4] + term(i);
    acc[0] += acc[2], acc[1] += acc[3], acc[0] += acc[1];
    acc[0] += __shfl_xor_sync(~0u, acc[0], 2);
    return (acc[0] + __shfl_xor_sync(~0u, acc[0], 1)) / n;
  };
  Own own;
  own.mean = mean([&](int i) { return x[i]; });
  own.var = mean([&](int i) {
    const float y = odd >> (4 * i + g) & 1 ? 0.f : x[i] - own.mean;
    return y * y;
  });
  own.power = 0;
#pragma unroll
  for (int i = 0; i < P / STRIDE; i++) {
    const float r = __shfl_sync(~0u, s.square[i / 4], (threadIdx.x & 28) + i % 4);
    own.power = i ? own.power + r : r;
  }
  own.power /= float(P / STRIDE);
  return own;
}
