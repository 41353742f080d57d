// A decoder layer of a few rows in two calls, one in front of attention and one behind it, or layers that follow each
// other in one call with the attention of their caches: what their modules compute one after another, each step rounded
// to the dtype where a module returns it, so that the bits are theirs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cache_calls.h"
#include "half.h"
#include "layers.h"

namespace nb = nanobind;

namespace tq {
namespace {

template <int D>
inline float get(const void* p, int64_t i) { return scalar_as(p, D, i); }
template <int D>
inline float rounded(float x) {
  return D == 0 ? x : D == 1 ? bits_float(uint32_t(float_to_bf16(x)) << 16) : half_to_float(float_to_half(x));
}

// x·cos + rotate_half(x)·sin in place, for heads of d numbers behind one another
template <int D>
void turn(void* x, int64_t at, int64_t heads, int64_t d, const void* cos, const void* sin, int64_t angle) {
  for (int64_t h = 0; h < heads; h++, at += d) {
    for (int64_t i = 0; i < d / 2; i++) {
      const int64_t j = i + d / 2;
      const float a = get<D>(x, at + i), b = get<D>(x, at + j);
      const float p = rounded<D>(a * get<D>(cos, angle + i)), q = rounded<D>(-b * get<D>(sin, angle + i));
      const float r = rounded<D>(b * get<D>(cos, angle + j)), s = rounded<D>(a * get<D>(sin, angle + j));
      store_as(x, D, at + i, p + q), store_as(x, D, at + j, r + s);
    }
  }
}

template <int D>
void add_to(void* y, const void* x, int64_t count) {  // y <- x + y
  for (int64_t i = 0; i < count; i++) store_as(y, D, i, get<D>(x, i) + get<D>(y, i));
}

void add_rows(void* y, const void* x, int64_t stride, int64_t rows, int64_t k, int dtype) {
  const int bytes = dtype ? 2 : 4;
  for (int64_t m = 0; m < rows; m++) {
    void* to = (uint8_t*)y + m * k * bytes;
    const void* from = (const uint8_t*)x + m * stride * bytes;
    dtype == 0 ? add_to<0>(to, from, k) : dtype == 1 ? add_to<1>(to, from, k) : add_to<2>(to, from, k);
  }
}

struct Norm {
  const void* weight;
  float eps, shift;
  int once;
};

struct Turn {  // of rows to be rotated and rounded
  const float* signs;
  int block;
  float norm;
};

struct Chunk {  // rows of a batch of `tokens` each, and their angles: strides of a sequence and of a token
  int64_t rows, tokens, d;
  const void *cos, *sin;
  int64_t of_batch, of_token;
};

struct Layer {
  Weights qkv, o, wide, down;
  Norm first, second;
  Turn turns[3];  // of the residual's width, of attention's, of the hidden one
  int activation, dtype;

  int64_t width() const { return qkv.all[0].weight.k; }

  RowsToQuantize rows(const void* x, int64_t stride, int which, int64_t k, int8_t* codes, float* unit) const {
    const Turn& t = turns[which];
    return {x, dtype, t.block, k, stride, t.signs, t.norm, codes, unit};
  }

  void normed(const void* x, int64_t stride, const Norm& n, int64_t count, int8_t* codes, float* unit,
              const char* isa, int threads) const {
    std::unique_ptr<uint8_t[]> y(new uint8_t[count * width() * (dtype ? 2 : 4)]);
    RowsToQuantize a = rows(x, stride, 0, width(), codes, unit);
    a.before = NORM, a.weight = n.weight, a.y = y.get(), a.eps = n.eps, a.shift = n.shift, a.once = n.once;
    quantize(a, count, quantizer_of(isa), threads);
  }

  int64_t columns() const {  // of q, k and v together
    int64_t all = 0;
    for (const auto& w : qkv.all) all += w.weight.n;
    return all;
  }

