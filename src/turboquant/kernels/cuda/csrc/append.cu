// cache_append: `encode` writes the pages that a chunk completes; `store` writes ring, sinks and readers. Where a chunk
// may complete several pages, `encode` runs for the values and the statistics of all pages first, then `track`, for the
// tracker goes from page to page, then `encode` for the keys. Sums run in the order of maths/exact.py.
#include "page.cuh"

DEVICE float* state_at(const Call& c, int b, int h, i64 page) {
  return c.tracker + ((i64(b) * STATES + page % STATES) * c.heads + h) * 3 * D;
}
DEVICE float blended(float old, float a, float add, float b) { return a * old + b * add; }

struct Memory {
  Work work;
  __align__(16) float mean[D], key[D], query[D], s[D], rest[D], other[D];
  int hot[HOT ? HOT : 1];
  u32 is_hot[D / 32 + 1];
  Marks marks;
};
static_assert(sizeof(Memory) <= MEMORY, "_memory() of append.py");
DEVICE void tables(Lookup& look, const u64* segments, const u64* codes) {
  for (int i = threadIdx.x; i < int(sizeof(look.segment)) / 8; i += THREADS) ((u64*)look.segment)[i] = segments[i];
  for (int i = threadIdx.x; i < int(sizeof(look.codes)) / 8; i += THREADS) ((u64*)look.codes)[i] = codes[i];
}
// Of the keys: statistics to c.states for `track`, or to m.mean, m.key, m.query blended with the tracker, which goes on.
DEVICE void take_stats(const Call& c, const Page& p, Memory& m, u64 odd) {
  const int ch = threadIdx.x, even = min(ch, D - 1) & ~1;
  const Own own = odd ? own_stats<true>(m.work, odd, even) : own_stats<false>(m.work, odd, even);
  if (c.several) {
    float* to = c.states + place(c, p) * 3 * D;
    if (ch < D) to[ch] = own.mean, to[D + ch] = own.var, to[2 * D + ch] = own.power;
    if (ch) return;
    c.masks[2 * place(c, p)] = odd, c.masks[2 * place(c, p) + 1] = m.marks.bad[0] | u64(m.marks.bad[1]) << 32;
  } else if (ch < D) {
    const float* before = state_at(c, p.b, p.h, p.index + 1);  // the slot of page index - 1
    float* after = state_at(c, p.b, p.h, p.index);
    m.mean[ch] = own.mean;
    m.key[ch] = p.index ? blended(before[D + ch], BLEND_OLD, own.var, BLEND_NEW) : own.var;
    m.query[ch] = p.index ? blended(before[2 * D + ch], BLEND_OLD, own.power, BLEND_NEW) : own.power;
    after[ch] = p.index ? blended(before[ch], DECAY_OLD, own.mean, DECAY_NEW) : own.mean;
    after[D + ch] = p.index ? blended(before[D + ch], DECAY_OLD, own.var, DECAY_NEW) : own.var;
    after[2 * D + ch] = p.index ? blended(before[2 * D + ch], DECAY_OLD, own.power, DECAY_NEW) : own.power;
  }
}
// the HOT channels with the largest m.rest, the first of equals: m.query becomes 1 there and 0 elsewhere; by one warp
DEVICE void choose_hot(Memory& m) {
  constexpr int EACH = (D + 31) / 32;
  const int lane = threadIdx.x;
  int bits[EACH];  // of numbers from 0 on, which are ordered as their bits are
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int ch = lane + 32 * i;
    bits[i] = ch < D ? int(__float_as_uint(m.rest[ch])) : -1;
    if (ch < D) m.query[ch] = 0.f;
  }
  for (int n = 0; n < HOT; n++) {
    int top = -1, at = D;
#pragma unroll
    for (int i = 0; i < EACH; i++) top = max(top, bits[i]);
    top = warp_max(top);
#pragma unroll
    for (int i = EACH - 1; i >= 0; i--)
      if (bits[i] == top) at = lane + 32 * i;
    at = warp_min(at);
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (at == lane + 32 * i) bits[i] = -1, m.query[at] = 1.f;
  }
}
// from the statistics to s, hot channels and the stored means: the header of the keys; begins with a barrier
DEVICE u16 take_header(Memory& m, u8* page) {
  const int ch = threadIdx.x, lane = ch & 31;
  __syncthreads();
  const float floor_k = 1e-8f * max_of(m.key, lane) + 1e-20f, floor_q = 1e-8f * max_of(m.query, lane) + 1e-20f;
  if (ch < D) {
    const float k = __fsqrt_rn(fmaxf(m.key[ch], 0.f) + floor_k), q = __fsqrt_rn(fmaxf(m.query[ch], 0.f) + floor_q);
    m.s[ch] = __fsqrt_rn(k / q), m.other[ch] = m.s[ch] * m.s[ch], m.rest[ch] = k * q;
  }
  __syncthreads();
  if (ch < 32) choose_hot(m);
  const float unit = __fsqrt_rn(sum_of(m.other, lane) / float(D));
  __syncthreads();
  if (ch < D) {
    const int log = int(fminf(fmaxf(rintf(log2f(m.s[ch] / unit) * S_STEPS) + 128.f, 0.f), 255.f));
    page[AT_LOG_S + ch] = u8(log), m.s[ch] = S_TABLE[log];
    m.key[ch] = m.query[ch] > 0 ? 0.f : m.mean[ch] / m.s[ch];
  }
  __syncthreads();
  float top = 0;
  for (int i = lane; i < D; i += 32) top = fmaxf(top, fabsf(m.key[i]));
  for (int n = 16; n; n >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, n));
  const u16 step_half = fp16_up(top / 127.f);
  const float step = half_(step_half);
  const bool hot = ch < D && m.query[ch] > 0;
  const u32 mask = __ballot_sync(~0u, hot);
  if (lane == 0 && ch < D) m.is_hot[ch / 32] = mask;
  if (ch < D) {
    const float code = fminf(fmaxf(rintf(divided(m.key[ch], step)), -127.f), 127.f);
    page[AT_MEAN + ch] = u8(int(code));
    // for the rows: k becomes k / s less the stored mean, times the sign of its channel; nothing if it is hot. With
    // 1 / s as a sum of two numbers the quotient of a 16-bit number is correctly rounded.
    const float sign = hot ? 0.f : sign_of(ch), r = __frcp_rn(m.s[ch]);
    m.rest[ch] = code * step * sign, m.other[ch] = fmaf(-m.s[ch], r, 1.f) * r * sign, m.s[ch] = r * sign;
  }
  __syncthreads();
  if (hot) {
    int at = __popc(mask & ((1u << lane) - 1));
    for (int i = 0; i < ch / 32; i++) at += __popc(m.is_hot[i]);
    m.hot[at] = ch, page[AT_HOT_INDEX + at] = u8(ch);
  }
  __syncthreads();
  return step_half;
}
DEVICE void hot_channels(const Source& keys, const Memory& m, u64 odd, u8* page) {
  const int lane = threadIdx.x & 31;
  for (int h = threadIdx.x / 32; h < HOT; h += THREADS / 32) {
    const int ch = m.hot[h];
    const u16 mean_half = fp16(m.mean[ch]);
    const float mean = half_(mean_half), a = finite(wide(keys.row(lane)[ch])) - mean;
    const float b = finite(wide(keys.row(lane + 32)[ch])) - mean;
    float top = fmaxf(odd >> lane & 1 ? 0.f : fabsf(a), odd >> (lane + 32) & 1 ? 0.f : fabsf(b));
    for (int n = 16; n; n >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, n));
    const u16 hot_half = fp16_up(top / 127.f);
    const float hot_step = half_(hot_half);
    auto code = [&](float x) { return u8(int(fminf(fmaxf(rintf(divided(x, hot_step)), -127.f), 127.f))); };
    page[AT_HOT_CODES + h * P + lane] = code(a), page[AT_HOT_CODES + h * P + lane + 32] = code(b);
    if (lane == 0) *(u16*)(page + AT_HOT_MEAN + 2 * h) = mean_half, *(u16*)(page + AT_HOT_STEP + 2 * h) = hot_half;
  }
}
DEVICE void get_sixteen(const float* from, float (&y)[16]) {
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    const float4 x = *(const float4*)(from + i);
    y[i] = x.x, y[i + 1] = x.y, y[i + 2] = x.z, y[i + 3] = x.w;
  }
}
// Rows to shared memory, with the butterflies over sixteen neighbours, which are in one thread. Four rows and two
// neighbours of each lie in different banks.
template <bool KEY> DEVICE void put_rows(const Source& source, Memory& m, u64 odd) {
  constexpr bool FIXED = THREADS / 4 % SIXTEENS == 0;  // a thread's channels are always the same
  constexpr int ROUNDS = (P * SIXTEENS + THREADS - 1) / THREADS;
  const u32 tid = threadIdx.x;
  const auto group_of = [&](u32 i) { return int((FIXED ? tid : i * THREADS + tid) / 4 % SIXTEENS); };
  const auto row_of = [&](u32 i) {
    const u32 four = FIXED ? tid / (4 * SIXTEENS) + i * (THREADS / SIXTEENS / 4) : (i * THREADS + tid) / (4 * SIXTEENS);
    return int(4 * four + tid % 4);
  };
  uint4 raw[2 * ROUNDS];
  load_rows(source, [&](int i) { return FIXED ? row_of(i / 2) : min(row_of(i / 2), P - 1); },
            [&](int i) { return 16 * group_of(i / 2) + i % 2 * 8; }, raw);
  float r[16], low[16], rest[16];
  u32 signs[8];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int group = group_of(i), t = row_of(i);
    if (P * SIXTEENS % THREADS && t >= P) break;
    if (i == 0 || !FIXED) {
      if (KEY) {
        const int at = 16 * group;
        get_sixteen(m.s + at, r), get_sixteen(m.other + at, low), get_sixteen(m.rest + at, rest);
      }
      const u32 positive = SIGN_BITS[group / 2] >> (group % 2 * 16);
#pragma unroll
      for (int j = 0; j < 8; j++)
        signs[j] = (positive >> (2 * j) & 1 ? 0u : 0x8000u) | (positive >> (2 * j + 1) & 1 ? 0u : 0x80000000u);
    }
    const uint4 a = raw[2 * i], b = raw[2 * i + 1];
    const u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    float y[16];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const u32 w = KEY ? words[j] : words[j] ^ signs[j];
      y[2 * j] = wide_low(w), y[2 * j + 1] = wide_high(w);
    }
    if (odd) {
#pragma unroll
      for (int j = 0; j < 16; j++) y[j] = finite(y[j]);
    }
    if (KEY) {
#pragma unroll
      for (int j = 0; j < 16; j++) y[j] = fmaf(y[j], r[j], y[j] * low[j]) - rest[j];
    }
    rotate_sixteen(y);
    put_sixteen(y, m.work.rows[t] + 16 * group);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, D > 128 ? 2 : 4) encode(const __grid_constant__ Call c) {
  extern __shared__ __align__(128) u8 memory[];
  Memory& m = *(Memory*)memory;
  const int tid = threadIdx.x;
  start_next(), wait_for_previous();
  if (tid == 0 && blockIdx.x == 0 && blockIdx.y == 0 && c.parts & VALUES) c.starts[blockIdx.z] = c.length[blockIdx.z];
  Page p;
  if (!page_of(c, p)) return;
  const int id = p.index < c.width ? c.table[i64(p.b) * c.width + p.index] : -1;
  const bool kept = id >= 0 && id < c.pool;  // a page out of the window has no place
  u8* page = c.pages + (i64(max(id, 0)) * c.heads + p.h) * PAGE_BYTES;
  u64 odd;
  if (c.parts & VALUES) {
    Samples samples;
    samples.load(c, p);  // under way while keys and values are loaded
    load_keys(c, p, m.work.keys, m.marks);
    samples.put(c, p, m.work.square);
    odd = m.marks.all();
    __syncthreads();
    take_stats(c, p, m, odd);
  } else {
    odd = c.masks[2 * place(c, p)];
    const float* from = c.states + place(c, p) * 3 * D;
    if (tid < D) m.mean[tid] = from[tid], m.key[tid] = from[D + tid], m.query[tid] = from[2 * D + tid];
  }
  if (!kept) return;
  for (int part = VALUES; part <= KEYS; part++) {
    if (!(c.parts & part)) continue;
    const bool values = part == VALUES;
    if ((values ? VALUE_BITS : KEY_BITS) < 8)
      tables(m.work.look, values ? VALUE_SEGMENTS : KEY_SEGMENTS, values ? VALUE_CODES : KEY_CODES);
    const Source source(c, p, values);
    u8 *log_scale = page + AT_VALUE_SCALE, *codes = page + AT_VALUE_CODES;
    u16 step_half = 0, base;
    if (values) {
      __syncthreads();
      put_rows<false>(source, m, odd);
    } else {
      log_scale = page + AT_KEY_SCALE, codes = page + AT_KEY_CODES;
      step_half = take_header(m, page);
      hot_channels(source, m, odd, page);
      put_rows<true>(source, m, odd);
    }
    if (KEY_BITS == VALUE_BITS || values) base = encode_rows<VALUE_BITS>(m.work, odd, log_scale, codes);
    else base = encode_rows<KEY_BITS>(m.work, odd, log_scale, codes);
    if (tid == 0) *(u16*)(page + (values ? AT_VALUE_BASE : AT_KEY_BASE)) = base;
    if (values) continue;
    if (tid == 0) *(u16*)(page + AT_MEAN_STEP) = step_half;
    for (int i = tid; i < GAPS; i += THREADS) page[GAP[i]] = 0;  // bytes between the fields
  }
}

