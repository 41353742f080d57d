// The calls on a cache: what Python hands over is checked here, for that takes a tenth of the time it takes there. False
// means that something is not as the kernels read it; Python then converts what may be converted and says what is wrong.
#include "cache_calls.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace nb = nanobind;
using namespace tq;

namespace {

using Numbers = std::map<std::string, double>;
using Offsets = std::map<std::string, int64_t>;
using Tables = std::map<std::string, std::vector<float>>;

template <class T>
T need(const std::map<std::string, T>& from, const char* name) {
  const auto it = from.find(name);
  if (it == from.end()) throw std::invalid_argument(std::string("spec lacks ") + name);
  return it->second;
}

template <class T>
void fill(T* to, size_t room, const std::vector<float>& from) {
  if (from.size() > room) throw std::invalid_argument("a table of the spec is too long");
  std::copy(from.begin(), from.end(), to);
}

void level_bytes(const float* levels, float unit, int bits, uint8_t (&to)[64]) {
  for (int i = 0; i < 64; i++) to[i] = bits == 8 ? 0 : uint8_t(int(std::nearbyint(levels[i & ((1 << bits) - 1)] / unit)) + 128);
}

// whether both tables are those of one octave times powers of two
bool tables_repeat(const Spec& s) {
  bool same = s.a_table[255] == 0;
  for (int i = 0; i < 255; i++) same = same && s.a_table[i] == std::ldexp(s.a_table[i % 32], -(i / 32));
  for (int i = 0; i < 256; i++) same = same && s.s_table[i] == std::ldexp(s.s_table[128 + i % 16], i / 16 - 8);
  return same;
}

Spec make_spec(const Numbers& n, const Offsets& at, const Tables& tables) {
  Spec s{};
  const auto whole = [&](const char* name) { return int(need(n, name)); };
  s.page = whole("page"), s.d = whole("d"), s.hot = whole("hot"), s.plain = whole("plain");
  s.key_bits = whole("key_bits"), s.value_bits = whole("value_bits"), s.block = whole("block");
  s.reader_stride = whole("reader_stride"), s.states = whole("states"), s.ring = whole("ring");
  s.slots = whole("slots"), s.sinks = whole("sinks"), s.samples = whole("samples");
  s.key_row = whole("key_row"), s.value_row = whole("value_row"), s.page_bytes = whole("page_bytes");
  s.norm = float(need(n, "norm")), s.s_steps = float(need(n, "s_steps")), s.row_steps = float(need(n, "row_steps"));
  s.decay_old = float(need(n, "decay_old")), s.decay_new = float(need(n, "decay_new"));
  s.blend_old = float(need(n, "blend_old")), s.blend_new = float(need(n, "blend_new"));
  s.code_cells = whole("code_cells"), s.search_units = whole("search_units"), s.search_cell = whole("search_cell");
  s.key_unit = float(need(n, "key_unit")), s.value_unit = float(need(n, "value_unit"));
  if (s.d < 16 || s.d > MAX_D || s.d % 16 || s.page < 16 || s.page > MAX_PAGE || s.page % 16 || s.hot > MAX_HOT ||
      s.block < 16 || s.d % s.block) {
    throw std::invalid_argument("a size of the spec is out of range");
  }
  const std::pair<const char*, int64_t Spec::*> fields[] = {
      {"key_mean_code", &Spec::key_mean_code}, {"key_log_s", &Spec::key_log_s},
      {"key_log_scale", &Spec::key_log_scale}, {"key_hot_mean", &Spec::key_hot_mean},
      {"key_hot_step", &Spec::key_hot_step},   {"key_base", &Spec::key_base},
      {"key_mean_step", &Spec::key_mean_step}, {"key_hot_index", &Spec::key_hot_index},
      {"key_hot_codes", &Spec::key_hot_codes}, {"key_codes", &Spec::key_codes},
      {"key_scale", &Spec::key_scale},         {"value_base", &Spec::value_base},
      {"value_log_scale", &Spec::value_log_scale}, {"value_codes", &Spec::value_codes},
      {"value_scale", &Spec::value_scale},
  };
  for (const auto& f : fields) {
    const auto it = at.find(f.first);
    s.*f.second = it == at.end() ? 0 : it->second;
  }
  fill(s.signs, MAX_D, need(tables, "signs"));
  fill(s.s_table, 256, need(tables, "s_table")), fill(s.a_table, 256, need(tables, "a_table"));
  fill(s.key_levels, 256, need(tables, "key_levels")), fill(s.value_levels, 256, need(tables, "value_levels"));
  fill(s.key_edges, 256, need(tables, "key_edges")), fill(s.value_edges, 256, need(tables, "value_edges"));
  if (need(tables, "key_search").size() != SEARCH_CELLS * TRIALS) throw std::invalid_argument("key_search has another size");
  fill(s.key_search, SEARCH_CELLS * TRIALS, need(tables, "key_search"));
  fill(s.value_search, SEARCH_CELLS * TRIALS, need(tables, "value_search"));
  s.octaves = tables_repeat(s);
  level_bytes(s.key_levels, s.key_unit, s.key_bits, s.key_bytes);
  level_bytes(s.value_levels, s.value_unit, s.value_bits, s.value_bytes);
  s.key_count = int(need(tables, "key_levels").size()), s.value_count = int(need(tables, "value_levels").size());
  return s;
}

constexpr const char* NAMES[] = {"pages",  "table",   "ring_k",  "ring_v", "sink_k",
                                 "sink_v", "readers", "tracker", "length", "nonfinite"};
PyObject* names[Prepared::BUFFERS];

bool is_float(Kind k) { return k == FLOAT32 || k == BFLOAT16 || k == FLOAT16; }

// (batch, heads, tokens, d) with dense rows
bool rows_of(nb::handle x, View& v, Strided& to) {
  if (!view_of(x, v) || v.ndim != 4 || v.stride[3] != 1 || !is_float(v.kind)) return false;
  to = {v.data, v.stride[0], v.stride[1], v.stride[2], int(v.kind)};
  return true;
}

bool same_shape(const View& a, const View& b) { return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape); }

}  // namespace