  // q, k, v behind one another (M, Nq + Nk + Nv)
  void before(const void* x, int64_t stride, const Chunk& c, uint8_t* out, const char* isa, int threads) const {
    const int64_t k = width(), all = columns();
    std::unique_ptr<int8_t[]> codes(new int8_t[c.rows * k]);
    std::unique_ptr<float[]> unit(new float[c.rows]);
    normed(x, stride, first, c.rows, codes.get(), unit.get(), isa, threads);
    int64_t column = 0;
    std::vector<Product> products;
    for (const auto& w : qkv.all) {
      products.push_back(product_of(w, c.rows, codes.get(), unit.get(), out + column * (dtype ? 2 : 4), dtype, all));
      column += w.weight.n;
    }
    multiply(products, multiplier_of(isa), threads);
    const int64_t heads = (qkv.all[0].weight.n + qkv.all[1].weight.n) / c.d;
    for (int64_t r = 0; r < c.rows; r++) {
      const int64_t angle = r / c.tokens * c.of_batch + r % c.tokens * c.of_token;
      switch (dtype) {
        case 0: turn<0>(out, r * all, heads, c.d, c.cos, c.sin, angle); break;
        case 1: turn<1>(out, r * all, heads, c.d, c.cos, c.sin, angle); break;
        default: turn<2>(out, r * all, heads, c.d, c.cos, c.sin, angle);
      }
    }
  }

  // out (M, K) <- y = x + o(attended), and to that its MLP
  void after(const void* attended, int64_t attended_stride, const void* x, int64_t stride, int64_t count, void* out,
             const char* isa, int threads) const {
    const int64_t k = width(), inner = o.all[0].weight.k;
    std::unique_ptr<int8_t[]> codes(new int8_t[count * std::max(k, inner)]);
    std::unique_ptr<float[]> unit(new float[count]);
    std::unique_ptr<uint8_t[]> middle(new uint8_t[count * k * (dtype ? 2 : 4)]);
    quantize(rows(attended, attended_stride, 1, inner, codes.get(), unit.get()), count, quantizer_of(isa), threads);
    std::vector<Product> one{product_of(o.all[0], count, codes.get(), unit.get(), middle.get(), dtype, k)};
    multiply(one, multiplier_of(isa), threads);
    add_rows(middle.get(), x, stride, count, k, dtype);
    normed(middle.get(), k, second, count, codes.get(), unit.get(), isa, threads);
    const Turn& t = turns[2];
    gated(wide, down.all[0], {t.signs, t.block, t.norm, activation}, count, codes.get(), unit.get(), out, dtype, isa,
          threads);
    add_rows(out, middle.get(), k, count, k, dtype);
  }
};

struct InTurn {  // a layer, and the call on its cache
  const Layer* layer;
  Prepared cache;
};

// Layers one after another, each with the attention of its cache and adding to that. steps: (Layer, Spec, CacheBuffers,
// scaling, window or -1); addresses: x cos sin; outs: an output (M, K) for each; sizes: B, stride of x, and the rest as
// for `before`. False, and nothing is done: a buffer is not as the kernels read it, or layer and cache do not fit.
bool in_turn(int threads, const nb::list& steps, const std::array<int64_t, 3>& at, const std::vector<int64_t>& outs,
             const std::array<int64_t, 6>& size) {
  const int64_t batch = size[0], n = size[2], d = size[3], rows = batch * n;
  const Chunk chunk{rows, n, d, address<void>(at[1]), address<void>(at[2]), size[4], size[5]};
  std::vector<InTurn> all(steps.size());
  if (all.empty() || outs.size() != all.size() || rows < 1 || d < 1) return false;
  int64_t room = 0;
  for (size_t i = 0; i < all.size(); i++) {
    const nb::tuple step = nb::cast<nb::tuple>(steps[i]);
    const Layer* layer = all[i].layer = &nb::cast<const Layer&>(step[0]);
    const Spec& spec = nb::cast<const Spec&>(step[1]);
    const int64_t q = layer->qkv.all[0].weight.n, k = layer->qkv.all[1].weight.n, v = layer->qkv.all[2].weight.n;
    if (layer->dtype != all[0].layer->dtype || layer->width() != all[0].layer->width()) return false;
    if (spec.d != d || !k || k != v || k % d || q % k || layer->o.all[0].weight.k != q) return false;
    Call& c = all[i].cache.call;
    if (!all[i].cache.read_buffers(spec, step[2], batch, k / d, q / k, n, Kind(layer->dtype))) return false;
    c.scaling = nb::cast<float>(step[3]), c.window = nb::cast<int64_t>(step[4]);
    room = std::max(room, layer->columns());
  }
  const char* isa = isa_in_use();
  const int dtype = all[0].layer->dtype, bytes = dtype ? 2 : 4;
  nb::gil_scoped_release release;
  std::unique_ptr<uint8_t[]> states(new uint8_t[rows * room * bytes]), attended(new uint8_t[rows * room * bytes]);
  const void* x = address<void>(at[0]);
  int64_t stride = size[1];
  for (size_t i = 0; i < all.size(); i++) {
    const Layer& layer = *all[i].layer;
    Call& c = all[i].cache.call;
    const int64_t wide = layer.columns(), q = layer.qkv.all[0].weight.n, k = layer.qkv.all[1].weight.n;
    layer.before(x, stride, chunk, states.get(), isa, threads);
    const auto part = [&](int64_t column) {
      return Strided{states.get() + column * bytes, n * wide, d, wide, dtype};
    };
    c.q = part(0), c.k = part(q), c.v = part(q + k), c.out = {attended.get(), n * q, d, q, dtype};
    all[i].cache.place();
    attention(c, kernels_of(isa), threads);
    append(c, encoder_of(isa), threads);
    void* out = address<void>(outs[i]);
    layer.after(attended.get(), q, x, stride, rows, out, isa, threads);
    x = out, stride = layer.width();
  }
  return true;
}

}  // namespace
}  // namespace tq

