// Adding a chunk: pages that become complete are encoded from ring and chunk, then ring, sinks and reader samples move
// on. Statistics of a head's pages run one after the other (each builds on the last), the codes of all pages in parallel.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "driver.h"
#include "half.h"
#include "pool.h"

namespace tq {
namespace {

struct Sequence {  // one sequence of the batch and one head
  const Call& c;
  int b, h;
  int64_t start, count, first_page, pages;

  Sequence(const Call& call, int b_, int h_, int64_t added) : c(call), b(b_), h(h_), start(call.start[b_]), count(added) {
    first_page = start / c.spec->page;
    pages = (start + count) / c.spec->page - first_page;
  }
  int64_t head() const { return int64_t(b) * c.heads + h; }
  size_t width() const { return c.dtype == F32 ? 4 : 2; }
  const char* chunk(const Strided& x, int64_t position) const {
    return (const char*)x.data +
           (b * x.sb + h * x.sh + int64_t(c.column[int64_t(b) * c.n + (position - start)]) * x.sn) * width();
  }
  char* slot(void* ring, int64_t position) const {
    return (char*)ring + (head() * c.slots + position % c.slots) * c.spec->d * width();
  }
  const char* token(const Strided& x, void* ring, int64_t position) const {
    return position < start ? slot(ring, position) : chunk(x, position);
  }
};

// RMS of the group's queries at a token, in the readers' dtype: (d) fp32
void reader_sample(const Sequence& s, int64_t position, float* out) {
  const Call& c = s.c;
  const int64_t column = c.column[int64_t(s.b) * c.n + (position - s.start)];
  const size_t width = c.q.dtype == F32 ? 4 : 2;
  const int d = c.spec->d;
  std::fill(out, out + d, 0.0f);
  for (int g = 0; g < c.group; g++) {
    const void* src = (const char*)c.q.data + (s.b * c.q.sb + (s.h * c.group + g) * c.q.sh + column * c.q.sn) * width;
    for (int k = 0; k < d; k++) {
      const float x = scalar_as(src, c.q.dtype, k);
      out[k] += x * x;
    }
  }
  for (int k = 0; k < d; k++) {
    float x = std::sqrt(out[k] / float(c.group));
    x = x != x ? 0.0f : x > 65504.0f ? 65504.0f : x;
    float kept[1];
    store_as(kept, c.dtype, 0, x);
    out[k] = scalar_as(kept, c.dtype, 0);
  }
}

void blend(const Spec& s, const float* state, const float* own, bool past, float* frozen, float* next) {
  const int d = s.d;
  for (int i = 0; i < 3 * d; i++) {
    frozen[i] = past && i >= d ? s.blend_old * state[i] + s.blend_new * own[i] : own[i];
    next[i] = past ? s.decay_old * state[i] + s.decay_new * own[i] : own[i];
  }
}

struct Loaded {
  std::unique_ptr<float[]> memory{new float[2 * MAX_PAGE * MAX_D + ENCODE_SCRATCH]};
  float *k = memory.get(), *v = k + MAX_PAGE * MAX_D, *scratch = v + MAX_PAGE * MAX_D;
  uint8_t usable[MAX_PAGE];
};

void load_page(const Sequence& s, const Encoder& e, int64_t page, Loaded& x, bool values) {
  const Call& c = s.c;
  const int d = c.spec->d;
  for (int t = 0; t < c.spec->page; t++) {
    const int64_t position = page * c.spec->page + t;
    const Worst k = e.load_finite(s.token(c.k, c.ring_k, position), c.dtype, d, x.k + t * d);
    const Worst v = e.load_finite(s.token(c.v, c.ring_v, position), c.dtype, d, values ? x.v + t * d : x.v);
    x.usable[t] = k == USABLE && v == USABLE && position >= c.sinks;
  }
}

void statistics(const Sequence& s, const Encoder& e, Loaded& x, float* frozen) {
  const Call& c = s.c;
  const Spec& p = *c.spec;
  const int64_t per = p.page / p.reader_stride;
  float own[3 * MAX_D], power[MAX_D], sample[MAX_D];
  for (int64_t i = 0; i < s.pages; i++) {
    const int64_t page = s.first_page + i;
    load_page(s, e, page, x, false);
    std::fill(power, power + p.d, 0.0f);
    for (int64_t j = page * per; j < (page + 1) * per; j++) {
      const int64_t at = j * p.reader_stride + p.reader_stride - 1;
      if (at >= s.start) {
        reader_sample(s, at, sample);
      } else {
        const int64_t from = (s.head() * c.samples + j % c.samples) * p.d;
        for (int k = 0; k < p.d; k++) sample[k] = scalar_as(c.readers, c.dtype, from + k);
      }
      for (int k = 0; k < p.d; k++) power[k] += sample[k] * sample[k];
    }
    for (int k = 0; k < p.d; k++) power[k] /= float(per);
    e.page_stats(p, x.k, x.usable, power, own);
    const auto state = [&](int64_t of) {
      return c.tracker + ((int64_t(s.b) * c.states + of % c.states) * c.heads + s.h) * 3 * p.d;
    };
    blend(p, page ? state(page - 1) : nullptr, own, page > 0, frozen + i * 3 * p.d, state(page));
  }
}

void move_on(const Sequence& s, const Encoder&) {
  const Call& c = s.c;
  const Spec& p = *c.spec;
  const int64_t end = s.start + s.count;
  const size_t bytes = p.d * s.width();
  float sample[MAX_D];
  for (int64_t t = std::max(s.start, end - c.slots); t < end; t++) {
    std::memcpy(s.slot(c.ring_k, t), s.chunk(c.k, t), bytes);
    std::memcpy(s.slot(c.ring_v, t), s.chunk(c.v, t), bytes);
  }
  for (int64_t t = s.start; t < std::min<int64_t>(end, c.sinks); t++) {
    std::memcpy((char*)c.sink_k + (s.head() * c.sinks + t) * bytes, s.chunk(c.k, t), bytes);
    std::memcpy((char*)c.sink_v + (s.head() * c.sinks + t) * bytes, s.chunk(c.v, t), bytes);
  }
  const int64_t last = end / p.reader_stride;
  for (int64_t j = std::max(s.start / p.reader_stride, last - c.samples); j < last; j++) {
    const int64_t at = j * p.reader_stride + p.reader_stride - 1;
    if (at < s.start) continue;
    reader_sample(s, at, sample);
    const int64_t to = (s.head() * c.samples + j % c.samples) * p.d;
    for (int k = 0; k < p.d; k++) store_as(c.readers, c.dtype, to + k, sample[k]);
  }
}

}  // namespace

void append(const Call& call, const Encoder& e, int threads) {
  const Spec& p = *call.spec;
  const int64_t heads = int64_t(call.batch) * call.heads;
  std::vector<int64_t> added(call.batch, 0);
  int64_t most = 0, encoded = 0;
  for (int b = 0; b < call.batch; b++) {
    for (int i = 0; i < call.n; i++) added[b] += call.position[int64_t(b) * call.n + i] >= 0;
    most = std::max(most, added[b]);
    const int64_t first = call.start[b] / p.page, last = (call.start[b] + added[b]) / p.page;
    encoded = std::max(encoded, last - first);
    for (int64_t i = first; i < last; i++) {
      if (i >= call.width) throw std::invalid_argument("the table names no page for tokens that complete one");
      if (call.table[int64_t(b) * call.width + i] >= call.pool) throw std::invalid_argument(OUTSIDE);
    }
  }
  const auto sequence = [&](int64_t bh) {
    return Sequence(call, int(bh / call.heads), int(bh % call.heads), added[bh / call.heads]);
  };
  if (most * heads < 64) threads = encoded ? threads : 1;

  std::vector<uint8_t> bad(size_t(heads) * call.n, 0);  // a token counts once, not once per head
  parallel(heads, most * heads < 64 ? 1 : threads, [&](int64_t bh, int) {
    const Sequence s = sequence(bh);
    float row[MAX_D];
    for (int64_t i = 0; i < s.count; i++) {
      const Worst k = e.load_finite(s.chunk(call.k, s.start + i), call.dtype, p.d, row);
      const Worst v = e.load_finite(s.chunk(call.v, s.start + i), call.dtype, p.d, row);
      bad[bh * call.n + i] = k == NONFINITE || v == NONFINITE;
    }
  });
  for (int b = 0; b < call.batch; b++) {
    for (int64_t i = 0; i < added[b]; i++) {
      bool any = false;
      for (int h = 0; h < call.heads; h++) any |= bad[(int64_t(b) * call.heads + h) * call.n + i] != 0;
      call.nonfinite[b] += any;
    }
  }

  if (encoded) {
    std::vector<std::unique_ptr<Loaded>> memory(threads);
    const auto of_worker = [&](int worker) -> Loaded& {
      if (!memory[worker]) memory[worker] = std::make_unique<Loaded>();
      return *memory[worker];
    };
    std::unique_ptr<float[]> frozen(new float[size_t(heads) * encoded * 3 * p.d]);
    parallel(p.plain ? 0 : heads, threads, [&](int64_t bh, int worker) {
      statistics(sequence(bh), e, of_worker(worker), frozen.get() + bh * encoded * 3 * p.d);
    });
    parallel(heads * encoded, threads, [&](int64_t task, int worker) {
      const Sequence s = sequence(task / encoded);
      const int64_t i = task % encoded;
      if (i >= s.pages) return;
      const int64_t id = call.table[int64_t(s.b) * call.width + s.first_page + i];
      if (id < 0) return;  // out of the window already, not kept
      Loaded& x = of_worker(worker);
      load_page(s, e, s.first_page + i, x, true);
      uint8_t* out = call.pages + (id * call.heads + s.h) * p.page_bytes;
      e.encode(p, {x.k, x.v, x.usable, frozen.get() + task * 3 * p.d, out}, x.scratch);
    });
  }
  parallel(heads, most * heads < 64 ? 1 : threads, [&](int64_t bh, int) { move_on(sequence(bh), e); });
  for (int b = 0; b < call.batch; b++) call.length[b] += added[b];
}

}  // namespace tq
