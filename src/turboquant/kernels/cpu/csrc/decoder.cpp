// A decoder layer of a few rows in two calls, one in front of attention and one behind it: what its modules compute one
// after another, each step rounded to the dtype where a module returns it, so that the bits are theirs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

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
};

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
      // q, k, v behind one another (M, Nq + Nk + Nv) of rows M of a batch of `tokens` each; addresses: x cos sin out;
      // sizes: M, stride of x, tokens, head_dim, strides of cos and sin: of the batch and of a token
      .def("before", [](const Layer& layer, const std::string& isa, int threads, const std::array<int64_t, 4>& at,
                        const std::array<int64_t, 6>& size) {
        nb::gil_scoped_release release;
        const int64_t rows = size[0], k = layer.width(), d = size[3];
        const int bytes = layer.dtype ? 2 : 4;
        std::unique_ptr<int8_t[]> codes(new int8_t[rows * k]);
        std::unique_ptr<float[]> unit(new float[rows]);
        layer.normed(address<void>(at[0]), size[1], layer.first, rows, codes.get(), unit.get(), isa.c_str(), threads);
        int64_t all = 0, column = 0;
        for (const auto& w : layer.qkv.all) all += w.weight.n;
        std::vector<Product> products;
        uint8_t* out = address<uint8_t>(at[3]);
        for (const auto& w : layer.qkv.all) {
          products.push_back(product_of(w, rows, codes.get(), unit.get(), out + column * bytes, layer.dtype, all));
          column += w.weight.n;
        }
        multiply(products, multiplier_of(isa.c_str()), threads);
        const int64_t heads = (layer.qkv.all[0].weight.n + layer.qkv.all[1].weight.n) / d;
        for (int64_t r = 0; r < rows; r++) {
          const int64_t angle = r / size[2] * size[4] + r % size[2] * size[5];
          const void *cos = address<void>(at[1]), *sin = address<void>(at[2]);
          switch (layer.dtype) {
            case 0: turn<0>(out, r * all, heads, d, cos, sin, angle); break;
            case 1: turn<1>(out, r * all, heads, d, cos, sin, angle); break;
            default: turn<2>(out, r * all, heads, d, cos, sin, angle);
          }
        }
      })
      // x + o(attended), and to that its MLP; addresses: attended x out; sizes: M, strides of attended and of x
      .def("after", [](const Layer& layer, const std::string& isa, int threads, const std::array<int64_t, 3>& at,
                       const std::array<int64_t, 3>& size) {
        nb::gil_scoped_release release;
        const int64_t rows = size[0], k = layer.width(), wide = layer.o.all[0].weight.k;
        std::unique_ptr<int8_t[]> codes(new int8_t[rows * std::max(k, wide)]);
        std::unique_ptr<float[]> unit(new float[rows]);
        std::unique_ptr<uint8_t[]> middle(new uint8_t[rows * k * (layer.dtype ? 2 : 4)]);
        quantize(layer.rows(address<void>(at[0]), size[1], 1, wide, codes.get(), unit.get()), rows,
                 quantizer_of(isa.c_str()), threads);
        std::vector<Product> one{product_of(layer.o.all[0], rows, codes.get(), unit.get(), middle.get(), layer.dtype, k)};
        multiply(one, multiplier_of(isa.c_str()), threads);
        add_rows(middle.get(), address<void>(at[1]), size[2], rows, k, layer.dtype);
        layer.normed(middle.get(), k, layer.second, rows, codes.get(), unit.get(), isa.c_str(), threads);
        const Turn& t = layer.turns[2];
        void* out = address<void>(at[2]);
        gated(layer.wide, layer.down.all[0], {t.signs, t.block, t.norm, layer.activation}, rows, codes.get(), unit.get(),
              out, layer.dtype, isa.c_str(), threads);
        add_rows(out, middle.get(), k, rows, k, layer.dtype);
      });
}
