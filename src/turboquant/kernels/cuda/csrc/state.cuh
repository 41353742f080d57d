// A call, a warp's place in it, and the running softmax of its rows.
#pragma once
#include "warp.cuh"

struct Call {  // mirrored by `_Call` in attention.py
  const u8* pages;
  const int* table;
  const i64* length;
  const u16 *ring_k, *ring_v, *sink_k, *sink_v, *q, *k, *v;
  const float* sink_logits;
  u16* out;
  float *part, *top;          // (slots, 2, R, D) and (slots, 2, R, 2), of warps: weighted values; maximum and sum
  float *cut_part, *cut_top;  // (blocks of rows, blocks, 2, R, D) and (…, 2), of blocks
  u32* arrived;               // (blocks of rows, batch, heads, R): blocks whose part is there; 0 before and after
  i64 q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n;
  int pool, width, batch, heads, group, tokens, ring, slots, sinks, window, exact, warps;
  float scale, cap;  // logits in powers of two
};

// Work is measured in units: a tile of 16 tokens, or a page, which is about as many bytes.
struct Span {  // a sequence's share: c.exact tiles of 16 tokens, then pages from `first` on
  i64 start;
  int first, last, units;
};
DEVICE Span span_of(const Call& c, int b) {
  const i64 start = c.length[b];
  // rows of a chunk of so many tokens read pages up to the one that holds position t - ring
  auto upto = [&](int tokens) {
    const i64 reach = start + tokens - 1 - c.ring;
    return min(min(reach < 0 ? 0 : reach / P + 1, start / P), i64(c.pool ? c.width : 0));
  };
  const i64 last = upto(c.tokens);
  const i64 behind = c.window ? start - c.window + 1 : 0;
  // in steps of eight pages and of a sixteenth: how work is cut into pieces rarely depends on the exact length; and as for
  // the longest chunk, so that it never depends on how many tokens come
  const int first = behind > 0 ? int(behind / P) & ~7 : 0;
  int pages = max(0, int(upto(MAX_TOKENS)) - first);
  const int grain = max(8, 1 << max(0, 28 - __clz(pages | 1)));
  pages = (pages + grain - 1) & -grain;
  return {start, first, int(last), c.exact + pages};
}

// The work of all sequences, in order of batch and head; the same for every block of rows.
struct Pair {  // a sequence and KV head
  int b, h, start;  // units before it
  Span span;
  DEVICE int end() const { return start + span.units; }
  DEVICE Pair known() const {  // to be the same in all lanes
    return {uniform(b), uniform(h), uniform(start), {uniform(int(span.start)), uniform(span.first), uniform(span.last), uniform(span.units)}};
  }
  // n further; behind the last one there is b = batch
  DEVICE void advance(const Call& c, int n) {
    h += n, start += n * span.units;
    while (h >= c.heads) {
      h -= c.heads, start -= h * span.units;
      if (++b == c.batch) return;
      span = span_of(c, b), start += h * span.units;
    }
  }
};
struct Work {  // of all sequences
  int units;
  bool even;  // each has as many
};
DEVICE Work work_of(const Call& c, int lane) {
  int total = 0, most = 0, least = 0x7FFFFFFF;
#pragma unroll 1
  for (int b = lane; b < c.batch; b += 32) {
    const int own = span_of(c, b).units;
    total += own, most = max(most, own), least = min(least, own);
  }
  return {uniform(warp_sum(total)) * c.heads, warp_max(most) == warp_min(least)};
}
DEVICE Pair pair_at(const Call& c, int x, int lane) {  // that holds unit x
  for (int base = 0, before = 0; base < c.batch; base += 32) {
    const int own = base + lane < c.batch ? span_of(c, base + lane).units * c.heads : 0;
    int upto = own;
    for (int i = 1; i < 32; i <<= 1) {
      const int other = __shfl_up_sync(~0u, upto, i);
      if (lane >= i) upto += other;
    }
    const u32 hit = __ballot_sync(~0u, before + upto > x);
    if (hit) {
      const int at = __ffs(hit) - 1;
      before += __shfl_sync(~0u, upto - own, at);
      const Span span = span_of(c, base + at);
      const int h = (x - before) / span.units;
      return Pair{base + at, h, before + h * span.units, span}.known();
    }
    before += __shfl_sync(~0u, upto, 31);
  }
  return {};
}
// Shares: units to warps that have work, those to blocks; all contiguous.
struct Shares {
  int total, warps, blocks;
  double per_warp, per_unit;  // one through warps; warps through units
  DEVICE Shares(const Call& c, const Work& work) : total(work.units) {
    warps = min(total, c.warps), blocks = min(warps, c.warps / WARPS);
    // Where all KV heads are as much work, blocks get whole ones, if few multiprocessors are idle then: few warps meet two,
    // and no block waits for another.
    const int pairs = c.batch * c.heads, most = c.warps / WARPS, each = (pairs + most - 1) / most;
    if (work.even && pairs % each == 0 && pairs / each * 24 >= most * 23) blocks = pairs / each, warps = min(total, blocks * WARPS);
    per_warp = 1. / warps, per_unit = double(warps) / total;
  }
  // of a warp the first unit: floor(warp · total / warps); halves keep the products off whole numbers
  DEVICE int unit(int warp) const { return int((double(warp) * total + 0.5) * per_warp); }
  DEVICE int warp(int block) const { return block * warps / blocks; }
  DEVICE int block_of(int unit) const {
    const int warp = int((unit + 1 - 0.5 * per_warp) * per_unit);
    return ((warp + 1) * blocks - 1) / warps;
  }
};

