// Decode attention: each warp takes an equal share of all sequences' and heads' tiles of 16 tokens and pages, in order, and
// writes one partial result per KV head that it meets and kind of token; `merge` adds them up, in order.
#include "exact.cuh"
#include "packed.cuh"

// Halves (keys, then values) of tiles or pages on their way to a warp's buffers, in order.
struct Stream {
  Scratch& x;
  int lane;
  u32 asked, taken;
  DEVICE void ask(const void* from, int bytes) {
    copy(x.buffer[asked % BUFFERS], from, bytes, x.bar + asked % BUFFERS, lane);
    asked++;
  }
  DEVICE const u8* next() {
    const int buffer = taken % BUFFERS;
    wait(x.bar + buffer, taken / BUFFERS & 1);
    taken++;
    return x.buffer[buffer];
  }
};

// tiles of 16 ring slots, `first` to `last`, then of 16 sinks
DEVICE void exact_items(const Call& c, const Rows& w, int first, int last, Stream& stream, int lane, Softmax& soft) {
  const int tiles = (c.slots + 15) / 16, g = lane >> 2, t = lane & 3;
  const ExactQuery q(c, w, lane);
  u64 some = 0, all = 0;  // tiles of which rows read something, everything
  for (int i = first; i < min(last, tiles); i++) {
    const Token j = in_ring(c, w, i * 16 + (lane & 15), 0, nullptr);
    const bool first_row = reads(c, w, j, int(w.start)), last_row = reads(c, w, j, int(w.start) + c.tokens - 1);
    if (__any_sync(~0u, read_at_all(c, w, j))) some |= u64(1) << i;
    if (__all_sync(~0u, j.ring && first_row && last_row)) all |= u64(1) << i;
  }
  const i64 head = (i64(w.b) * c.heads + w.h) * c.slots;
  u64 coming = some;
  bool values = false;
  auto ask = [&] {
    if (!coming) return no_copy();
    const int slot = (__ffsll(coming) - 1) * 16;
    stream.ask((values ? c.ring_v : c.ring_k) + (head + slot) * D, min(16, c.slots - slot) * D * 2);
    if (values) coming &= coming - 1;
    values = !values;
  };
  for (int i = 0; i < BUFFERS; i++) ask();
  for (; some; some &= some - 1) {
    const int tile = __ffsll(some) - 1, slot = tile * 16;
    const u16* keys = (const u16*)stream.next();
    const u16* rows = (const u16*)stream.next();
    if (all >> tile & 1) {
      const u16* const key[2] = {keys + g * D, keys + (8 + g) * D};
      const u16* const value[4] = {rows + 2 * t * D, rows + (2 * t + 1) * D, rows + (8 + 2 * t) * D, rows + (9 + 2 * t) * D};
      float logits[TALL][2][4];
      exact_logits(q, key, lane, logits);
      exact_values<true>(c, w, q, value, [](int) { return Token{}; }, lane, logits, soft);
    } else {
      auto token_of = [&](int i) {
        Token j = in_ring(c, w, slot + i, slot, keys);
        if (j.ring && j.pos >= 0) j.v = rows + i * D;
        return j;
      };
      exact_some(c, w, q, token_of, lane, soft);
    }
    __syncwarp();
    ask(), ask();
  }
  for (int i = max(0, first - tiles); i < last - tiles; i++)
    exact_some(c, w, q, [&](int n) { return in_sinks(c, w, i * 16 + n); }, lane, soft);
}

DEVICE void packed_items(const Call& c, const Rows& w, int first, int last, Stream& stream, int lane,
                         const Tables& tables, const float (&sign)[(D + 31) / 32], Softmax& soft) {
  Scratch& x = stream.x;
  const int pages = max(0, last - first);
  const int* table = c.table + i64(w.b) * c.width + first;
  auto page_at = [&](int i) { return min(__ldg(table + i), c.pool - 1); };
  auto ask = [&](int half) {
    if (half >= 2 * pages) return no_copy();
    const u8* from = c.pages + (i64(max(0, page_at(half / 2))) * c.heads + w.h) * PAGE_BYTES;
    if (half & 1) stream.ask(from + VALUE_PART, PAGE_BYTES - VALUE_PART);
    else stream.ask(from, VALUE_PART);
  };
  for (int i = 0; i < BUFFERS; i++) ask(i);
  const int g = lane >> 2, t = lane & 3;
  for (int i = 0; i < pages; i++) {
    u32 q[E / 2];
    const u16* row = c.q + query_at(c, w, lane / LANES);
    load_query(row, lane, q);
    const u8* page = stream.next();
    const float unit = half_(*(const u16*)(page + AT_VALUE_BASE)) * (VALUE_UNIT / TOP);
    read_header(page, x, lane, sign);
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      if (m) row = c.q + query_at(c, w, m * ROWS + lane / LANES), load_query(row, lane, q);
      turn_query(c, row, page, x, m, lane, q);
    }
    __syncwarp();
    float logits[TILES][NT][2];
    logits_of(tables, page, x, lane, logits);
    __syncwarp();
    ask(2 * i + BUFFERS);
    const i64 from = i64(first + i) * P;
    const bool whole = from >= c.sinks && from + P - 1 <= w.start - c.ring && page_at(i) >= 0 &&
                       (!c.window || w.start + c.tokens - 1 - from < c.window);
    if (CAP || !whole) {
#pragma unroll
      for (int m = 0; m < TILES; m++) {
        const i64 at = position(c, w, m * ROWS + g % ROWS);
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const i64 pos = from + token(j, 2 * t + e);
            const bool see = pos >= c.sinks && pos <= at - c.ring && (!c.window || at - pos < c.window) && page_at(i) >= 0;
            logits[m][j][e] = see ? capped(c, logits[m][j][e]) : NEG;
          }
      }
    }
    const u8* values = stream.next();
    read_value_scales(values, x, lane);
    Weights weights[TILES];
