// Rows of a page to scales and codes: sixteen lanes hold a row, element e·16 + l in y[e]. The arithmetic is that of
// maths/codec.py in the order of maths/exact.py.
#pragma once
#include "ptx.cuh"

constexpr int P = 64, E = D / 16, THREADS = 256, PASSES = P / (THREADS / 16);
constexpr float FP16_MAX = 65504.f;

DEVICE float sum16(float x) {  // over the sixteen lanes of a row, by halves
  for (int n = 8; n; n >>= 1) x += __shfl_xor_sync(~0u, x, n);
  return x;
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

// the nearest level's code; a tie goes to the lower one
template <int BITS> DEVICE int code_of(float q, const float* edges) {
  if (BITS == 8) return int(fminf(fmaxf(ceilf(fmaf(q, 127.f, -0.5f)) + 127.f, 0.f), 254.f));
  const bool below = !(q > 0);
  const float a = __uint_as_float((__float_as_uint(q) & 0x7FFFFFFFu) + below);
  int m = 0;
#pragma unroll
  for (int half = 1 << (BITS - 1) >> 1; half; half >>= 1) m += a > edges[m + half] ? half : 0;
  return below ? (1 << (BITS - 1)) - 1 - m : (1 << (BITS - 1)) + m;
}
template <int BITS> DEVICE float level_of(int code, const float* levels) {
  return BITS == 8 ? (code - 127) / 127.f : levels[code];
}

// the scale to store for the row that sixteen lanes hold
template <int BITS> DEVICE float row_scale(const float (&y)[E], const float* edges, const float* levels) {
  float square = y[0] * y[0];
  for (int e = 1; e < E; e++) square += y[e] * y[e];
  square = sum16(square);
  float norm = 0, best = 0, overlap = 0;
  if (BITS == 8) {
    for (int e = 0; e < E; e++) norm = fmaxf(norm, fabsf(y[e]));
    for (int n = 8; n; n >>= 1) norm = fmaxf(norm, __shfl_xor_sync(~0u, norm, n));
  } else {
    norm = __fsqrt_rn(square / float(D));
  }
  constexpr float trials[] = {TRIALS};
#pragma unroll
  for (int i = 0; i < (BITS == 8 ? 1 : int(sizeof(trials) / 4)); i++) {
    const float s = BITS == 8 ? norm : norm * trials[i], r = s > 0 ? __frcp_rn(s) : 0.f;
    float dot, size;
#pragma unroll
    for (int e = 0; e < E; e++) {
      const float level = level_of<BITS>(code_of<BITS>(divide(y[e], s, r), edges), levels);
      dot = e ? dot + y[e] * level : y[e] * level, size = e ? size + level * level : level * level;
    }
    dot = sum16(dot), size = sum16(size);
    if (BITS == 8) return dot / fmaxf(size, 1e-30f);
    const float fit = dot * dot / size;
    if (i == 0 || fit > best * TIE) best = fit, overlap = dot;
  }
  return divided(square, overlap);
}
// The rows of a page, already rotated, to scales and codes in the page's image; returns the base. Row of pass i of this
// thread: i·16 + threadIdx.x/16.
template <int BITS>
DEVICE u16 encode_rows(const float (&y)[PASSES][E], const int* odd, float* scale, u8* log_scale, u8* codes,
                       const float* edges, const float* levels) {
  const int l = threadIdx.x & 15, row = threadIdx.x / 16, lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < PASSES; i++) {
    const float s = row_scale<BITS>(y[i], edges, levels);
    if (l == 0) scale[i * 16 + row] = s;
  }
  __syncthreads();
  float top = fmaxf(odd[lane] ? 0.f : scale[lane], odd[lane + 32] ? 0.f : scale[lane + 32]);
  for (int n = 16; n; n >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, n));
  const u16 half = fp16_up(top);
  const float base = half_(half);
#pragma unroll
  for (int i = 0; i < PASSES; i++) {
    const int t = i * 16 + row;
    const float s = scale[t];
    int log = 255;
    if (s > 0 && base > 0) log = int(fminf(fmaxf(rintf(log2f(fmaxf(base / s, 1.f)) * ROW_STEPS), 0.f), 254.f));
    const float a = base * A_TABLE[log], r = a > 0 ? __frcp_rn(a) : 0.f;
    if (l == 0) log_scale[t] = u8(log);
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int code = code_of<BITS>(divide(y[i][e], a, r), edges);
      if (BITS == 8) {
        codes[t * D + e * 16 + l] = u8(code);
      } else {  // eight codes are BITS bytes
        u32 word = u32(code) << (BITS * (l & 7));
        for (int n = 1; n < 8; n <<= 1) word |= __shfl_xor_sync(~0u, word, n);
        if ((l & 7) < BITS) codes[t * (D * BITS / 8) + (e * 2 + l / 8) * BITS + (l & 7)] = u8(word >> (8 * (l & 7)));
      }
    }
  }
  return half;
}
DEVICE void rotate(float (&y)[E]) {  // sixteen lanes hold a row, element e·16 + l in y[e]; signs are multiplied in already
  const int l = threadIdx.x & 15;
#pragma unroll
  for (int n = 1; n < 16; n *= 2)
#pragma unroll
    for (int e = 0; e < E; e++) {
      const float other = __shfl_xor_sync(~0u, y[e], n);
      y[e] = l & n ? other - y[e] : y[e] + other;
    }
#pragma unroll
  for (int n = 1; n < BLOCK / 16; n *= 2)
#pragma unroll
    for (int e = 0; e < E; e++)
      if (!(e & n)) {
        const float a = y[e], b = y[e + n];
        y[e] = a + b, y[e + n] = a - b;
      }
#pragma unroll
  for (int e = 0; e < E; e++) y[e] *= NORM;
}
DEVICE float sign_of(int ch) { return SIGN_BITS[ch / 32] >> (ch & 31) & 1 ? 1.f : -1.f; }
