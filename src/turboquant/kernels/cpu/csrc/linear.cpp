// The product of arranged int8 rows with packed weights, compiled once per instruction set and without contraction: see
// product.h for what is computed and in which order.
//
// A panel is LANES outputs. Their packed bytes are transposed in registers so that a lane holds four codes of one
// output. Up to FEW rows meet them right there, and weights are read once from memory. For more rows two panels are
// unpacked into a tile of bytes that stays in the cache while all blocks of rows pass.
#include "product.h"

#include "whole_groups.h"

namespace tq {
namespace TQ_ISA {

namespace {

static void write(const Product& p, int64_t m, int64_t n, int count, float* y) {  // y: the sums, times nothing yet
  const float unit = p.unit[m];
  for (int i = 0; i < count; i++) y[i] *= unit;
  if (p.bias) {
    for (int i = 0; i < count; i++) y[i] += scalar_as(p.bias, p.bias_dtype, n + i);
  }
  const int64_t at = m * p.stride + n;
  if (p.dtype == 0) {
    std::memcpy((float*)p.out + at, y, sizeof(float) * size_t(count));
  } else if (p.dtype == 1) {
    for (int i = 0; i < count; i++) ((uint16_t*)p.out)[at + i] = float_to_bf16(y[i]);
  } else {
    for (int i = 0; i < count; i++) ((uint16_t*)p.out)[at + i] = float_to_half(y[i]);
  }
}

#if defined(TQ_AVX512) || defined(TQ_AVX2) || defined(TQ_NEONDOT)

constexpr int64_t BYTES = 4 * LANES;  // of a load, and of LANES words

struct Panel {
  const uint8_t* codes[LANES];  // rows of the outputs; beyond the last one the last one again, not written
  int64_t stage;                // bytes to the second stage
};

TQ_INLINE Panel panel_of(const Weight& w, int64_t n) {
  Panel p;
  for (int i = 0; i < LANES; i++) p.codes[i] = w.codes + (n + i < w.n ? n + i : w.n - 1) * (w.k / 2);
  p.stage = w.n * (w.k / 2);
  return p;
}

// (G, LANES) scales fp32 and zeros of a panel, of the 8-bit grid where there are two stages
static void fields(const Weight& w, int64_t n, float* scale, int32_t* zero) {
  for (int64_t g = 0; g < w.groups; g += LANES) {
    const int count = int(w.groups - g < LANES ? w.groups - g : LANES);
    I s[LANES], z[LANES];
    for (int i = 0; i < LANES; i++) {
      const int64_t at = (n + i < w.n ? n + i : w.n - 1) * w.groups + g;
      s[i] = halves_to_floats(w.scale + at, count), z[i] = bytes_to_words(w.zero + at, count);
      if (w.stages == 2) s[i] = mul_bits(s[i], 0.0625f), z[i] = add_i(join4(z[i], zero_i()), set_i(8));
    }
    transpose(s), transpose(z);
    for (int i = 0; i < count; i++) store_i(scale + (g + i) * LANES, s[i]), store_i(zero + (g + i) * LANES, z[i]);
  }
}

template <int S>
struct Words {  // LANES words of each output of a panel, transposed
  I stage[S][LANES];
  TQ_MEMBER void load(const Panel& p, int64_t byte, int bytes) {
#pragma GCC unroll 2
    for (int s = 0; s < S; s++) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) stage[s][i] = load_some(p.codes[i] + s * p.stage + byte, bytes);
      transpose(stage[s]);
    }
  }
  TQ_MEMBER I even(int d) const { return S == 1 ? low4(stage[0][d]) : join4(low4(stage[0][d]), low4(stage[S - 1][d])); }
  TQ_MEMBER I odd(int d) const { return S == 1 ? high4(stage[0][d]) : join4(high4(stage[0][d]), high4(stage[S - 1][d])); }
};

template <int S, int M>
struct Few {  // M rows against one panel
  const Product& p;
  const float* scale;
  const int32_t* zero;
  I even[M], odd[M];
  F sum[M];
  TQ_MEMBER void clear() {
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) even[m] = odd[m] = zero_i();
  }
  TQ_MEMBER void take(const Words<S>& words, int d, int64_t at) {  // at: eights of k
    const I lo = words.even(d), hi = words.odd(d);
    const int8_t* x = p.x + at * 8 * M;
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      even[m] = dot<S>(even[m], lo, word(x + 4 * m)), odd[m] = dot<S>(odd[m], hi, word(x + 4 * (M + m)));
    }
  }
  TQ_MEMBER void flush(int64_t g) {
    const F s = load_f(scale + g * LANES);
    const I z = load_i(zero + g * LANES);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      sum[m] = add_scaled(sum[m], minus_product(add_i(even[m], odd[m]), z, set_i(p.sums[m * p.w.groups + g])), s);
    }
    clear();
  }
};

