// Attention over 16-bit tokens: sinks, the ring, the open page, and the chunk itself.
#pragma once
#include "query.h"

namespace tq {
namespace TQ_ISA {
namespace {

TQ_INLINE bool all_finite(const float* x, int d) {
  uint32_t bits[16], bad = 0;
  for (int k = 0; k < d; k += 16) {
    std::memcpy(bits, x + k, 64);
    for (int i = 0; i < 16; i++) bad |= (bits[i] & 0x7F800000) == 0x7F800000;
  }
  return !bad;
}

// bits lo <= i < hi of 64, for any lo and hi
TQ_INLINE uint64_t bits_between(int64_t lo, int64_t hi) {
  lo = lo < 0 ? 0 : lo, hi = hi > 64 ? 64 : hi;
  return lo >= hi ? 0 : ~0ull >> (64 - (hi - lo)) << lo;
}

// Which of the 64 tokens after `from` the query in a column reads, as bits.
struct Exact {
  const Call& c;
  int64_t b, start, packed_end, total;
  uint64_t reads(int64_t i, int64_t from) const {
    const int64_t t = c.position[b * c.n + i];
    if (t < 0) return 0;
    const int64_t near = c.window < 0 ? 0 : t - c.window + 1, ring = t - c.ring + 1 < packed_end ? t - c.ring + 1 : packed_end;
    const int64_t sinks = c.sinks < start ? c.sinks : start, recent = near > ring ? near : ring;
    const uint64_t seen = bits_between(near - from, sinks - from);
    if (!c.mask) return seen | bits_between(recent - from, t + 1 - from);
    uint64_t own = 0;
    const uint8_t* mask = c.mask + b * c.mask_sb + i * c.n;
    for (int64_t j = from > start ? from : start; j < from + 64 && j < total; j++) {
      own |= uint64_t(mask[c.column[b * c.n + (j - start)]] != 0) << (j - from);
    }
    return seen | bits_between(recent - from, start - from) | own;
  }
};

// where the keys and values of 64 tokens lie; `dtype` is the ring's before `own` and the chunk's from there on
struct Sources {
  const char *k[EXACT], *v[EXACT];
  int64_t own;
  Sources(const Exact& e, int h, int64_t from, uint64_t any) {
    const Call& c = e.c;
    const int64_t head = e.b * c.heads + h, d = c.spec->d;
    int64_t slot = c.slots ? from % c.slots : 0;
    own = e.start - from;
    for (int t = 0; t < EXACT; t++, slot = slot + 1 >= c.slots ? 0 : slot + 1) {
      if (!(any >> t & 1)) continue;
      const int64_t j = from + t;
      if (j >= e.start) {
        const int64_t column = c.column[e.b * c.n + (j - e.start)];
        k[t] = at(c.k.data, c.k.dtype, e.b * c.k.sb + h * c.k.sh + column * c.k.sn);
        v[t] = at(c.v.data, c.v.dtype, e.b * c.v.sb + h * c.v.sh + column * c.v.sn);
      } else if (j < c.sinks) {
        k[t] = at(c.sink_k, c.dtype, (head * c.sinks + j) * d), v[t] = at(c.sink_v, c.dtype, (head * c.sinks + j) * d);
      } else {
        k[t] = at(c.ring_k, c.dtype, (head * c.slots + slot) * d), v[t] = at(c.ring_v, c.dtype, (head * c.slots + slot) * d);
      }
    }
  }
};

// 16 rows as fp32, zeros for those that nobody reads; false if a number is not finite
TQ_INLINE bool gather16(const char* const* from, int dtype, int own_dtype, int64_t own, uint16_t any, int d, float* to) {
  V16 bad = zero();
  for (int t = 0; t < 16; t++, to += d) {
    if (!(any >> t & 1)) {
      std::memset(to, 0, sizeof(float) * d);
      continue;
    }
    for (int k = 0; k < d; k += 16) {
      const V16 x = load_as(from[t], t < own ? dtype : own_dtype, k);
      bad = fma(x, zero(), bad);
      store(to + k, x);
    }
  }
  const float sum = sum16(bad);
  return sum == 0;
}

void exact(const Call& c, int b, int h, int r0, int r1, Rows run, float* memory) {
  const Spec& s = *c.spec;
  const int rows = r1 - r0, d = s.d, i0 = r0 / c.group, i1 = (r1 - 1) / c.group + 1;
  Scratch w(s, memory);
  const int64_t start = c.start[b], packed_end = start / s.page * s.page;
  const int64_t* position = c.position + int64_t(b) * c.n;
  int64_t low = INT64_MAX, high = -1, total = start;
  for (int i = 0; i < c.n; i++) total += position[i] >= 0;
  for (int i = i0; i < i1; i++) {
    if (position[i] < 0) continue;
    low = position[i] < low ? position[i] : low;
    high = position[i] > high ? position[i] : high;
  }
  if (high < 0) return;
  const Exact e{c, b, start, packed_end, total};
  const int64_t end = c.mask ? total : high + 1;
  int64_t begin = low - c.ring + 1 < packed_end ? low - c.ring + 1 : packed_end;  // first old one beside the sinks
  if (c.window >= 0 && low - c.window + 1 > begin) begin = low - c.window + 1;
  begin = begin < 0 ? 0 : begin > start ? start : begin;
  for (int r = 0; r < rows; r++) {
    load_query(c, b, h, r0 + r, w.q + r * LD);
    for (int k = 0; k < d; k += 16) store(w.q + r * LD + k, mul(load(w.q + r * LD + k), set1(c.scaling)));
  }
  const int64_t stored_sinks = c.sinks < start ? c.sinks : start;
  for (int64_t block = 0; block * EXACT < end; block++) {
    const int64_t from = block * EXACT;
    if (from + EXACT <= begin && from >= stored_sinks) {
      block = begin / EXACT - 1;  // next: the block that holds `begin`
      continue;
    }
    uint64_t sees[ROWS], any = 0;  // by column of the chunk, not by row: the members of a group see the same
    for (int i = i0; i < i1; i++) any |= sees[i - i0] = e.reads(i, from);
    if (!any) continue;
    const Sources src(e, h, from, any);
    for (int t = 0; t < EXACT; t += 16) {
      if (!(any >> t & 0xFFFF)) continue;  // masked below
      gather16(src.k + t, c.dtype, c.k.dtype, src.own - t, uint16_t(any >> t), d, w.rows);
      transpose16(w.rows, d, d, w.tile, TILE);
      dot_tile(w.q, rows, w.tile, 16, d, w.s + t, EXACT);
    }
    for (int r = 0; r < rows; r++) {
      float* x = w.s + r * EXACT;
      const uint64_t seen = sees[(r0 + r) / c.group - i0];
      for (int t = 0; t < EXACT; t += 16) store(x + t, pick(uint16_t(seen >> t), load(x + t), set1(-INFINITY)));
      softmax_row(x, nullptr, EXACT, d, c.softcap, run.m[r], run.l[r], run.o + r * LD);
    }
    for (int t = 0; t < EXACT; t += 16) {
      if (!(any >> t & 0xFFFF)) continue;
      const bool fine = gather16(src.v + t, c.dtype, c.v.dtype, src.own - t, uint16_t(any >> t), d, w.rows);
      for (int u = 0; u < 16 && !fine; u++) {  // 0·NaN is NaN: what is not finite may reach the rows that read it and no others
        float* v = w.rows + u * d;
        if (!(any >> (t + u) & 1) || all_finite(v, d)) continue;
        for (int r = 0; r < rows; r++) {
          if (!(sees[(r0 + r) / c.group - i0] >> (t + u) & 1)) continue;
          const float p = w.s[r * EXACT + t + u];
          for (int k = 0; k < d; k++) run.o[r * LD + k] += p * v[k];
        }
        std::memset(v, 0, sizeof(float) * d);
      }
      mix_tile(w.s + t, EXACT, rows, w.rows, 16, d, run.o);
    }
  }
}

}  // namespace
}  // namespace TQ_ISA
}  // namespace tq
