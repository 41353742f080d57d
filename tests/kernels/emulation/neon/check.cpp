// Dot-product code for aarch64 against the portable code of the same machine: a program that needs neither Python nor torch,
// so that an emulator of the processor can run it. Says what differs and exits with 1, or how close the two were.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "driver.h"
#include "half.h"

namespace tq {
namespace portable {
extern const Kernels kernels;
extern const Multiplier multiplier;
}  // namespace portable
namespace neondot {
extern const Kernels kernels;
extern const Multiplier multiplier;
}  // namespace neondot
}  // namespace tq

using namespace tq;

static std::mt19937 draw(0);
static int whole(int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(draw); }
static float normal() { return std::normal_distribution<float>()(draw); }

template <class T>
static std::vector<T> some(size_t n, int lo, int hi) {
  std::vector<T> v(n);
  for (T& x : v) x = T(whole(lo, hi));
  return v;
}

// int8 rows times packed weights: every bit
static bool products() {
  for (int stages : {1, 2}) {
    for (int64_t m : {1, 3, 4, 9}) {
      for (int64_t group : {16, 32, 96}) {
        const int64_t n = 37, k = 96, groups = k / group;
        const auto codes = some<uint8_t>(size_t(stages * n * k / 2), 0, 255), zero = some<uint8_t>(size_t(n * groups), 0, 15);
        const auto scale = some<uint16_t>(size_t(n * groups), 0x2000, 0x3000);
        const auto x = some<int8_t>(size_t(m * k), -127, 127);
        std::vector<float> unit(size_t(m), 0.01f), out[2];
        for (int i : {0, 1}) {
          out[i].assign(size_t(m * n), -1.0f);
          std::vector<Product> p{{{codes.data(), scale.data(), zero.data(), n, k, groups, stages}, m, x.data(), nullptr,
                                  unit.data(), nullptr, F32, out[i].data(), F32, n}};
          multiply(p, i ? neondot::multiplier : portable::multiplier, 1);
        }
        if (out[0] != out[1]) {
          std::printf("products differ: %d stages, %d rows, groups of %d\n", stages, int(m), int(group));
          return false;
        }
      }
    }
  }
  return true;
}

struct Case {
  int d, key_bits, value_bits, group, page, dtype;
};

static void levels(int bits, float* level, uint8_t (&bytes)[64], float& unit, int& count) {
  unit = 1.0f / 127, count = bits == 8 ? 255 : 1 << bits;
  for (int i = 0; i < count; i++) {
    const int whole_ = bits == 8 ? i - 127 : int(std::lround(-127 + 254.0 * i / (count - 1)));
    level[i] = float(whole_) * unit;
  }
  for (int i = 0; i < 64 && bits < 8; i++) bytes[i] = uint8_t(std::lround(level[i % count] / unit) + 128);
}

