// What the warps of a block found is added up, KV head by KV head and row by row, in the order of the work; of a KV head
// that lies in several blocks the last one to come adds up the blocks' sums, in their order.
#pragma once
#include "packed.cuh"

constexpr int CH = (D + 127) / 128;  // a lane has channels channel_of(e, lane) to + 3
DEVICE int channel_of(int e, int lane) { return 128 * e + 4 * lane; }

// where the partial result of a warp and KV head lies: both only grow along the work; of its tiles, then of its pages
DEVICE i64 slot_of(const Call& c, int block, int warp, i64 pair) {
  return (block * (c.warps + i64(c.batch) * c.heads) + warp + pair) * 2 * R;
}
// of a block: its first KV head (0), or one that begins in it and goes on behind it (1)
DEVICE i64 cut_slot(const Shares& s, int block_y, int block, int which) {
  return ((i64(block_y) * s.blocks + block) * 2 + which) * R;
}

struct Block {  // this one's part of the work
  int number, first, warps, begin, end;  // its first warp, of all; units
  DEVICE Block(const Shares& s, int n) : number(n), first(s.warp(n)), warps(s.warp(n + 1) - first) {
    begin = s.unit(first), end = s.unit(first + warps);
  }
};

typedef float Channels[CH][4];
DEVICE void load(const float* row, bool is, int lane, Channels& v) {
#pragma unroll
  for (int e = 0; e < CH; e++) {
    float4 four = make_float4(0, 0, 0, 0);
    if (is && channel_of(e, lane) < D) four = __ldcg((const float4*)(row + channel_of(e, lane)));
    v[e][0] = four.x, v[e][1] = four.y, v[e][2] = four.z, v[e][3] = four.w;
  }
}
DEVICE void add(Channels& y, const Channels& v, float weight) {
#pragma unroll
  for (int i = 0; i < 4 * CH; i++) y[i / 4][i % 4] = fmaf(v[i / 4][i % 4], weight, y[i / 4][i % 4]);
}

DEVICE void turn_back(Channels& y, int lane) {  // from the rotation
#pragma unroll
  for (int n = 1; n < BLOCK; n *= 2)
#pragma unroll
    for (int i = 0; i < 4 * CH; i++) {
      const int e = i / 4, j = i % 4, e2 = (e + n / 128) % CH, j2 = (j + n) % 4;
      if (n >= 4 && n < 128) {
        const float other = __shfl_xor_sync(~0u, y[e][j], n / 4);
        y[e][j] = lane & n / 4 ? other - y[e][j] : y[e][j] + other;
      } else if (n < 4 ? !(j & n) : !(e & n / 128)) {
        float &a = y[e][j], &z = n < 4 ? y[e][j2] : y[e2][j];
        const float sum = a + z;
        z = a - z, a = sum;
      }
    }
#pragma unroll
  for (int i = 0; i < 4 * CH; i++) {
    const int ch = channel_of(i / 4, lane) + i % 4;
    y[i / 4][i % 4] *= ch < D && SIGN_BITS[ch / 32] >> ch % 32 & 1 ? NORM : -NORM;
  }
}

DEVICE void finish(const Call& c, const Pair& p, int row, const Channels& y, float top, float total, int lane) {
  const float sink = c.sink_logits ? c.sink_logits[p.h * c.group + row / c.tokens] * 1.4426950408889634f : NEG;
  const float most = fmaxf(top, sink), base = most == NEG ? 0.f : most, weight = exp2_(top - base);
  const float sum = fmaf(total, weight, exp2_(sink - base)), scale = weight / (sum == 0 ? 1.f : sum);
  u16* out = c.out + ((i64(p.b) * c.heads + p.h) * c.group * c.tokens + row) * D;
#pragma unroll
  for (int e = 0; e < CH; e++)
    if (channel_of(e, lane) < D)
      *(uint2*)(out + channel_of(e, lane)) = make_uint2(two_16(y[e][0] * scale, y[e][1] * scale), two_16(y[e][2] * scale, y[e][3] * scale));
}

