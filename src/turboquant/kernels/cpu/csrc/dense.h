// Products of a few rows with a 16-bit weight that stays as it is (output embeddings): as fast as memory gives it.
//
// An output is the sum of 64 partial sums: lane l of sum j takes k = 64·i + 16·j + l in ascending i, then ((0+1)+(2+3)) of
// the sums, then the lanes' tree of simd.h, then the bias. A product of two 16-bit numbers is exact in fp32, so that fused
// and separate multiply-adds round alike: every instruction set, number of threads and number of rows gives the same bits.
#pragma once
#include <cstdint>

namespace tq {

struct Dense {
  const uint16_t* w;  // (N, K)
  int dtype;          // BF16 or F16: of w and out
  int64_t n, k, m;
  const float* x;     // (M, K)
  const void* bias;   // (N) or null
  int bias_dtype;
  void* out;          // (M, N)
};

struct DenseMultiplier {
  void (*outputs)(const Dense&, int64_t first, int64_t last);
};

constexpr int DENSE_ROWS = 4;  // rows a weight meets each time it is read

// out <- rows·Wᵀ + bias for rows of w's dtype, `stride` numbers apart; x of p is ignored
void multiply_dense(Dense p, const void* x, int64_t stride, const DenseMultiplier& k, int threads);

}  // namespace tq
