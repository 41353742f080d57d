// The Python module. It knows no torch: the wrapper (kernels/cpu/cache.py) checks the contract and hands over
// addresses, sizes and strides of tensors that it keeps alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <stdexcept>

#include "driver.h"
#include "pool.h"

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
  s.reader_stride = whole("reader_stride"), s.states = whole("states");
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

template <class T>
T* address(int64_t x) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(x));
}

using Row = std::array<int64_t, 5>;  // address, strides of batch, head and token, dtype

Strided strided(const Row& r) { return {address<void>(r[0]), r[1], r[2], r[3], int(r[4])}; }

void quantize(const RowsToQuantize& a, int64_t rows, const Quantizer& q, int threads) {
  const int64_t per = std::max<int64_t>(1, 8192 / a.width);  // rows of a task
  parallel((rows + per - 1) / per, threads, [&](int64_t task, int) {
    std::unique_ptr<float[]> scratch(new float[a.width]);
    for (int64_t row = task * per; row < std::min(rows, (task + 1) * per); row++) q.row(a, row, scratch.get());
  });
}

// addresses: x signs codes scale; sizes: rows width stride block dtype
RowsToQuantize rows_to_quantize(const std::array<int64_t, 4>& at, const std::array<int64_t, 5>& size, double norm) {
  return {address<void>(at[0]), int(size[4]), int(size[3]), size[1], size[2], address<float>(at[1]), float(norm),
          address<int8_t>(at[2]), address<float>(at[3]), PLAIN, nullptr, nullptr, 0, 0, 0, nullptr, 0};
}

// Packed weights that meet the same rows, by: addresses of codes, scale, zero and bias (0: none); N K G S, dtype of bias
struct Weights {
  struct One {
    Weight weight;
    const void* bias;
    int bias_dtype;
  };
  std::vector<One> all;
  explicit Weights(const std::vector<std::array<int64_t, 9>>& some) {
    for (const auto& w : some) {
      all.push_back({{address<uint8_t>(w[0]), address<uint16_t>(w[1]), address<uint8_t>(w[2]), w[4], w[5], w[6],
                      int(w[7])}, address<void>(w[3]), int(w[8])});
      if (w[5] != some[0][5]) throw std::invalid_argument("weights of different inputs");
    }
  }
};

Product product_of(const Weights::One& w, int64_t rows, const int8_t* x, const float* unit, void* out, int dtype,
                   int64_t stride) {
  return {w.weight, rows, x, nullptr, unit, w.bias, w.bias_dtype, out, dtype, stride};
}

// The rows of a product: int8 codes as they are, or made of float rows
struct Input {
  int64_t rows;
  const int8_t* x;
  const float* unit;
  std::unique_ptr<int8_t[]> codes;
  std::unique_ptr<float[]> units;
  Input(const Weights& some, const std::string& isa, int threads, const std::array<int64_t, 3>& at,
        const std::array<int64_t, 5>& size, double norm)
      : rows(size[0]), x(address<int8_t>(at[0])), unit(address<float>(at[1])) {
    if (!at[2]) return;
    const int64_t k = some.all.at(0).weight.k;
    codes.reset(new int8_t[rows * k]), units.reset(new float[rows]);
    quantize({address<void>(at[0]), int(size[3]), int(size[2]), k, size[1], address<float>(at[2]), float(norm),
              codes.get(), units.get(), PLAIN, nullptr, nullptr, 0, 0, 0, nullptr, 0}, rows, quantizer_of(isa.c_str()),
             threads);
    x = codes.get(), unit = units.get();
  }
  Product product(const Weights::One& w, void* out, int dtype, int64_t stride) const {
    return product_of(w, rows, x, unit, out, dtype, stride);
  }
};

struct Prepared {
  Call call{};
  std::vector<int64_t> start, position;
  std::vector<int32_t> column;
};

