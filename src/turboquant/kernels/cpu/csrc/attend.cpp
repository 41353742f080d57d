// Attention of some query rows over packed pages and over 16-bit tokens; compiled once per instruction set.
//
// A page's keys are k = s∘(Rᵀ(a_t·level) + mean), but for the hot channels. So q' = R(q∘s) is made once per page and
// row, a logit is a_t·(q'·level) + (q∘s)·mean + the hot channels, and no key is ever rotated back. Values stay rotated
// in the accumulator; one inverse rotation per output row undoes that (`finish`).
#include "fused.h"
#include "integer.h"

namespace tq {
namespace TQ_ISA {

namespace {

struct Scratch {
  float *q, *s, *tile, *scale, *mean, *rows, *hot, *integer;
  explicit Scratch(const Spec& spec, float* p) {
    q = p, p += 2 * ROWS * LD;
    s = p, p += ROWS * (spec.page > EXACT ? spec.page : EXACT);
    tile = p, p += TILE * MAX_D + 16 * MAX_D;
    scale = p, p += MAX_D;
    mean = p, p += MAX_D;
    rows = p, p += 16 * MAX_D;
    hot = p, p += spec.hot * spec.page;
    integer = p;
  }
};

TQ_INLINE const char* at(const void* base, int dtype, int64_t element) {
  return (const char*)base + element * (dtype == F32 ? 4 : 2);
}

// query row r = column·group + member, as fp32
TQ_INLINE void load_query(const Call& c, int b, int h, int r, float* dst) {
  const int i = r / c.group, g = r % c.group;
  const void* src = at(c.q.data, c.q.dtype, b * c.q.sb + (h * c.group + g) * c.q.sh + i * c.q.sn);
  for (int k = 0; k < c.spec->d; k += 16) store(dst + k, load_as(src, c.q.dtype, k));
}

struct Span {  // tokens lo <= j < hi that a row reads
  int64_t lo, hi;
};

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
  const float base = header_half(page + base_at);
  const V16 b = set1(base);
  for (int t = 0; t < s.page; t += 16) store(out + t, mul(b, lookup(s.a_table, page + log_at + t)));
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
    for (int v = 0; v < NV; v++) y[v] = fma(set1(q[i]), load(hot + i * P + 16 * v), y[v]);
  }
  for (int v = 0; v < NV; v++) store(x + 16 * v, y[v]);
}

static void pages(const Call& c, int b, int h, int r0, int r1, int64_t first, int64_t last, Rows run, float* memory) {
  const Spec& s = *c.spec;
  const int rows = r1 - r0, d = s.d, P = s.page;
  Scratch w(s, memory);
  float *raw = w.q, *turned = w.q + ROWS * LD;
  const Table key_table = make_table(s.key_levels, s.key_bits, !s.plain),
              value_table = make_table(s.value_levels, s.value_bits, !s.plain);
  float key_scale[MAX_PAGE], value_scale[MAX_PAGE], constant[ROWS];
  const bool integer = INTEGER && !s.plain, fine = c.q.dtype == F32, fused = !integer && rows <= FUSED_ROWS;
  IntegerScratch whole(s, w.integer);
  Span span[ROWS];
  int64_t lo = INT64_MAX, hi = 0;
  for (int r = 0; r < rows; r++) {
    load_query(c, b, h, r0 + r, raw + r * LD);
    for (int k = 0; k < d; k += 16) store(raw + r * LD + k, mul(load(raw + r * LD + k), set1(c.scaling)));
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
    if (next >= 0) {  // a head's pages lie apart: no hardware prefetcher follows
      const uint8_t* ahead = c.pages + (int64_t(next) * c.heads + h) * s.page_bytes;
      for (int64_t i = 0; i < s.page_bytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
    }
    token_scales(s, page, s.key_scale, s.key_log_scale, s.key_base, key_scale);
    token_scales(s, page, s.value_scale, s.value_log_scale, s.value_base, value_scale);
    if (!s.plain) {
      const float step = header_half(page + s.key_mean_step);
      for (int k = 0; k < d; k += 16) store(w.scale + k, lookup(s.s_table, page + s.key_log_s + k));
      for (int k = 0; k < d; k += 16) store(w.mean + k, mul(from_i8(page + s.key_mean_code + k), set1(step)));
      for (int i = 0; i < s.hot; i++) w.scale[page[s.key_hot_index + i]] = 0;
    }
    for (int k = 0; k < d; k += 16) {
      const V16 sign = load(s.signs + k), scale = s.plain ? set1(1.0f) : load(w.scale + k);
      store(w.mean + k, s.plain ? zero() : mul(load(w.mean + k), scale));
      store(w.scale + k, mul(scale, mul(sign, set1(s.norm))));
    }
    for (int r = 0; r < rows; r++) {  // q' and the constant of each row
      const float* q = raw + r * LD;
      float total = d == 64    ? turn<4>(q, w.scale, w.mean, turned + r * LD)
                    : d == 128 ? turn<8>(q, w.scale, w.mean, turned + r * LD)
                               : turn(q, w.scale, w.mean, d, s.block, turned + r * LD);
      for (int i = 0; i < s.hot; i++) total += q[page[s.key_hot_index + i]] * header_half(page + s.key_hot_mean + 2 * i);
      constant[r] = total;
    }
    if (integer) (fine ? integer_dot<3> : integer_dot<2>)(s, turned, rows, page + s.key_codes, w.s, P, whole);
    if (fused) fused_dot(turned, rows, page + s.key_codes, s.key_row, P, d, key_table, w.s, P);
    for (int t = 0; t < P && !fused && !integer; t += TILE) {
      const int count = P - t < TILE ? P - t : TILE;
      key_tile(page + s.key_codes + int64_t(t) * s.key_row, s.key_row, count, d, key_table, w.tile);
      dot_tile(turned, rows, w.tile, count, d, w.s + t, P);
    }
    for (int i = 0; i < s.hot; i++) {
      const V16 step = set1(header_half(page + s.key_hot_step + 2 * i));
      const uint8_t* codes = page + s.key_hot_codes + int64_t(i) * P;
      for (int t = 0; t < P; t += 16) store(w.hot + i * P + t, mul(from_i8(codes + t), step));
    }
    for (int r = 0; r < rows; r++) {
      float *x = w.s + r * P, q_hot[MAX_HOT];
      const V16 add_ = set1(constant[r]);
      for (int i = 0; i < s.hot; i++) q_hot[i] = raw[r * LD + page[s.key_hot_index + i]];
      int t = 0;
      for (; t + 64 <= P; t += 64) add_hot<4>(x + t, key_scale + t, add_, q_hot, w.hot + t, s.hot, P);
      for (; t < P; t += 16) add_hot<1>(x + t, key_scale + t, add_, q_hot, w.hot + t, s.hot, P);
    }
    for (int r = 0; r < rows; r++) {
      float* x = w.s + r * P;
      for (int64_t t = 0; t < span[r].lo - from && t < P; t++) x[t] = -INFINITY;
      for (int64_t t = span[r].hi - from > 0 ? span[r].hi - from : 0; t < P; t++) x[t] = -INFINITY;
      softmax_row(x, value_scale, P, d, c.softcap, run.m[r], run.l[r], run.o + r * LD);
    }
    if (integer) (fine ? integer_mix<3> : integer_mix<2>)(s, w.s, P, rows, page + s.value_codes, run.o, whole);
    if (fused) fused_mix(w.s, P, rows, page + s.value_codes, s.value_row, P, d, value_table, run.o);
    for (int t = 0; t < P && !fused && !integer; t += TILE) {
      const int count = P - t < TILE ? P - t : TILE;
      value_tile(page + s.value_codes + int64_t(t) * s.value_row, s.value_row, count, d, value_table, w.tile);
      mix_tile(w.s + t, P, rows, w.tile, count, d, run.o);
    }
  }
}

TQ_INLINE bool all_finite(const float* x, int d) {
  uint32_t bits[16], bad = 0;
  for (int k = 0; k < d; k += 16) {
    std::memcpy(bits, x + k, 64);
    for (int i = 0; i < 16; i++) bad |= (bits[i] & 0x7F800000) == 0x7F800000;
  }
  return !bad;
}

// Which 16-bit tokens a row reads: sinks, the ring, the open page, and the chunk.
struct Exact {
  const Call& c;
  int64_t b, start, packed_end;
  bool reads(int64_t i, int64_t t, int64_t j) const {
    const bool near = c.window < 0 || t - j < c.window;
    if (j < start) return near && (j < c.sinks || j > t - c.ring || j >= packed_end);
    const int64_t column = c.column[b * c.n + (j - start)];
    if (c.mask) return c.mask[b * c.mask_sb + i * c.n + column];
    return near && j <= t;
  }
  const void* row(const Strided& chunk, const void* ring, const void* sink, int h, int64_t j) const {
    const int64_t head = b * c.heads + h, d = c.spec->d;
    if (j < start && j < c.sinks) return at(sink, c.dtype, (head * c.sinks + j) * d);
    if (j < start) return at(ring, c.dtype, (head * c.slots + j % c.slots) * d);
    return at(chunk.data, chunk.dtype, b * chunk.sb + h * chunk.sh + c.column[b * c.n + (j - start)] * chunk.sn);
  }
};

static void exact(const Call& c, int b, int h, int r0, int r1, Rows run, float* memory) {
  const Spec& s = *c.spec;
  const int rows = r1 - r0, d = s.d, i0 = r0 / c.group, i1 = (r1 - 1) / c.group + 1;
  Scratch w(s, memory);
  const int64_t start = c.start[b], packed_end = start / s.page * s.page;
  const Exact e{c, b, start, packed_end};
  const int64_t* position = c.position + int64_t(b) * c.n;
  int64_t low = INT64_MAX, high = -1, total = start;
  for (int i = 0; i < c.n; i++) total += position[i] >= 0;
  for (int i = i0; i < i1; i++) {
    if (position[i] < 0) continue;
    low = position[i] < low ? position[i] : low;
    high = position[i] > high ? position[i] : high;
  }
  if (high < 0) return;
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
    uint8_t sees[ROWS][EXACT] = {};  // by column of the chunk, not by row: the members of a group see the same
    bool any[EXACT] = {}, some = false;
    for (int i = i0; i < i1; i++) {
      if (position[i] < 0) continue;
      for (int t = 0; t < EXACT && from + t < total; t++) {
        if (!e.reads(i, position[i], from + t)) continue;
        sees[i - i0][t] = 1, any[t] = some = true;
      }
    }
    if (!some) continue;
    const auto gather = [&](int t0, const Strided& chunk, const void* ring, const void* sink) {
      for (int t = 0; t < 16; t++) {
        float* dst = w.rows + t * d;
        if (!any[t0 + t]) {
          std::memset(dst, 0, sizeof(float) * d);
          continue;
        }
        const int64_t j = from + t0 + t;
        const void* src = e.row(chunk, ring, sink, h, j);
        const int type = j < start ? c.dtype : chunk.dtype;
        for (int k = 0; k < d; k += 16) store(dst + k, load_as(src, type, k));
      }
    };
    for (int t = 0; t < EXACT; t += 16) {
      gather(t, c.k, c.ring_k, c.sink_k);
      transpose16(w.rows, d, d, w.tile, TILE);
      dot_tile(w.q, rows, w.tile, 16, d, w.s + t, EXACT);
    }
    for (int r = 0; r < rows; r++) {
      float* x = w.s + r * EXACT;
      const uint8_t* seen = sees[(r0 + r) / c.group - i0];
      for (int t = 0; t < EXACT; t++) x[t] = seen[t] ? x[t] : -INFINITY;
      softmax_row(x, nullptr, EXACT, d, c.softcap, run.m[r], run.l[r], run.o + r * LD);
    }
    for (int t = 0; t < EXACT; t += 16) {
      gather(t, c.v, c.ring_v, c.sink_v);
      for (int u = 0; u < 16; u++) {  // 0·NaN is NaN: what is not finite may reach the rows that read it and no others
        float* v = w.rows + u * d;
        if (!any[t + u] || all_finite(v, d)) continue;
        for (int r = 0; r < rows; r++) {
          if (!sees[(r0 + r) / c.group - i0][t + u]) continue;
          const float p = w.s[r * EXACT + t + u];
          for (int k = 0; k < d; k++) run.o[r * LD + k] += p * v[k];
        }
        std::memset(v, 0, sizeof(float) * d);
      }
      mix_tile(w.s + t, EXACT, rows, w.rows, 16, d, run.o);
    }
  }
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
