// Attention of some query rows over packed pages and over 16-bit tokens; compiled once per instruction set.
//
// A page's keys are k = s∘(Rᵀ(a_t·level) + mean), but for the hot channels. So q' = R(q∘s) is made once per page and
// row, a logit is a_t·(q'·level) + (q∘s)·mean + the hot channels, and no key is ever rotated back. Values stay rotated
// in the accumulator; one inverse rotation per output row undoes that (`finish`).
#include "fused.h"
#include "live.h"

namespace tq {
namespace TQ_ISA {

namespace {

// what the row at position t reads from pages
TQ_INLINE Span packed_span(const Call& c, int64_t start, int64_t t) {
  if (t < 0) return {0, 0};
  int64_t lo = c.sinks, hi = t - c.ring + 1;
  if (c.window >= 0 && t - c.window + 1 > lo) lo = t - c.window + 1;
  if (hi > start / c.spec->page * c.spec->page) hi = start / c.spec->page * c.spec->page;
  return {lo, hi};
}

template <int BITS>
TQ_INLINE void keys_of(const uint8_t* codes, int row, int count, int d, const Table& tab, float* kt) {
  for (int t = 0; t < count; t += 16) key_tile16<BITS>(codes + int64_t(t) * row, row, d, tab, kt + t, TILE);
}

template <int BITS>
TQ_INLINE void values_of(const uint8_t* codes, int row, int count, int d, const Table& tab, float* vt) {
  for (int t = 0; t < count; t++) value_row<BITS>(codes + int64_t(t) * row, d, tab, vt + t * d);
}

static void key_tile(const uint8_t* codes, int row, int count, int d, const Table& tab, float* kt) {
  switch (tab.kind) {
    case 2: return keys_of<2>(codes, row, count, d, tab, kt);
    case 3: return keys_of<3>(codes, row, count, d, tab, kt);
    case 4: return keys_of<4>(codes, row, count, d, tab, kt);
    case LOOKUP8: return keys_of<LOOKUP8>(codes, row, count, d, tab, kt);
    default: return keys_of<8>(codes, row, count, d, tab, kt);
  }
}

static void value_tile(const uint8_t* codes, int row, int count, int d, const Table& tab, float* vt) {
  switch (tab.kind) {
    case 2: return values_of<2>(codes, row, count, d, tab, vt);
    case 3: return values_of<3>(codes, row, count, d, tab, vt);
    case 4: return values_of<4>(codes, row, count, d, tab, vt);
    case LOOKUP8: return values_of<LOOKUP8>(codes, row, count, d, tab, vt);
    default: return values_of<8>(codes, row, count, d, tab, vt);
  }
}

// per-token scales of a page: fp16 each (plain), or logarithms below a base
TQ_INLINE void token_scales(const Spec& s, const uint8_t* page, int64_t plain_at, int64_t log_at, int64_t base_at,
                            float* out) {
  if (s.plain) {
    for (int t = 0; t < s.page; t += 16) store(out + t, load_as(page + plain_at, F16, t));
    return;
  }
  const V16 b = set1(half_at(page + base_at));
  for (int t = 0; t < s.page; t += 16) store(out + t, mul(b, token_scale16(s, page + log_at + t)));
}

// y = R(q∘s) from scale = s·sign·norm; returns (q∘s)·mean from mean = s·mean
TQ_INLINE float turn(const float* q, const float* scale, const float* mean, int d, int block, float* y) {
  V16 sum = zero();
  for (int k = 0; k < d; k += 16) {
    const V16 x = load(q + k);
    sum = fma(x, load(mean + k), sum);
    store(y + k, mul(x, load(scale + k)));
  }
  hadamard(y, d, block, 1.0f);
  return sum16(sum);
}

template <int NV>
TQ_INLINE float turn(const float* q, const float* scale, const float* mean, float* y) {
  V16 sum = zero(), x[NV];
  for (int i = 0; i < NV; i++) {
    x[i] = load(q + 16 * i);
    sum = fma(x[i], load(mean + 16 * i), sum);
    x[i] = mul(x[i], load(scale + 16 * i));
  }
  hadamard_block<NV>(x);
  for (int i = 0; i < NV; i++) store(y + 16 * i, x[i]);
  return sum16(sum);
}

// logits x <- x·scale + constant + the hot channels, 16·NV tokens
template <int NV>
TQ_INLINE void add_hot(float* x, const float* scale, V16 constant, const float* q, const float* hot, int count, int P) {
  V16 y[NV];
  for (int v = 0; v < NV; v++) y[v] = fma(load(x + 16 * v), load(scale + 16 * v), constant);
  for (int i = 0; i < count; i++) {
    for (int v = 0; v < NV; v++) y[v] = fma(set1(q[i * ROWS]), load(hot + i * P + 16 * v), y[v]);
  }
  for (int v = 0; v < NV; v++) store(x + 16 * v, y[v]);
}

// What a page's header says: scales of tokens; s·sign·norm and s·mean of channels, 0 for hot ones; the hot channels,
// whose numbers are mean + step·code.
struct Header {
  float key_scale[MAX_PAGE], value_scale[MAX_PAGE], hot_mean[MAX_HOT], hot_step[MAX_HOT];
  int hot_index[MAX_HOT];

