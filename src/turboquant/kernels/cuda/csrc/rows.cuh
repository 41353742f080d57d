// Rows of a page to scales and codes. The threads of a row lie in warps of their own, 64 apart: thread h of ROW_THREADS
// holds every ROW_THREADS-th number of the row, y[k][p] being number 16k + ROW_THREADS·p + h. The arithmetic is that of
// maths/codec.py in the order of maths/exact.py; the search for a scale is in integers, which have no order.
#pragma once
#include "ptx.cuh"

constexpr int P = 64, ROW_THREADS = THREADS / P, SIXTEENS = D / 16, OWN = 16 / ROW_THREADS, TRIALS = 8;
constexpr int ROW_PITCH = D + 4;  // floats: 16 bytes of eight rows lie in different banks
constexpr int OCTETS = D / 8, OCTET_PITCH = ((OCTETS + 3) / 4 | 1) * 4;
constexpr int STRIDE = 8;  // of reader samples
constexpr float FP16_MAX = 65504.f;
constexpr u32 COUNT = 1u << 23;  // units of a segment are added below, numbers counted above
constexpr int CLEARED = (MAX_SEGMENTS * P / 4 + THREADS - 1) / THREADS;  // by each thread, four words at a time
constexpr float WHOLE = 12582912.f;  // 1.5·2^23: adding it, rounded down, leaves the whole part in the low bits

struct Lookup {
  __align__(16) u8 segment[SEARCH_REACH + 16];  // of a cell of |y|: the levels of all trials are the same within one
  u8 codes[2 * CODE_REACH / CODE_STEP + 16];
};
struct __align__(16) Sums {
  float part[2][4][D], square[P / STRIDE][D];  // of the tokens of a class; of the reader samples
};
struct Work {  // of a block, in shared memory: first sums of the statistics, then what becomes of the rows
  union {
    Sums sums;
    float rows[P][ROW_PITCH];
    u32 found[CLEARED * THREADS * 4 / P][P];
    u32 octets[ROW_THREADS][P][OCTET_PITCH];
    u8 bytes[P][D + 4];
  };
  float part[2][ROW_THREADS][P], scale[P];
  Lookup look;
};

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

// Butterflies over sixteen neighbours, then their place in the row: those of thread h of the row side by side.
DEVICE void rotate_sixteen(float (&y)[16]) {
#pragma unroll
  for (int n = 1; n < 16; n *= 2)
#pragma unroll
    for (int j = 0; j < 16; j++)
      if (!(j & n)) {
        const float a = y[j], b = y[j + n];
        y[j] = a + b, y[j + n] = a - b;
      }
}
DEVICE void put_sixteen(const float (&y)[16], float* to) {
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    const auto at = [&](int p) { return y[p % OWN * ROW_THREADS + p / OWN]; };
    *(float4*)(to + i) = make_float4(at(i), at(i + 1), at(i + 2), at(i + 3));
  }
}
DEVICE void take_row(const Work& w, float (&y)[SIXTEENS][OWN]) {  // and the other butterflies
  const float* from = w.rows[threadIdx.x % P] + threadIdx.x / P * OWN;
#pragma unroll
  for (int k = 0; k < SIXTEENS; k++)
#pragma unroll
    for (int p = 0; p < OWN; p += 4) {
      const float4 x = *(const float4*)(from + 16 * k + p);
      y[k][p] = x.x, y[k][p + 1] = x.y, y[k][p + 2] = x.z, y[k][p + 3] = x.w;
    }
#pragma unroll
  for (int n = 1; n < BLOCK / 16; n *= 2)
#pragma unroll
    for (int k = 0; k < SIXTEENS; k++)
      if (!(k & n))
#pragma unroll
        for (int p = 0; p < OWN; p++) {
          const float a = y[k][p], b = y[k + n][p];
          y[k][p] = a + b, y[k + n][p] = a - b;
        }
#pragma unroll
  for (int k = 0; k < SIXTEENS; k++)
#pragma unroll
    for (int p = 0; p < OWN; p++) y[k][p] *= NORM;
}

// This thread's share of the sum of term(k, p) over a row in the order of lane_sum; `joined` adds the shares.
template <class Term> DEVICE float share(Term term) {
  float lane[OWN];
#pragma unroll
  for (int k = 0; k < SIXTEENS; k++)
#pragma unroll
    for (int p = 0; p < OWN; p++) lane[p] = k ? lane[p] + term(k, p) : term(k, p);
#pragma unroll
  for (int n = OWN / 2; n; n /= 2)
#pragma unroll
    for (int p = 0; p < n; p++) lane[p] += lane[p + n];
  return lane[0];
}
DEVICE float joined(const float (&part)[ROW_THREADS][P]) {
  const int row = threadIdx.x % P;
  if (ROW_THREADS == 2) return part[0][row] + part[1][row];
  return (part[0][row] + part[2 % ROW_THREADS][row]) + (part[1][row] + part[3 % ROW_THREADS][row]);
}

