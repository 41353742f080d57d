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
  const int tiles = (c.slots + 15) / 16, g = lane >> 2;
  const i64 head = i64(w.b) * c.heads + w.h;
  auto tile_at = [&](int i) -> Tile { return {16 * (i < tiles ? i : i - tiles), i < tiles, nullptr, nullptr}; };
  bool plain = false;
  auto after = [&](int i) {  // the next tile of which some row reads something; plain: all rows read all of it
    for (i++; i < last; i++) {
      const Token j = token_in(c, w, tile_at(i), lane & 15);
      if (!__any_sync(~0u, read_at_all(c, w, j))) continue;
      plain = __all_sync(~0u, j.ring && reads(c, w, j, int(w.start)) && reads(c, w, j, w.newest));
      break;
    }
    return i;
  };
  auto ask = [&](int i, const u16* ring, const u16* sinks) {
    if (i >= last) return no_copy();
    const Tile tile = tile_at(i);
    const int slots = tile.ring ? c.slots : c.sinks;
    stream.ask((tile.ring ? ring : sinks) + (head * slots + tile.first) * D, min(16, slots - tile.first) * D * 2);
  };
  int i = after(first - 1);
  ask(i, c.ring_k, c.sink_k), ask(i, c.ring_v, c.sink_v);
  const ExactQuery q(c, w, lane);
  while (i < last) {
    Tile tile = tile_at(i);
    const bool all = plain;
    tile.keys = (const u16*)stream.next();
    const u16* key[2] = {tile.keys + g * D, tile.keys + (8 + g) * D};
    if (!all) key[0] = token_in(c, w, tile, g).k, key[1] = token_in(c, w, tile, 8 + g).k;
    float logits[TALL][2][4];
    exact_logits(q, key, lane, logits);
    __syncwarp();
    i = after(i);
    ask(i, c.ring_k, c.sink_k);
    tile.values = (const u16*)stream.next();
    exact_values(c, w, q, tile, all, lane, logits, soft);
    __syncwarp();
    ask(i, c.ring_v, c.sink_v);
  }
}

