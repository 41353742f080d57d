// Few int8 rows times a weight of 4 or 4+4 bit: y = unit·Σ scale·Σ (code - zero)·x, sums of codes exact; of two stages
// the inner sum is 16·Σ (code - zero)·x + Σ (code₂ - 8)·x and the scale a sixteenth.
//
// A block has 64 outputs and, with the other blocks of its cluster, its share of K. Its warps take turns over pieces of
// 64 inputs. A lane fetches the very bytes that it multiplies, some pieces ahead, so nobody waits for anybody until the
// sums meet in shared memory and then across the cluster, in one order. Weights are asked for before the rows are
// there: they do not depend on the kernel before this one. Where there are more outputs than all blocks at once have, a
// block takes 64 after 64 (SEVERAL), and asks for the next ones' weights while it sums up.
//
// config.cuh, written by product.py: PLANES (stages of the weight), NT (tiles of 8 rows), DEPTH (pieces that a warp has
// under way), GROUP (weights that share a scale, 0 for a whole row), PACKED_K (layout, see product.py), SEVERAL, BF16.
#include "pipe.cuh"

constexpr int BN = 64, WARPS = 8, THREADS = 32 * WARPS;  // outputs of a block
constexpr int PIECE = BN * 64 / 2, MT = BN / 16;         // bytes of a piece's plane; tiles of 16 outputs
constexpr int PSTRIDE = BN + 4, PART = 8 * NT * PSTRIDE;  // words of partial sums, [row][output]
constexpr int PER = GROUP ? GROUP / 64 : 1;               // pieces that share a scale

struct Call {
  const u8* weight[2];
  const u16* scale;  // (n, groups) fp16
  const u8* zero;    // (n, groups)
  const u8* codes;   // (rows, k) int8
  const float* unit;
  const u16* bias;  // (n) or null
  u16* out;         // (rows, n)
  int n, k, rows, groups, split;
  int tables;  // groups that every block of a cluster keeps room for: they find each other's sums behind it
};

DEVICE float real(u16 scale) { return half_(scale) * (PLANES == 2 ? 0.0625f : 1.f); }
DEVICE u32 minus(u32 codes, u32 zeros) { return (((codes & 0x0F0F0F0Fu) | 0x80808080u) - zeros) ^ 0x80808080u; }
DEVICE u32 plus(u32 a, u32 b) { return GROUP ? __float_as_uint(__uint_as_float(a) + __uint_as_float(b)) : a + b; }