  void read(const Spec& s, const uint8_t* page, Scratch& w) {
    token_scales(s, page, s.key_scale, s.key_log_scale, s.key_base, key_scale);
    token_scales(s, page, s.value_scale, s.value_log_scale, s.value_base, value_scale);
    uint64_t cold[MAX_D / 64] = {~0ull, ~0ull, ~0ull, ~0ull};
    for (int i = 0; i < s.hot; i++) {
      const int channel = hot_index[i] = page[s.key_hot_index + i];
      cold[channel / 64] &= ~(1ull << channel % 64);
      hot_mean[i] = half_at(page + s.key_hot_mean + 2 * i);
      hot_step[i] = half_at(page + s.key_hot_step + 2 * i);
      const uint8_t* codes = page + s.key_hot_codes + int64_t(i) * s.page;
      for (int t = 0; t < s.page; t += 16) store(w.hot + i * s.page + t, from_i8(codes + t));
    }
    const V16 norm = set1(s.norm), step = set1(s.plain ? 0.0f : half_at(page + s.key_mean_step));
    for (int k = 0; k < s.d; k += 16) {
      const V16 turn = mul(load(s.signs + k), norm);
      if (s.plain) {
        store(w.mean + k, zero()), store(w.scale + k, turn);
        continue;
      }
      const V16 scale = pick(uint16_t(cold[k / 64] >> k % 64), channel_scale16(s, page + s.key_log_s + k), zero());
      store(w.mean + k, mul(mul(from_i8(page + s.key_mean_code + k), step), scale));
      store(w.scale + k, mul(scale, turn));
    }
  }
};

// A head's pages lie apart, so no hardware prefetcher follows; all of a page at once would fill the queue of misses.
struct Ahead {
  const uint8_t* page;  // null: there is none
  int64_t bytes, at = 0;
  void some() {
    const int64_t end = page && at + bytes / 4 + 64 < bytes ? at + bytes / 4 + 64 : page ? bytes : 0;
    for (; at < end; at += 64) __builtin_prefetch(page + at, 0, 2);
  }
};

static void pages(const Call& c, int b, int h, int r0, int r1, int64_t first, int64_t last, Rows run, float* memory) {
  const Spec& s = *c.spec;
  const int rows = r1 - r0, d = s.d, P = s.page;
  Scratch w(s, memory);
  float *raw = w.q, *turned = w.q + ROWS * LD;
  const Table key_table = make_table(s.key_levels, s.key_bits, !s.plain),
              value_table = make_table(s.value_levels, s.value_bits, !s.plain);
  Header head;
  float constant[ROWS] = {}, hot[MAX_HOT][ROWS], q_hot[MAX_HOT][ROWS];
  int hot_now[MAX_HOT];
  for (int i = 0; i < s.hot; i++) {
    hot_now[i] = -1;
    for (int r = 0; r < ROWS; r += 16) store(hot[i] + r, zero());
  }
  const bool integer = INTEGER && !s.plain, fine = c.q.dtype == F32, fused = !integer && rows <= FUSED_ROWS;
  const bool turn_in_registers = IN_REGISTERS && integer && (d == 64 || d == 128);
  const bool softmax_in_registers = IN_REGISTERS && integer && P == 64 && c.softcap == 0;
  const bool nibble_keys = turn_in_registers && P == 64 && s.key_bits == 4;
  const bool nibble_values = IN_REGISTERS && integer && P == 64 && d % 32 == 0 && s.value_bits == 4;
  const float scaling = softmax_in_registers ? c.scaling * LOG2_E : c.scaling;
  IntegerScratch whole(s, w.integer);
  Span span[ROWS];
  int64_t lo = INT64_MAX, hi = 0;
  for (int r = 0; r < rows; r++) {
    load_query(c, b, h, r0 + r, raw + r * LD);
    for (int k = 0; k < d; k += 16) store(raw + r * LD + k, mul(load(raw + r * LD + k), set1(scaling)));
    span[r] = packed_span(c, c.start[b], c.position[int64_t(b) * c.n + (r0 + r) / c.group]);
    if (span[r].lo < span[r].hi) {
      lo = span[r].lo < lo ? span[r].lo : lo;
      hi = span[r].hi > hi ? span[r].hi : hi;
    }
  }
  for (int64_t p = first; p < last; p++) {
    const int32_t id = c.table[int64_t(b) * c.width + p];
    const int64_t from = p * P;
    if (id < 0 || from + P <= lo || from >= hi) continue;
    const uint8_t* page = c.pages + (int64_t(id) * c.heads + h) * s.page_bytes;
    const int32_t next = p + 1 < last ? c.table[int64_t(b) * c.width + p + 1] : -1;
    Ahead ahead{next < 0 ? nullptr : c.pages + (int64_t(next) * c.heads + h) * s.page_bytes, s.page_bytes};
    ahead.some();
    head.read(s, page, w);
    if (turn_in_registers) {  // q' and the constant of each row
      const auto turn_ = d == 64 ? (fine ? turn_digits<3, 4> : turn_digits<2, 4>) : fine ? turn_digits<3, 8> : turn_digits<2, 8>;
      turn_(raw, w.scale, w.mean, turned, constant, rows, nibble_keys, whole.x);
    }
    for (int r = 0; r < rows && !turn_in_registers; r++) {
      const float* q = raw + r * LD;
      float* y = turned + r * LD;
      constant[r] = d == 64    ? turn<4>(q, w.scale, w.mean, y)
                    : d == 128 ? turn<8>(q, w.scale, w.mean, y)
                               : turn(q, w.scale, w.mean, d, s.block, y);
    }
    for (int i = 0; i < s.hot; i++) {
      if (hot_now[i] == head.hot_index[i]) continue;  // the same for many pages
      hot_now[i] = head.hot_index[i];
      for (int r = 0; r < rows; r++) hot[i][r] = raw[r * LD + hot_now[i]];
    }
    for (int r = 0; r < rows; r += 16) {
      V16 sum = load_quads(constant + r);
      for (int i = 0; i < s.hot; i++) {
        sum = fma(load(hot[i] + r), set1(head.hot_mean[i]), sum);
        store(q_hot[i] + r, mul(load(hot[i] + r), set1(head.hot_step[i])));
      }
      store(constant + r, sum);
    }
    ahead.some();
    if (integer && !turn_in_registers) (fine ? digits_of<3, false> : digits_of<2, false>)(turned, LD, rows, d, whole.x);
    if (integer) (fine ? integer_dot<3> : integer_dot<2>)(s, turned, rows, page + s.key_codes, w.s, P, nibble_keys, whole);
    if (fused) fused_dot(turned, rows, page + s.key_codes, s.key_row, P, d, key_table, w.s, P);
    for (int t = 0; t < P && !fused && !integer; t += TILE) {
      const int count = P - t < TILE ? P - t : TILE;
      key_tile(page + s.key_codes + int64_t(t) * s.key_row, s.key_row, count, d, key_table, w.tile);
      dot_tile(turned, rows, w.tile, count, d, w.s + t, P);
    }
    ahead.some();
    if (softmax_in_registers) {
      const PageRows shared{head.key_scale, head.value_scale, w.hot, constant, q_hot, span, from, s.hot, d};
      (fine ? softmax_digits<3> : softmax_digits<2>)(shared, w.s, rows, run, whole.x);
    }
    for (int r = 0; r < rows && !softmax_in_registers; r++) {
      float* x = w.s + r * P;
      const int64_t begin = span[r].lo - from, end = span[r].hi - from;
      int t = 0;
      for (; t + 64 <= P; t += 64) add_hot<4>(x + t, head.key_scale + t, set1(constant[r]), q_hot[0] + r, w.hot + t, s.hot, P);
      for (; t < P; t += 16) add_hot<1>(x + t, head.key_scale + t, set1(constant[r]), q_hot[0] + r, w.hot + t, s.hot, P);
      for (int64_t t = 0; t < begin && t < P; t++) x[t] = -INFINITY;
      for (int64_t t = end > 0 ? end : 0; t < P; t++) x[t] = -INFINITY;
      softmax_row(x, head.value_scale, P, d, c.softcap, run.m[r], run.l[r], run.o + r * LD);
    }
    ahead.some();
    if (integer && !softmax_in_registers) (fine ? digits_of<3, true> : digits_of<2, true>)(w.s, P, rows, P, whole.x);
    if (integer) (fine ? integer_mix<3> : integer_mix<2>)(s, w.s, P, rows, page + s.value_codes, run.o, nibble_values, whole);
    if (fused) fused_mix(w.s, P, rows, page + s.value_codes, s.value_row, P, d, value_table, run.o);
    for (int t = 0; t < P && !fused && !integer; t += TILE) {
      const int count = P - t < TILE ? P - t : TILE;
      value_tile(page + s.value_codes + int64_t(t) * s.value_row, s.value_row, count, d, value_table, w.tile);
      mix_tile(w.s + t, P, rows, w.tile, count, d, run.o);
    }
  }
  if (softmax_in_registers) natural(run, rows, d);
}

static void finish(const Call& c, int b, int h, int r0, int r1, Rows packed, Rows exact_) {
  const Spec& s = *c.spec;
  for (int r = 0; r < r1 - r0; r++) {
    float *a = packed.o + r * LD, *e = exact_.o + r * LD;
    const int i = (r0 + r) / c.group, g = (r0 + r) % c.group;
    if (packed.l[r] != 0) {
      hadamard(a, s.d, s.block, s.norm);
      for (int k = 0; k < s.d; k += 16) store(a + k, mul(load(a + k), load(s.signs + k)));
    }
    const Rows one{exact_.m + r, exact_.l + r, e};
    merge(s, 1, one, Rows{packed.m + r, packed.l + r, a});
    float sum = exact_.l[r], gain = 1;
    if (c.sink_logits && c.position[int64_t(b) * c.n + i] >= 0) {
      const float sink = c.sink_logits[h * c.group + g], m = exact_.m[r];
      if (sum == 0) {
        sum = 1;
      } else {
        const float top = sink > m ? sink : m;
        gain = exp1(m - top);
        sum = sum * gain + exp1(sink - top);
      }
    }
    const float f = sum == 0 ? 0.0f : gain / sum;
    for (int k = 0; k < s.d; k++) {
      store_as((void*)c.out.data, c.out.dtype, b * c.out.sb + (h * c.group + g) * c.out.sh + i * c.out.sn + k, e[k] * f);
    }
  }
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels{TQ_NAME, pages, exact, merge, finish};

}  // namespace TQ_ISA
}  // namespace tq
