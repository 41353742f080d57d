// PTX in functions, and the model's 16-bit floats.
#pragma once
#include "config.cuh"
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
#define DEVICE __device__ __forceinline__
#define NEG __int_as_float(0xff800000)
#define NOT_A_NUMBER __int_as_float(0x7fffffff)

DEVICE u32 prmt(u32 a, u32 b, u32 s) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(s));
  return d;
}
DEVICE u32 mad(u32 a, u32 b, u32 c) {
  u32 d;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
DEVICE u32 low_nibbles_of(u32 a, u32 b) {  // of every byte the low half from a, the high one from b; in one instruction
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(0x0F0F0F0Fu), "r"(a), "r"(b));
  return d;
}
DEVICE float add_down(float a, float b) {  // rounded down
  float d;
  asm("add.rm.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
// x / y, correctly rounded where both are far from the ends of the range: what the compiler's own division does there
DEVICE float quotient(float x, float y) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(y));
  r = fmaf(fmaf(-y, r, 1.f), r, r);
  float q = x * r;
  q = fmaf(fmaf(-y, q, x), r, q);
  return fmaf(fmaf(-y, q, x), r, q);
}
// of two pairs of the model's 16-bit floats the larger magnitudes; a NaN stays one
DEVICE u32 larger(u32 a, u32 b) {
  u32 d;
#if BF16
  asm("{\n.reg .b32 x;\nabs.bf16x2 x, %2;\nmax.NaN.bf16x2 %0, %1, x;\n}" : "=r"(d) : "r"(a), "r"(b));
#else
  asm("{\n.reg .b32 x;\nabs.f16x2 x, %2;\nmax.NaN.f16x2 %0, %1, x;\n}" : "=r"(d) : "r"(a), "r"(b));
#endif
  return d;
}
// the larger magnitude; a NaN stays one
DEVICE float larger(float a, float b) {
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(fabsf(b)));
  return d;
}
DEVICE float inverse(float x) {  // about 22 bits
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float inverse_root(float x) {  // about 22 bits
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
struct Bytes {  // in shared memory, numbered from `first` on; an address takes one instruction
  u32 at;
  DEVICE Bytes(const u8* p, u32 first) : at(shared_address(p) - first) {}
  DEVICE u32 operator[](u32 i) const {
    u32 x;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(at + i) : "memory");
    return x;
  }
};
// of a warp's numbers
DEVICE int warp_max(int x) { return __reduce_max_sync(~0u, x); }
DEVICE int warp_sum(int x) { return __reduce_add_sync(~0u, x); }
DEVICE int warp_min(int x) { return __reduce_min_sync(~0u, x); }
DEVICE float warp_top(float x) {
  for (int n = 16; n; n >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, n));
  return x;
}
DEVICE float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// a barrier of some warps of a block
DEVICE void named_sync(int name, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory"); }
// a kernel launched to start while the one before it ends waits here for its results
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// lets the kernel after this one start, which waits as above, as soon as all blocks of this one have
DEVICE void start_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
template <class T> DEVICE T uniform(T x) { return __shfl_sync(~0u, x, 0); }  // tells the compiler that lanes agree
DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// adds one; what this warp wrote before is there for whoever finds it added, and the other way round
DEVICE u32 add_behind(u32* counter) {
  u32 before;
  asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DEVICE void wait_until(const u32* at, u32 least) {  // for other blocks, whose results are then seen
  u32 x;
  do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
  while (x < least);
}
DEVICE u64 shuffled(u64 x, int lane) {
  return u64(__shfl_sync(~0u, u32(x >> 32), lane)) << 32 | __shfl_sync(~0u, u32(x), lane);
}
DEVICE u32 two_16(float lo, float hi) {  // a pair in the model's dtype
  u32 d;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
#endif
  return d;
}
DEVICE u32 times_16(u32 a, u32 b) {  // products of two pairs in the model's dtype
  u32 d;
#if BF16
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
#else
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
  return d;
}
DEVICE u32 plus_16(u32 a, u32 b) {  // and sums
  u32 d;
#if BF16
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3F803F80u), "r"(b));
#else
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
  return d;
}
DEVICE float half_(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
DEVICE u16 to_half(float x) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}
DEVICE float wide(u16 x) {  // the model's dtype to fp32
#if BF16
  return __uint_as_float(u32(x) << 16);
#else
  return half_(x);
#endif
}
DEVICE float wide_low(u32 pair) { return BF16 ? __uint_as_float(pair << 16) : wide(u16(pair)); }
DEVICE float wide_high(u32 pair) { return BF16 ? __uint_as_float(pair & 0xFFFF0000u) : wide(u16(pair >> 16)); }
