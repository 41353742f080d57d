// cache_append: `encode` writes the pages that a chunk completes, keys and values in blocks of their own; `store` writes
// ring, sinks and readers. A chunk that may complete several pages runs `stats` and `track` first, for the tracker goes
// from page to page. Sums run in the order of maths/exact.py, sixteen lanes a row.
#include "page.cuh"

DEVICE float* state_at(const Call& c, int b, int h, i64 page) {
  return c.tracker + ((i64(b) * STATES + page % STATES) * c.heads + h) * 3 * D;
}
DEVICE float blended(float old, float a, float add, float b) { return a * old + b * add; }

struct Memory {
  u16 rows[P][PITCH];
  Lookup look;
  float mean[D], key[D], query[D], s[D], rest[D], work[D], scale[P];
  int hot[HOT ? HOT : 1];
  u32 is_hot[D / 32 + 1];
  Marks marks;
};
DEVICE void tables(Memory& m, const u64* search, const u64* codes) {
  for (int i = threadIdx.x; i < SEARCH_CELLS; i += THREADS) ((u64*)m.look.search)[i] = search[i];
  for (int i = threadIdx.x; i < CODE_REACH / 4; i += THREADS) ((u64*)m.look.codes)[i] = codes[i];
}
// row of pass i, as it came
DEVICE void take_row(const Memory& m, int i, u64 odd, float (&y)[E]) {
  const u16* row = m.rows[i * (THREADS / 8) + threadIdx.x / 8] + (threadIdx.x & 7);
#pragma unroll
  for (int j = 0; j < E; j++) y[j] = wide(row[8 * j]);
  if (odd) {
#pragma unroll
    for (int j = 0; j < E; j++) y[j] = finite(y[j]);
  }
}
// mean, variance and power that the page is encoded with to m.mean, m.key, m.query
DEVICE void take_stats(const Call& c, const Page& p, Memory& m, u64 odd) {
  if (c.several) {
    const float* from = c.states + place(c, p) * 3 * D;
    for (int ch = threadIdx.x; ch < D; ch += THREADS)
      m.mean[ch] = from[ch], m.key[ch] = from[D + ch], m.query[ch] = from[2 * D + ch];
    return;
  }
  const float* before = state_at(c, p.b, p.h, p.index + 1);  // the slot of page index - 1
  float* after = state_at(c, p.b, p.h, p.index);
  for (int ch = threadIdx.x / 4; ch < D; ch += THREADS / 4) {
    const Own own = own_stats(samples_of(c, p, ch), m.rows, odd, ch);
    if (threadIdx.x & 3) continue;
    m.mean[ch] = own.mean;
    m.key[ch] = p.index ? blended(before[D + ch], BLEND_OLD, own.var, BLEND_NEW) : own.var;
    m.query[ch] = p.index ? blended(before[2 * D + ch], BLEND_OLD, own.power, BLEND_NEW) : own.power;
    after[ch] = p.index ? blended(before[ch], DECAY_OLD, own.mean, DECAY_NEW) : own.mean;
    after[D + ch] = p.index ? blended(before[D + ch], DECAY_OLD, own.var, DECAY_NEW) : own.var;
    after[2 * D + ch] = p.index ? blended(before[2 * D + ch], DECAY_OLD, own.power, DECAY_NEW) : own.power;
  }
}
// from the statistics to s, hot channels and the stored means: the header of the keys; begins with a barrier
DEVICE u16 take_header(Memory& m, u8* page) {
  const int tid = threadIdx.x, lane = tid & 31;
  __syncthreads();
  const float floor_k = 1e-8f * max_of(m.key, lane) + 1e-20f, floor_q = 1e-8f * max_of(m.query, lane) + 1e-20f;
  for (int ch = tid; ch < D; ch += THREADS) {
    const float k = __fsqrt_rn(fmaxf(m.key[ch], 0.f) + floor_k), q = __fsqrt_rn(fmaxf(m.query[ch], 0.f) + floor_q);
    m.s[ch] = __fsqrt_rn(k / q), m.work[ch] = m.s[ch] * m.s[ch], m.rest[ch] = k * q;
  }
  __syncthreads();
  const float unit = __fsqrt_rn(sum_of(m.work, lane) / float(D));
  int rank[(4 * D + THREADS - 1) / THREADS];  // by four threads a channel
#pragma unroll
  for (int i = 0; i < int(sizeof(rank) / 4); i++) {
    const int ch = tid / 4 + i * (THREADS / 4);
    rank[i] = 0;
    if (ch < D) {
      const float own = m.rest[ch];
      for (int at = tid & 3; at < D; at += 4) rank[i] += m.rest[at] > own || (m.rest[at] == own && at < ch);
    }
    rank[i] += __shfl_xor_sync(~0u, rank[i], 1), rank[i] += __shfl_xor_sync(~0u, rank[i], 2);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < int(sizeof(rank) / 4); i++) {
    const int ch = tid / 4 + i * (THREADS / 4);
    if (tid & 3 || ch >= D) continue;
    const int log = int(fminf(fmaxf(rintf(log2f(m.s[ch] / unit) * S_STEPS) + 128.f, 0.f), 255.f));
    page[AT_LOG_S + ch] = u8(log), m.s[ch] = S_TABLE[log];
    m.query[ch] = rank[i] < HOT ? 1.f : 0.f;  // from here on: whether the channel is hot
    m.work[ch] = rank[i] < HOT ? 0.f : fabsf(m.mean[ch] / m.s[ch]);
  }
  __syncthreads();
  const u16 step_half = fp16_up(max_of(m.work, lane) / 127.f);
  const float step = half_(step_half);
  for (int from = 0; from < D; from += THREADS) {
    const int ch = from + tid;
    const bool hot = ch < D && m.query[ch] > 0;
    const u32 mask = __ballot_sync(~0u, hot);
    if (lane == 0 && ch < D) m.is_hot[ch / 32] = mask;
    if (ch >= D) continue;
    const float code = hot ? 0.f : fminf(fmaxf(rintf(divided(m.mean[ch] / m.s[ch], step)), -127.f), 127.f);
    page[AT_MEAN + ch] = u8(int(code)), m.rest[ch] = code * step;
  }
  __syncthreads();
  for (int ch = tid; ch < D; ch += THREADS) {
    if (m.query[ch] <= 0) continue;
    int at = __popc(m.is_hot[ch / 32] & ((1u << (ch & 31)) - 1));
    for (int i = 0; i < ch / 32; i++) at += __popc(m.is_hot[i]);
    m.hot[at] = ch, page[AT_HOT_INDEX + at] = u8(ch);
  }
  __syncthreads();
  return step_half;
}
DEVICE void hot_channels(Memory& m, u64 odd, u8* page) {
  const int lane = threadIdx.x & 31;
  for (int h = threadIdx.x / 32; h < HOT; h += THREADS / 32) {
    const int ch = m.hot[h];
    const u16 mean_half = fp16(m.mean[ch]);
    const float mean = half_(mean_half), a = finite(wide(m.rows[lane][ch])) - mean;
    const float b = finite(wide(m.rows[lane + 32][ch])) - mean;
    float top = fmaxf(odd >> lane & 1 ? 0.f : fabsf(a), odd >> (lane + 32) & 1 ? 0.f : fabsf(b));
    for (int n = 16; n; n >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, n));
    const u16 hot_half = fp16_up(top / 127.f);
    const float hot_step = half_(hot_half);
    auto code = [&](float x) { return u8(int(fminf(fmaxf(rintf(divided(x, hot_step)), -127.f), 127.f))); };
    page[AT_HOT_CODES + h * P + lane] = code(a), page[AT_HOT_CODES + h * P + lane + 32] = code(b);
    if (lane == 0) *(u16*)(page + AT_HOT_MEAN + 2 * h) = mean_half, *(u16*)(page + AT_HOT_STEP + 2 * h) = hot_half;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, D > 128 ? 1 : 3) encode(const __grid_constant__ Call c) {
  extern __shared__ __align__(128) u8 memory[];
  Memory& m = *(Memory*)memory;
  const int tid = threadIdx.x, l = tid & 7;
  const bool values = blockIdx.z & 1;
  wait_for_previous();
  if (tid == 0 && blockIdx.x == 0 && blockIdx.y == 0 && !values) c.starts[blockIdx.z / 2] = c.length[blockIdx.z / 2];
  Page p;
  if (!page_of(c, p, blockIdx.z / 2)) return;
  const int id = p.index < c.width ? c.table[i64(p.b) * c.width + p.index] : -1;
  const bool kept = id >= 0 && id < c.pool;  // a page out of the window has no place
  if ((values || c.several) && !kept) return;
  u8* page = c.pages + (i64(max(id, 0)) * c.heads + p.h) * PAGE_BYTES;
  tables(m, values ? VALUE_SEARCH : KEY_SEARCH, values ? VALUE_CODES : KEY_CODES);
  u64 odd;
  if (c.several) {
    odd = c.masks[2 * place(c, p)];
    load_rows(c, p, values, m.rows);
    __syncthreads();
  } else {
    load_page(c, p, values, m.rows, m.marks);
    odd = m.marks.all();
  }
  float y[PASSES][E];
  if (values) {
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
      take_row(m, i, odd, y[i]);
#pragma unroll
      for (int j = 0; j < E; j++) y[i][j] *= sign_of(8 * j + l);
      rotate(y[i]);
    }
    const u16 base =
        encode_rows<VALUE_BITS>(y, odd, m.scale, page + AT_VALUE_SCALE, page + AT_VALUE_CODES, m.look, VALUE_UNIT);
    if (tid == 0) *(u16*)(page + AT_VALUE_BASE) = base;
    return;
  }
  take_stats(c, p, m, odd);
  if (!kept) return;
  const u16 step_half = take_header(m, page);
  hot_channels(m, odd, page);
  float s[E], r[E], rest[E], sign[E];  // of this thread's channels
