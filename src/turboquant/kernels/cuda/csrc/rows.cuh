// Rows of a page to scales and codes. Eight lanes hold a row: lane l has element 8j + l in y[j]. The arithmetic is that
// of maths/codec.py in the order of maths/exact.py; the search for a scale is in integers, which have no order.
#pragma once
#include "ptx.cuh"

constexpr int P = 64, E = D / 8, PASSES = P / (THREADS / 8), TRIALS = 8;
constexpr float FP16_MAX = 65504.f;

DEVICE float sum8(float x) {  // over the eight lanes of a row, by halves
  for (int n = 4; n; n >>= 1) x += __shfl_xor_sync(~0u, x, n);
  return x;
}
// the sum of term(j) over a row, in the order of lane_sum: lanes l and l + 8 of its sixteen are this lane's
template <class Term> DEVICE float row_sum(Term term) {
  float low = term(0), high = term(1);
#pragma unroll
  for (int j = 2; j < E; j += 2) low += term(j), high += term(j + 1);
  return sum8(low + high);
}
DEVICE u16 fp16_up(float x) {  // x >= 0, rounded up
  x = fminf(x, FP16_MAX);
  const u16 h = to_half(x);
  return half_(h) < x ? h + 1 : h;
}
// y / s, correctly rounded for ordinary numbers, given r = 1 / s
DEVICE float divide(float y, float s, float r) {
  const float q = y * r;
  return fmaf(fmaf(-q, s, y), r, q);
}
DEVICE float divided(float y, float s) { return s > 0 ? y / s : 0.f; }

// Of 2·HALF lanes that hold 2·HALF words each: what `of` makes of all lanes' i-th words comes to lane i's first.
template <int HALF, class Of> DEVICE void transpose(u32* x, int lane, Of of) {
  if constexpr (HALF > 0) {
#pragma unroll
    for (int i = 0; i < HALF; i++) {
      const u32 a = x[i], b = x[i + HALF];
      x[i] = of(lane & HALF ? b : a, __shfl_xor_sync(~0u, lane & HALF ? a : b, HALF));
    }
    transpose<HALF / 2>(x, lane, of);
  }
}

struct Lookup {  // in shared memory
  uint2 search[SEARCH_CELLS];  // the level of a cell at each trial scale, a byte each
  u8 codes[2 * CODE_REACH];    // the code of a cell, from -CODE_REACH on
};
template <int BITS> DEVICE int uniform_code(float q) {  // of 8 bit; a tie goes to the lower one
  return int(fminf(fmaxf(ceilf(fmaf(q, 127.f, -0.5f)) + 127.f, 0.f), 254.f));
}

// the scale to store for the row that eight lanes hold, by least squares
DEVICE float scale_of_8_bits(const float (&y)[E]) {
  float norm = 0, level[E];
  for (int j = 0; j < E; j++) norm = fmaxf(norm, fabsf(y[j]));
  for (int n = 4; n; n >>= 1) norm = fmaxf(norm, __shfl_xor_sync(~0u, norm, n));
  const float r = norm > 0 ? __frcp_rn(norm) : 0.f;
#pragma unroll
  for (int j = 0; j < E; j++) level[j] = (uniform_code<8>(divide(y[j], norm, r)) - 127) / 127.f;
  const float dot = row_sum([&](int j) { return y[j] * level[j]; });
  return dot / fmaxf(row_sum([&](int j) { return level[j] * level[j]; }), 1e-30f);
}
// the same for up to 4 bits: the best of eight trials
DEVICE float scale_of(const float (&y)[E], const Lookup& look, float unit) {
  const int l = threadIdx.x & 7;
  const float square = row_sum([&](int j) { return y[j] * y[j]; });
  const float norm = __fsqrt_rn(square / float(D)), per_unit = norm > 0 ? float(SEARCH_UNITS) / norm : 0.f;
  u32 dot[TRIALS] = {}, size[TRIALS] = {};  // <y, level> and <level, level>
#pragma unroll
  for (int j = 0; j < E; j += 4) {  // four numbers at a time
    u32 units[4] = {}, part[2][4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (j + i >= E) continue;
      // adding 1.5·2^23 leaves the whole number in the low bits
      units[i] = __float_as_uint(fminf(fabsf(y[j + i] * per_unit), 32767.f) + 12582912.f);
      const uint2 levels = look.search[min((units[i] & 0xFFFFu) / SEARCH_CELL, u32(SEARCH_CELLS - 1))];
      part[0][i] = levels.x, part[1][i] = levels.y;
    }
    const u32 first = prmt(units[0], units[1], 0x5410), second = prmt(units[2], units[3], 0x5410);
#pragma unroll
    for (int t = 0; t < TRIALS; t += 2) {  // a, b: bytes of two trials for the first two numbers, for the others
      const u32 *x = part[t / 4], pick = t % 4 ? 0x7362 : 0x5140;
      const u32 a = prmt(x[0], x[1], pick), b = prmt(x[2], x[3], pick);
      dot[t] = dp2a_low(second, b, dp2a_low(first, a, dot[t]));
      dot[t + 1] = dp2a_high(second, b, dp2a_high(first, a, dot[t + 1]));
      const u32 even = prmt(a, b, 0x5410), odd = prmt(a, b, 0x7632);
      size[t] = dp4a(even, even, size[t]), size[t + 1] = dp4a(odd, odd, size[t + 1]);
    }
  }
  const auto add = [](u32 a, u32 b) { return a + b; };
  transpose<TRIALS / 2>(dot, l, add), transpose<TRIALS / 2>(size, l, add);  // those of trial l
  const float overlap = float(int(dot[0])), fit = overlap * overlap / float(int(size[0]));
  float best = fit;
  for (int n = 4; n; n >>= 1) best = fmaxf(best, __shfl_xor_sync(~0u, best, n));
  const int from = threadIdx.x & 24, trial = __ffs(__ballot_sync(~0u, fit == best) >> from) - 1;  // the first of equals
  return divided(square, __shfl_sync(~0u, overlap, from + trial) * unit * (norm / float(SEARCH_UNITS)));
}

