// PTX for product.cu: copies into shared memory, clusters, dependent launch, the int8 tensor-core product (sm_90).
#pragma once
#include "ptx.cuh"

DEVICE void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }  // of one group
template <int N> DEVICE void copies_wait() {  // until all but the newest N groups of this thread have come
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE u32 remote(const u32* at, int rank) {  // what stands at this place in the memory of a block of the cluster
  u32 x;
  asm volatile("{\n.reg .u32 a;\nmapa.shared::cluster.u32 a, %1, %2;\nld.shared::cluster.u32 %0, [a];\n}"
               : "=r"(x)
               : "r"(shared_address(at)), "r"(rank)
               : "memory");
  return x;
}
// c (16×8 int) += a (16×32 int8) · b (32×8 int8)
DEVICE void mma_s8(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
