// Attention of a tile's rows over 16 tokens that stand in 16 bit. Tokens are grouped by the ring slot that they have or
// will have, so that a row of a verify step sums in the order in which it would alone.
#pragma once
#include "state.cuh"

struct Token {
  int pos;  // negative: not a token
  bool ring;
  const u16 *k, *v;
};
// 16 tokens side by side: of the ring or of the sinks, from slot `first` on, and where copies of them lie
struct Tile {
  int first;
  bool ring;
  const u16 *keys, *values;
};
DEVICE Token token_in(const Call& c, const Rows& w, const Tile& tile, int i) {
  const int slot = tile.first + i, start = int(w.start);
  const int pos = tile.ring ? w.newest - w.turn + slot - (slot > w.turn ? c.slots : 0) : slot;
  const bool none = tile.ring ? slot >= c.slots || pos < c.sinks : slot >= min(c.sinks, w.newest + 1);
  if (none || pos < 0) return {-1, tile.ring, nullptr, nullptr};
  if (pos < start) return {pos, tile.ring, tile.keys + i * D, tile.values + i * D};
  i = pos - start;
  return {pos, false, c.k + w.b * c.k_b + w.h * c.k_h + i * c.k_n, c.v + w.b * c.v_b + w.h * c.v_h + i * c.v_n};
}
DEVICE bool reads(const Call& c, const Rows& w, const Token& j, int t) {
  const bool near = !j.ring || j.pos > t - c.ring || j.pos >= (int(w.start) & -P);
  return j.pos >= 0 && j.pos <= t && near && (!c.window || t - j.pos < c.window);
}
// whether any row does: of a token before the chunk the first row does if any
DEVICE bool read_at_all(const Call& c, const Rows& w, const Token& j) { return reads(c, w, j, max(int(w.start), j.pos)); }

constexpr int TALL = (TILES + 1) / 2;  // tiles of 16 rows
struct ExactQuery {                    // the rows as A operands: two steps of 16 channels for each of 32
  u32 a[TALL][KS][2][4];
  int pos[TILES];  // of row g
  DEVICE ExactQuery(const Call& c, const Rows& w, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int m = 0; m < 2 * TALL; m++) {
      const u16* from = c.q + query_at(c, w, min(m, TILES - 1) * ROWS + g % ROWS);
      if (m < TILES) pos[min(m, TILES - 1)] = int(position(c, w, m * ROWS + g % ROWS));
#pragma unroll
      for (int s = 0; s < KS; s++) {
        const int octet = s * 4 + t;
        uint4 q = make_uint4(0, 0, 0, 0);
        if (octet < OCTETS && m < TILES) q = *(const uint4*)(from + octet * 8);
        a[m / 2][s][0][m % 2] = q.x, a[m / 2][s][0][2 + m % 2] = q.y;
        a[m / 2][s][1][m % 2] = q.z, a[m / 2][s][1][2 + m % 2] = q.w;
      }
    }
  }
};

DEVICE void exact_logits(const ExactQuery& q, const u16* const (&key)[2], int lane, float (&logits)[TALL][2][4]) {
  const int t = lane & 3;
#pragma unroll
  for (int m = 0; m < TALL; m++)
#pragma unroll
    for (int i = 0; i < 8; i++) logits[m][i / 4][i % 4] = 0;
#pragma unroll
  for (int s = 0; s < KS; s++) {
    const int octet = s * 4 + t;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      uint4 k = make_uint4(0, 0, 0, 0);
      if (octet < OCTETS && key[j]) k = *(const uint4*)(key[j] + octet * 8);
#pragma unroll
      for (int m = 0; m < TALL; m++) mma_16(logits[m][j], q.a[m][s][0], k.x, k.y), mma_16(logits[m][j], q.a[m][s][1], k.z, k.w);
    }
  }
}

DEVICE bool odd_half(u32 x) {  // a 16-bit float that is not finite
  constexpr u32 e = BF16 ? 0x7F80u : 0x7C00u;
  return (x & e) == e || (x >> 16 & e) == e;
}

