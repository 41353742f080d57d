// Compiled once per instruction set; see dense.h for the order of the sums.
#include "dense.h"

#include "simd.h"
#include "spec.h"

namespace tq {
namespace TQ_ISA {

namespace {

constexpr int AHEAD = 2048;  // numbers; the weight is one stream, whose pages the processor does not look beyond

template <int D, int M>
static void rows_of(const Dense& p, const float* x, int64_t m0, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; n++) {
    const uint16_t* w = p.w + n * p.k;
    V16 sum[M][4];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sum[m][j] = zero();
    }
    int64_t k = 0;
    for (; k + 64 <= p.k; k += 64) {
      __builtin_prefetch(w + k + AHEAD, 0, 2), __builtin_prefetch(w + k + AHEAD + 32, 0, 2);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const V16 a = load_as(w, D, k + 16 * j);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) sum[m][j] = fma(a, load(x + m * p.k + k + 16 * j), sum[m][j]);
      }
    }
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++) {
      if (k + 16 * j >= p.k) break;
      const V16 a = load_as(w, D, k + 16 * j);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) sum[m][j] = fma(a, load(x + m * p.k + k + 16 * j), sum[m][j]);
    }
    for (int m = 0; m < M; m++) {
      float y = sum16(add(add(sum[m][0], sum[m][1]), add(sum[m][2], sum[m][3])));
      if (p.bias) y += scalar_as(p.bias, p.bias_dtype, n);
      ((uint16_t*)p.out)[(m0 + m) * p.n + n] = D == BF16 ? float_to_bf16(y) : float_to_half(y);
    }
  }
}

template <int D>
static void outputs_as(const Dense& p, int64_t first, int64_t last) {
  for (int64_t m = 0; m < p.m; m += DENSE_ROWS) {
    const float* x = p.x + m * p.k;
    switch (p.m - m) {
      case 1: rows_of<D, 1>(p, x, m, first, last); break;
      case 2: rows_of<D, 2>(p, x, m, first, last); break;
      case 3: rows_of<D, 3>(p, x, m, first, last); break;
      default: rows_of<D, 4>(p, x, m, first, last);
    }
  }
}

static void outputs(const Dense& p, int64_t first, int64_t last) {
  p.dtype == BF16 ? outputs_as<BF16>(p, first, last) : outputs_as<F16>(p, first, last);
}

}  // namespace

extern const DenseMultiplier dense;
const DenseMultiplier dense{outputs};

}  // namespace TQ_ISA
}  // namespace tq