#pragma unroll
  for (int j = 0; j < E; j++) {
    const int ch = 8 * j + l;
    s[j] = m.s[ch], r[j] = __frcp_rn(s[j]), rest[j] = m.rest[ch], sign[j] = m.query[ch] > 0 ? 0.f : sign_of(ch);
  }
#pragma unroll
  for (int i = 0; i < PASSES; i++) {
    take_row(m, i, odd, y[i]);
#pragma unroll
    for (int j = 0; j < E; j++) y[i][j] = (divide(y[i][j], s[j], r[j]) - rest[j]) * sign[j];
    rotate(y[i]);
  }
  const u16 base = encode_rows<KEY_BITS>(y, odd, m.scale, page + AT_KEY_SCALE, page + AT_KEY_CODES, m.look, KEY_UNIT);
  if (tid == 0) *(u16*)(page + AT_KEY_BASE) = base, *(u16*)(page + AT_MEAN_STEP) = step_half;
  for (int i = tid; i < GAPS; i += THREADS) page[GAP[i]] = 0;  // bytes between the fields
}

// own statistics of every page that the chunk completes
extern "C" __global__ void __launch_bounds__(THREADS) stats(const __grid_constant__ Call c) {
  __shared__ __align__(16) u16 rows[P][PITCH];
  __shared__ Marks marks;
  Page p;
  if (!page_of(c, p, blockIdx.z)) return;
  Samples samples[(4 * D + THREADS - 1) / THREADS];  // their loads come back while the page is loaded
#pragma unroll
  for (int i = 0; i < int(sizeof(samples) / sizeof(Samples)); i++) {
    const int ch = threadIdx.x / 4 + i * (THREADS / 4);
    if (ch < D) samples[i] = samples_of(c, p, ch);
  }
  load_page(c, p, false, rows, marks);
  const u64 odd = marks.all();
  float* to = c.states + place(c, p) * 3 * D;
#pragma unroll
  for (int i = 0; i < int(sizeof(samples) / sizeof(Samples)); i++) {
    const int ch = threadIdx.x / 4 + i * (THREADS / 4);
    if (ch >= D) continue;
    const Own own = own_stats(samples[i], rows, odd, ch);
    if ((threadIdx.x & 3) == 0) to[ch] = own.mean, to[D + ch] = own.var, to[2 * D + ch] = own.power;
  }
  if (threadIdx.x) return;
  c.masks[2 * place(c, p)] = odd, c.masks[2 * place(c, p) + 1] = marks.bad[0] | u64(marks.bad[1]) << 32;
}
// own statistics become what each page is encoded with; the tracker's states after the last two are kept
extern "C" __global__ void track(const __grid_constant__ Call c) {
  const int b = blockIdx.z, h = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
  wait_for_previous();
  if (i >= 3 * D) return;
  const i64 first = c.length[b] / P, last = (c.length[b] + c.tokens) / P;
  float* at = c.states + (i64(b) * c.heads + h) * c.several * 3 * D + i;
  float state = first ? state_at(c, b, h, first - 1)[i] : 0.f;
  constexpr int AHEAD = 16;  // loads under way at a time
  for (i64 from = first; from < last; from += AHEAD, at += AHEAD * 3 * D) {
    const int some = int(last - from < AHEAD ? last - from : AHEAD);
    float own[AHEAD];
#pragma unroll
    for (int n = 0; n < AHEAD; n++) own[n] = n < some ? at[n * 3 * D] : 0.f;
#pragma unroll
    for (int n = 0; n < AHEAD; n++) {
      if (n >= some) break;
      const i64 page = from + n;
      if (i >= D && page) at[n * 3 * D] = blended(state, BLEND_OLD, own[n], BLEND_NEW);
      state = page ? blended(state, DECAY_OLD, own[n], DECAY_NEW) : own[n];
      if (page >= last - STATES) state_at(c, b, h, page)[i] = state;
    }
  }
}

