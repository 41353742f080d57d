// What calls of linear layers share: packed weights by their addresses, rounding of rows, a gated MLP.
#pragma once
#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>
#include <vector>

#include "driver.h"
#include "pool.h"

namespace tq {

template <class T>
inline T* address(int64_t x) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(x));
}

inline void quantize(const RowsToQuantize& a, int64_t rows, const Quantizer& q, int threads) {
  const int64_t per = std::max<int64_t>(1, 8192 / a.width);  // rows of a task
  parallel((rows + per - 1) / per, threads, [&](int64_t task, int) {
    std::unique_ptr<float[]> scratch(new float[a.width]);
    for (int64_t row = task * per; row < std::min(rows, (task + 1) * per); row++) q.row(a, row, scratch.get());
  });
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

inline Product product_of(const Weights::One& w, int64_t rows, const int8_t* x, const float* unit, void* out, int dtype,
                   int64_t stride) {
  return {w.weight, rows, x, nullptr, unit, w.bias, w.bias_dtype, out, dtype, stride};
}

struct Gate {  // what is done to gate and up: rotation of the hidden row (its signs, block, block^-1/2), which activation
  const float* signs;
  int block;
  float norm;
  int activation;
};

// out (M, N) <- down(activation(gate)·up) of int8 rows; gate and up are one weight or two
inline void gated(const Weights& wide, const Weights::One& down, const Gate& gate, int64_t rows, const int8_t* x,
                  const float* units, void* out, int dtype, const char* isa, int threads) {
  const int bytes = dtype ? 2 : 4;
  const int64_t k = down.weight.k;
  std::unique_ptr<uint8_t[]> hidden(new uint8_t[rows * 2 * k * bytes]);  // (M, 2K): gate, up
  std::vector<Product> products;
  int64_t column = 0;
  for (const Weights::One& one : wide.all) {
    products.push_back(product_of(one, rows, x, units, hidden.get() + column * bytes, dtype, 2 * k));
    column += one.weight.n;
  }
  if (column != 2 * k) throw std::invalid_argument("gate and up have not the width of down");
  multiply(products, multiplier_of(isa), threads);
  std::unique_ptr<int8_t[]> codes(new int8_t[rows * k]);
  std::unique_ptr<float[]> unit(new float[rows]);
  quantize({hidden.get(), dtype, gate.block, k, 2 * k, gate.signs, gate.norm, codes.get(), unit.get(), GATE, nullptr,
            nullptr, 0, 0, 0, hidden.get() + k * bytes, gate.activation}, rows, quantizer_of(isa), threads);
  products = {product_of(down, rows, codes.get(), unit.get(), out, dtype, down.weight.n)};
  multiply(products, multiplier_of(isa), threads);
}

}  // namespace tq