// a decode step over three pages and a ring; the largest difference of an output, in shares of the largest output
static float attention_error(const Case& c) {
  Spec s{};
  s.page = c.page, s.d = c.d, s.hot = 2, s.key_bits = c.key_bits, s.value_bits = c.value_bits;
  s.block = c.d & -c.d, s.norm = 1 / std::sqrt(float(s.block));
  s.key_row = c.d * c.key_bits / 8, s.value_row = c.d * c.value_bits / 8;
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) { return at += bytes, at - bytes; };
  s.key_mean_code = take(c.d), s.key_log_s = take(c.d), s.key_log_scale = take(c.page), s.value_log_scale = take(c.page);
  s.key_hot_mean = take(4), s.key_hot_step = take(4), s.key_base = take(2), s.key_mean_step = take(2), s.value_base = take(2);
  s.key_hot_index = take(2), s.key_hot_codes = take(2 * c.page), s.key_codes = take(c.page * s.key_row);
  s.value_codes = take(c.page * s.value_row), s.page_bytes = at;
  for (float& x : s.signs) x = whole(0, 1) ? 1.0f : -1.0f;
  for (int i = 0; i < 256; i++) s.s_table[i] = std::exp2(float(i - 128) / 64), s.a_table[i] = std::exp2(-float(i) / 64);
  levels(c.key_bits, s.key_levels, s.key_bytes, s.key_unit, s.key_count);
  levels(c.value_bits, s.value_levels, s.value_bytes, s.value_unit, s.value_count);

  const int heads = 2, count = 3, slots = 48;
  auto pages = some<uint8_t>(size_t(count * heads * s.page_bytes), 0, 254);
  for (int i = 0; i < count * heads; i++) {
    uint8_t* p = pages.data() + i * s.page_bytes;
    const auto half = [p](int64_t to, uint16_t x) { p[to] = uint8_t(x), p[to + 1] = uint8_t(x >> 8); };
    half(s.key_hot_mean, 0x3400), half(s.key_hot_mean + 2, 0xB800), half(s.key_hot_step, 0x1C00), half(s.key_hot_step + 2, 0x2000);
    half(s.key_base, 0x3C00), half(s.key_mean_step, 0x1400), half(s.value_base, 0x3800);
    p[s.key_hot_index] = uint8_t(whole(0, c.d / 2)), p[s.key_hot_index + 1] = uint8_t(whole(c.d / 2 + 1, c.d - 1));
  }
  const auto numbers = [](size_t n) {
    std::vector<float> v(n);
    for (float& x : v) x = normal();
    return v;
  };
  const int hq = heads * c.group;
  auto q = numbers(size_t(hq * c.d)), k = numbers(size_t(heads * c.d)), v = numbers(size_t(heads * c.d));
  auto ring_k = numbers(size_t(heads * slots * c.d)), ring_v = numbers(size_t(heads * slots * c.d));
  std::vector<uint16_t> coarse(q.size());
  for (size_t i = 0; i < q.size(); i++) coarse[i] = float_to_bf16(q[i]);
  const int64_t start = int64_t(count) * c.page + 5, position = start;
  const int32_t table[] = {0, 1, 2}, column = 0;
  std::vector<float> out[2];
  for (int i : {0, 1}) {
    out[i].assign(size_t(hq * c.d), NAN);
    Call call{};
    call.spec = &s, call.pages = pages.data(), call.table = table, call.ring_k = ring_k.data(), call.ring_v = ring_v.data();
    call.batch = 1, call.heads = heads, call.group = c.group, call.n = 1, call.slots = slots, call.width = call.pool = count;
    call.q = {c.dtype == F32 ? (void*)q.data() : coarse.data(), 0, c.d, c.d, c.dtype};
    call.k = {k.data(), 0, c.d, c.d, F32}, call.v = {v.data(), 0, c.d, c.d, F32}, call.out = {out[i].data(), 0, c.d, c.d, F32};
    call.scaling = 1 / std::sqrt(float(c.d)), call.window = -1, call.ring = 16;
    call.start = &start, call.position = &position, call.column = &column;
    attention(call, i ? neondot::kernels : portable::kernels, 1);
  }
  float most = 0, error = 0;
  for (size_t i = 0; i < out[0].size(); i++) {
    if (!(std::fabs(out[1][i]) < INFINITY)) return INFINITY;
    most = std::fmax(most, std::fabs(out[0][i])), error = std::fmax(error, std::fabs(out[0][i] - out[1][i]));
  }
  return error / most;
}

int main() {
  if (!products()) return 1;
  float worst[2] = {};
  for (int dtype : {F32, BF16}) {
    for (const Case& c : {Case{64, 4, 4, 7, 64, dtype}, Case{128, 4, 3, 4, 64, dtype}, Case{48, 3, 2, 3, 32, dtype},
                          Case{80, 8, 8, 1, 64, dtype}, Case{16, 2, 4, 12, 512, dtype}}) {
      const float e = attention_error(c), limit = dtype == F32 ? 2e-6f : 4e-4f;
      worst[dtype == BF16] = std::fmax(worst[dtype == BF16], e);
      if (!(e < limit)) {
        std::printf("attention differs by %g at head_dim %d, %d and %d bit\n", e, c.d, c.key_bits, c.value_bits);
        return 1;
      }
    }
  }
  std::printf("products equal, attention within %.1e (fp32 queries) and %.1e (bf16)\n", worst[0], worst[1]);
}