// buffers: pages table ring_k ring_v sink_k sink_v readers tracker length nonfinite;
// sizes: batch heads group n slots sinks samples width dtype pool
void prepare(Prepared& p, const Spec& spec, const std::array<int64_t, 10>& at, const std::array<int64_t, 10>& size,
             const Row& q, const Row& k, const Row& v, int64_t valid) {
  Call& c = p.call;
  c.spec = &spec;
  c.pages = address<uint8_t>(at[0]), c.table = address<int32_t>(at[1]);
  c.ring_k = address<void>(at[2]), c.ring_v = address<void>(at[3]), c.sink_k = address<void>(at[4]);
  c.sink_v = address<void>(at[5]), c.readers = address<void>(at[6]), c.tracker = address<float>(at[7]);
  c.length = address<int64_t>(at[8]), c.nonfinite = address<int64_t>(at[9]);
  c.batch = int(size[0]), c.heads = int(size[1]), c.group = int(size[2]), c.n = int(size[3]), c.slots = int(size[4]);
  c.sinks = int(size[5]), c.samples = int(size[6]), c.width = int(size[7]), c.dtype = int(size[8]);
  c.pool = int(size[9]);
  c.q = strided(q), c.k = strided(k), c.v = strided(v);
  c.valid = address<uint8_t>(valid);
  p.start.assign(c.length, c.length + c.batch);
  p.position.assign(size_t(c.batch) * c.n, -1);
  p.column.assign(size_t(c.batch) * c.n, 0);
  for (int b = 0; b < c.batch; b++) {
    int count = 0;
    for (int i = 0; i < c.n; i++) {
      const size_t row = size_t(b) * c.n;
      if (c.valid && !c.valid[row + i]) continue;
      p.position[row + i] = p.start[b] + count;
      p.column[row + count++] = i;
    }
  }
  c.start = p.start.data(), c.position = p.position.data(), c.column = p.column.data();
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // models that live to the end of a process are no leak
  nb::class_<Spec>(m, "Spec");
  m.def("spec", &make_spec);
  m.def("isas", [] {
    int count;
    const char* const* names = isa_names(&count);
    return std::vector<std::string>(names, names + count);
  });
  m.def("pool", [] { return std::string(pool_name()); });
  m.def("isa", isa_in_use);
  m.def("attention", [](const Spec& spec, const std::string& isa, int threads, const std::array<int64_t, 10>& buffers,
                        const std::array<int64_t, 10>& sizes, const Row& q, const Row& k, const Row& v, const Row& out,
                        int64_t valid, int64_t mask, int64_t mask_sb, double scaling, double softcap, int64_t window,
                        int64_t ring, int64_t sink_logits) {
    nb::gil_scoped_release release;
    Prepared p;
    prepare(p, spec, buffers, sizes, q, k, v, valid);
    Call& c = p.call;
    c.out = strided(out), c.mask = address<uint8_t>(mask), c.mask_sb = mask_sb;
    c.scaling = float(scaling), c.softcap = float(softcap), c.window = window, c.ring = ring;
    c.sink_logits = address<float>(sink_logits);
    attention(c, kernels_of(isa.c_str()), threads);
  });
  // addresses: x signs codes scale; sizes: rows width stride block dtype
  m.def("quantize_rows", [](const std::string& isa, int threads, const std::array<int64_t, 4>& at,
                            const std::array<int64_t, 5>& size, double norm) {
    nb::gil_scoped_release release;
    quantize(rows_to_quantize(at, size, norm), size[0], quantizer_of(isa.c_str()), threads);
  });
  // the same behind a norm; more: weight y, eps, shift, whether it is rounded once
  m.def("norm_quantize", [](const std::string& isa, int threads, const std::array<int64_t, 4>& at,
                            const std::array<int64_t, 5>& size, double norm, int64_t weight, int64_t y, double eps,
                            double shift, bool once) {
    nb::gil_scoped_release release;
    RowsToQuantize a = rows_to_quantize(at, size, norm);
    a.before = NORM, a.weight = address<void>(weight), a.y = address<void>(y);
    a.eps = float(eps), a.shift = float(shift), a.once = once;
    quantize(a, size[0], quantizer_of(isa.c_str()), threads);
  });
  // the same behind a gate; more: up, which activation
  m.def("gate_quantize", [](const std::string& isa, int threads, const std::array<int64_t, 4>& at,
                            const std::array<int64_t, 5>& size, double norm, int64_t up, int activation) {
    nb::gil_scoped_release release;
    RowsToQuantize a = rows_to_quantize(at, size, norm);
    a.before = GATE, a.up = address<void>(up), a.activation = activation;
    quantize(a, size[0], quantizer_of(isa.c_str()), threads);
  });
  nb::class_<Weights>(m, "Weights").def(nb::init<const std::vector<std::array<int64_t, 9>>&>());
  // addresses: x unit signs, and an output (M, N) for each weight; sizes: rows stride block, dtypes of x and out. With
  // signs, x are rows to be rotated and rounded, and unit is ignored; without, int8 codes.
  m.def("linear", [](const Weights& some, const std::string& isa, int threads, const std::array<int64_t, 3>& at,
                     const std::vector<int64_t>& outs, const std::array<int64_t, 5>& size, double norm) {
    nb::gil_scoped_release release;
    const Input x(some, isa, threads, at, size, norm);
    std::vector<Product> products;
    for (size_t i = 0; i < some.all.size(); i++) {
      const Weights::One& w = some.all[i];
      products.push_back(x.product(w, address<void>(outs.at(i)), int(size[4]), w.weight.n));
    }
    multiply(products, multiplier_of(isa.c_str()), threads);
  });
  // down(activation(gate)·up) of rows as for `linear`; gate and up are one weight or two. more: the signs of the hidden
  // row, its block, which activation
  m.def("mlp", [](const Weights& wide, const Weights& down, const std::string& isa, int threads,
                  const std::array<int64_t, 3>& at, int64_t out, const std::array<int64_t, 5>& size, double norm,
                  int64_t signs, int block, double hidden_norm, int activation) {
    nb::gil_scoped_release release;
    const Input x(wide, isa, threads, at, size, norm);
    const Weights::One& w = down.all.at(0);
    const int dtype = int(size[4]), bytes = dtype ? 2 : 4;
    const int64_t k = w.weight.k;
    std::unique_ptr<uint8_t[]> hidden(new uint8_t[x.rows * 2 * k * bytes]);  // (M, 2K): gate, up
    std::vector<Product> products;
    int64_t column = 0;
    for (const Weights::One& one : wide.all) {
      products.push_back(x.product(one, hidden.get() + column * bytes, dtype, 2 * k));
      column += one.weight.n;
    }
    if (column != 2 * k) throw std::invalid_argument("gate and up have not the width of down");
    multiply(products, multiplier_of(isa.c_str()), threads);
    std::unique_ptr<int8_t[]> codes(new int8_t[x.rows * k]);
    std::unique_ptr<float[]> unit(new float[x.rows]);
    RowsToQuantize a{hidden.get(), dtype, block, k, 2 * k, address<float>(signs), float(hidden_norm), codes.get(),
                     unit.get(), GATE, nullptr, nullptr, 0, 0, 0, hidden.get() + k * bytes, activation};
    quantize(a, x.rows, quantizer_of(isa.c_str()), threads);
    products = {product_of(w, x.rows, codes.get(), unit.get(), address<void>(out), dtype, w.weight.n)};
    multiply(products, multiplier_of(isa.c_str()), threads);
  });
  // addresses: x weight bias out; sizes: M N K stride, dtypes of x and bias
  m.def("dense", [](const std::string& isa, int threads, const std::array<int64_t, 4>& at,
                    const std::array<int64_t, 6>& size) {
    nb::gil_scoped_release release;
    const Dense p{address<uint16_t>(at[1]), int(size[4]), size[1], size[2], size[0], nullptr, address<void>(at[2]),
                  int(size[5]), address<void>(at[3])};
    multiply_dense(p, address<void>(at[0]), size[3], dense_of(isa.c_str()), threads);
  });
  m.def("append", [](const Spec& spec, const std::string& isa, int threads, const std::array<int64_t, 10>& buffers,
                     const std::array<int64_t, 10>& sizes, const Row& q, const Row& k, const Row& v, int64_t valid) {
    nb::gil_scoped_release release;
    Prepared p;
    prepare(p, spec, buffers, sizes, q, k, v, valid);
    append(p.call, encoder_of(isa.c_str()), threads);
  });
}