// Weights of the tile's tokens for the rows, and the values' product. plain: every row reads all 16.
DEVICE void exact_values(const Call& c, const Rows& w, const ExactQuery& q, const Tile& tile, bool plain, int lane,
                         const float (&logits)[TALL][2][4], Softmax<1>& soft) {
  const int g = lane >> 2, t = lane & 3;
  const u16* value[4];  // of the tokens that this lane multiplies
  bool seen[TILES][4];  // by row g
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const int i = n / 2 * 8 + 2 * t + n % 2;
    value[n] = tile.values + i * D;
#pragma unroll
    for (int m = 0; m < TILES; m++) seen[m][n] = true;
    if (plain) continue;
    const Token j = token_in(c, w, tile, i);
    value[n] = read_at_all(c, w, j) ? j.v : nullptr;  // what no row reads must not be touched: it may be a NaN
#pragma unroll
    for (int m = 0; m < TILES; m++) seen[m][n] = reads(c, w, j, q.pos[m]);
  }
  bool odd = false;
  uint4 v[NV][4];
#pragma unroll
  for (int n = 0; n < 4; n++)
#pragma unroll
    for (int i = 0; i < NV; i++) {
      const int octet = value_octet(i, g);
      v[i][n] = make_uint4(0, 0, 0, 0);
      if (octet < OCTETS && value[n]) v[i][n] = *(const uint4*)(value[n] + octet * 8);
      if (MANY) odd |= odd_half(v[i][n].x) | odd_half(v[i][n].y) | odd_half(v[i][n].z) | odd_half(v[i][n].w);
    }
  if (MANY) odd = __any_sync(~0u, odd && !plain);
#pragma unroll
  for (int m = 0; m < TALL; m++) {
    float p[2][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int rows = 2 * m + half;
      if (rows >= TILES) {
#pragma unroll
        for (int n = 0; n < 4; n++) p[half][n] = 0;
        continue;
      }
      float top = NEG;
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const float z = capped(c, logits[m][n / 2][2 * half + (n & 1)] * c.scale);
        p[half][n] = seen[rows][n] ? z : NEG;
        top = fmaxf(top, p[half][n]);
      }
      const float base = soft.raise(rows, max4(top));
#pragma unroll
      for (int n = 0; n < 4; n++) p[half][n] = exp2_(p[half][n] - base), soft.sum[rows][0] += p[half][n];
    }
    if (MANY && odd) {  // some rows may not read a value that is not finite: 0·NaN is NaN, so add token by token
      for (int from = 0; from < 16; from++) {
        const Token j = token_in(c, w, tile, from);
        const int n = from / 8 * 2 + (from & 1), source = (lane & ~3) + (from & 7) / 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float own = n == 0 ? p[half][0] : n == 1 ? p[half][1] : n == 2 ? p[half][2] : p[half][3];
          const float weight = __shfl_sync(~0u, own, source);
          const int rows = 2 * m + half;
          if (rows >= TILES || !reads(c, w, j, q.pos[rows < TILES ? rows : 0])) continue;
#pragma unroll
          for (int i = 0; i < 16 * NV; i++) {
            const int octet = value_octet(i / 16, 2 * t + i % 2);
            if (octet < OCTETS) soft.out[rows < TILES ? rows : 0][i / 2][i % 2] += weight * wide(j.v[octet * 8 + i / 2 % 8]);
          }
        }
      }
      continue;
    }
    const u32 a[4] = {two_16(p[0][0], p[0][1]), two_16(p[1][0], p[1][1]), two_16(p[0][2], p[0][3]),
                      two_16(p[1][2], p[1][3])};
    constexpr bool both = TILES > 1;
#pragma unroll
    for (int i = 0; i < NV; i++) {
      const u32 r0[4] = {v[i][0].x, v[i][0].y, v[i][0].z, v[i][0].w}, r1[4] = {v[i][1].x, v[i][1].y, v[i][1].z, v[i][1].w};
      const u32 r2[4] = {v[i][2].x, v[i][2].y, v[i][2].z, v[i][2].w}, r3[4] = {v[i][3].x, v[i][3].y, v[i][3].z, v[i][3].w};
#pragma unroll
      for (int n = 0; n < 8; n++) {
        const u32 pick = n & 1 ? 0x7632 : 0x5410;
        float(&o)[2] = soft.out[2 * m][8 * i + n], (&o2)[2] = soft.out[both ? 2 * m + 1 : 0][8 * i + n];
        float d[4] = {o[0], o[1], both ? o2[0] : 0.f, both ? o2[1] : 0.f};
        mma_16(d, a, prmt(r0[n / 2], r1[n / 2], pick), prmt(r2[n / 2], r3[n / 2], pick));
        o[0] = d[0], o[1] = d[1];
        if (both) o2[0] = d[2], o2[1] = d[3];
      }
    }
  }
}
