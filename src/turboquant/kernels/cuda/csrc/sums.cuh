// What the warps of a block found is added up, KV head by KV head and row by row, in the order of the work; of a KV head
// that lies in several blocks the last one to come adds up the blocks' sums, in their order.
#pragma once
#include "packed.cuh"

constexpr int CH = (D + 31) / 32;  // channels of a lane: lane, lane + 32, …

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
  // neighbours in the work share a scheduler, which has every fourth warp: so that each gets tiles and pages alike
  DEVICE int per() const { return (warps + 3) / 4; }
  DEVICE int place(int warp) const { return warp / 4 < per() ? warp % 4 * per() + warp / 4 : WARPS; }
  DEVICE int warp_at(int place) const { return place % per() * 4 + place / per(); }
};

// back from the rotation: channels within the lanes, then of a lane
DEVICE void turn_back(float (&y)[CH], int lane) {
#pragma unroll
  for (int n = 1; n < (BLOCK < 32 ? BLOCK : 32); n *= 2)
#pragma unroll
    for (int e = 0; e < CH; e++) {
      const float other = __shfl_xor_sync(~0u, y[e], n);
      y[e] = lane & n ? other - y[e] : y[e] + other;
    }
#pragma unroll
  for (int n = 1; n < BLOCK / 32; n *= 2)
#pragma unroll
    for (int e = 0; e < CH; e++)
      if (!(e & n) && e + n < CH) {
        const float a = y[e], z = y[(e + n) % CH];
        y[e] = a + z, y[(e + n) % CH] = a - z;
      }
#pragma unroll
  for (int e = 0; e < CH; e++) y[e] *= SIGN_BITS[e] >> lane & 1 ? NORM : -NORM;
}

DEVICE void finish(const Call& c, const Pair& p, int row, const float (&y)[CH], float top, float total, int lane) {
  const float sink = c.sink_logits ? c.sink_logits[p.h * c.group + row / c.tokens] * 1.4426950408889634f : NEG;
  const float most = fmaxf(top, sink), base = most == NEG ? 0.f : most, weight = exp2_(top - base);
  const float sum = fmaf(total, weight, exp2_(sink - base)), scale = weight / (sum == 0 ? 1.f : sum);
  u16* out = c.out + ((i64(p.b) * c.heads + p.h) * c.group * c.tokens + row) * D;
#pragma unroll
  for (int e = 0; e < CH; e++)
    if (32 * e + lane < D) out[32 * e + lane] = u16(two_16(y[e] * scale, 0));
}

