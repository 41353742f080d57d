// Stands in for kernels/cuda/csrc/pipe.cuh: all blocks of a cluster run at once, and a copy is done as late as it may be,
// where its thread waits for it, so that what is read before holds no data; or at once, so that what is still needed is gone.
#pragma once
#include "ptx.cuh"
static bool at_once = false;
static void copy16(void* to, const void* from) {
  if (u64(to) % 16 || u64(from) % 16) std::abort();
  if (at_once) {
    std::memcpy(to, from, 16);
    return;
  }
  fibers[current].copies.push_back({to, from, fibers[current].group});
}
static void copies_end() { fibers[current].group++; }
template <int N> static void copies_wait() {
  Fiber& f = fibers[current];
  const auto later = std::partition(f.copies.begin(), f.copies.end(), [&](Copy& c) { return c.group >= f.group - N; });
  for (auto c = later; c != f.copies.end(); c++) std::memcpy(c->to, c->from, 16);
  f.copies.erase(later, f.copies.end());
}
static void cluster_sync() { barrier(250, alive()); }
static u32 remote(const u32* at, int rank) {
  u32 x;
  std::memcpy(&x, shared_memory[rank] + ((const u8*)at - block_memory()), 4);
  return x;
}
static u32 given[2048][6];  // operands of the warps' products
static int dot4(u32 a, u32 b) {
  int y = 0;
  for (int i = 0; i < 32; i += 8) y += int(int8_t(a >> i)) * int8_t(b >> i);
  return y;
}
static void mma_s8(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const int me = current, first = me & ~31, g = (me & 31) / 4, t = me & 3;
  const u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(given[me], mine, sizeof mine);
  barrier(me / 32, 32);
  for (int i = 0; i < 4; i++)
    for (int lane = 0; lane < 4; lane++) {
      const u32 *left = given[first + g * 4 + lane], *right = given[first + (t * 2 + i % 2) * 4 + lane];
      c[i] += dot4(left[i / 2], right[4]) + dot4(left[i / 2 + 2], right[5]);
    }
  barrier(me / 32, 32);
}
template <class T> static T uniform(T x) { return x; }