// a block a token that is not in a page of the chunk, or that ring, sinks or readers keep
extern "C" __global__ void __launch_bounds__(256) store(const __grid_constant__ Call c) {
  const int b = blockIdx.y, tid = threadIdx.x;
  const int n = int(blockIdx.x) < c.front ? blockIdx.x : c.tokens - gridDim.x + blockIdx.x;
  wait_for_previous();
  const i64 start = c.starts[b], pos = start + n, paged = c.several ? (start + c.tokens) / P * P : start;
  const bool ring = n >= c.tokens - c.slots, sink = pos < c.sinks;
  bool odd = false;
  for (int i = tid; i < 2 * c.heads * (D / 8); i += blockDim.x) {
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
    for (int i = tid; i < c.heads * D; i += blockDim.x)
      c.readers[((i64(b) * c.heads + i / D) * c.samples + pos / STRIDE % c.samples) * D + i % D] = sample(c, b, i / D, n, i % D);
  odd = __syncthreads_or(odd && pos >= paged);
  int bad = odd && tid == 0;
  if (c.several && blockIdx.x == 0)  // tokens of pages: a token counts once, not once per head
    for (i64 page = start / P + tid; page < paged / P; page += blockDim.x) {
      u64 mask = 0;
      for (int h = 0; h < c.heads; h++) mask |= c.masks[2 * ((i64(b) * c.heads + h) * c.several + page - start / P) + 1];
      if (page * P < start) mask = mask >> (start - page * P) << (start - page * P);  // those were counted when they came
      bad += __popcll(mask);
    }
  if (bad) atomicAdd((u64*)c.nonfinite + b, u64(bad));
  if (tid == 0 && blockIdx.x == 0) c.length[b] = start + c.tokens;
}