// The rows of a page, already rotated, to scales and codes; returns the base. Row of pass i of this thread:
// i·THREADS/8 + threadIdx.x/8.
template <int BITS>
DEVICE u16 encode_rows(const float (&y)[PASSES][E], u64 odd, float* scale, u8* log_scale, u8* codes, const Lookup& look,
                       float unit) {
  const int l = threadIdx.x & 7, row = threadIdx.x / 8, lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < PASSES; i++) {
    const float s = BITS == 8 ? scale_of_8_bits(y[i]) : scale_of(y[i], look, unit);
    if (l == 0) scale[i * (THREADS / 8) + row] = s;
  }
  __syncthreads();
  float top = fmaxf(odd >> lane & 1 ? 0.f : scale[lane], odd >> (lane + 32) & 1 ? 0.f : scale[lane + 32]);
  for (int n = 16; n; n >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, n));
  const u16 half = fp16_up(top);
  const float base = half_(half);
#pragma unroll
  for (int i = 0; i < PASSES; i++) {
    const int t = i * (THREADS / 8) + row;
    const float s = scale[t];
    int log = 255;
    if (s > 0 && base > 0) log = int(fminf(fmaxf(rintf(log2f(fmaxf(base / s, 1.f)) * ROW_STEPS), 0.f), 254.f));
    const float a = base * A_TABLE[log];
    if (l == 0) log_scale[t] = u8(log);
    u8* to = codes + t * (D * BITS / 8);
    if constexpr (BITS == 8) {
      const float r = a > 0 ? __frcp_rn(a) : 0.f;
#pragma unroll
      for (int j = 0; j < E; j++) to[8 * j + l] = u8(uniform_code<8>(divide(y[i][j], a, r)));
    } else {
      const float per_cell = a > 0 ? float(CODE_CELLS) / a : 0.f, reach = float(CODE_REACH);
      u32 word[(E + 7) / 8 * 8];  // octet j has one code in each of the eight lanes
#pragma unroll
      for (int j = 0; j < (E + 7) / 8 * 8; j++) {
        if (j >= E) { word[j] = 0; continue; }
        // rounding the sum with 2^23 down leaves the whole number in the low bits
        const float cell = fminf(fmaxf(y[i][j] * per_cell, -reach), reach - 0.5f);
        word[j] = u32(look.codes[__float_as_uint(__fadd_rd(cell, 8388608.f + reach)) & 0x7FFFFFu]) << (BITS * l);
      }
#pragma unroll
      for (int j = 0; j < E; j += 8) {
        transpose<4>(word + j, l, [](u32 a, u32 b) { return a | b; });
        if (j + l >= E) continue;
        u8* at = to + (j + l) * BITS;  // eight codes are BITS bytes
        if (BITS == 4) *(u32*)at = word[j];
        if (BITS == 2) *(u16*)at = u16(word[j]);
        if (BITS == 3)
          for (int n = 0; n < 3; n++) at[n] = u8(word[j] >> (8 * n));
      }
    }
  }
  return half;
}
DEVICE void rotate(float (&y)[E]) {  // signs are multiplied in already
  const int l = threadIdx.x & 7;
#pragma unroll
  for (int n = 1; n < 8; n *= 2) {
    const float sign = l & n ? -1.f : 1.f;
#pragma unroll
    for (int j = 0; j < E; j++) y[j] = fmaf(y[j], sign, __shfl_xor_sync(~0u, y[j], n));
  }
#pragma unroll
  for (int n = 1; n < BLOCK / 8; n *= 2)
#pragma unroll
    for (int j = 0; j < E; j++)
      if (!(j & n)) {
        const float a = y[j], b = y[j + n];
        y[j] = a + b, y[j + n] = a - b;
      }
#pragma unroll
  for (int j = 0; j < E; j++) y[j] *= NORM;
}
DEVICE float sign_of(int ch) { return SIGN_BITS[ch / 32] >> (ch & 31) & 1 ? 1.f : -1.f; }
