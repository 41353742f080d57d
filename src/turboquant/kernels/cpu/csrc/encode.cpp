// A page of keys and values to bytes, in exactly the arithmetic order of maths/codec.py and maths/tracker.py wherever a
// code depends on it. Compiled once per instruction set, without contraction to fused multiply-adds: every one of them
// writes the same bytes.
#include "rows.h"
#include "spec.h"

namespace tq {
namespace TQ_ISA {

namespace {

constexpr float HALF_MAX = 65504.0f;

TQ_INLINE uint16_t half_up(float x) {  // rounds x >= 0 up, saturating
  if (x > HALF_MAX) x = HALF_MAX;
  uint16_t h = float_to_half(x);
  return half_to_float(h) < x ? h + 1 : h;
}

TQ_INLINE void put_half(uint8_t* p, uint16_t h) { std::memcpy(p, &h, 2); }

TQ_INLINE float clamp_round(float x, float lo, float hi) {
  x = std::nearbyintf(x);
  return x < lo ? lo : x > hi ? hi : x;
}

TQ_INLINE float ratio(float x, float scale) { return scale > 0 ? x / scale : 0.0f; }

static Worst load_finite(const void* src, int dtype, int d, float* dst) {
  const uint32_t largest = float_bits(HALF_MAX);
  uint32_t worst = 0;
  for (int c = 0; c < d; c += 16) {
    store(dst + c, load_as(src, dtype, c));
    uint32_t bits[16], m = 0;
    std::memcpy(bits, dst + c, 64);
    for (int i = 0; i < 16; i++) m |= (bits[i] & 0x7FFFFFFF) > largest;
    worst |= m;
  }
  if (!worst) return USABLE;
  Worst found = TOO_LARGE;
  for (int c = 0; c < d; c++) {
    const uint32_t u = float_bits(dst[c]), a = u & 0x7FFFFFFF;
    if (a <= largest) continue;
    if (a >= 0x7F800000) found = NONFINITE;
    dst[c] = a > 0x7F800000 ? 0.0f : u >> 31 ? -HALF_MAX : HALF_MAX;
  }
  return found;
}

// a sum over tokens in lane_sum's order (maths/sums.py): term(t) goes to lane t mod 16
template <class Term>
TQ_INLINE V16 token_sum(int tokens, Term term) {
  V16 lane[16];
  for (int i = 0; i < 16; i++) lane[i] = zero();
  for (int t = 0; t < tokens; t += 16) {
    for (int i = 0; i < 16; i++) lane[i] = add(lane[i], term(t + i));
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) lane[i] = add(lane[i], lane[i + half]);
  }
  return lane[0];
}

// (3, d) mean, variance, power of the usable tokens
static void page_stats(const Spec& s, const float* k, const uint8_t* usable, const float* power, float* stats) {
  const int d = s.d;
  int n = 0;
  for (int t = 0; t < s.page; t++) n += usable[t];
  const V16 count = set1(float(n ? n : 1));
  for (int c = 0; c < d; c += 16) {
    const V16 mean = div(token_sum(s.page, [&](int t) { return usable[t] ? load(k + t * d + c) : zero(); }), count);
    const V16 square = token_sum(s.page, [&](int t) {
      const V16 x = usable[t] ? sub(load(k + t * d + c), mean) : zero();
      return mul(x, x);
    });
    store(stats + c, mean), store(stats + d + c, div(square, count)), store(stats + 2 * d + c, load(power + c));
  }
}

TQ_INLINE void floored_root(const float* x, int d, float* out) {
  float top = -INFINITY;
  for (int c = 0; c < d; c++) top = x[c] > top ? x[c] : top;
  const float floor = 1e-8f * top + 1e-20f;
  for (int c = 0; c < d; c++) out[c] = std::sqrt((x[c] > 0 ? x[c] : 0.0f) + floor);
}

// codes of 16 numbers: edges below the value; with REACHED also an edge that the value equals; NaN goes last
template <bool REACHED>
TQ_INLINE void count_edges(V16 y, const float* edges, int count, int bits, uint8_t* out) {
  float v[16];
  store(v, y);
  const auto above = [](float x, float edge) { return REACHED ? x >= edge : !(x <= edge); };
  if (bits == 8) {
    for (int i = 0; i < 16; i++) {
      const float g = v[i] * 127.0f + 127.0f;
      int at = g > 0 ? (g < float(count) ? int(g) : count) : 0;
      while (at > 0 && !above(v[i], edges[at - 1])) at--;
      while (at < count && above(v[i], edges[at])) at++;
      out[i] = uint8_t(at);
    }
    return;
  }
#if defined(TQ_AVX512)  // halving over the sorted edges, which fit a register
  const __m512 all = _mm512_maskz_loadu_ps(__mmask16((1 << count) - 1), edges);
  __m512i at = _mm512_setzero_si512();
  for (int half = (count + 1) / 2; half > 0; half /= 2) {
    const __m512 edge = _mm512_permutexvar_ps(_mm512_add_epi32(at, _mm512_set1_epi32(half - 1)), all);
    const __mmask16 more = _mm512_cmp_ps_mask(y.a, edge, REACHED ? _CMP_GE_OQ : _CMP_NLE_UQ);
    at = _mm512_mask_add_epi32(at, more, at, _mm512_set1_epi32(half));
  }
  _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(at));
#else
  int32_t code[16] = {};
  for (int e = 0; e < count; e++) {
    const float edge = edges[e];
    for (int i = 0; i < 16; i++) code[i] += above(v[i], edge);
  }
  for (int i = 0; i < 16; i++) out[i] = uint8_t(code[i]);
#endif
}

struct Levels {
  const float *level, *edge;
  int count, bits, cells;  // cells: in which edges are counted, 0 for the nearest of `level`
  float unit;
  const int8_t* search;  // (SEARCH_CELLS, TRIALS)
};

TQ_INLINE void codes_of(const float* y, int d, float scale, const Levels& lv, uint8_t* codes) {
  const V16 s = set1(lv.cells ? ratio(float(lv.cells), scale) : scale);
  for (int c = 0; c < d; c += 16) {
    if (lv.cells) {
      count_edges<true>(mul(load(y + c), s), lv.edge, lv.count - 1, lv.bits, codes + c);
    } else {
      count_edges<false>(scale > 0 ? div(load(y + c), s) : zero(), lv.edge, lv.count - 1, lv.bits, codes + c);
    }
  }
}

struct Fit {
  float dot, square;  // <y, level> and <level, level>
};

// how the levels nearest to y / scale fit y
TQ_INLINE Fit fit_of(const float* y, int d, float scale, const Levels& lv) {
  const V16 s = set1(scale);
  V16 dot = zero(), square = zero();
  uint8_t codes[16];
  for (int c = 0; c < d; c += 16) {
    const V16 v = load(y + c);
    count_edges<false>(scale > 0 ? div(v, s) : zero(), lv.edge, lv.count - 1, lv.bits, codes);
    const V16 x = lookup(lv.level, codes);
    dot = add(dot, mul(v, x)), square = add(square, mul(x, x));
  }
  return {sum16(dot), sum16(square)};
}

TQ_INLINE float sum_of_squares(const float* y, int d) {
  V16 sum = zero();
  for (int c = 0; c < d; c += 16) sum = add(sum, mul(load(y + c), load(y + c)));
  return sum16(sum);
}

TQ_INLINE float root_mean_square(const float* y, int d) { return std::sqrt(sum_of_squares(y, d) / float(d)); }

TQ_INLINE float amax(const float* y, int d) {
  V16 top = zero();
  for (int c = 0; c < d; c += 16) top = max(top, max(load(y + c), sub(zero(), load(y + c))));
  return max16(top);
}

// the scale to store for a row, before rounding
TQ_INLINE float row_scale(const Spec& s, const float* y, const Levels& lv) {
  if (lv.bits == 8) {
    const Fit f = fit_of(y, s.d, amax(y, s.d), lv);
    return f.dot / (f.square > 1e-30f ? f.square : 1e-30f);
  }
  const float square = sum_of_squares(y, s.d), norm = std::sqrt(square / float(s.d));
  const V16 per_unit = set1(ratio(float(s.search_units), norm)), most = set1(32767);
  int32_t dot[TRIALS] = {}, size[TRIALS] = {};
  for (int c = 0; c < s.d; c += 16) {
    const V16 x = mul(load(y + c), per_unit);
    float units[16];
    store(units, min(rint(max(x, sub(zero(), x))), most));
    for (int i = 0; i < 16; i++) {
      const int32_t n = int32_t(units[i]), cell = n / s.search_cell;
      const int8_t* level = lv.search + (cell < SEARCH_CELLS ? cell : SEARCH_CELLS - 1) * TRIALS;
      for (int t = 0; t < TRIALS; t++) dot[t] += n * level[t], size[t] += level[t] * level[t];
    }
  }
  float best = 0, overlap = 0;
  for (int t = 0; t < TRIALS; t++) {
    const float fit = float(dot[t]) * float(dot[t]) / float(size[t]);
    if (fit > best) best = fit, overlap = float(dot[t]);
  }
  return ratio(square, overlap * lv.unit * (norm / float(s.search_units)));
}

TQ_INLINE void pack_row(const uint8_t* codes, int d, int bits, uint8_t* out) {
  if (bits == 8) {
    std::memcpy(out, codes, d);
  } else if (bits == 4) {
    for (int c = 0; c < d; c += 2) out[c / 2] = uint8_t(codes[c] | codes[c + 1] << 4);
  } else {
    for (int c = 0; c < d; c += 8, out += bits) {
      uint32_t w = 0;
      for (int i = 0; i < 8; i++) w |= uint32_t(codes[c + i]) << (bits * i);
      for (int i = 0; i < bits; i++) out[i] = uint8_t(w >> (8 * i));
    }
  }
}

// rotated rows y (page, d) -> base, log scales, packed codes
TQ_INLINE void encode_rows(const Spec& s, const float* y, const uint8_t* usable, const Levels& lv, int row, uint8_t* base_at,
                           uint8_t* log_at, uint8_t* codes_at) {
  float scale[MAX_PAGE], top = 0;
  uint8_t codes[MAX_D];
  for (int t = 0; t < s.page; t++) {
    const float* x = y + t * s.d;
    scale[t] = row_scale(s, x, lv);
    if (usable[t] && scale[t] > top) top = scale[t];
  }
  const uint16_t half = half_up(top);
  const float base = half_to_float(half);
  put_half(base_at, half);
  for (int t = 0; t < s.page; t++) {
    float r = ratio(base, scale[t]);
    r = r < 1 ? 1.0f : r;
    log_at[t] = scale[t] > 0 && base > 0 ? uint8_t(clamp_round(std::log2(r) * s.row_steps, 0, 254)) : 255;
    codes_of(y + t * s.d, s.d, base * s.a_table[log_at[t]], lv, codes);
    pack_row(codes, s.d, lv.bits, codes_at + int64_t(t) * row);
  }
}

TQ_INLINE void encode_plain(const Spec& s, const float* x, const Levels& lv, int row, uint8_t* scale_at, uint8_t* codes_at,
                            float* y) {
  uint8_t codes[MAX_D];
  for (int t = 0; t < s.page; t++) {
    for (int c = 0; c < s.d; c += 16) store(y + c, mul(load(x + t * s.d + c), load(s.signs + c)));
    hadamard(y, s.d, s.block, s.norm);
    const float r = root_mean_square(y, s.d);
    const uint16_t half = float_to_half(r > HALF_MAX ? HALF_MAX : r);
    put_half(scale_at + 2 * t, half);
    codes_of(y, s.d, half_to_float(half), lv, codes);
    pack_row(codes, s.d, lv.bits, codes_at + int64_t(t) * row);
  }
}

// header of the keys and the rotated rest y
TQ_INLINE void live_keys(const Spec& s, const PageInput& in, float* y) {
  const int d = s.d, h = s.hot;
  const float *mean = in.stats, *var = in.stats + d, *power = in.stats + 2 * d;
  float sk[MAX_D], sq[MAX_D], scale[MAX_D], relative[MAX_D];
  bool hot[MAX_D] = {};
  int index[MAX_HOT];
  floored_root(var, d, sk), floored_root(power, d, sq);
  for (int c = 0; c < d; c++) scale[c] = std::sqrt(sk[c] / sq[c]);
  const float unit = root_mean_square(scale, d);
  for (int c = 0; c < d; c++) {
    const uint8_t code = uint8_t(clamp_round(std::log2(scale[c] / unit) * s.s_steps, -128, 127) + 128);
    in.out[s.key_log_s + c] = code;
    scale[c] = s.s_table[code];
  }
  for (int i = 0; i < h; i++) {  // the largest first, the lower index at a tie
    int best = -1;
    for (int c = 0; c < d; c++) {
      if (!hot[c] && (best < 0 || sk[c] * sq[c] > sk[best] * sq[best])) best = c;
    }
    hot[best] = true;
  }
  for (int c = 0, i = 0; c < d; c++) {
    if (hot[c]) index[i++] = c;
  }
  float top = 0;
  for (int c = 0; c < d; c++) {
    relative[c] = hot[c] ? 0.0f : mean[c] / scale[c];
    top = std::fabs(relative[c]) > top ? std::fabs(relative[c]) : top;
  }
  const uint16_t step_half = half_up(top / 127);
  const float step = half_to_float(step_half);
  put_half(in.out + s.key_mean_step, step_half);
  float center[MAX_D];
  for (int c = 0; c < d; c++) {
    const float code = clamp_round(ratio(relative[c], step), -127, 127);
    in.out[s.key_mean_code + c] = uint8_t(int8_t(code));
    center[c] = code * step;
  }
  for (int t = 0; t < s.page; t++) {
    float* x = y + t * d;
    for (int c = 0; c < d; c += 16) store(x + c, sub(div(load(in.k + t * d + c), load(scale + c)), load(center + c)));
    for (int i = 0; i < h; i++) x[index[i]] = 0;
    for (int c = 0; c < d; c += 16) store(x + c, mul(load(x + c), load(s.signs + c)));
    hadamard(x, d, s.block, s.norm);
  }
  for (int i = 0; i < h; i++) {
    const float m = mean[index[i]];
    const uint16_t mean_half = float_to_half(m < -HALF_MAX ? -HALF_MAX : m > HALF_MAX ? HALF_MAX : m);
    const float center_hot = half_to_float(mean_half);
    float reach = 0;
    for (int t = 0; t < s.page; t++) {
      const float x = std::fabs(in.k[t * d + index[i]] - center_hot);
      if (in.usable[t] && x > reach) reach = x;
    }
    const uint16_t half = half_up(reach / 127);
    const float unit_hot = half_to_float(half);
    in.out[s.key_hot_index + i] = uint8_t(index[i]);
    put_half(in.out + s.key_hot_mean + 2 * i, mean_half), put_half(in.out + s.key_hot_step + 2 * i, half);
    for (int t = 0; t < s.page; t++) {
      const float code = clamp_round(ratio(in.k[t * d + index[i]] - center_hot, unit_hot), -127, 127);
      in.out[s.key_hot_codes + int64_t(i) * s.page + t] = uint8_t(int8_t(code));
    }
  }
}

static void encode(const Spec& s, const PageInput& in, float* y) {
  const auto cells = [&](int bits) { return s.plain || bits == 8 ? 0 : s.code_cells; };
  const Levels key{s.key_levels, s.key_edges, s.key_count, s.key_bits, cells(s.key_bits), s.key_unit, s.key_search};
  const Levels value{s.value_levels, s.value_edges, s.value_count, s.value_bits, cells(s.value_bits), s.value_unit,
                     s.value_search};
  std::memset(in.out, 0, s.page_bytes);
  if (s.plain) {
    encode_plain(s, in.k, key, s.key_row, in.out + s.key_scale, in.out + s.key_codes, y);
    encode_plain(s, in.v, value, s.value_row, in.out + s.value_scale, in.out + s.value_codes, y);
    return;
  }
  live_keys(s, in, y);
  encode_rows(s, y, in.usable, key, s.key_row, in.out + s.key_base, in.out + s.key_log_scale, in.out + s.key_codes);
  for (int t = 0; t < s.page; t++) {
    float* x = y + t * s.d;
    for (int c = 0; c < s.d; c += 16) store(x + c, mul(load(in.v + t * s.d + c), load(s.signs + c)));
    hadamard(x, s.d, s.block, s.norm);
  }
  encode_rows(s, y, in.usable, value, s.value_row, in.out + s.value_base, in.out + s.value_log_scale,
              in.out + s.value_codes);
}

}  // namespace

extern const Encoder encoder;
const Encoder encoder{TQ_NAME, load_finite, page_stats, encode};

}  // namespace TQ_ISA
}  // namespace tq