struct Multiply {  // one warp
  int acc[PLANES][MT][NT][4] = {};
  float sum[GROUP ? MT : 1][NT][4] = {};
  u32 zeros[MT][2];
  float scale[MT][2];
  int lane;
  // a lane's bytes of piece `at` (of all K): 16 for each quarter of it
  DEVICE void fetch(u8* to, const Call& c, int at, int tile) const {
#pragma unroll
    for (int p = 0; p < PLANES; p++)
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const i64 block = PACKED_K ? i64(at) * (c.n / 16) + tile * 4 + q
                                   : i64(at * 2 + q / 2) * (c.n / 32) + tile * 2 + q % 2;
        copy16(to + p * PIECE + q * 512 + lane * 16, c.weight[p] + block * 512 + lane * 16);
      }
  }
  DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int t = 0; t < NT; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[0][m][t][i] = acc[PLANES - 1][m][t][i] = 0, sum[GROUP ? m : 0][t][i] = 0;
  }
  DEVICE void group(const u16* scales, const u8* zero) {  // of the block's outputs
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = m * 16 + h * 8 + lane / 4;
        zeros[m][h] = zero[row] * 0x01010101u;
        if (GROUP) scale[m][h] = real(scales[row]);
      }
  }
  // x: of this lane's row and inputs
  DEVICE void step(const u8* piece, const u8* const (&x)[NT], int k) {
#pragma unroll
    for (int s = 0; s < 2; s++) {
      u32 b[NT][2];
#pragma unroll
      for (int t = 0; t < NT; t++) {
        b[t][0] = *(const u32*)(x[t] + k + s * 32);
        b[t][1] = *(const u32*)(x[t] + k + s * 32 + 16);
      }
#pragma unroll
      for (int mp = 0; mp < MT * PLANES; mp++) {
        const int m = mp % MT, p = mp / MT;
        const u32 z0 = p ? 0x08080808u : zeros[m][0], z1 = p ? 0x08080808u : zeros[m][1];
        const u8* w_at = piece + p * PIECE + lane * 16;
        u32 a[4];
        if (PACKED_K) {  // 16 outputs × 64: lane's words are (32 of K, 16 of K), nibbles the two halves of the outputs
          const uint2 w = *(const uint2*)(w_at + m * 512 + s * 8);
          a[0] = minus(w.x, z0), a[1] = minus(w.x >> 4, z1), a[2] = minus(w.y, z0), a[3] = minus(w.y >> 4, z1);
        } else {  // 32 outputs × 32: words are eighths of the outputs, nibbles the two halves of K
          const uint2 w = *(const uint2*)(w_at + (s * 2 + m / 2) * 512 + m % 2 * 8);
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
  DEVICE void fold() {  // scales of this piece's group
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int t = 0; t < NT; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float& s = sum[GROUP ? m : 0][t][i];
          s = fmaf(scale[m][i / 2], float(whole(m, t, i)), s);
          acc[0][m][t][i] = acc[PLANES - 1][m][t][i] = 0;
        }
  }
  DEVICE void store(u32* to) const {  // partial sums, [row][output]
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int t = 0; t < NT; t++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          to[(t * 8 + lane % 4 * 2 + i % 2) * PSTRIDE + m * 16 + i / 2 * 8 + lane / 4] =
              GROUP ? __float_as_uint(sum[GROUP ? m : 0][t][i]) : u32(whole(m, t, i));
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2) product(const __grid_constant__ Call c) {
  extern __shared__ __align__(128) u8 memory[];
  const int rank = blockIdx.x, thread = threadIdx.x, warp = uniform(thread / 32), tiles = c.n / BN;
  const int pieces = c.k / 64, first = pieces * rank / c.split, count = pieces * (rank + 1) / c.split - first;
  const int group0 = GROUP ? first / PER : 0, groups = GROUP ? (first + count - 1) / PER - group0 + 1 : 1;
  const int turns = (count - warp + WARPS - 1) / WARPS, stride = count * 64 + 16;  // of a tile, this warp's; of x, below
  u8* tables = memory;                                        // scales, [group][output], and zeros; of two tiles
  u8* ring = tables + (1 + SEVERAL) * c.tables * (3 * BN);  // at the same place in all blocks: `remote` reads there
  u8 *mine = ring + warp * (DEPTH * PLANES * PIECE), *x = ring + WARPS * (DEPTH * PLANES * PIECE);
  u32* parts = (u32*)(SEVERAL ? x + c.rows * stride : ring);  // partial sums; lanes of a fragment of x meet no bank twice
  Multiply m;
  m.lane = thread & 31;
  int wanted = blockIdx.y, turn = 0;  // what is asked for next
  const auto ask = [&](int slot) {
    if (turn < turns && wanted < tiles) {
      m.fetch(mine + slot * (PLANES * PIECE), c, first + turn * WARPS + warp, wanted);
      if (++turn == turns && SEVERAL) turn = 0, wanted += gridDim.y;
    }
    copies_end();
  };
  const auto table = [&](int tile, u8* to) {
    u16* scales = (u16*)to;
    for (int e = thread; e < groups * BN; e += THREADS) {
      const i64 from = i64(tile * BN + e / groups) * c.groups + group0 + e % groups;
      const int at = e % groups * BN + e / groups;
      scales[at] = c.scale[from], (to + c.tables * (2 * BN))[at] = c.zero[from];
    }
  };
#pragma unroll
  for (int i = 0; i < DEPTH; i++) ask(i);
  if (thread == 0) start_next();
  table(blockIdx.y, tables);
  wait_for_previous();
  for (int e = thread; e < c.rows * count * 4; e += THREADS) {
    const int row = e / (count * 4), at = e % (count * 4) * 16;
    *(uint4*)(x + row * stride + at) = *(const uint4*)(c.codes + i64(row) * c.k + first * 64 + at);
  }
  __syncthreads();
  const u8* of[NT];
#pragma unroll
  for (int t = 0; t < NT; t++) of[t] = x + min(t * 8 + m.lane / 4, c.rows - 1) * stride + m.lane % 4 * 4;
  for (int tile = blockIdx.y, slot = 0, odd = 0; tile < tiles; tile += gridDim.y, odd ^= 1) {
    const u16* scales = (u16*)(tables + odd * c.tables * (3 * BN));
    const u8* zeros = (const u8*)(scales + c.tables * BN);
    if (SEVERAL && tile + int(gridDim.y) < tiles) table(tile + gridDim.y, tables + (odd ^ 1) * c.tables * (3 * BN));
    if (!GROUP) m.group(scales, zeros);
    for (int i = 0; i < turns; i++, slot = slot + 1 < DEPTH ? slot + 1 : 0) {
      const int at = i * WARPS + warp;
      if (GROUP) {
        const int g = (first + at) / PER - group0;
        m.group(scales + g * BN, zeros + g * BN);
      }
      copies_wait<DEPTH - 1>();
      m.step(mine + slot * (PLANES * PIECE), of, at * 64);
      ask(slot);
      if (GROUP) m.fold();
    }
    if (!SEVERAL) __syncthreads();  // everybody is done with ring and rows, whose place the partial sums take
    m.store(parts + warp * PART);
    __syncthreads();
    const int elements = c.rows * BN;
    if (c.split > 1) {
      for (int e = thread; e < elements; e += THREADS) {
        u32* at = parts + e / BN * PSTRIDE + e % BN;
        u32 y = at[0];
        for (int w = 1; w < WARPS; w++) y = plus(y, at[w * PART]);
        at[0] = y;
      }
      cluster_sync();
    }
    for (int e = elements * rank / c.split + thread; e < elements * (rank + 1) / c.split; e += THREADS) {
      const int row = e / BN, o = tile * BN + e % BN;
      const u32* at = parts + row * PSTRIDE + e % BN;
      u32 y = c.split > 1 ? remote(at, 0) : at[0];
      for (int w = 1; w < (c.split > 1 ? c.split : WARPS); w++) y = plus(y, c.split > 1 ? remote(at, w) : at[w * PART]);
      float value = GROUP ? __uint_as_float(y) : float(int(y)) * real(scales[e % BN]);
      value *= c.unit[row];
      if (c.bias) value += wide(c.bias[o]);
      c.out[i64(row) * c.n + o] = u16(two_16(value, value));
    }
    if (!SEVERAL) break;
    m.clear();
    __syncthreads();  // everybody has read the partial sums, and written the next tile's table
  }
  if (c.split > 1) cluster_sync();  // nobody leaves while others read its sums
}
