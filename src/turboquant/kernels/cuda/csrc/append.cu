// cache_append: `encode` writes the page that a chunk completes; `store` writes ring, sinks and readers. Where a chunk
// may complete several pages, `stats` takes the statistics of all and tracks them from page to page, then `rows` writes
// the pages: the instructions of one kernel fit into their cache, those of all do not. Sums run in the order of
// maths/exact.py.
#include "page.cuh"

DEVICE float* state_at(const Call& c, int b, int h, i64 page) {
  return c.tracker + ((i64(b) * c.kept + u32(page) % u32(c.kept)) * c.heads + h) * 3 * D;
}
DEVICE float blended(float old, float a, float add, float b) { return a * old + b * add; }

// what a page of keys is encoded with: mean, variance and reader power; what its rows are multiplied with, see below
typedef float Stats[3][D], Factors[3][D];
struct Memory {
  Work work;
  __align__(16) Factors factors;
  Stats stats;
  int hot[HOT ? HOT : 1];
  Marks marks;
};
static_assert(sizeof(Memory) <= MEMORY, "_memory() of append.py");
DEVICE void tables(Lookup& look, const u64* from) {
#pragma unroll
  for (int n = 0; n < (int(sizeof look) / 16 + THREADS - 1) / THREADS; n++) {
    const int i = n * THREADS + threadIdx.x;
    if (i < int(sizeof look) / 16) ((uint4*)&look)[i] = ((const uint4*)from)[i];
  }
}
// The statistics of the keys, blended with the tracker, which goes on.
DEVICE void blend(const Call& c, const Page& p, Stats& stats, const float (&own)[4]) {
  const int kind = threadIdx.x / QUADS, ch = threadIdx.x % QUADS * 4;
  if (kind > 2) return;
  float before[4], out[4], after[4];
  get_four(state_at(c, p.b, p.h, p.index + c.kept - 1) + kind * D + ch, before);  // the slot of page index - 1
#pragma unroll
  for (int i = 0; i < 4; i++) {
    out[i] = kind && p.index ? blended(before[i], BLEND_OLD, own[i], BLEND_NEW) : own[i];
    after[i] = p.index ? blended(before[i], DECAY_OLD, own[i], DECAY_NEW) : own[i];
  }
  put_four(out, stats[kind] + ch), put_four(after, state_at(c, p.b, p.h, p.index) + kind * D + ch);
}
// Where a chunk completes several pages: of a KV head the own statistics become what each page is encoded with, and the
// tracker's last states are kept. By one block, four channels of one kind a thread, from page to page.
constexpr int AT_ONCE = 8;
DEVICE void track(const Call& c, const Page& p, i64 last) {
  const int i = threadIdx.x * 4;
  const i64 first = p.start / P;
  if (i >= 3 * D) return;
  float* at = states_at(c, p) - p.at * 6 * D + i;
  float state[4] = {};
  if (first) get_four(state_at(c, p.b, p.h, first - 1) + i, state);
#pragma unroll 1
  for (i64 from = first; from < last; from += AT_ONCE, at += AT_ONCE * 6 * D) {
    float4 x[AT_ONCE];
#pragma unroll
    for (int n = 0; n < AT_ONCE; n++)
      if (from + n < last) x[n] = __ldcg((const float4*)(at + n * 6 * D));
#pragma unroll
    for (int n = 0; n < AT_ONCE; n++) {
      if (from + n >= last) break;
      float y[4] = {x[n].x, x[n].y, x[n].z, x[n].w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float own = y[j];
        if (from + n) y[j] = blended(state[j], BLEND_OLD, own, BLEND_NEW);  // the first page has no past
        state[j] = from + n ? blended(state[j], DECAY_OLD, own, DECAY_NEW) : own;
      }
      if (i >= D) put_four(y, at + n * 6 * D);
      if (from + n + c.kept >= last) put_four(state, state_at(c, p.b, p.h, from + n) + i);
    }
  }
}
// Channels lane + 32·i of a warp.
constexpr int EACH = (D + 31) / 32;
DEVICE float sum_of(const float (&x)[EACH], int lane) {  // of D numbers, in the order of lane_sum
  float sum = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const float other = __shfl_xor_sync(~0u, x[i], 16);
    sum = i ? sum + x[i] : x[i];
    if (32 * i + 16 < D) sum += other;
  }
  for (int n = 8; n; n >>= 1) sum += __shfl_xor_sync(~0u, sum, n);
  return __shfl_sync(~0u, sum, 0);
}
template <class Of> DEVICE float top_of(int lane, Of of) {
  float top = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (lane + 32 * i < D) top = fmaxf(top, of(i));
  return warp_top(top);
}
// a bit a channel i: whether it is one of the HOT largest, the first of equals
DEVICE u32 choose_hot(const float (&rest)[EACH], int lane) {
  int bits[EACH];  // of numbers from 0 on, which are ordered as their bits are
  u32 hot = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) bits[i] = lane + 32 * i < D ? int(__float_as_uint(rest[i])) : -1;
