// Stands in for kernels/cuda/csrc/ptx.cuh: CUDA's threads as fibers of one CPU thread, so that the sources run in
// tests without a GPU. A barrier or a shuffle lets the other fibers go on until all have come.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <vector>

#include "config.cuh"
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
#define DEVICE inline
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define NEG (-INFINITY)
#define NOT_A_NUMBER NAN

struct Three {
  int x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static Three threadIdx, blockIdx, gridDim, blockDim;
static u8 shared_memory[8][1 << 18] __attribute__((aligned(128)));  // of the blocks of a cluster

struct Copy {  // of 16 bytes, of a group of copies of its thread
  void* to;
  const void* from;
  int group;
};
struct Fiber {
  ucontext_t context;
  std::vector<Copy> copies;  // under way
  int group = 0;             // of the next ones
  std::vector<char> stack = std::vector<char>(1 << 17);
  bool done = false;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current;
static std::function<void()> body;
static u32 exchange[2048];
static bool unfair = false;  // whether a third of the warps stands still for a while, others for another
static int arrived[256], generation[256], any[2], first_block;  // by warp; from 192 on by block

static void enter(int fiber) {
  current = fiber, threadIdx.x = fiber % blockDim.x, blockIdx.x = first_block + fiber / blockDim.x;
}
static int block() { return current / blockDim.x; }
static u8* block_memory() { return shared_memory[block()]; }
static void yield() {
  const int me = current;
  swapcontext(&fibers[me].context, &scheduler);
  enter(me);
}
static void barrier(int group, int members) {
  const int now = generation[group];
  if (++arrived[group] == members) arrived[group] = 0, generation[group]++;
  while (generation[group] == now) yield();
}
static int alive() {
  int n = 0;
  for (auto& f : fibers) n += !f.done;
  return n;
}
static int alive_here() {
  int n = 0;
  for (int i = 0; i < blockDim.x; i++) n += !fibers[block() * blockDim.x + i].done;
  return n;
}
static void __syncthreads() { barrier(192 + block(), alive_here()); }
static void named_sync(int, int members) { barrier(128 + current / members, members); }  // threads side by side
static void __syncwarp() { barrier(threadIdx.x / 32, 32); }
static int __syncthreads_or(int x) {
  const int slot = generation[192] / 2 & 1;
  any[slot] |= x != 0;
  barrier(192, alive());
  const int out = any[slot];
  barrier(192, alive());
  any[slot] = 0;
  return out;
}
template <class T> static T __shfl_xor_sync(u32, T x, int n) {
  static_assert(sizeof(T) == 4, "one word");
  const int warp = current / 32;
  std::memcpy(&exchange[current], &x, 4);
  barrier(warp, 32);
  T y;
  std::memcpy(&y, &exchange[current ^ n], 4);
  barrier(warp, 32);
  return y;
}
template <class T> static T __shfl_sync(u32, T x, int lane) {
  return __shfl_xor_sync(~0u, x, (threadIdx.x ^ lane) & 31);
}
static u32 __ballot_sync(u32, bool x) {
  u32 bits = u32(x) << (threadIdx.x & 31);
  for (int n = 16; n; n >>= 1) bits |= __shfl_xor_sync(~0u, bits, n);
  return bits;
}
static void entry() {
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}
static void launch(Three grid, int threads, std::function<void()> kernel, int cluster = 1) {
  gridDim = grid, blockDim.x = threads, body = kernel;
  for (int z = 0; z < grid.z; z++)
    for (int y = 0; y < grid.y; y++)
      for (int x = 0; x < grid.x; x += cluster) {
        first_block = x, blockIdx.y = y, blockIdx.z = z;
        std::memset(shared_memory, 0xEE, sizeof shared_memory);
        std::memset(arrived, 0, sizeof arrived), std::memset(any, 0, sizeof any);
        if (int(fibers.size()) != threads * cluster) fibers = std::vector<Fiber>(threads * cluster);
        for (auto& f : fibers) {
          f.done = false, f.copies.clear();
          getcontext(&f.context);
          f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
          f.context.uc_link = &scheduler;
          makecontext(&f.context, entry, 0);
        }
        for (u32 pass = 1; alive(); pass++)
          for (int t = 0; t < threads * cluster; t++) {
            const bool still = unfair && ((pass / 64 * 2654435761u) >> 13 ^ (t / 32 * 40503u >> 3)) % 3 == 0;
            if (!fibers[t].done && !still) enter(t), swapcontext(&scheduler, &fibers[t].context);
          }
      }
}

static float __uint_as_float(u32 x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
static u32 __float_as_uint(float x) {
  u32 y;
  std::memcpy(&y, &x, 4);
  return y;
}
static float __fsqrt_rn(float x) { return std::sqrt(x); }
static float __frcp_rn(float x) { return 1.f / x; }
static int max(int a, int b) { return a > b ? a : b; }
static int __ffs(u32 x) { return __builtin_ffs(x); }
static float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }  // NaN gives 0
static float add_down(float a, float b) {
  const float near = a + b, rest = float((double(b) - near) + a);  // its sign is exact
  return rest < 0 ? std::nextafterf(near, -INFINITY) : near;
}
static float quotient(float x, float y) { return x / y; }
struct Bytes {
  const u8* at;
  Bytes(const u8* p, u32 first) : at(p - first) {}
  u32 operator[](u32 i) const { return at[i]; }
};
static void wait_until(const u32* at, u32 least) {
  if (*at < least) std::abort();
}
static int warp_max(int x) {
  for (int n = 16; n; n >>= 1) x = std::max(x, __shfl_xor_sync(~0u, x, n));
  return x;
}
static int warp_sum(int x) {
  for (int n = 16; n; n >>= 1) x += __shfl_xor_sync(~0u, x, n);
  return x;
}
static u64 shuffled(u64 x, int lane) {
  return u64(__shfl_sync(~0u, u32(x >> 32), lane)) << 32 | __shfl_sync(~0u, u32(x), lane);
}
static float warp_top(float x) {
  for (int n = 16; n; n >>= 1) x = std::max(x, __shfl_xor_sync(~0u, x, n));
  return x;
}
static int warp_min(int x) { return -warp_max(-x); }
static int __popc(u32 x) { return __builtin_popcount(x); }
static int __popcll(u64 x) { return __builtin_popcountll(x); }
static u32 prmt(u32 a, u32 b, u32 selector) {
  const u64 bytes = a | u64(b) << 32;
  u32 out = 0;
  for (int i = 0; i < 4; i++) {
    const u32 pick = selector >> (4 * i), byte = u8(bytes >> (8 * (pick & 7)));
    out |= (pick & 8 ? byte >> 7 ? 0xFFu : 0u : byte) << (8 * i);
  }
  return out;
}
static u32 low_nibbles_of(u32 a, u32 b) { return (a & 0x0F0F0F0Fu) | (b & 0xF0F0F0F0u); }
static u32 mad(u32 a, u32 b, u32 c) { return a * b + c; }
static int min(int a, int b) { return a < b ? a : b; }
static void atomicOr(u32* to, u32 x) { *to |= x; }
static u32 atomicAdd(u32* to, u32 x) { return *to += x, *to - x; }
static void prefetch(const void*) {}
static void fence() {}
static u32 add_behind(u32* counter) { return atomicAdd(counter, 1u); }
template <class T> static T __ldcg(const T* x) { return *x; }
static void atomicAdd(u64* to, u64 x) { *to += x; }
static void wait_for_previous() {}
static void start_next() {}
static u16 to_half(float x) {
  const _Float16 h = _Float16(x);
  u16 y;
  std::memcpy(&y, &h, 2);
  return y;
}
static float half_(u16 x) {
  _Float16 h;
  std::memcpy(&h, &x, 2);
  return float(h);
}
static float wide(u16 x) { return BF16 ? __uint_as_float(u32(x) << 16) : half_(x); }
static float wide_low(u32 pair) { return wide(u16(pair)); }
static float wide_high(u32 pair) { return wide(u16(pair >> 16)); }
static u16 one_16(float x) {
  if (!BF16) return to_half(x);
  if (x != x) return 0x7FFF;
  const u32 bits = __float_as_uint(x);
  return u16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
static u16 larger_16(u16 a, u16 b) {
  const float x = wide(a), y = std::fabs(wide(b));
  return x != x || y != y ? 0x7FFF : x > y ? a : b & 0x7FFF;
}
static float larger(float a, float b) { return a != a || b != b ? NAN : std::max(a, std::fabs(b)); }
static float inverse(float x) { return 1 / x; }
static float inverse_root(float x) { return 1 / std::sqrt(x); }
static float exp2_(float x) { return std::exp2(x); }
static u32 larger(u32 a, u32 b) { return larger_16(a, b) | u32(larger_16(a >> 16, b >> 16)) << 16; }
static u32 two_16(float lo, float hi) { return one_16(lo) | u32(one_16(hi)) << 16; }
static u32 times_16(u32 a, u32 b) { return two_16(wide_low(a) * wide_low(b), wide_high(a) * wide_high(b)); }
static u32 plus_16(u32 a, u32 b) { return two_16(wide_low(a) + wide_low(b), wide_high(a) + wide_high(b)); }