// Own statistics become what each page is encoded with; the tracker's states after the last two are kept. A block has
// TRACKED columns; all its threads load and store them, one warp goes from page to page.
constexpr int TRACKED = 32, AHEAD = 128, AT_ONCE = 16;
extern "C" __global__ void __launch_bounds__(256) track(const __grid_constant__ Call c) {
  __shared__ float own[AHEAD][TRACKED];
  const int b = blockIdx.z, h = blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int i = blockIdx.x * TRACKED + lane, warps = blockDim.x / 32;
  start_next(), wait_for_previous();
  const i64 first = c.length[b] / P, last = (c.length[b] + c.tokens) / P;
  float* at = c.states + (i64(b) * c.heads + h) * c.several * 3 * D + i;
  const bool mine = i < 3 * D, blends = i >= D;
  float state = warp == 0 && mine && first ? state_at(c, b, h, first - 1)[i] : 0.f, before = state;
  for (i64 from = first; from < last; from += AHEAD, at += AHEAD * 3 * D) {
    const int some = int(last - from < AHEAD ? last - from : AHEAD);
    __syncthreads();
    if (mine)
#pragma unroll 16
      for (int n = warp; n < some; n += warps) own[n][lane] = at[n * 3 * D];
    __syncthreads();
    if (warp == 0)
      for (int n = 0; n < some; n += AT_ONCE) {
        float x[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) x[j] = own[n + j][lane];  // those from `some` on are not used
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
          const bool opens = j == 0 && from + n == 0, counts = n + j < some;  // the first page has no past
          const float next = opens ? x[j] : blended(state, DECAY_OLD, x[j], DECAY_NEW);
          if (blends && !opens) x[j] = blended(state, BLEND_OLD, x[j], BLEND_NEW);
          before = counts ? state : before, state = counts ? next : state;
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) own[n + j][lane] = x[j];
      }
    __syncthreads();
    if (mine && blends)
      for (int n = warp; n < some; n += warps) at[n * 3 * D] = own[n][lane];
  }
  if (warp || !mine || first == last) return;
  state_at(c, b, h, last - 1)[i] = state;
  if (last - first > 1) state_at(c, b, h, last - 2)[i] = before;
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
    for (int i = tid; i < c.heads * (D / 8); i += blockDim.x) {
      const int h = i / (D / 8), at = i % (D / 8) * 8;
      u16* to = c.readers + ((i64(b) * c.heads + h) * c.samples + u32(pos) / STRIDE % u32(c.samples)) * D + at;
      uint4 q[QUERIES];
      load_queries(c, b, h, n, at, 0, q);
      *(uint4*)to = sample(c, b, h, n, at, q);
    }
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
