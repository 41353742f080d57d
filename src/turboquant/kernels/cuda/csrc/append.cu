// cache_append: `encode` writes the pages that a chunk completes, keys and values in blocks of their own; `store` writes
// ring, sinks and readers. A chunk that may complete several pages runs `stats` and `track` first, for the tracker goes
// from page to page. Sums run in the order of maths/exact.py, sixteen lanes a row.
#include "rows.cuh"

constexpr int STRIDE = 8, STATES = 2;  // of the reader samples; states kept of the tracker

struct Call {  // mirrored by `_Call` in append.py
  u8* pages;
  const int* table;
  i64 *length, *nonfinite, *starts;
  u16 *ring_k, *ring_v, *sink_k, *sink_v, *readers;
  float *tracker, *states;  // states: (batch, heads, pages of the chunk, 3, D) before each page
  const u16 *q, *k, *v;
  i64 q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n;
  int pool, width, batch, heads, group, tokens, slots, sinks, samples, several;  // pages of the chunk, 0 if at most one
};

DEVICE u16 narrow(float x) { return u16(two_16(x, 0)); }
DEVICE float finite(float x) { return x != x ? 0.f : fminf(fmaxf(x, -FP16_MAX), FP16_MAX); }
DEVICE float max_of(const float* x, int lane) {  // of D numbers, by each warp
  float top = x[lane];
  for (int i = lane + 32; i < D; i += 32) top = fmaxf(top, x[i]);
  if (D < 32 && lane >= D) top = x[0];
  for (int n = 16; n; n >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, n));
  return top;
}
DEVICE float sum_of(const float* x, int lane) {  // of D numbers, in the order of lane_sum
  float sum = x[lane & 15];
  for (int e = 1; e < E; e++) sum += x[(lane & 15) + 16 * e];
  return sum16(sum);
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
DEVICE const u16* token_row(const Call& c, const Page& p, int t, bool values) {
  const i64 pos = p.index * P + t;
  if (pos >= p.start) {
    const i64 n = pos - p.start;
    return values ? c.v + p.b * c.v_b + p.h * c.v_h + n * c.v_n : c.k + p.b * c.k_b + p.h * c.k_h + n * c.k_n;
  }
  return (values ? c.ring_v : c.ring_k) + ((i64(p.b) * c.heads + p.h) * c.slots + int(pos) % c.slots) * D;
}
// rows of keys or values to shared memory, and which tokens count
DEVICE void load_page(const Call& c, const Page& p, bool values, u16 (*rows)[D], int* odd) {
  for (int t = threadIdx.x; t < P; t += THREADS) odd[t] = p.index * P + t < c.sinks;
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * P * (D / 8); i += THREADS) {
    const bool which = i >= P * (D / 8);
    const int t = i / (D / 8) % P, at = i % (D / 8) * 8;
    const uint4 x = *(const uint4*)(token_row(c, p, t, which) + at);
    if (which == values) *(uint4*)(rows[t] + at) = x;
    bool fine = true;
    for (u32 w : {x.x, x.y, x.z, x.w}) fine &= fabsf(wide_low(w)) <= FP16_MAX && fabsf(wide_high(w)) <= FP16_MAX;
    if (!fine) odd[t] = 1;
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

struct Own {
  float mean, var, power;
};
// a channel's statistics over the page
DEVICE Own own_stats(const Call& c, const Page& p, const u16 (*rows)[D], const int* odd, int ch) {
  float acc[16];
  int count = 0;
  for (int t = 0; t < P; t++) count += !odd[t];
  const float n = float(max(count, 1));
  auto add = [&](auto value) {
#pragma unroll
    for (int t = 0; t < 16; t++) acc[t] = odd[t] ? 0.f : value(t);
    for (int from = 16; from < P; from += 16)
#pragma unroll
      for (int t = 0; t < 16; t++) acc[t] += odd[from + t] ? 0.f : value(from + t);
#pragma unroll
    for (int half = 8; half; half >>= 1)
#pragma unroll
      for (int t = 0; t < half; t++) acc[t] += acc[t + half];
    return acc[0] / n;
  };
  Own own;
  own.mean = add([&](int t) { return finite(wide(rows[t][ch])); });
  own.var = add([&](int t) {
    const float x = finite(wide(rows[t][ch])) - own.mean;
    return x * x;
  });
  own.power = 0;
  for (int i = 0; i < P / STRIDE; i++) {
    const i64 pos = p.index * P + i * STRIDE + STRIDE - 1, j = pos / STRIDE;
    const i64 at = ((i64(p.b) * c.heads + p.h) * c.samples + j % c.samples) * D + ch;
    const float r = wide(pos < p.start ? c.readers[at] : sample(c, p.b, p.h, pos - p.start, ch));
    own.power = i ? own.power + r * r : r * r;
  }
  own.power /= float(P / STRIDE);
  return own;
}
DEVICE float* state_at(const Call& c, int b, int h, i64 page) {
  return c.tracker + ((i64(b) * STATES + page % STATES) * c.heads + h) * 3 * D;
}
DEVICE float blended(float old, float a, float add, float b) { return a * old + b * add; }

struct Memory {
  u16 rows[P][D];
  alignas(16) u8 image[VALUE_PART > PAGE_BYTES - VALUE_PART ? VALUE_PART : PAGE_BYTES - VALUE_PART];
  float mean[D], key[D], query[D], s[D], rest[D], work[D], scale[P], edges[8], levels[16];
  int odd[P], hot[HOT ? HOT : 1];
};
DEVICE void tables(Memory& m, const float* edges, const float* levels) {
  if (threadIdx.x < 8) m.edges[threadIdx.x] = edges[threadIdx.x];
  if (threadIdx.x < 16) m.levels[threadIdx.x] = levels[threadIdx.x];
  for (int i = threadIdx.x; i < int(sizeof(m.image)) / 4; i += THREADS) ((u32*)m.image)[i] = 0;
}
DEVICE void copy_out(u8* to, const u8* image, int bytes, int skip) {
  for (int i = threadIdx.x * 16; i < bytes; i += THREADS * 16) {
    if (i <= skip && skip < i + 16) {  // two bytes there belong to the other block
      for (int n = 0; n < 16; n += 2)
        if (i + n != skip) *(u16*)(to + i + n) = *(const u16*)(image + i + n);
    } else {
      *(uint4*)(to + i) = *(const uint4*)(image + i);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) encode(const __grid_constant__ Call c) {
  extern __shared__ __align__(128) u8 memory[];
  Memory& m = *(Memory*)memory;
  const int tid = threadIdx.x, l = tid & 15, lane = tid & 31;
  const bool values = blockIdx.z & 1;
  if (tid == 0 && blockIdx.x == 0 && blockIdx.y == 0 && !values) c.starts[blockIdx.z / 2] = c.length[blockIdx.z / 2];
  Page p;
  if (!page_of(c, p, blockIdx.z / 2)) return;
  const int id = p.index < c.width ? c.table[i64(p.b) * c.width + p.index] : -1;
  const bool kept = id >= 0 && id < c.pool;  // a page out of the window has no place
  if (values && !kept) return;
  u8* page = c.pages + (i64(max(id, 0)) * c.heads + p.h) * PAGE_BYTES;
  tables(m, values ? VALUE_EDGES : KEY_EDGES, values ? VALUE_LEVELS : KEY_LEVELS);
  load_page(c, p, values, m.rows, m.odd);
  float y[PASSES][E];
  if (values) {
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
#pragma unroll
      for (int e = 0; e < E; e++) y[i][e] = finite(wide(m.rows[i * 16 + tid / 16][e * 16 + l])) * sign_of(e * 16 + l);
      rotate(y[i]);
    }
    const u16 base = encode_rows<VALUE_BITS>(y, m.odd, m.scale, m.image + AT_VALUE_SCALE - VALUE_PART,
                                             m.image + AT_VALUE_CODES - VALUE_PART, m.edges, m.levels);
    __syncthreads();
    copy_out(page + VALUE_PART, m.image, PAGE_BYTES - VALUE_PART, -1);
    if (tid == 0) *(u16*)(page + AT_VALUE_BASE) = base;
    return;
  }
  for (int ch = tid; ch < D; ch += THREADS) {
    Own own = own_stats(c, p, m.rows, m.odd, ch);
    m.mean[ch] = own.mean;
    const float* before = c.several ? c.states + ((i64(p.b) * c.heads + p.h) * gridDim.x + blockIdx.x) * 3 * D
                                    : state_at(c, p.b, p.h, p.index + 1);  // the slot of page index - 1
    float old[3] = {0, 0, 0};
    if (p.index)
      for (int i = 0; i < 3; i++) old[i] = before[i * D + ch];
    m.key[ch] = p.index ? blended(old[1], BLEND_OLD, own.var, BLEND_NEW) : own.var;
    m.query[ch] = p.index ? blended(old[2], BLEND_OLD, own.power, BLEND_NEW) : own.power;
    if (!c.several) {
      float* after = state_at(c, p.b, p.h, p.index);
      after[ch] = p.index ? blended(old[0], DECAY_OLD, own.mean, DECAY_NEW) : own.mean;
      after[D + ch] = p.index ? blended(old[1], DECAY_OLD, own.var, DECAY_NEW) : own.var;
      after[2 * D + ch] = p.index ? blended(old[2], DECAY_OLD, own.power, DECAY_NEW) : own.power;
    }
  }
  if (!kept) return;
  __syncthreads();
  const float floor_k = 1e-8f * max_of(m.key, lane) + 1e-20f, floor_q = 1e-8f * max_of(m.query, lane) + 1e-20f;
  __syncthreads();
  for (int ch = tid; ch < D; ch += THREADS) {
    const float k = __fsqrt_rn(fmaxf(m.key[ch], 0.f) + floor_k), q = __fsqrt_rn(fmaxf(m.query[ch], 0.f) + floor_q);
    m.s[ch] = __fsqrt_rn(k / q), m.work[ch] = m.s[ch] * m.s[ch], m.rest[ch] = k * q;
  }
  __syncthreads();
  const float unit = __fsqrt_rn(sum_of(m.work, lane) / float(D));
  __syncthreads();
  for (int ch = tid; ch < D; ch += THREADS) {
    const int log = int(fminf(fmaxf(rintf(log2f(m.s[ch] / unit) * S_STEPS) + 128.f, 0.f), 255.f));
    m.image[AT_LOG_S + ch] = u8(log), m.s[ch] = S_TABLE[log];
    int rank = 0;
    for (int i = 0; i < D; i++) rank += m.rest[i] > m.rest[ch] || (m.rest[i] == m.rest[ch] && i < ch);
    m.query[ch] = rank < HOT ? 1.f : 0.f;  // from here on: whether the channel is hot
    m.work[ch] = rank < HOT ? 0.f : fabsf(m.mean[ch] / m.s[ch]);
  }
  __syncthreads();
  const u16 step_half = fp16_up(max_of(m.work, lane) / 127.f);
  const float step = half_(step_half);
  for (int ch = tid; ch < D; ch += THREADS) {
    const bool hot = m.query[ch] > 0;
    const float code = hot ? 0.f : fminf(fmaxf(rintf(divided(m.mean[ch] / m.s[ch], step)), -127.f), 127.f);
    m.image[AT_MEAN + ch] = u8(int(code)), m.rest[ch] = code * step;
    if (hot) {
      int at = 0;
      for (int i = 0; i < ch; i++) at += m.query[i] > 0;
      m.hot[at] = ch, m.image[AT_HOT_INDEX + at] = u8(ch);
    }
  }
  __syncthreads();
  for (int h = tid / 32; h < HOT; h += THREADS / 32) {
    const int ch = m.hot[h];
    const u16 mean_half = fp16(m.mean[ch]);
    const float mean = half_(mean_half), a = finite(wide(m.rows[lane][ch])) - mean;
    const float b = finite(wide(m.rows[lane + 32][ch])) - mean;
    float top = fmaxf(m.odd[lane] ? 0.f : fabsf(a), m.odd[lane + 32] ? 0.f : fabsf(b));
    for (int n = 16; n; n >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, n));
    const u16 hot_half = fp16_up(top / 127.f);
    const float hot_step = half_(hot_half);
    auto code = [&](float x) { return u8(int(fminf(fmaxf(rintf(divided(x, hot_step)), -127.f), 127.f))); };
    m.image[AT_HOT_CODES + h * P + lane] = code(a), m.image[AT_HOT_CODES + h * P + lane + 32] = code(b);
    if (lane == 0) {
      *(u16*)(m.image + AT_HOT_MEAN + 2 * h) = mean_half, *(u16*)(m.image + AT_HOT_STEP + 2 * h) = hot_half;
    }
  }
#pragma unroll
  for (int i = 0; i < PASSES; i++) {
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int ch = e * 16 + l;
      const float x = finite(wide(m.rows[i * 16 + tid / 16][ch])) / m.s[ch] - m.rest[ch];
      y[i][e] = m.query[ch] > 0 ? 0.f : x * sign_of(ch);
    }
    rotate(y[i]);
  }
  const u16 base = encode_rows<KEY_BITS>(y, m.odd, m.scale, m.image + AT_KEY_SCALE, m.image + AT_KEY_CODES, m.edges, m.levels);
  if (tid == 0) *(u16*)(m.image + AT_KEY_BASE) = base, *(u16*)(m.image + AT_MEAN_STEP) = step_half;
  __syncthreads();
  copy_out(page, m.image, VALUE_PART, AT_VALUE_BASE);
}

// own statistics of every page that the chunk completes
extern "C" __global__ void __launch_bounds__(THREADS) stats(const __grid_constant__ Call c) {
  __shared__ u16 rows[P][D];
  __shared__ int odd[P];
  Page p;
  if (!page_of(c, p, blockIdx.z)) return;
  load_page(c, p, false, rows, odd);
  float* to = c.states + ((i64(p.b) * c.heads + p.h) * gridDim.x + blockIdx.x) * 3 * D;
  for (int ch = threadIdx.x; ch < D; ch += THREADS) {
    const Own own = own_stats(c, p, rows, odd, ch);
    to[ch] = own.mean, to[D + ch] = own.var, to[2 * D + ch] = own.power;
  }
}
// own statistics become the state before each page; the tracker's states after the last two are kept
extern "C" __global__ void track(const __grid_constant__ Call c) {
  const int b = blockIdx.z, h = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
  wait_for_previous();
  if (i >= 3 * D) return;
  const i64 first = c.length[b] / P, last = (c.length[b] + c.tokens) / P;
  float* at = c.states + (i64(b) * c.heads + h) * c.several * 3 * D + i;
  float state = first ? state_at(c, b, h, first - 1)[i] : 0.f;
  for (i64 page = first; page < last; page++, at += 3 * D) {
    const float own = *at;
    *at = state;
    state = page ? blended(state, DECAY_OLD, own, DECAY_NEW) : own;
    if (page >= last - STATES) state_at(c, b, h, page)[i] = state;
  }
}

// a block a token: ring, sinks, readers, and whether it came finite
extern "C" __global__ void __launch_bounds__(THREADS) store(const __grid_constant__ Call c) {
  const int b = blockIdx.y, n = blockIdx.x, tid = threadIdx.x;
  wait_for_previous();
  const i64 start = c.starts[b], pos = start + n;
  const bool ring = n >= c.tokens - c.slots, sink = pos < c.sinks;
  bool odd = false;
  for (int i = tid; i < 2 * c.heads * (D / 8); i += THREADS) {
    const bool values = i >= c.heads * (D / 8);
    const int h = i / (D / 8) % c.heads, at = i % (D / 8) * 8;
    const u16* from = values ? c.v + b * c.v_b + h * c.v_h + n * c.v_n : c.k + b * c.k_b + h * c.k_h + n * c.k_n;
    const uint4 x = *(const uint4*)(from + at);
    for (u32 w : {x.x, x.y, x.z, x.w}) odd |= !(fabsf(wide_low(w)) < -NEG) || !(fabsf(wide_high(w)) < -NEG);
    const i64 head = i64(b) * c.heads + h;
    if (ring) *(uint4*)((values ? c.ring_v : c.ring_k) + (head * c.slots + int(pos) % c.slots) * D + at) = x;
    if (sink) *(uint4*)((values ? c.sink_v : c.sink_k) + (head * c.sinks + pos) * D + at) = x;
  }
  if (pos % STRIDE == STRIDE - 1 && pos / STRIDE + c.samples >= (start + c.tokens) / STRIDE)
    for (int i = tid; i < c.heads * D; i += THREADS)
      c.readers[((i64(b) * c.heads + i / D) * c.samples + pos / STRIDE % c.samples) * D + i % D] = sample(c, b, i / D, n, i % D);
  odd = __syncthreads_or(odd);
  if (tid == 0 && odd) atomicAdd((u64*)c.nonfinite + b, u64(1));
  if (tid == 0 && n == 0) c.length[b] = start + c.tokens;
}
