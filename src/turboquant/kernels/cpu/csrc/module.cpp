// The Python module. It knows no torch: the wrapper (kernels/cpu/cache.py) checks the contract and hands over
// addresses, sizes and strides of tensors that it keeps alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>

#include "layers.h"
#include "pool.h"

void bind_cache(nanobind::module_& m);    // cache_calls.cpp
void bind_decoder(nanobind::module_& m);  // decoder.cpp

namespace nb = nanobind;
using namespace tq;

namespace {

// addresses: x signs codes scale; sizes: rows width stride block dtype
RowsToQuantize rows_to_quantize(const std::array<int64_t, 4>& at, const std::array<int64_t, 5>& size, double norm) {
  return {address<void>(at[0]), int(size[4]), int(size[3]), size[1], size[2], address<float>(at[1]), float(norm),
          address<int8_t>(at[2]), address<float>(at[3])};
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
              codes.get(), units.get()}, rows, quantizer_of(isa.c_str()), threads);
    x = codes.get(), unit = units.get();
  }
  Product product(const Weights::One& w, void* out, int dtype, int64_t stride) const {
    return product_of(w, rows, x, unit, out, dtype, stride);
  }
};

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // models that live to the end of a process are no leak
  bind_cache(m);
  m.def("isas", [] {
    int count;
    const char* const* names = isa_names(&count);
    return std::vector<std::string>(names, names + count);
  });
  m.def("pool", [] { return std::string(pool_name()); });
  m.def("isa", isa_in_use);
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
    const Gate gate{address<float>(signs), block, float(hidden_norm), activation};
    gated(wide, down.all.at(0), gate, x.rows, x.x, x.unit, address<void>(out), int(size[4]), isa.c_str(), threads);
  });
  // addresses: x weight bias out; sizes: M N K stride, dtypes of x and bias
  m.def("dense", [](const std::string& isa, int threads, const std::array<int64_t, 4>& at,
                    const std::array<int64_t, 6>& size) {
    nb::gil_scoped_release release;
    const Dense p{address<uint16_t>(at[1]), int(size[4]), size[1], size[2], size[0], nullptr, address<void>(at[2]),
                  int(size[5]), address<void>(at[3])};
    multiply_dense(p, address<void>(at[0]), size[3], dense_of(isa.c_str()), threads);
  });
  bind_decoder(m);
}
