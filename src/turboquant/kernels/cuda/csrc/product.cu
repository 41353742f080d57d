// Few int8 rows times a weight of 4 or 4+4 bit: y = unit·Σ scale·Σ (code - zero)·x, sums of codes exact; of two stages
// the inner sum is 16·Σ (code - zero)·x + Σ (code₂ - 8)·x and the scale a sixteenth.
//
// A block has 64 outputs and, with the other blocks of its cluster, its share of K. One warp fetches: weights run ahead
// of the rows, for they do not depend on the kernel before this one. The other eight multiply, each a run of K within a
// stage. Partial sums meet in shared memory, then across the cluster, in one order.
//
// config.cuh, written by product.py: PLANES (stages of the weight), NT (tiles of 8 rows), SPLIT (of the outputs among warps), GROUP (weights that share
// a scale, 0 for a whole row), PACKED_K (layout, see product.py), STAGES, BF16.
#include "pipe.cuh"

constexpr int BN = 64, KS = 512, WARPS = 8;           // outputs of a block; K of a stage; warps that multiply
constexpr int WK = WARPS / SPLIT, RUN = KS / WK;      // shares of a stage, and their K
constexpr int MT = BN / 16 / SPLIT;                   // tiles of 16 outputs of a warp
constexpr int XROW = KS + 16;                         // bytes between rows: lanes of a fragment meet no bank twice
constexpr int PIECE_K = PACKED_K ? 64 : 32, PIECE = BN * PIECE_K / 2;  // what lies together in memory
constexpr int PLANE = BN * KS / 2, W_BYTES = PLANES * PLANE, STAGE = W_BYTES + 8 * NT * XROW;
constexpr int PSTRIDE = BN + 4, PART = 8 * NT * PSTRIDE;  // words of partial sums, [row][output]
static_assert(WK * PART * 4 <= STAGES * STAGE && (!GROUP || GROUP % RUN == 0), "fits");

struct Call {
  const u8* weight[2];
  const u16* scale;  // (n, groups) fp16
  const u8* zero;    // (n, groups)
  const u8* codes;   // (rows, k) int8
  const float* unit;
  const u16* bias;  // (n) or null
  u16* out;         // (rows, n)
  int n, k, rows, groups, split;
};

DEVICE float real(u16 scale) { return half_(scale) * (PLANES == 2 ? 0.0625f : 1.f); }
DEVICE u32 minus(u32 codes, u32 zeros) { return (((codes & 0x0F0F0F0Fu) | 0x80808080u) - zeros) ^ 0x80808080u; }

struct Fetch {  // one warp
  const Call& c;
  u8* ring;
  u64 *full, *empty;
  int first, count, tile, lane;
  DEVICE int width(int i) const { return min(KS, c.k - (first + i) * KS); }
  DEVICE void weights(int i) const {
    const int slot = i % STAGES, pieces = width(i) / PIECE_K;
    if (lane == 0) expect(full + slot, width(i) * (PLANES * BN / 2 + c.rows));
    __syncwarp();
    const i64 row = i64(c.n) * PIECE_K / 2;
    const int plane = lane / 16, piece = lane % 16;
    if (plane < PLANES && piece < pieces)
      copy(ring + slot * STAGE + plane * PLANE + piece * PIECE,
           c.weight[plane] + ((first + i) * (KS / PIECE_K) + piece) * row + tile * PIECE, PIECE, full + slot);
  }
  DEVICE void rows(int i) const {
    const int slot = i % STAGES;
    for (int r = lane; r < c.rows; r += 32)
      copy(ring + slot * STAGE + W_BYTES + r * XROW, c.codes + i64(r) * c.k + (first + i) * KS, width(i), full + slot);
  }
  DEVICE void run() const {
    for (int i = 0; i < min(count, STAGES); i++) weights(i);
    launch_dependents();
    wait_for_previous();
    for (int i = 0; i < min(count, STAGES); i++) rows(i);
    for (int i = STAGES; i < count; i++) {
      wait(empty + i % STAGES, i / STAGES + 1 & 1);
      weights(i), rows(i);
    }
  }
};