DEVICE void packed_items(const Call& c, const Rows& w, int first, int last, Stream& stream, int lane,
                         const Tables& tables, const float (&sign)[(D + 31) / 32], Softmax& soft) {
  Scratch& x = stream.x;
  const int pages = max(0, last - first);
  const int* table = c.table + i64(w.b) * c.width + first;
  auto page_at = [&](int i) { return i < pages ? min(__ldg(table + i), c.pool - 1) : -1; };
  auto ask = [&](int i, int number, bool values) {
    if (i >= pages) return no_copy();
    const u8* from = c.pages + (i64(max(0, number)) * c.heads + w.h) * PAGE_BYTES;
    if (values) stream.ask(from + VALUE_PART, PAGE_BYTES - VALUE_PART);
    else stream.ask(from, VALUE_PART);
  };
  int number = page_at(0), next = page_at(1);
  ask(0, number, false), ask(0, number, true);
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
    ask(i + 1, next, false);
    const i64 from = i64(first + i) * P;
    const bool whole = from >= c.sinks && from + P - 1 <= w.start - c.ring && number >= 0 &&
                       (!c.window || w.start + c.tokens - 1 - from < c.window);
    if (CAP || !whole) {
#pragma unroll
      for (int m = 0; m < TILES; m++) {  // row g reads tokens low to high of the page
        const i64 at = position(c, w, m * ROWS + g % ROWS);
        const int low = int(max(max(i64(c.sinks), c.window ? at - c.window + 1 : 0) - from, i64(0)));
        const int high = number < 0 ? -1 : int(min(at - c.ring - from, i64(P)));
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int pos = token(j, 2 * t + e);
            logits[m][j][e] = pos >= low && pos <= high ? capped(c, logits[m][j][e]) : NEG;
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
    ask(i + 1, next, true);
    number = next, next = page_at(i + 2);
  }
}

// that have work: a page at least, or as much in tiles
DEVICE int warps_of(const Call& c, int total) { return min((total + PAGE_UNITS - 1) / PAGE_UNITS, c.warps); }
// where the partial result of a warp and KV head lies: both only grow along the work
DEVICE i64 slot_of(const Call& c, int block, int warp, i64 pair) {
  return block * (c.warps + i64(c.batch) * c.heads) + warp + pair;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) attend(const __grid_constant__ Call c) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ i64 open[WARPS];
  const int lane = threadIdx.x & 31, own = uniform(int(threadIdx.x >> 5)), warp = blockIdx.x * WARPS + own;
  Scratch& x = ((Scratch*)memory)[own];
  for (int i = lane; i < int(sizeof(x.turned)) / 4; i += 32) ((u32*)&x.turned)[i] = 0;
  copies_init(x.bar, lane);
  Stream stream{x, lane, 0, 0};
  const Tables tables(c.batch >> 31);
  float sign[(D + 31) / 32];
#pragma unroll
  for (int i = 0; i < (D + 31) / 32; i++) sign[i] = SIGN_BITS[i] >> lane & 1 ? 1.f : -1.f;
  start_next();
  wait_for_previous();
  int from = 0, to = 0;
  {
    const int total = locate(c, 0, lane, warp == 0 && blockIdx.y == 0).total, warps = warps_of(c, total);
    if (warp < warps) from = ratio(total, warp, warps), to = ratio(total, warp + 1, warps);  // none without a unit
  }
  Softmax soft;
  Rows w{};
  i64 pair = -1;
  bool kept = false;
  const int exact = c.exact * TILE_UNITS;
  while (from < to) {
    const Where at = locate(c, from, lane, false);
    const Span span = span_of(c, at.b);
    const int h = (from - at.before) / span.units, begin = from - at.before - h * span.units;
    const int end = begin + min(to - from, span.units - begin);
    const int newest = int(span.start) + c.tokens - 1;
    w = {at.b, h, int(blockIdx.y), 0, span.start, newest, newest % c.slots};
    w.used = min(R, c.group * c.tokens - w.block * R);
    pair = i64(at.b) * c.heads + h;
    const i64 slot = slot_of(c, w.block, warp, pair) * 2 * R;
    from += end - begin;
    // whose first unit it is takes a tile or a page
    if (begin < exact) {
      soft.clear();
      exact_items(c, w, (begin + TILE_UNITS - 1) / TILE_UNITS, (min(end, exact) + TILE_UNITS - 1) / TILE_UNITS, stream, lane, soft);
      soft.write(w, c.part + slot * D, c.top + slot * 2, false, lane);
    }
    if (end > exact) {
      auto page_of = [&](int unit) { return span.first + (max(0, unit - exact) + PAGE_UNITS - 1) / PAGE_UNITS; };
      soft.clear();
      packed_items(c, w, page_of(begin), min(span.last, page_of(end)), stream, lane, tables, sign, soft);
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
  start_next();
  wait_for_previous();
  const int units = c.plan[2 * b + 1], total = c.plan[2 * c.batch], warps = warps_of(c, total);
  const int start = c.plan[2 * b] + h * units, exact = c.exact * TILE_UNITS;
  const i64 pair = i64(b) * c.heads + h;
  auto warp_of = [&](int unit) { return ratio(unit + 1, warps, total, 1); };
  const int low0 = warp_of(start), count0 = warp_of(start + exact - 1) - low0 + 1;
  // of the pages: a sum in the first warp of each block, and the last warp by itself if it went on to other work
  const int low1 = warp_of(start + exact), high1 = warp_of(start + units - 1);
  const bool alone = ratio(total, high1 + 1, warps) > start + units;
  const int sums = high1 - alone < low1 ? 0 : (high1 - alone) / WARPS - low1 / WARPS + 1;
  const int count = count0 + (units > exact ? sums + alone : 0);
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