// Row r of KV head p, of this block's warps: each lane looks after the tiles' or the pages' part of one of them.
DEVICE void add_warps(const Call& c, const Shares& s, const Block& block, const Scratch* all, const Pair& p, int r, int lane,
                      Channels& y, float& top, float& total) {
  const int n = lane / 2, warp = block.first + n, border = p.start + c.exact, to = s.unit(warp + 1);
  const int from = max(s.unit(warp), lane & 1 ? border : p.start), end = lane & 1 ? p.end() : border;
  const bool is = n < block.warps && from < min(to, end), last = to <= end;
  const i64 slot = slot_of(c, blockIdx.y, warp, i64(p.b) * c.heads + p.h) + lane % 2 * R + r;
  const Scratch& x = all[n < block.warps ? n : 0];
  const float* part = last ? (const float*)x.buffer + r * D : c.part + slot * D;
  float2 own = make_float2(NEG, 0);
  if (is) own = *(const float2*)(last ? x.row[0] + r * 2 : c.top + slot * 2);
  top = warp_top(own.x);
  const float base = top == NEG ? 0.f : top, weight = is ? exp2_(own.x - base) : 0.f;
  total = own.y * weight;
#pragma unroll
  for (int i = 16; i; i >>= 1) total += __shfl_xor_sync(~0u, total, i);
  Channels plain;
#pragma unroll
  for (int i = 0; i < 4 * CH; i++) plain[i / 4][i % 4] = y[i / 4][i % 4] = 0;
  for (u32 left = __ballot_sync(~0u, is); left;) {
    Channels v[4];
    float w[4];
    bool turned[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int from = left ? __ffs(left) - 1 : 0;
      const float* at = (const float*)shuffled(u64(part), from) + 4 * lane;
      w[i] = __shfl_sync(~0u, weight, from), turned[i] = from & 1;
#pragma unroll
      for (int e = 0; e < CH; e++) {
        float4 four = make_float4(0, 0, 0, 0);
        if (left && channel_of(e, lane) < D) four = *(const float4*)(at + 128 * e);
        v[i][e][0] = four.x, v[i][e][1] = four.y, v[i][e][2] = four.z, v[i][e][3] = four.w;
      }
      left &= left - 1;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (turned[i]) add(y, v[i], w[i]);
      else add(plain, v[i], w[i]);
  }
  turn_back(y, lane);
  add(y, plain, 1.f);
}

// Row r of KV head p, of the blocks `first` to `last`.
DEVICE void add_blocks(const Call& c, const Shares& s, const Pair& p, int first, int last, int r, int lane, Channels& y,
                       float& top, float& total) {
  constexpr int AT_ONCE = 8;
  const int inside = s.unit(s.warp(first)) < p.start ? first : -1;
  auto slot = [&](int i) { return cut_slot(s, blockIdx.y, i, i == inside) + r; };
  top = NEG, total = 0;
#pragma unroll
  for (int i = 0; i < 4 * CH; i++) y[i / 4][i % 4] = 0;
  for (; first <= last; first += 32) {  // whose maxima and sums lanes hold
    float2 own = make_float2(NEG, 0);
    if (first + lane <= last) own = __ldcg((const float2*)(c.cut_top + slot(first + lane) * 2));
    float weight = 0;
    const int n = min(32, last - first + 1);
#pragma unroll 1
    for (int from = 0; from < n; from += AT_ONCE) {
      Channels v[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) load(c.cut_part + slot(first + from + i) * D, from + i < n, lane, v[i]);
      if (from == 0) {  // while these come
        const float before = top;
        top = fmaxf(top, warp_top(own.x));
        const float base = top == NEG ? 0.f : top, old = exp2_(before - base);
        weight = exp2_(own.x - base), total *= old;
#pragma unroll
        for (int i = 0; i < 4 * CH; i++) y[i / 4][i % 4] *= old;
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const float w = __shfl_sync(~0u, weight, from + i);
        add(y, v[i], w), total = fmaf(__shfl_sync(~0u, own.y, from + i), w, total);
      }
    }
  }
}

// All of this block's warps, when each has written its parts; p: the block's first KV head.
DEVICE void add_up(const Call& c, const Shares& s, const Block& block, const Scratch* all, Pair p, int own, int lane) {
  const int used = min(R, c.group * c.tokens - int(blockIdx.y) * R), row = blockIdx.y * R;
  Channels y;
  float top, total;
  for (int round = 0, at = 0; true; round++) {
    // there and back: KV heads at both ends of the block, which take longer, come to different warps
    const int i = round * WARPS + (round & 1 ? WARPS - 1 - own : own), r = i % used;
    p.advance(c, i / used - at), p = p.known();
    at = i / used;
    if (p.b >= c.batch || p.start >= block.end) return;
    add_warps(c, s, block, all, p, r, lane, y, top, total);
    if (block.begin > p.start || p.end() > block.end) {  // others have a part
      const i64 slot = cut_slot(s, blockIdx.y, block.number, block.begin < p.start) + r;
#pragma unroll
      for (int e = 0; e < CH; e++)
        if (channel_of(e, lane) < D) *(float4*)(c.cut_part + slot * D + channel_of(e, lane)) = make_float4(y[e][0], y[e][1], y[e][2], y[e][3]);
      if (lane == 0) *(float2*)(c.cut_top + slot * 2) = make_float2(top, total);
      __syncwarp();
      const int first = s.block_of(p.start), last = s.block_of(p.end() - 1);
      u32* arrived = c.arrived + ((i64(blockIdx.y) * c.batch + p.b) * c.heads + p.h) * R + r;
      u32 before = 0;
      if (lane == 0) before = add_behind(arrived);
      if (uniform(before) != u32(last - first)) continue;
      if (lane == 0) *arrived = 0;
      add_blocks(c, s, p, first, last, r, lane, y, top, total);
    }
    finish(c, p, row + r, y, top, total, lane);
  }
}