namespace tq {

bool Prepared::read(const Spec& s, nb::handle buffers, nb::handle q, nb::handle k, nb::handle v, nb::handle valid) {
  View vq, vk, vv;
  if (!rows_of(q, vq, call.q) || !rows_of(k, vk, call.k) || !rows_of(v, vv, call.v) || !same_shape(vk, vv)) return false;
  const int64_t b = vk.shape[0], h = vk.shape[1], n = vk.shape[2], d = s.d;
  if (vk.shape[3] != d || vq.shape[0] != b || vq.shape[2] != n || vq.shape[3] != d || !h || vq.shape[1] % h) return false;
  if (vv.kind != vk.kind || !read_buffers(s, buffers, b, h, vq.shape[1] / h, n, vk.kind)) return false;
  if (!valid.is_none()) {
    View mask;
    if (!view_of(valid, mask) || !mask.is(BOOL, {b, n})) return false;
    call.valid = static_cast<uint8_t*>(mask.data);
  }
  return true;
}

bool Prepared::read_buffers(const Spec& s, nb::handle buffers, int64_t b, int64_t h, int64_t group, int64_t n,
                            Kind dtype) {
  Call& c = call;
  View at[BUFFERS];
  const int64_t d = s.d;
  for (int i = 0; i < BUFFERS; i++) {
    alive[i] = nb::steal(PyObject_GetAttr(buffers.ptr(), names[i]));
    if (!alive[i].is_valid()) throw nb::python_error();
    if (!view_of(alive[i], at[i])) return false;
  }
  if (at[PAGES].ndim != 3 || at[TABLE].ndim != 2) return false;
  c.pool = int(at[PAGES].shape[0]), c.width = int(at[TABLE].shape[1]);
  if (!at[PAGES].is(UINT8, {c.pool, h, s.page_bytes}) || !at[TABLE].is(INT32, {b, c.width})) return false;
  for (int i : {RING_K, RING_V}) {
    if (!at[i].is(dtype, {b, h, s.slots, d})) return false;
  }
  for (int i : {SINK_K, SINK_V}) {
    if (!at[i].is(dtype, {b, h, s.sinks, d})) return false;
  }
  if (!at[READERS].is(dtype, {b, h, s.samples, d}) || at[TRACKER].ndim != 5) return false;
  c.states = int(at[TRACKER].shape[1]);
  if (c.states < s.states || !at[TRACKER].is(FLOAT32, {b, c.states, h, 3, d})) return false;
  if (!at[LENGTH].is(INT64, {b}) || !at[NONFINITE].is(INT64, {b})) return false;
  c.spec = &s;
  c.pages = static_cast<uint8_t*>(at[PAGES].data), c.table = static_cast<int32_t*>(at[TABLE].data);
  c.ring_k = at[RING_K].data, c.ring_v = at[RING_V].data, c.sink_k = at[SINK_K].data, c.sink_v = at[SINK_V].data;
  c.readers = at[READERS].data, c.tracker = static_cast<float*>(at[TRACKER].data);
  c.length = static_cast<int64_t*>(at[LENGTH].data), c.nonfinite = static_cast<int64_t*>(at[NONFINITE].data);
  c.batch = int(b), c.heads = int(h), c.group = int(group), c.n = int(n), c.slots = s.slots, c.sinks = s.sinks;
  c.samples = s.samples, c.dtype = int(dtype), c.ring = s.ring;
  return true;
}

void Prepared::place() {
  Call& c = call;
  start.assign(c.length, c.length + c.batch);
  position.assign(size_t(c.batch) * c.n, -1);
  column.assign(size_t(c.batch) * c.n, 0);
  for (int b = 0; b < c.batch; b++) {
    const size_t row = size_t(b) * c.n;
    int count = 0;
    for (int i = 0; i < c.n; i++) {
      if (c.valid && !c.valid[row + i]) continue;
      position[row + i] = start[b] + count;
      column[row + count++] = i;
    }
  }
  c.start = start.data(), c.position = position.data(), c.column = column.data();
}

}  // namespace tq