struct Multiply {  // one warp
  int acc[PLANES][MT][NT][4] = {};
  float sum[GROUP ? MT : 1][NT][4] = {};
  u32 zeros[MT][2];
  float scale[MT][2];
  int lane, part, wk;
  DEVICE void group(const u16* scales, const u8* zero) {  // of the block's outputs
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = (part * MT + m) * 16 + h * 8 + lane / 4;
        zeros[m][h] = zero[row] * 0x01010101u;
        if (GROUP) scale[m][h] = real(scales[row]);
      }
  }
  DEVICE void step(const u8* stage, int k) {  // 64 of K
    const u8* x = stage + W_BYTES + (lane / 4) * XROW + k + lane % 4 * 4;
#pragma unroll
    for (int s = 0; s < 2; s++) {
      u32 b[NT][2];
#pragma unroll
      for (int t = 0; t < NT; t++) {
        b[t][0] = *(const u32*)(x + t * 8 * XROW + s * 32);
        b[t][1] = *(const u32*)(x + t * 8 * XROW + s * 32 + 16);
      }
#pragma unroll
      for (int mp = 0; mp < MT * PLANES; mp++) {
        const int m = mp % MT, p = mp / MT;
        const u32 z0 = p ? 0x08080808u : zeros[m][0], z1 = p ? 0x08080808u : zeros[m][1];
        const u8* w_at = stage + p * PLANE + lane * 16;
        u32 a[4];
        if (PACKED_K) {  // 16 outputs × 64: lane's words are (32 of K, 16 of K), nibbles the two halves of the outputs
          const uint2 w = *(const uint2*)(w_at + k / 64 * PIECE + (part * MT + m) * 512 + s * 8);
          a[0] = minus(w.x, z0), a[1] = minus(w.x >> 4, z1), a[2] = minus(w.y, z0), a[3] = minus(w.y >> 4, z1);
        } else {  // 32 outputs × 32: words are eighths of the outputs, nibbles the two halves of K
          const int eighth = part * MT + m;
          const uint2 w = *(const uint2*)(w_at + (k / 32 + s) * PIECE + eighth / 2 * 512 + eighth % 2 * 8);
          a[0] = minus(w.x, z0), a[2] = minus(w.x >> 4, z0), a[1] = minus(w.y, z1), a[3] = minus(w.y >> 4, z1);
        }
#pragma unroll
        for (int t = 0; t < NT; t++) mma_s8(acc[p][m][t], a, b[t][0], b[t][1]);
      }
    }
  }
  DEVICE int whole(int m, int t, int i) const {
    return PLANES == 2 ? 16 * acc[0][m][t][i] + acc[PLANES - 1][m][t][i] : acc[0][m][t][i];
  }
  DEVICE void fold() {  // a run of one group is complete
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int t = 0; t < NT; t++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          sum[GROUP ? m : 0][t][i] = fmaf(scale[m][i / 2], float(whole(m, t, i)), sum[GROUP ? m : 0][t][i]),
                                acc[0][m][t][i] = acc[PLANES - 1][m][t][i] = 0;
  }
  DEVICE void store(u32* to) const {  // partial sums, [row][output]
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int t = 0; t < NT; t++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          to[wk * PART + (t * 8 + lane % 4 * 2 + i % 2) * PSTRIDE + (part * MT + m) * 16 + i / 2 * 8 + lane / 4] =
              GROUP ? __float_as_uint(sum[GROUP ? m : 0][t][i]) : u32(whole(m, t, i));
  }
};

DEVICE u32 plus(u32 a, u32 b) { return GROUP ? __float_as_uint(__uint_as_float(a) + __uint_as_float(b)) : a + b; }