template <int BITS> DEVICE int uniform_code(float q) {  // of 8 bit; a tie goes to the lower one
  return int(fminf(fmaxf(ceilf(fmaf(q, 127.f, -0.5f)) + 127.f, 0.f), 254.f));
}
// the scale to store for each row, by least squares; begins with a barrier
DEVICE void scales_of_8_bits(const float (&y)[SIXTEENS][OWN], Work& w) {
  const int row = threadIdx.x % P, h = threadIdx.x / P;
  float norm = 0, level[SIXTEENS][OWN];
#pragma unroll
  for (int k = 0; k < SIXTEENS; k++)
#pragma unroll
    for (int p = 0; p < OWN; p++) norm = fmaxf(norm, fabsf(y[k][p]));
  w.part[0][h][row] = norm;
  __syncthreads();
  norm = 0;
  for (int i = 0; i < ROW_THREADS; i++) norm = fmaxf(norm, w.part[0][i][row]);
  const float r = norm > 0 ? __frcp_rn(norm) : 0.f;
#pragma unroll
  for (int k = 0; k < SIXTEENS; k++)
#pragma unroll
    for (int p = 0; p < OWN; p++) level[k][p] = (uniform_code<8>(divide(y[k][p], norm, r)) - 127) / 127.f;
  __syncthreads();
  w.part[0][h][row] = share([&](int k, int p) { return y[k][p] * level[k][p]; });
  w.part[1][h][row] = share([&](int k, int p) { return level[k][p] * level[k][p]; });
  __syncthreads();
  if (h == 0) w.scale[row] = joined(w.part[0]) / fmaxf(joined(w.part[1]), 1e-30f);
}
// The same for up to 4 bits: the best of eight trials. The numbers of a row are counted, and their units added, by
// segment; a level is a sum of steps, so a trial's sums are those of the segments from each of its steps on.
template <int BITS> DEVICE void scales_of(const float (&y)[SIXTEENS][OWN], Work& w) {
  using S = Search<BITS>;
  const int row = threadIdx.x % P, h = threadIdx.x / P;
  w.part[0][h][row] = share([&](int k, int p) { return y[k][p] * y[k][p]; });
  __syncthreads();  // rows have been read
#pragma unroll
  for (int i = 0; i < CLEARED; i++) ((uint4*)w.found)[i * THREADS + threadIdx.x] = uint4{};
  __syncthreads();
  const float square = joined(w.part[0]);
  const float norm = __fsqrt_rn(square / float(D)), per_unit = norm > 0 ? float(SEARCH_UNITS) / norm : 0.f;
  const float scaled = per_unit * 0x1p-15f;
  u8* own = (u8*)(w.found[0] + row);
  const Bytes segment_of(w.look.segment, COUNT / SEARCH_CELL);
#pragma unroll
  for (int k = 0; k < SIXTEENS; k++) {
    u32 units[OWN], segment[OWN];  // look-ups first, for they may not pass the sums
#pragma unroll
    for (int p = 0; p < OWN; p++) {
      // |y| in units, at most 32768 (that is 16 RMS, more than there can be up to D = 128), rounded by a product below
      // the normal numbers, whose bits are whole
      float t = __saturatef(fabsf(y[k][p]) * scaled);
      if (D > 128) t = fminf(t, 32767.f / 32768.f);
      units[p] = __float_as_uint(fmaf(t, 0x1p-134f, 0x1p-126f));  // with COUNT
      segment[p] = segment_of[units[p] / SEARCH_CELL];
    }
#pragma unroll
    for (int p = 0; p < OWN; p++) atomicAdd((u32*)(own + segment[p] * u32(4 * P)), units[p]);
  }
  __syncthreads();
  if (h == 0) {
    u32 dot[TRIALS] = {}, size[TRIALS] = {}, sum = 0;  // <y, level> and <level, level>
#pragma unroll
    for (int i = 0; i < S::STEPS; i++) {  // from the last segment down, leaving none out
      if (i == 0 || S::segment(i) != S::segment(i - 1)) sum += w.found[S::segment(i)][row];
      dot[S::trial(i)] += sum % COUNT * S::step(i), size[S::trial(i)] += sum / COUNT * S::square(i);
    }
    float best = 0, overlap = 0;
#pragma unroll
    for (int t = 0; t < TRIALS; t++) {  // the first of equals
      const float x = float(int(dot[t])), fit = quotient(x * x, float(int(size[t])));
      if (fit > best) best = fit, overlap = x;
    }
    w.scale[row] = divided(square, overlap * S::unit() * (norm / float(SEARCH_UNITS)));
  }
}