namespace {

// mask: (B or 1, 1, n, n) bool; sinks: (heads of queries) fp32; both contiguous, or None. window < 0: none; softcap 0: none
bool attention_call(const Spec& spec, int threads, nb::handle buffers, nb::handle q, nb::handle k, nb::handle v,
                    nb::handle valid, nb::handle out, nb::handle mask, nb::handle sinks, double scaling, double softcap,
                    int64_t window) {
  Prepared p;
  Call& c = p.call;
  View to, seen, sink;
  if (!p.read(spec, buffers, q, k, v, valid) || !rows_of(out, to, c.out)) return false;
  const int64_t heads = int64_t(c.heads) * c.group, n = c.n;
  if (to.shape[0] != c.batch || to.shape[1] != heads || to.shape[2] != n || to.shape[3] != spec.d) return false;
  if (!mask.is_none()) {
    if (!view_of(mask, seen) || (!seen.is(BOOL, {1, 1, n, n}) && !seen.is(BOOL, {c.batch, 1, n, n}))) return false;
    c.mask = static_cast<uint8_t*>(seen.data), c.mask_sb = seen.shape[0] > 1 ? n * n : 0;
  }
  if (!sinks.is_none()) {
    if (!view_of(sinks, sink) || !sink.is(FLOAT32, {heads})) return false;
    c.sink_logits = static_cast<float*>(sink.data);
  }
  if (!c.batch || !n) return true;
  c.scaling = float(scaling), c.softcap = float(softcap), c.window = window;
  nb::gil_scoped_release release;
  p.place();
  attention(c, kernels_of(isa_in_use()), threads);
  return true;
}

bool append_call(const Spec& spec, int threads, nb::handle buffers, nb::handle q, nb::handle k, nb::handle v,
                 nb::handle valid) {
  Prepared p;
  if (!p.read(spec, buffers, q, k, v, valid)) return false;
  if (!p.call.batch || !p.call.n) return true;
  nb::gil_scoped_release release;
  p.place();
  append(p.call, encoder_of(isa_in_use()), threads);
  return true;
}

}  // namespace

void bind_cache(nb::module_& m) {
  for (int i = 0; i < Prepared::BUFFERS; i++) names[i] = PyUnicode_InternFromString(NAMES[i]);
  nb::class_<Spec>(m, "Spec");
  m.def("spec", &make_spec);
  m.def("use_tensors", &use_tensors, nb::arg("type"), nb::arg("dtypes"), nb::arg("table").none());
  m.def("attention", &attention_call, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
        nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg());
  m.def("append", &append_call, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
}