extern "C" __global__ void __launch_bounds__(32 * WARPS + 32, NT > 2 ? 1 : 2) product(const __grid_constant__ Call c) {
  extern __shared__ __align__(128) u8 memory[];
  u64 *full = (u64*)memory, *empty = full + STAGES;
  u8* ring = memory + 128;
  const int stages = (c.k + KS - 1) / KS, rank = blockIdx.x, tile = blockIdx.y;
  const int first = stages * rank / c.split, count = stages * (rank + 1) / c.split - first;
  const int group0 = GROUP ? first * KS / (GROUP ? GROUP : 1) : 0;
  const int groups = GROUP ? min(c.groups - group0, count * KS / (GROUP ? GROUP : 1)) : 1;
  u16* scales = (u16*)(ring + STAGES * STAGE);  // [group][output]
  u8* zeros = (u8*)(scales + groups * BN);
  const int thread = threadIdx.x, warp = uniform(thread / 32);
  if (thread == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(full + i, 1), barrier_init(empty + i, WARPS);
    barriers_ready();
  }
  __syncthreads();
  Multiply m;
  m.lane = thread & 31, m.part = warp % SPLIT, m.wk = warp / SPLIT;
  if (warp == WARPS) {
    Fetch{c, ring, full, empty, first, count, tile, thread & 31}.run();
  } else {
    for (int e = thread; e < groups * BN; e += 32 * WARPS) {
      const i64 at = i64(tile * BN + e / groups) * c.groups + group0 + e % groups;
      const int to = e % groups * BN + e / groups;
      scales[to] = c.scale[at], zeros[to] = c.zero[at];
    }
    sync_first(32 * WARPS);
    wait_for_previous();
    if (!GROUP) m.group(scales, zeros);
    for (int i = 0; i < count; i++) {
      const int slot = i % STAGES, begin = m.wk * RUN, end = min(begin + RUN, c.k - (first + i) * KS);
      if (GROUP && begin < end) {
        const int g = (i * KS + begin) / (GROUP ? GROUP : 1);
        m.group(scales + g * BN, zeros + g * BN);
      }
      wait(full + slot, i / STAGES & 1);
#pragma unroll
      for (int k = 0; k < RUN; k += 64)
        if (begin + k < end) m.step(ring + slot * STAGE, begin + k);
      __syncwarp();
      if (m.lane == 0) arrive(empty + slot);
      if (GROUP && begin < end) m.fold();
    }
  }
  __syncthreads();  // everybody is done with the ring, which takes the partial sums
  u32* parts = (u32*)ring;
  if (warp < WARPS) m.store(parts);
  __syncthreads();
  const int elements = c.rows * BN;
  if (c.split > 1) {
    for (int e = thread; e < elements; e += 32 * WARPS + 32) {
      u32* at = parts + e / BN * PSTRIDE + e % BN;
      u32 y = at[0];
      for (int w = 1; w < WK; w++) y = plus(y, at[w * PART]);
      at[0] = y;
    }
    cluster_sync();
  }
  for (int e = elements * rank / c.split + thread; e < elements * (rank + 1) / c.split; e += 32 * WARPS + 32) {
    const int row = e / BN, o = tile * BN + e % BN;
    const u32* at = parts + row * PSTRIDE + e % BN;
    u32 y = c.split > 1 ? remote(at, 0) : at[0];
    for (int w = 1; w < (c.split > 1 ? c.split : WK); w++) y = plus(y, c.split > 1 ? remote(at, w) : at[w * PART]);
    float value = GROUP ? __uint_as_float(y) : float(int(y)) * real(scales[e % BN]);
    value *= c.unit[row];
    if (c.bias) value += wide(c.bias[o]);
    c.out[i64(row) * c.n + o] = u16(two_16(value, value));
  }
  if (c.split > 1) cluster_sync();  // nobody leaves while others read its sums
}