// Codes to the page: octets, that is eight codes in BITS bytes, put together from the threads of a row.
template <int BITS> DEVICE void write_octets(const Work& w, u8* codes) {
  if constexpr (BITS == 4 && OCTETS % 4 == 0) {
#pragma unroll
    for (int n = 0; n < (P * OCTETS / 4 + THREADS - 1) / THREADS; n++) {
      const u32 i = n * THREADS + threadIdx.x;
      if (P * OCTETS / 4 % THREADS && i >= P * OCTETS / 4) break;
      uint4 all = {};
#pragma unroll
      for (int h = 0; h < ROW_THREADS; h++) {
        const uint4 x = *(const uint4*)(w.octets[h][i / (OCTETS / 4)] + i % (OCTETS / 4) * 4);
        all.x |= x.x, all.y |= x.y, all.z |= x.z, all.w |= x.w;
      }
      ((uint4*)codes)[i] = all;
    }
  } else {
    for (int i = threadIdx.x; i < P * OCTETS; i += THREADS) {
      u32 all = 0;
      for (int h = 0; h < ROW_THREADS; h++) all |= w.octets[h][i / OCTETS][i % OCTETS];
      u8* at = codes + i * BITS;
      if (BITS == 4) *(u32*)at = all;
      if (BITS == 2) *(u16*)at = u16(all);
      if (BITS == 3)
        for (int n = 0; n < 3; n++) at[n] = u8(all >> (8 * n));
    }
  }
}
// The rows of a page, of which all but the last butterflies are done, to scales and codes; returns the base. Begins and
// ends with a barrier.
template <int BITS> DEVICE u16 encode_rows(Work& w, u64 odd, u8* log_scale, u8* codes) {
  const int row = threadIdx.x % P, h = threadIdx.x / P, lane = threadIdx.x & 31;
  __syncthreads();
  float y[SIXTEENS][OWN];
  take_row(w, y);
  if constexpr (BITS == 8) scales_of_8_bits(y, w);
  else scales_of<BITS>(y, w);
  __syncthreads();
  float top = fmaxf(odd >> lane & 1 ? 0.f : w.scale[lane], odd >> (lane + 32) & 1 ? 0.f : w.scale[lane + 32]);
  for (int n = 16; n; n >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, n));
  const u16 half = fp16_up(top);
  const float base = half_(half), s = w.scale[row];
  int log = 255;
  if (s > 0 && base > 0) log = int(fminf(fmaxf(rintf(log2f(fmaxf(base / s, 1.f)) * ROW_STEPS), 0.f), 254.f));
  const float a = base * A_TABLE[log];
  if (h == 0) log_scale[row] = u8(log);
  if constexpr (BITS == 8) {
    const float r = a > 0 ? __frcp_rn(a) : 0.f;
#pragma unroll
    for (int k = 0; k < SIXTEENS; k++)
#pragma unroll
      for (int p = 0; p < OWN; p++)
        w.bytes[row][16 * k + ROW_THREADS * p + h] = u8(uniform_code<8>(divide(y[k][p], a, r)));
    __syncthreads();
    for (int i = threadIdx.x; i < P * D / 4; i += THREADS)
      ((u32*)codes)[i] = *(const u32*)(w.bytes[i / (D / 4)] + i % (D / 4) * 4);
  } else {
    const float per_cell = a > 0 ? float(CODE_CELLS) / a : 0.f;
    if (__builtin_expect(odd >> row & 1 || base == FP16_MAX, 0))  // it may lie beyond the table, where others cannot
#pragma unroll
      for (int k = 0; k < SIXTEENS; k++)
#pragma unroll
        for (int p = 0; p < OWN; p++) y[k][p] = fminf(fmaxf(y[k][p], -8 * a), 8 * a);
    const Bytes code_of(w.look.codes, (__float_as_uint(WHOLE) - CODE_REACH) / CODE_STEP);
    u32 octet[OCTET_PITCH] = {};
#pragma unroll
    for (int k = 0; k < SIXTEENS; k++) {
      u32 x[OWN];
#pragma unroll
      for (int p = 0; p < OWN; p++) {
        // the cell, rounded down. A table entry has the code of CODE_STEP cells in its high half, less their number,
        // and what the edge between them lacks of a step.
        const u32 cell = __float_as_uint(add_down(y[k][p] * per_cell, WHOLE));
        x[p] = code_of[cell / CODE_STEP] + cell;  // bits 4 to 7: the code
      }
#pragma unroll
      for (int o = 0; o < 2; o++) {
        u32 *from = x + o * (OWN / 2), &to = octet[2 * k + o];
        if constexpr (BITS == 4 && ROW_THREADS == 2) {
          to = prmt(prmt(from[0], from[1], 0x0040), prmt(from[2], from[3], 0x0040), 0x5410);
          to = to >> (4 - 4 * h) & 0x0F0F0F0Fu << (4 * h);
        } else {
#pragma unroll
          for (int p = 0; p < OWN / 2; p++) to |= (from[p] >> 4 & 15u) << (BITS * ROW_THREADS * p);
          to <<= BITS * h;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < OCTETS; i += 4)
      *(uint4*)(w.octets[h][row] + i) = uint4{octet[i], octet[i + 1], octet[i + 2], octet[i + 3]};
    __syncthreads();
    write_octets<BITS>(w, codes);
  }
  __syncthreads();
  return half;
}
DEVICE float sign_of(int ch) { return SIGN_BITS[ch / 32] >> (ch & 31) & 1 ? 1.f : -1.f; }