using namespace tq;

void bind_decoder(nb::module_& m) {
  // norms: address of the weight, eps, shift, whether it is rounded once; turns: address of the signs, block
  nb::class_<Layer>(m, "Layer")
      .def("__init__", [](Layer* to, const Weights& qkv, const Weights& o, const Weights& wide, const Weights& down,
                          const std::vector<std::array<double, 3>>& norms, const std::array<int64_t, 2>& norm_at,
                          const std::array<int64_t, 3>& signs, const std::array<int64_t, 3>& blocks,
                          const std::array<double, 3>& scales, int activation, int dtype) {
        Layer layer{qkv, o, wide, down, {}, {}, {}, activation, dtype};
        const auto norm = [&](int i) {
          return Norm{address<void>(norm_at[i]), float(norms.at(i)[0]), float(norms[i][1]), norms[i][2] != 0};
        };
        layer.first = norm(0), layer.second = norm(1);
        for (int i = 0; i < 3; i++) layer.turns[i] = {address<float>(signs[i]), int(blocks[i]), float(scales[i])};
        const int64_t k = layer.width();
        if (o.all.size() != 1 || down.all.size() != 1 || o.all[0].weight.n != k || down.all[0].weight.n != k ||
            wide.all[0].weight.k != k || qkv.all.size() != 3) {
          throw std::invalid_argument("weights of a decoder layer do not fit one another");
        }
        new (to) Layer(std::move(layer));
      })
      // addresses: x cos sin out; sizes: M, stride of x, tokens of a sequence, head_dim, strides of cos and sin: of the
      // batch and of a token
      .def("before", [](const Layer& layer, const std::string& isa, int threads, const std::array<int64_t, 4>& at,
                        const std::array<int64_t, 6>& size) {
        nb::gil_scoped_release release;
        const Chunk c{size[0], size[2], size[3], address<void>(at[1]), address<void>(at[2]), size[4], size[5]};
        layer.before(address<void>(at[0]), size[1], c, address<uint8_t>(at[3]), isa.c_str(), threads);
      })
      // addresses: attended x out; sizes: M, strides of attended and of x
      .def("after", [](const Layer& layer, const std::string& isa, int threads, const std::array<int64_t, 3>& at,
                       const std::array<int64_t, 3>& size) {
        nb::gil_scoped_release release;
        layer.after(address<void>(at[0]), size[1], address<void>(at[1]), size[2], size[0], address<void>(at[2]),
                    isa.c_str(), threads);
      });
  m.def("in_turn", &in_turn);
}