template <int S, int M>
static void few(const Product& p, int64_t first, int64_t last, uint8_t* scratch) {
  const Weight& w = p.w;
  const int64_t eights = w.k / 8, per = w.group() / 8;
  float* scale = (float*)scratch;
  int32_t* zero = (int32_t*)(scale + w.groups * LANES);
  for (int64_t n = first; n < last; n += LANES) {
    fields(w, n, scale, zero);
    const Panel panel = panel_of(w, n);
    const int64_t ahead = LANES * (w.k / 2);
    Few<S, M> f{p, scale, zero, {}, {}, {}};
    f.clear();
    for (int m = 0; m < M; m++) f.sum[m] = zero_f();
    int64_t left = per, g = 0;
    for (int64_t at = 0; at < eights; at += LANES) {
      Words<S> words;
      for (int s = 0; s < S; s++) {  // the next panel, in the order of memory
        const uint8_t* next = panel.codes[0] + s * panel.stage + ahead + at * 4 * LANES;
        for (int64_t i = 0; i < BYTES * LANES; i += 64) __builtin_prefetch(next + i, 0, 2);
      }
      if (eights - at >= LANES && per % LANES == 0) {
        words.load(panel, at * 4, BYTES);
#pragma GCC unroll 16
        for (int d = 0; d < LANES; d++) f.take(words, d, at + d);
        if ((left -= LANES) == 0) f.flush(g++), left = per;
      } else {
        const int count = int(eights - at < LANES ? eights - at : LANES);
        words.load(panel, at * 4, 4 * count);
        for (int d = 0; d < count; d++) {
          f.take(words, d, at + d);
          if (--left == 0) f.flush(g++), left = per;
        }
      }
    }
    alignas(64) float y[LANES];
    for (int m = 0; m < M; m++) {
      store_f(y, f.sum[m]);
      write(p, m, n, int(last - n < LANES ? last - n : LANES), y);
    }
  }
}

// tile: [k/4][2 panels][LANES] words
template <int S>
static void unpack(const Weight& w, int64_t n, uint8_t* tile) {
  const int64_t eights = w.k / 8;
  const Panel panel = panel_of(w, n);
  for (int64_t at = 0; at < eights; at += LANES) {
    const int count = int(eights - at < LANES ? eights - at : LANES);
    Words<S> words;
    words.load(panel, at * 4, 4 * count);
    for (int d = 0; d < count; d++) {
      uint8_t* to = tile + (at + d) * 4 * BYTES;
      store_i(to, words.even(d)), store_i(to + 2 * BYTES, words.odd(d));
    }
  }
}

template <int S, int R>
static void block(const Product& p, int64_t m0, int64_t n, int64_t last, const uint8_t* tile, const float* scale,
                  const int32_t* zero, float* sum) {
  const Weight& w = p.w;
  const int64_t words = w.group() / 4, panel = w.groups * LANES;
  const int8_t* x = p.x + m0 * w.k;
  for (int i = 0; i < 2 * R; i++) store_f(sum + i * LANES, zero_f());
  for (int64_t g = 0; g < w.groups; g++) {
    I acc[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = zero_i();
    for (int64_t i = 0; i < words; i++, tile += 2 * BYTES, x += 4 * R) {
      const I a = load_i(tile), b = load_i(tile + BYTES);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const I v = word(x + 4 * r);
        acc[r][0] = dot<S>(acc[r][0], a, v), acc[r][1] = dot<S>(acc[r][1], b, v);
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      const F s = load_f(scale + j * panel + g * LANES);
      const I z = load_i(zero + j * panel + g * LANES);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        float* y = sum + (2 * r + j) * LANES;
        store_f(y, add_scaled(load_f(y), minus_product(acc[r][j], z, set_i(p.sums[(m0 + r) * w.groups + g])), s));
      }
    }
  }
  for (int r = 0; r < R; r++) {
    write(p, m0 + r, n, int(last - n < 2 * LANES ? last - n : 2 * LANES), sum + 2 * r * LANES);
  }
}