// Row r of KV head p, of this block's warps: each lane looks after the tiles' or the pages' part of one of them.
DEVICE void add_warps(const Call& c, const Shares& s, const Block& block, const Scratch* all, const Pair& p, int r, int lane,
                      float (&y)[CH], float& top, float& total) {
  const int n = lane / 2, warp = block.first + n, exact = c.exact * TILE_UNITS, border = p.start + exact;
  const int from = max(s.unit(warp), lane & 1 ? border : p.start), hi = lane & 1 ? p.end() : border;
  const bool is = n < block.warps && from < min(s.unit(warp + 1), hi), last = s.unit(warp + 1) <= hi;
  const i64 slot = slot_of(c, blockIdx.y, warp, i64(p.b) * c.heads + p.h) + lane % 2 * R + r;
  const Scratch& x = all[n < block.warps ? block.warp_at(n) : 0];
  const float* part = last ? (const float*)x.buffer + r * D : c.part + slot * D;
  float2 own = make_float2(NEG, 0);
  if (is) own = *(const float2*)(last ? x.row[0] + r * 2 : c.top + slot * 2);
  top = own.x;
#pragma unroll
  for (int i = 16; i; i >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
  const float base = top == NEG ? 0.f : top, weight = is ? exp2_(own.x - base) : 0.f;
  total = own.y * weight;
#pragma unroll
  for (int i = 16; i; i >>= 1) total += __shfl_xor_sync(~0u, total, i);
  float plain[CH];
#pragma unroll
  for (int e = 0; e < CH; e++) plain[e] = y[e] = 0;
  for (u32 left = __ballot_sync(~0u, is); left;) {
    float v[4][CH], w[4];
    bool turned[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int from = left ? __ffs(left) - 1 : 0;
      const float* at = (const float*)shuffled(u64(part), from);
      w[i] = __shfl_sync(~0u, weight, from), turned[i] = from & 1;
#pragma unroll
      for (int e = 0; e < CH; e++) v[i][e] = left && 32 * e + lane < D ? at[32 * e + lane] : 0.f;
      left &= left - 1;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int e = 0; e < CH; e++)
        if (turned[i]) y[e] = fmaf(v[i][e], w[i], y[e]);
        else plain[e] = fmaf(v[i][e], w[i], plain[e]);
  }
  turn_back(y, lane);
#pragma unroll
  for (int e = 0; e < CH; e++) y[e] += plain[e];
}

// Row r of KV head p, of the blocks `first` to `last`.
DEVICE void add_blocks(const Call& c, const Shares& s, const Pair& p, int first, int last, int r, int lane, float (&y)[CH],
                       float& top, float& total) {
  const int inside = s.unit(s.warp(first)) < p.start;
  auto slot = [&](int i) { return cut_slot(s, blockIdx.y, i, i == first && inside) + r; };
  top = NEG, total = 0;
  for (int i = first + lane; i <= last; i += 32) top = fmaxf(top, __ldcg(c.cut_top + slot(i) * 2));
#pragma unroll
  for (int i = 16; i; i >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
  const float base = top == NEG ? 0.f : top;
#pragma unroll
  for (int e = 0; e < CH; e++) y[e] = 0;
#pragma unroll 8
  for (int i = first; i <= last; i++) {
    const i64 at = slot(i);
    const float2 own = __ldcg((const float2*)(c.cut_top + at * 2));
    const float weight = exp2_(own.x - base);
    total = fmaf(own.y, weight, total);
#pragma unroll
    for (int e = 0; e < CH; e++)
      if (32 * e + lane < D) y[e] = fmaf(__ldcg(c.cut_part + at * D + 32 * e + lane), weight, y[e]);
  }
}

// All of this block's warps, when each has written its parts; p: the block's first KV head.
DEVICE void add_up(const Call& c, const Shares& s, const Block& block, const Scratch* all, Pair p, int own, int lane) {
  __shared__ Pair cut[2];  // a KV head that other blocks share
  __shared__ int blocks[2][2];
  __shared__ bool ready[2];
  const int used = min(R, c.group * c.tokens - int(blockIdx.y) * R), row = blockIdx.y * R, thread = own * 32 + lane;
  if (thread < 2) ready[thread] = false;
  __syncthreads();
  float y[CH], top, total;
  for (int i = own, at = 0; true; i += WARPS) {
    p.advance(c, i / used - at), p = p.known();
    at = i / used;
    if (p.b >= c.batch || p.start >= block.end) break;
    const int r = i % used;
    add_warps(c, s, block, all, p, r, lane, y, top, total);
    if (block.begin <= p.start && p.end() <= block.end) {
      finish(c, p, row + r, y, top, total, lane);
      continue;
    }
    const int which = block.begin < p.start;
    const i64 slot = cut_slot(s, blockIdx.y, block.number, which) + r;
#pragma unroll
    for (int e = 0; e < CH; e++)
      if (32 * e + lane < D) c.cut_part[slot * D + 32 * e + lane] = y[e];
    if (lane) continue;
    *(float2*)(c.cut_top + slot * 2) = make_float2(top, total);
    if (r) continue;
    cut[which] = p, ready[which] = true;
    blocks[which][0] = s.block_of(p.start), blocks[which][1] = s.block_of(p.end() - 1);
  }
  __syncthreads();
  if (thread < 2 && ready[thread]) {
    const Pair& shared = cut[thread];
    u32* arrived = c.arrived + (i64(blockIdx.y) * c.batch + shared.b) * c.heads + shared.h;
    __threadfence();
    ready[thread] = atomicAdd(arrived, 1u) == u32(blocks[thread][1] - blocks[thread][0]);
    if (ready[thread]) *arrived = 0, __threadfence();
  }
  __syncthreads();
  for (int which = 0; which < 2; which++)
    if (ready[which])
      for (int r = own; r < used; r += WARPS) {
        add_blocks(c, s, cut[which], blocks[which][0], blocks[which][1], r, lane, y, top, total);
        finish(c, cut[which], row + r, y, top, total, lane);
      }
}
