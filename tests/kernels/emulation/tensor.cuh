// Stands in for kernels/cuda/csrc/tensor.cuh and for what only attention needs of CUDA: tensor-core products of a warp's
// fibers, copies to shared memory that are there at once.
#pragma once
#include "ptx.cuh"

struct int2 {
  int x, y;
};
static int2 make_int2(int x, int y) { return {x, y}; }
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static i64 min(i64 a, i64 b) { return a < b ? a : b; }
static i64 max(i64 a, i64 b) { return a > b ? a : b; }
static int __clz(u32 x) { return x ? __builtin_clz(x) : 32; }
static int __ldg(const int* x) { return *x; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static bool __any_sync(u32, bool x) { return __ballot_sync(~0u, x) != 0; }
static bool __all_sync(u32, bool x) { return __ballot_sync(~0u, x) == ~0u; }
static int __shfl_up_sync(u32, int x, int n) {
  const int lane = threadIdx.x & 31;
  return __shfl_sync(~0u, x, lane < n ? lane : lane - n);
}
template <class T> static T uniform(T x) { return __shfl_sync(~0u, x, 0); }
static int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += int((signed char)(a >> i)) * int((signed char)(b >> i));
  return c;
}
static float reciprocal(float x) { return x > 1e-30f ? 1 / x : 0; }

// every lane's words, for all of a warp
struct Operands {
  u32 a[32][4], b[32][2];
};
static const Operands& gather(const u32* a, int na, u32 b0, u32 b1) {
  static Operands all[32];
  Operands& o = all[threadIdx.x / 32];
  const int lane = threadIdx.x & 31;
  barrier(threadIdx.x / 32, 32);
  for (int i = 0; i < na; i++) o.a[lane][i] = a[i];
  o.b[lane][0] = b0, o.b[lane][1] = b1;
  barrier(threadIdx.x / 32, 32);
  return o;
}
static int byte_of(u32 word, int i, bool is_signed) {
  const u8 x = u8(word >> 8 * i);
  return is_signed ? int((signed char)x) : int(x);
}
// c (16×8) = a (16×16·STEPS bytes) · b, as m16n8k16 and m16n8k32 place them
template <int STEPS> static void product(int c[4], const Operands& o, bool a_signed, bool b_signed) {
  const int g = (threadIdx.x & 31) / 4, t = threadIdx.x & 3;
  for (int i = 0; i < 4; i++) {
    const int row = g + i / 2 * 8, col = 2 * t + i % 2;
    for (int k = 0; k < 16 * STEPS; k++) {
      const int from = k % 16 / 4;
      const u32 a = o.a[row % 8 * 4 + from][row / 8 + k / 16 * 2], b = o.b[col * 4 + from][k / 16];
      c[i] += byte_of(a, k % 4, a_signed) * byte_of(b, k % 4, b_signed);
    }
  }
}
static void mma_u8(int c[4], const u32 a[4], u32 b0, u32 b1, bool first) {
  const Operands& o = gather(a, 4, b0, b1);
  if (first) c[0] = c[1] = c[2] = c[3] = 0;
  product<2>(c, o, true, false);
}
static void mma_s8(int c[4], const u32 a[2], u32 b0, bool first) {
  const Operands& o = gather(a, 2, b0, 0);
  if (first) c[0] = c[1] = c[2] = c[3] = 0;
  product<1>(c, o, true, true);
}
static void mma_16(float c[4], const u32 a[4], u32 b0, u32 b1) {
  const Operands& o = gather(a, 4, b0, b1);
  const int g = (threadIdx.x & 31) / 4, t = threadIdx.x & 3;
  for (int i = 0; i < 4; i++) {
    const int row = g + i / 2 * 8, col = 2 * t + i % 2;
    for (int k = 0; k < 16; k++) {
      const u32 x = o.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], y = o.b[col * 4 + k % 8 / 2][k / 8];
      c[i] += wide(u16(x >> 16 * (k % 2))) * wide(u16(y >> 16 * (k % 2)));
    }
  }
}
static int shift_to(const void* from, const void*) { return int(u64(from)) & 112; }
static void copies_init(i64*, int) {}
static void copy(void* to, const void* from, int bytes, i64*, int lane) {
  if (lane == 0) std::memcpy(to, from, bytes);
}
static void no_copy() {}
static void wait(i64*, u32) { __syncwarp(); }
