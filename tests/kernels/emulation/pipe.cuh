// Stands in for kernels/cuda/csrc/pipe.cuh: all blocks of a cluster run at once, a copy is done where it is asked for,
// and a barrier counts as the hardware's does. Copies that would read beyond the tensors are the caller's fault and fail.
#pragma once
#include "ptx.cuh"
struct Bar {  // in the 8 bytes of a barrier
  u16 members, missing;
  u8 phase, unused[3];
};
static std::vector<std::vector<i64>> pending(64);  // bytes that the barriers of a block wait for
static i64& bytes_of(u64* bar) {
  auto& some = pending[current / blockDim.x];
  some.resize(64);
  return some[(u8*)bar - block_memory() >> 3];
}
static void settle(u64* bar) {
  Bar* b = (Bar*)bar;
  if (!b->missing && !bytes_of(bar)) b->missing = b->members, b->phase ^= 1;
}
static void barrier_init(u64* bar, int count) {
  Bar b = {u16(count), u16(count), 0};
  std::memcpy(bar, &b, 8), bytes_of(bar) = 0;
}
static void barriers_ready() {}
static void expect(u64* bar, int bytes) {
  bytes_of(bar) += bytes, ((Bar*)bar)->missing--;
  settle(bar);
}
static void arrive(u64* bar) { ((Bar*)bar)->missing--, settle(bar); }
static void wait(u64* bar, u32 phase) {
  while (((Bar*)bar)->phase == phase) yield();
}
static void copy(void* to, const void* from, int bytes, u64* bar) {
  if (bytes % 16 || u64(to) % 16 || u64(from) % 16) std::abort();
  std::memcpy(to, from, bytes);
  bytes_of(bar) -= bytes;
  settle(bar);
}
static void sync_first(int threads) { barrier(208 + block(), threads); }
static void cluster_sync() { barrier(250, alive()); }
static u32 remote(const u32* at, int rank) {
  u32 x;
  std::memcpy(&x, shared_memory[rank] + ((const u8*)at - block_memory()), 4);
  return x;
}
static void launch_dependents() {}
static void __syncwarp() { barrier(current / 32, 32); }
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
