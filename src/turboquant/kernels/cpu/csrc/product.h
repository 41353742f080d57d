// Products of int8 rows with packed weights: what driver (product.cpp) and kernels (linear.cpp) agree on.
//
// The weight is read as it is saved: codes (S, N, K/2), two of 4 bit a byte, scale (N, G) fp16, zero (N, G). An output
// is Σ_g scale_g·float(Σ_k code·x - zero_g·Σ_k x), groups in ascending order, products and sums rounded by
// themselves, then times the row's unit, plus the bias. The integers are exact, so every instruction set, number of
// threads and number of rows gives the same bits.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <vector>

namespace tq {

struct Weight {
  const uint8_t* codes;
  const uint16_t* scale;
  const uint8_t* zero;
  int64_t n, k, groups;
  int stages;
  int64_t group() const { return k / groups; }
};

// Rows are arranged in blocks. A word is four codes of a row: those of even k, or those of odd k, of eight neighbours,
// as a load of weights has them. Block of rows m0 <= m < m0 + R: words [k/4][R] from byte m0·K.
struct Product {
  Weight w;
  int64_t m;
  const int8_t* x;      // (M, K) arranged
  const int32_t* sums;  // (M, G) of the codes of each group
  const float* unit;    // (M)
  const void* bias;     // (N) or null
  int bias_dtype;
  void* out;  // (M, N), rows `stride` numbers apart
  int dtype;
  int64_t stride;
};

struct Multiplier {
  int block;  // rows of the largest block
  void (*outputs)(const Product&, int64_t first, int64_t last, uint8_t* scratch);
};

constexpr int MOST = 12, FEW = 4;  // rows of a block; rows for which weights go straight from memory to the product

// rows of the block that begins when `left` of m rows are left
inline int block_rows(int64_t m, int64_t left, int most) {
  if (m <= FEW && most > 1) return int(m);
  for (int r : {12, 8, 4, 2}) {
    if (r <= most && r <= left) return r;
  }
  return 1;
}

inline int64_t product_scratch(const Weight& w) { return 32 * w.k + 2 * 16 * 8 * w.groups + MOST * 32 * 4 + 256; }

// out <- rows·Wᵀ for int8 rows (M, K) and each of some weights of K inputs; `unit` and `x` of each are the same rows and
// units as they come, sums is ignored
void multiply(std::vector<Product>& some, const Multiplier& k, int threads);

}  // namespace tq