#pragma unroll
    for (int m = 0; m < TILES; m++) weigh(x, lane, logits[m], unit, soft, m, weights[m]);
    add_values(tables, values + AT_VALUE_CODES - VALUE_PART, lane, weights, unit, soft);
    __syncwarp();
    ask(2 * i + 1 + BUFFERS);
  }
}

// where the partial result of a warp and KV head lies: both only grow along the work
DEVICE i64 slot_of(const Call& c, int block, int warp, i64 pair) {
  return block * (c.warps + i64(c.batch) * c.heads) + warp + pair;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) attend(const __grid_constant__ Call c) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ i64 open[WARPS];
  const int lane = threadIdx.x & 31, own = uniform(int(threadIdx.x >> 5)), warp = blockIdx.x * WARPS + own;
  Scratch& x = ((Scratch*)memory)[own];
  for (int i = lane; i < int(sizeof(x.query) + sizeof(x.hot_hi) + sizeof(x.hot_lo)) / 4; i += 32) x.query[0][i] = 0;
  copies_init(x.bar, lane);
  Stream stream{x, lane, 0, 0};
  const Tables tables(c.batch >> 31);
  float sign[(D + 31) / 32];
#pragma unroll
  for (int i = 0; i < (D + 31) / 32; i++) sign[i] = SIGN_BITS[i] >> lane & 1 ? 1.f : -1.f;
  i64 from = 0, to = 0;
  {
    const i64 total = locate(c, 0, lane, warp == 0 && blockIdx.y == 0).total, warps = min(total, i64(c.warps));  // none without an item
    if (warp < warps) from = total * warp / warps, to = total * (warp + 1) / warps;
  }
  Softmax soft;
  Rows w{};
  i64 pair = -1;
  bool kept = false;
  while (from < to) {
    const Where at = locate(c, from, lane, false);
    const Span span = span_of(c, at.b);
    const int h = int(from - at.before) / span.items, item = int(from - at.before) % span.items;
    const int count = int(min(to - from, i64(span.items - item)));
    w = {at.b, h, int(blockIdx.y), 0, span.start};
    w.used = min(R, c.group * c.tokens - w.block * R);
    pair = i64(at.b) * c.heads + h;
    const i64 slot = slot_of(c, w.block, warp, pair) * 2 * R;
    from += count;
    if (item < c.exact) {
      soft.clear();
      exact_items(c, w, item, min(item + count, c.exact), stream, lane, soft);
      soft.write(w, c.part + slot * D, c.top + slot * 2, false, lane);
    }
    if (item + count > c.exact) {
      const int first = span.first + max(0, item - c.exact), last = min(span.last, span.first + item + count - c.exact);
      soft.clear();
      packed_items(c, w, first, last, stream, lane, tables, sign, soft);
      kept = from == to;
      const i64 place = slot + R;
      if (kept) soft.write(w, (float*)x.buffer, x.row[0], true, lane);
      else soft.write(w, c.part + place * D, c.top + place * 2, true, lane);
    }
  }
  // Warps of a block add up what they ended with, if it is pages of the same KV head: the first one's slot holds the sum.
  static_assert(R * D * 4 <= BUFFERS * HALF, "partial results do not fit the buffers");
  if (lane == 0) open[own] = kept ? pair : -1;
  __syncthreads();
  if (!kept) return;
  int first = own, last = own + 1;
  while (first > 0 && open[first - 1] == pair) first--;
  while (last < WARPS && open[last] == pair) last++;
  const Scratch* all = (const Scratch*)memory;
  const i64 slot = slot_of(c, w.block, blockIdx.x * WARPS + first, pair) * 2 * R + R;
  for (int i = (own - first) * 32 + lane; i < w.used * (D / 4); i += (last - first) * 32) {
    const int r = i / (D / 4);
    float top = NEG, total = 0;
    for (int k = first; k < last; k++) top = fmaxf(top, all[k].row[0][r * 2]);
    const float base = top == NEG ? 0.f : top;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int k = first; k < last; k++) {
      const float weight = exp2_(all[k].row[0][r * 2] - base);
      const float4 v = ((const float4*)all[k].buffer)[i];
      total = fmaf(all[k].row[0][r * 2 + 1], weight, total);
      sum.x = fmaf(v.x, weight, sum.x), sum.y = fmaf(v.y, weight, sum.y);
      sum.z = fmaf(v.z, weight, sum.z), sum.w = fmaf(v.w, weight, sum.w);
    }
    ((float4*)(c.part + slot * D))[i] = sum;
    if (i % (D / 4) == 0) *(float2*)(c.top + (slot + r) * 2) = make_float2(top, total);
  }
}

