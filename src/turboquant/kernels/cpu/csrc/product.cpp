// The product with a packed weight: arrange the rows once, then cut the outputs into tasks.
#include "product.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "dense.h"
#include "half.h"
#include "pool.h"

namespace tq {
namespace {

inline uint64_t even_first(uint64_t x) {  // bytes 0 2 4 6 1 3 5 7
  uint64_t t = (x ^ (x >> 8)) & 0x0000FF000000FF00u;
  x ^= t ^ (t << 8);
  t = (x ^ (x >> 16)) & 0x00000000FFFF0000u;
  return x ^ t ^ (t << 16);
}

void arrange(const Weight& w, const int8_t* rows, int r, int8_t* out, int32_t* sums) {
  const int64_t group = w.group();
  for (int i = 0; i < r; i++) {
    const int8_t* x = rows + i * w.k;
    for (int64_t g = 0; g < w.groups; g++) {
      int32_t sum = 0;
      for (int64_t k = g * group; k < (g + 1) * group; k++) sum += x[k];
      sums[i * w.groups + g] = sum;
    }
    for (int64_t k = 0; k < w.k; k += 8) {
      uint64_t eight;
      std::memcpy(&eight, x + k, 8);
      eight = even_first(eight);
      const uint32_t even = uint32_t(eight), odd = uint32_t(eight >> 32);
      std::memcpy(out + (k / 4 * r + i) * 4, &even, 4);
      std::memcpy(out + ((k / 4 + 1) * r + i) * 4, &odd, 4);
    }
  }
}

uint8_t* scratch_of_thread(int64_t bytes) {  // on a cache line
  static thread_local std::vector<uint8_t> room;
  if (int64_t(room.size()) < bytes + 64) room.resize(size_t(bytes) + 64);
  return room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) % 64;
}

}  // namespace

void multiply(std::vector<Product>& some, const Multiplier& kernel, int threads) {
  if (some.empty() || some[0].m == 0) return;
  const int64_t m_all = some[0].m, k = some[0].w.k;
  std::unique_ptr<int8_t[]> x(new int8_t[m_all * k]);
  int64_t most = 0;
  for (const Product& p : some) most += p.w.groups;
  std::unique_ptr<int32_t[]> sums(new int32_t[m_all * most]);
  std::vector<int64_t> starts;
  for (int64_t m = 0; m < m_all; m += block_rows(m_all, m_all - m, kernel.block)) starts.push_back(m);
  const int64_t blocks = int64_t(starts.size()), at_once = std::max<int64_t>(1, 65536 / (MOST * k));
  starts.push_back(m_all);
  int32_t* next = sums.get();
  for (size_t i = 0; i < some.size(); i++) {  // weights of the same groups share their sums
    Product& p = some[i];
    const int8_t* rows = p.x;
    size_t like = 0;
    while (some[like].w.groups != p.w.groups) like++;
    p.x = x.get(), p.sums = some[like].sums;
    if (like != i) continue;
    int32_t* mine = next;
    next += m_all * p.w.groups, p.sums = mine;
    parallel((blocks + at_once - 1) / at_once, threads, [&](int64_t task, int) {
      for (int64_t b = task * at_once; b < std::min(blocks, (task + 1) * at_once); b++) {
        const int64_t m = starts[b];
        arrange(p.w, rows + m * k, int(starts[b + 1] - m), x.get() + m * k, mine + m * p.w.groups);
      }
    });
  }
  // a task computes 32 outputs of many rows, or reads 32 to 256 KiB of a weight: what it fetches ahead ends with it
  int64_t total = 0;
  for (const Product& p : some) total += p.w.n * (k / 2) * p.w.stages;
  const int64_t size = std::clamp<int64_t>(total / (8 * threads), 32768, 262144);
  std::vector<int64_t> first{0}, per;
  for (const Product& p : some) {
    const int64_t bytes = 16 * k * p.w.stages;  // of 32 outputs
    per.push_back(32 * (m_all > FEW ? 1 : std::max<int64_t>(1, size / bytes)));
    first.push_back(first.back() + (p.w.n + per.back() - 1) / per.back());
  }
  parallel(first.back(), threads, [&](int64_t task, int) {
    size_t i = 0;
    while (task >= first[i + 1]) i++;
    const Product& p = some[i];
    const int64_t n = (task - first[i]) * per[i];
    kernel.outputs(p, n, std::min(p.w.n, n + per[i]), scratch_of_thread(product_scratch(p.w)));
  });
}

void multiply_dense(Dense p, const void* x, int64_t stride, const DenseMultiplier& kernel, int threads) {
  if (p.m == 0 || p.n == 0) return;
  std::unique_ptr<float[]> rows(new float[p.m * p.k]);
  for (int64_t m = 0; m < p.m; m++) {
    for (int64_t k = 0; k < p.k; k++) rows[m * p.k + k] = scalar_as(x, p.dtype, m * stride + k);
  }
  p.x = rows.get();
  const int64_t per = std::max<int64_t>(1, 131072 / p.k);  // outputs of a task, which reads about 256 KiB
  parallel((p.n + per - 1) / per, threads, [&](int64_t task, int) {
    kernel.outputs(p, task * per, std::min(p.n, (task + 1) * per));
  });
}

}  // namespace tq
