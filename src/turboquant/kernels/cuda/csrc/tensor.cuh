// PTX of the attention in functions: tensor-core products, and copies to shared memory.
#pragma once
#include "ptx.cuh"

DEVICE float reciprocal(float x) {  // 0 for what is too small to be told from 0
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return x > 1e-30f ? y : 0.f;
}
// c (16×8 int) += a (16×32 int8) · b (32×8), b unsigned or signed bytes; the first product of a sum ignores c
DEVICE void mma_u8(int c[4], const u32 a[4], u32 b0, u32 b1, bool first) {
#define MMA(TYPE) "mma.sync.aligned.m16n8k32.row.col.s32.s8." TYPE ".s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
#define OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)
  if (first)
    asm(MMA("u8") "{%10,%10,%10,%10};" : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : OPERANDS, "r"(0));
  else
    asm(MMA("u8") "{%0,%1,%2,%3};" : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : OPERANDS);
}
DEVICE void mma_s8(int c[4], const u32 a[2], u32 b0, bool first) {  // 16 deep, all signed
#define MMA_S8 "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5},{%6},"
  if (first)
    asm(MMA_S8 "{%7,%7,%7,%7};" : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0), "r"(0));
  else
    asm(MMA_S8 "{%0,%1,%2,%3};" : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
}
// c (16×8 fp32) += a (16×16) · b (16×8), 16-bit floats
DEVICE void mma_16(float c[4], const u32 a[4], u32 b0, u32 b1) {
#if BF16
#define TYPES "f32.bf16.bf16.f32"
#else
#define TYPES "f32.f16.f16.f32"
#endif
  asm("mma.sync.aligned.m16n8k16.row.col." TYPES " {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// ---- copies of 16-byte multiples from global to shared memory, in order; `wait` returns when the n-th has come
// how far behind `to` a copy must begin to lie in its 128 bytes as `from` does: such copies are faster
DEVICE int shift_to(const void* from, const void* to) { return int(u32(u64(from)) - shared_address(to)) & 112; }
#if __CUDA_ARCH__ >= 900
DEVICE void copies_init(i64* bars, int lane) {
  if (lane < BUFFERS) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(bars + lane)));
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
}
DEVICE void copy(void* to, const void* from, int bytes, i64* bar, int lane) {
  if (lane == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(bar))
                 : "memory");
  }
}
DEVICE void no_copy() {}
DEVICE void wait(i64* bar, u32 phase) {
  asm volatile(
      "{\n.reg .pred p;\nagain: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra again;\n}" ::"r"(
          shared_address(bar)),
      "r"(phase)
      : "memory");
}
#else
DEVICE void copies_init(i64*, int) {}
DEVICE void copy(void* to, const void* from, int bytes, i64*, int lane) {
  for (int i = lane * 16; i < bytes; i += 512)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address((u8*)to + i)),
                 "l"((const u8*)from + i));
  asm volatile("cp.async.commit_group;");
}
DEVICE void no_copy() { asm volatile("cp.async.commit_group;"); }
DEVICE void wait(i64*, u32) {
  asm volatile("cp.async.wait_group %0;" ::"n"(BUFFERS - 1) : "memory");
  __syncwarp();
}
#endif