// one block of WIDE threads a query row, a thread a channel
extern "C" __global__ void __launch_bounds__((D + 31) / 32 * 32) merge(const __grid_constant__ Call c) {
  constexpr int WIDE = (D + 31) / 32 * 32;
  __shared__ float rotated[WIDE];
  const int ch = threadIdx.x, rows = c.group * c.tokens;
  const int row = blockIdx.x % rows, h = blockIdx.x / rows % c.heads, b = blockIdx.x / rows / c.heads;
  const int block = row / R, r = row % R;
  wait_for_previous();
  const i64 items = c.plan[2 * b + 1], total = c.plan[2 * c.batch], warps = min(total, i64(c.warps));
  const i64 pair = i64(b) * c.heads + h, start = c.plan[2 * b] + h * items;
  auto warp_of = [&](i64 item) { return int(((item + 1) * warps - 1) / total); };
  const int low0 = warp_of(start), count0 = warp_of(start + c.exact - 1) - low0 + 1;
  // of the pages: a sum in the first warp of each block, and the last warp by itself if it went on to other work
  const int low1 = warp_of(start + c.exact), high1 = warp_of(start + items - 1);
  const bool alone = total * (high1 + 1) / warps > start + items;
  const int sums = high1 - alone < low1 ? 0 : (high1 - alone) / WARPS - low1 / WARPS + 1;
  const int count = count0 + (items > c.exact ? sums + alone : 0);
  auto slot = [&](int i) -> i64 {
    if (i < count0) return slot_of(c, block, low0 + i, pair) * 2 * R + r;
    i -= count0;
    return slot_of(c, block, i == sums ? high1 : max(low1, (low1 / WARPS + i) * WARPS), pair) * 2 * R + R + r;
  };
  const int lane = ch & 31;
  const float sink = c.sink_logits ? c.sink_logits[h * c.group + row / c.tokens] * 1.4426950408889634f : NEG;
  float top = sink;
  for (int i = lane; i < count; i += 32) top = fmaxf(top, c.top[slot(i) * 2]);
  for (int n = 16; n; n >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, n));
  const float base = top == NEG ? 0.f : top;
  float sum = c.sink_logits ? exp2_(sink - base) : 0.f, plain = 0, y = 0;
#pragma unroll 8
  for (int i = 0; i < count; i++) {
    const i64 s = slot(i);
    const float2 own = *(const float2*)(c.top + s * 2);
    const float weight = exp2_(own.x - base), v = ch < D ? c.part[s * D + ch] * weight : 0.f;
    sum = fmaf(own.y, weight, sum);
    plain += i < count0 ? v : 0.f, y += i < count0 ? 0.f : v;
  }
  // back from the rotation: within the warp, then between warps
  for (int n = 1; n < min(BLOCK, 32); n *= 2) {
    const float other = __shfl_xor_sync(~0u, y, n);
    y = lane & n ? other - y : y + other;
  }
  if (BLOCK > 32) {
    rotated[ch] = y;
    __syncthreads();
    y = 0;
    for (int n = 0; n < BLOCK / 32; n++) {
      const float other = rotated[n * 32 + lane];
      y += __popc(n & (ch / 32)) & 1 ? -other : other;
    }
  }
  if (ch >= D) return;
  const float sign = SIGN_BITS[ch / 32] >> lane & 1 ? NORM : -NORM;
  c.out[i64(blockIdx.x) * D + ch] = u16(two_16((plain + sign * y) / (sum == 0 ? 1.f : sum), 0));
}