template <int S>
static void many(const Product& p, int64_t first, int64_t last, uint8_t* scratch) {
  const Weight& w = p.w;
  uint8_t* tile = scratch;
  float* scale = (float*)(tile + w.k / 4 * 2 * BYTES);
  int32_t* zero = (int32_t*)(scale + 2 * w.groups * LANES);
  float* sum = (float*)(zero + 2 * w.groups * LANES);
  for (int64_t n = first; n < last; n += 2 * LANES) {
    for (int j = 0; j < 2; j++) {
      const int64_t from = n + j * LANES;
      unpack<S>(w, from, tile + j * BYTES);
      fields(w, from, scale + j * w.groups * LANES, zero + j * w.groups * LANES);
    }
    for (int64_t m = 0; m < p.m;) {
      const int r = block_rows(p.m, p.m - m, BLOCK);
      switch (r) {
        case 12: block<S, (BLOCK < 12 ? BLOCK : 12)>(p, m, n, last, tile, scale, zero, sum); break;
        case 8: block<S, (BLOCK < 8 ? BLOCK : 8)>(p, m, n, last, tile, scale, zero, sum); break;
        case 4: block<S, 4>(p, m, n, last, tile, scale, zero, sum); break;
        case 2: block<S, 2>(p, m, n, last, tile, scale, zero, sum); break;
        default: block<S, 1>(p, m, n, last, tile, scale, zero, sum);
      }
      m += r;
    }
  }
}

template <int S>
static void outputs_of(const Product& p, int64_t first, int64_t last, uint8_t* scratch) {
#if defined(TQ_AVX512)
  if (p.w.group() % CODES == 0) {
    switch (p.m) {
      case 1: return whole_groups<S, 1>(p, first, last, scratch, write);
      case 2: return whole_groups<S, 2>(p, first, last, scratch, write);
      case 3: return whole_groups<S, 3>(p, first, last, scratch, write);
      case 4: return whole_groups<S, 4>(p, first, last, scratch, write);
    }
  }
#endif
  switch (p.m) {
    case 1: return few<S, 1>(p, first, last, scratch);
    case 2: return few<S, 2>(p, first, last, scratch);
    case 3: return few<S, 3>(p, first, last, scratch);
    case 4: return few<S, 4>(p, first, last, scratch);
    default: return many<S>(p, first, last, scratch);
  }
}

#else  // any compiler: one output at a time, its codes unpacked in the order of the rows' words

constexpr int BLOCK = 1;

template <int S>
static void outputs_of(const Product& p, int64_t first, int64_t last, uint8_t* codes) {
  const Weight& w = p.w;
  const int64_t half = w.k / 2, group = w.group();
  for (int64_t n = first; n < last; n++) {
    const uint8_t *high = w.codes + n * half, *low = high + (S - 1) * w.n * half;
    for (int64_t i = 0; i < half; i += 4) {
      for (int j = 0; j < 4; j++) {
        const uint8_t h = high[i + j], l = low[i + j];
        codes[2 * i + j] = S == 1 ? h & 15 : uint8_t(h << 4 | (l & 15));
        codes[2 * i + 4 + j] = S == 1 ? h >> 4 : uint8_t((h & 240) | l >> 4);
      }
    }
    for (int64_t m = 0; m < p.m; m++) {
      float sum = 0.0f;
      for (int64_t g = 0; g < w.groups; g++) {
        const int8_t* x = p.x + m * w.k;
        int32_t dot = 0;
        for (int64_t k = g * group; k < (g + 1) * group; k++) dot += int16_t(codes[k]) * int16_t(x[k]);
        const int32_t zero = w.zero[n * w.groups + g];
        const float scale = half_to_float(w.scale[n * w.groups + g]);
        dot -= (S == 1 ? zero : 16 * zero + 8) * p.sums[m * w.groups + g];
        sum += float(dot) * (S == 1 ? scale : scale * 0.0625f);
      }
      write(p, m, n, 1, &sum);
    }
  }
}

#endif

static void outputs(const Product& p, int64_t first, int64_t last, uint8_t* scratch) {
  p.w.stages == 1 ? outputs_of<1>(p, first, last, scratch) : outputs_of<2>(p, first, last, scratch);
}

}  // namespace

extern const Multiplier multiplier;
const Multiplier multiplier{BLOCK, outputs};

}  // namespace TQ_ISA
}  // namespace tq