struct Rows {  // of one work item: the rows r of its tiles are the heads and tokens of one KV head
  int b, h, block, used;
  i64 start;
  int newest, turn;  // the chunk's last position, and its ring slot
};
// row r, of R·block + r of the KV head; rows that are not there repeat the first one
DEVICE i64 query_at(const Call& c, const Rows& w, int r) {
  const int row = r < w.used ? w.block * R + r : w.block * R;
  const int head = MANY ? row / c.tokens : row, n = MANY ? row % c.tokens : 0;
  return w.b * c.q_b + (w.h * c.group + head) * c.q_h + n * c.q_n;
}
DEVICE i64 position(const Call& c, const Rows& w, int r) {
  return MANY ? w.start + (r < w.used ? w.block * R + r : w.block * R) % c.tokens : w.start;
}

// octet of channels of accumulator column g of the i-th run of eight tiles
DEVICE int value_octet(int i, int g) { return i * 8 + g; }
// Rows of tile m: row g = lane/4 of the accumulators, of PARTS parts of the lanes each with its own octets of channels.
// out[m][8·i+n][e] is channel n of octet value_octet(PARTS·i + part, 2·(lane%4)+e).
template <int PARTS> struct Softmax {
  static constexpr int RUNS = (NV + PARTS - 1) / PARTS, SUMS = KC / PARTS;
  float out[TILES][8 * RUNS][2];
  float top[TILES], sum[TILES][SUMS], excess[TILES][SUMS];  // sum, and what all of `out` has too little: this lane's part
  DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      top[m] = NEG;
#pragma unroll
      for (int k = 0; k < SUMS; k++) sum[m][k] = excess[m][k] = 0;
#pragma unroll
      for (int i = 0; i < 8 * RUNS; i++) out[m][i][0] = out[m][i][1] = 0;
    }
  }
  // a new maximum: rescale; returns the base that logits are measured from
  DEVICE float raise(int m, float tile_top) {
    const float now = fmaxf(top[m], tile_top), base = now == NEG ? 0.f : now;
    const float old = exp2_(top[m] - base);
    if (__any_sync(~0u, old != 1.f)) {
#pragma unroll
      for (int i = 0; i < 8 * RUNS; i++) out[m][i][0] *= old, out[m][i][1] *= old;
    }
#pragma unroll
    for (int k = 0; k < SUMS; k++) sum[m][k] *= old, excess[m][k] *= old;
    top[m] = now;
    return base;
  }
  DEVICE static float total(const float (&x)[SUMS]) {  // over the lanes of a row: each half of the tokens, then both
    float y = sum4(x[0]);
    if (PARTS > 1) return y + __shfl_xor_sync(~0u, y, 16);
#pragma unroll
    for (int k = 1; k < SUMS; k++) y += sum4(x[k]);
    return y;
  }
  // (R, D) and (R, 2); packed: columns are in the order of the values' nibbles
  DEVICE void write(const Rows& w, float* part, float* tops, bool packed, int lane) {
    const int g = lane >> 2, t = lane & 3, mine = PARTS > 1 ? g / ROWS : 0;
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      const float all = total(sum[m]), more = total(excess[m]);
      const int r = m * ROWS + g % ROWS;
      if ((PARTS == 1 && g >= ROWS) || r >= w.used) continue;
      if (t == 0 && mine == 0) *(float2*)(tops + r * 2) = make_float2(top[m], all);
#pragma unroll
      for (int i = 0; i < RUNS; i++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int octet = value_octet(PARTS * i + mine, 2 * t + e);
          if (octet >= OCTETS) continue;
          float* to = part + r * D + octet * 8;
          float y[8];
#pragma unroll
          for (int n = 0; n < 8; n++) y[channel(packed ? VALUE_BITS : 4, n)] = out[m][8 * i + n][e] + more;
          ((float4*)to)[0] = make_float4(y[0], y[1], y[2], y[3]), ((float4*)to)[1] = make_float4(y[4], y[5], y[6], y[7]);
        }
      }
    }
  }
};

DEVICE float capped(const Call& c, float x) { return CAP ? c.cap * tanhf(x / c.cap) : x; }