#pragma unroll 1
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
      if (at == lane + 32 * i) bits[i] = -1, hot |= 1u << i;
  }
  return hot;
}
// each hot channel by a warp: those from `first` on, every `step`-th
DEVICE void hot_channels(const Source& keys, const float* mean_of, const int* hot, u64 odd, u8* page, int first,
                         int step) {
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int h = first; h < HOT; h += step) {
    const int ch = hot[h];
    const u16 mean_half = fp16(mean_of[ch]);
    const float mean = half_(mean_half), a = finite(wide(keys.row(lane)[ch])) - mean;
    const float b = finite(wide(keys.row(lane + 32)[ch])) - mean;
    const float top = fmaxf(odd >> lane & 1 ? 0.f : fabsf(a), odd >> (lane + 32) & 1 ? 0.f : fabsf(b));
    const u16 hot_half = fp16_up(warp_top(top) / 127.f);
    const float hot_step = half_(hot_half);
    auto code = [&](float x) { return u8(int(fminf(fmaxf(rintf(divided(x, hot_step)), -127.f), 127.f))); };
    page[AT_HOT_CODES + h * P + lane] = code(a), page[AT_HOT_CODES + h * P + lane + 32] = code(b);
    if (lane == 0) *(u16*)(page + AT_HOT_MEAN + 2 * h) = mean_half, *(u16*)(page + AT_HOT_STEP + 2 * h) = hot_half;
  }
}
// From the statistics to s, hot channels and the stored means: the header of the keys, by one warp. For the rows: k
// becomes k / s less the stored mean, times the sign of its channel; nothing if it is hot. With 1 / s as a sum of two
// numbers, the first two of the factors, the quotient of a 16-bit number is correctly rounded.
DEVICE void take_header(const float* stats, float* factors, int* hot_at, u8* page) {
  const int lane = threadIdx.x & 31;
  float s[EACH], square[EACH], rest[EACH], mean[EACH];
  const float *key = stats + D + lane, *query = key + D;
  const float floor_k = 1e-8f * top_of(lane, [&](int i) { return key[32 * i]; }) + 1e-20f;
  const float floor_q = 1e-8f * top_of(lane, [&](int i) { return query[32 * i]; }) + 1e-20f;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    if (lane + 32 * i >= D) continue;
    const float k = __fsqrt_rn(fmaxf(key[32 * i], 0.f) + floor_k), q = __fsqrt_rn(fmaxf(query[32 * i], 0.f) + floor_q);
    s[i] = __fsqrt_rn(k / q), square[i] = s[i] * s[i], rest[i] = k * q;
  }
  const float unit = __fsqrt_rn(sum_of(square, lane) / float(D));
  const u32 hot = choose_hot(rest, lane);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int ch = lane + 32 * i;
    mean[i] = 0;
    if (ch >= D) continue;
    const int log = int(fminf(fmaxf(rintf(log2f(s[i] / unit) * S_STEPS) + 128.f, 0.f), 255.f));
    page[AT_LOG_S + ch] = u8(log), s[i] = S_TABLE[log];
    if (!(hot >> i & 1)) mean[i] = stats[ch] / s[i];
  }
  const u16 step_half = fp16_up(top_of(lane, [&](int i) { return fabsf(mean[i]); }) / 127.f);
  const float step = half_(step_half);
  int before = 0;  // hot channels
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int ch = lane + 32 * i;
    const bool is_hot = hot >> i & 1;
    const u32 mask = __ballot_sync(~0u, is_hot);
    const int at = before + __popc(mask & ((1u << lane) - 1));
    before += __popc(mask);
    if (ch >= D) continue;
    const float code = fminf(fmaxf(rintf(divided(mean[i], step)), -127.f), 127.f);
    page[AT_MEAN + ch] = u8(int(code));
    const float sign = is_hot ? 0.f : sign_of(ch), r = __frcp_rn(s[i]);
    factors[ch] = r * sign, factors[D + ch] = fmaf(-s[i], r, 1.f) * r * sign, factors[2 * D + ch] = code * step * sign;
    if (is_hot) hot_at[at] = ch, page[AT_HOT_INDEX + at] = u8(ch);
  }
  if (lane == 0) *(u16*)(page + AT_MEAN_STEP) = step_half;
  for (int i = lane; i < GAPS; i += 32) page[GAP[i]] = 0;  // bytes between the fields
}
DEVICE void get_sixteen(const float* from, float (&y)[16]) {
#pragma unroll
  for (int i = 0; i < 16; i += 4) get_four(from + i, *(float(*)[4])(y + i));
}
// Rows to shared memory, with the butterflies over sixteen neighbours, which are in one thread. ODD: some are beyond
// what is stored. A loop, for the instructions of all that rows need fit into their cache; a round's loads are under way
// while the round before it is computed.
template <bool KEY, bool ODD> DEVICE void put_rows(Ahead& raw, const Source& source, Work& w, const Factors& factors) {
  float r[16], low[16], rest[16];
  u32 signs[8];
  const auto channels = [&](int group) {
    if (KEY) {
      const int at = 16 * group;
      get_sixteen(factors[0] + at, r), get_sixteen(factors[1] + at, low), get_sixteen(factors[2] + at, rest);
    }
    const u32 positive = SIGN_BITS[group / 2] >> (group % 2 * 16);
#pragma unroll
    for (int j = 0; j < 8; j++)
      signs[j] = (positive >> (2 * j) & 1 ? 0u : 0x8000u) | (positive >> (2 * j + 1) & 1 ? 0u : 0x80000000u);
  };
  if (Ahead::FIXED) channels(Ahead::group(0));  // before the loop, or they take registers outside of it
#pragma unroll 1
  for (int i = 0; i < Ahead::ROUNDS; i++) {
    const int group = Ahead::group(i), t = Ahead::row(i);
    if (!Ahead::FIXED) channels(group);
    const uint4 a = raw.x[0][0], b = raw.x[0][1];
    raw.next(source, i + 2);
    if (P * SIXTEENS % THREADS && t >= P) break;
    const u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    float y[16];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const u32 x = KEY ? words[j] : words[j] ^ signs[j];
      y[2 * j] = wide_low(x), y[2 * j + 1] = wide_high(x);
    }
#pragma unroll
    for (int j = 0; j < 16; j++) {
      if (ODD) y[j] = finite(y[j]);
      if (KEY) y[j] = fmaf(y[j], r[j], y[j] * low[j]) - rest[j];
    }
    rotate_sixteen(y);
    put_sixteen(y, w.rows[t] + 16 * group);
  }
}
// keys or values of a page, once their factors are there; begins without a barrier, ends with one
DEVICE void encode_part(bool key, Ahead& raw, const Source& source, Work& w, const Factors& factors, u64 odd,
                        u8* page) {
  if (key) {
    if (odd) put_rows<true, true>(raw, source, w, factors);
    else put_rows<true, false>(raw, source, w, factors);
  } else {
    if (odd) put_rows<false, true>(raw, source, w, factors);
    else put_rows<false, false>(raw, source, w, factors);
  }
  u8 *scales = page + (key ? AT_KEY_SCALE : AT_VALUE_SCALE), *codes = page + (key ? AT_KEY_CODES : AT_VALUE_CODES);
  u16 base;
  if (KEY_BITS == VALUE_BITS || !key) base = encode_rows<VALUE_BITS>(w, odd, scales, codes);
  else base = encode_rows<KEY_BITS>(w, odd, scales, codes);
  if (threadIdx.x == 0) *(u16*)(page + (key ? AT_KEY_BASE : AT_VALUE_BASE)) = base;
}
DEVICE u8* page_at(const Call& c, const Page& p) {  // null if it is out of the window and has no place
  const int id = p.index < c.width ? c.table[i64(p.b) * c.width + p.index] : -1;
  return id >= 0 && id < c.pool ? c.pages + (i64(id) * c.heads + p.h) * PAGE_BYTES : nullptr;
}
extern "C" __global__ void __launch_bounds__(THREADS, D > 128 ? 2 : 4) encode(const __grid_constant__ Call c) {
  extern __shared__ __align__(128) u8 memory[];
  Memory& m = *(Memory*)memory;
  wait_for_previous(), start_next();
  if (threadIdx.x == 0 && blockIdx.y == 0) c.starts[blockIdx.z] = c.length[blockIdx.z];
  Page p;
  if (!page_of(c, blockIdx.z, blockIdx.y, 0, p)) return;
  u8* page = page_at(c, p);
  float own[4];
  const u64 odd = page_stats(c, p, m.work.sums, m.marks, own);
  blend(c, p, m.stats, own);
  if (!page) return;
#pragma unroll 1
  for (int key = 0; key < 2; key++) {
    const Source source(c, p, !key);
    Ahead raw;
    raw.load(source);
    if ((key ? KEY_BITS : VALUE_BITS) < 8) tables(m.work.look, key ? KEY_LOOKUP : VALUE_LOOKUP);
    if (key && threadIdx.x < 32) take_header(m.stats[0], m.factors[0], m.hot, page);
    __syncthreads();
    if (key) hot_channels(source, m.stats[0], m.hot, odd, page, threadIdx.x / 32, THREADS / 32);
    encode_part(key, raw, source, m.work, m.factors, odd, page);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, D > 128 ? 2 : 4) stats(const __grid_constant__ Call c) {
  __shared__ Sums sums;
  __shared__ Marks marks;
  __shared__ u32 arrived;
  const int tid = threadIdx.x;
  wait_for_previous(), start_next();
  if (tid == 0 && blockIdx.x == 0 && blockIdx.y == 0) c.starts[blockIdx.z] = c.length[blockIdx.z];
  Page p;
  if (!page_of(c, blockIdx.z, blockIdx.y, blockIdx.x, p)) return;
  float own[4];
  const u64 odd = page_stats(c, p, sums, marks, own);
  if (tid < 3 * QUADS) put_four(own, states_at(c, p) + tid * 4);
  if (tid == 0) c.masks[2 * place(c, p)] = odd, c.masks[2 * place(c, p) + 1] = marks.bad[0] | u64(marks.bad[1]) << 32;
  __syncthreads();
  if (tid == 0) fence(), arrived = atomicAdd(c.arrived + head_of(c, p), 1u) + 1;
  __syncthreads();
  const i64 last = (p.start + c.tokens) / P;
  if (arrived == u32(last - p.start / P)) fence(), track(c, p, last);  // by the last block of a KV head
}

// A block a page writes values, once the head's pages have statistics; one writes keys, once they have headers, which
// other blocks write, a warp a page. Nobody waits in vain: blocks of lower numbers start first, those of `stats` before.
extern "C" __global__ void __launch_bounds__(THREADS, D > 128 ? 2 : 4) rows(const __grid_constant__ Call c) {
  extern __shared__ __align__(128) u8 memory[];
  Work& w = *(Work*)memory;
  Factors& factors = *(Factors*)(memory + sizeof w);
  constexpr int WARPS = THREADS / 32;
  const int tid = threadIdx.x, b = blockIdx.z, h = blockIdx.x % u32(c.heads), groups = (c.several + WARPS - 1) / WARPS;
  u32 *with_stats = c.arrived + b * c.heads + h, *with_header = with_stats + c.batch * c.heads;
  int at = blockIdx.x / u32(c.heads) - c.several / 2;  // half of the values, headers, the other half, keys
  Page p;
  start_next();
  if (at >= 0 && at < groups) {
    const bool there = page_of(c, b, h, at * WARPS + tid / 32, p);
    wait_for_previous();  // for the tracker
    u8* page = there ? page_at(c, p) : nullptr;
    if (!there) return;
    int* hot = (int*)memory + tid / 32 * MAX_HOT;
    if (page) {
      take_header(states_at(c, p), states_at(c, p) + 3 * D, hot, page);
      __syncwarp();
      hot_channels(Source(c, p, false), states_at(c, p), hot, c.masks[2 * place(c, p)], page, 0, 1);
    }
    __syncwarp();
    if (tid % 32 == 0) fence(), atomicAdd(with_header, 1u);
    return;
  }
  at += c.several / 2 - (at < 0 ? 0 : groups);
  const bool key = at >= c.several;
  if (!page_of(c, b, h, key ? at - c.several : at, p)) return;
  const Source source(c, p, !key);
  Ahead raw;
  raw.load(source);
  if ((key ? KEY_BITS : VALUE_BITS) < 8) tables(w.look, key ? KEY_LOOKUP : VALUE_LOOKUP);
  u8* page = page_at(c, p);
  if (!page) return;
  if (tid == 0) wait_until(key ? with_header : with_stats, u32((p.start + c.tokens) / P - p.start / P));
  __syncthreads();
  const u64 odd = __ldcg(c.masks + 2 * place(c, p));
  if (key) {
    if (tid < 3 * D / 4) ((float4*)factors)[tid] = __ldcg((const float4*)(states_at(c, p) + 3 * D) + tid);
    __syncthreads();
  }
  encode_part(key, raw, source, w, factors, odd, page);
}

// a block a token that is not in a page of the chunk, or that ring, sinks or readers keep
extern "C" __global__ void __launch_bounds__(256) store(const __grid_constant__ Call c) {
  const int b = blockIdx.y, tid = threadIdx.x;
  const int n = int(blockIdx.x) < c.front ? blockIdx.x : c.tokens - gridDim.x + blockIdx.x;
  const int all = 2 * c.heads * (D / 8);  // keys, values
  const auto token = [&](int i) {
    const int h = i / (D / 8) % c.heads, at = i % (D / 8) * 8;
    const u16* keys = c.k + b * c.k_b + h * c.k_h + n * c.k_n;
    return *(const uint4*)((i < all / 2 ? keys : c.v + b * c.v_b + h * c.v_h + n * c.v_n) + at);
  };
  uint4 x = tid < all ? token(tid) : uint4{};  // before the kernel before ends, which does not write them
  wait_for_previous();
  const i64 start = c.starts[b], pos = start + n, paged = c.several ? (start + c.tokens) / P * P : start;
  const bool ring = n >= c.tokens - c.slots, sink = pos < c.sinks;
  bool odd = false;
  for (int i = tid; i < all; i += blockDim.x) {
    const bool values = i >= all / 2;
    const int h = i / (D / 8) % c.heads, at = i % (D / 8) * 8;
    if (i != tid) x = token(i);
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
  if (c.several && blockIdx.x == 0)
    for (int i = tid; i < 2 * c.heads; i += blockDim.x) c.arrived[(i % 2 * c.batch + b) * c.heads + i / 2] = 0;
  if (tid == 0 && blockIdx.x == 0) c.length[b] = start + c.tokens;
}
