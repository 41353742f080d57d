// Rows -> rotated int8 with one unit a row, in one pass behind (RMSNorm of x or of a sum | activation·x | nothing).
//
// Blocks take rows in turns and load the next one's while they work. A thread has 32 numbers of a row in registers. The
// butterflies of the Walsh-Hadamard transform are over the bits of a number's column, and where those are: at first
// bits 0 to 2, 8 and 9 number a thread's registers and bits 3 to 7 the lanes of a warp. A tensor-core product with ±1
// transforms over 0, 2, 3 and 4, exactly but for sums in fp32, and moves 5 into registers: 1, 5, 8 and 9 are additions
// there. An exchange through shared memory brings the rest, 6, 7 and from 10 on. Codes go through shared memory once
// more and leave in pieces of 16 bytes.
//
// config.cuh, written by rows.py: K (numbers of a row), BLOCK (of the rotation, 128 to 8192), THREADS, RESIDENT (blocks
// of a multiprocessor), MODE (0 nothing, 1 norm, 2 gate), ADD, ONCE, ACT (0 silu, 1 gelu_tanh), BF16.
#include "tensor.cuh"

constexpr int E = 32, TEAM = BLOCK / E, WARPS = THREADS / 32;  // numbers of a thread, threads of a Hadamard block
constexpr int log2_(int n) { return n > 1 ? 1 + log2_(n / 2) : 0; }
constexpr int BITS = log2_(BLOCK);
constexpr bool has(int bit) { return bit < BITS; }
// The bits that number a thread's registers behind the exchange; the threads have the others, in order.
constexpr int late(int r) { return BITS < 12 ? BITS - 5 + r : r < 2 ? 6 + r : BITS - 5 + r; }
constexpr int late_mask() { return 1 << late(0) | 1 << late(1) | 1 << late(2) | 1 << late(3) | 1 << late(4); }
// Where number i stands in shared memory: threads write four numbers at once that differ in bits 1 and 2, and lanes of a
// warp meet at no bank. A sum over i's bits.
constexpr int place(int i) { return (i & 1) * 4 + (i >> 1 & 3) + (i & 56) + (i >> 6) * 72; }
constexpr int FLOATS = THREADS * E / 64 * 72, BYTES_AT = (FLOATS + 3 * WARPS + 3) / 4 * 16;  // in shared memory
constexpr float MAGIC = 12582912.f;  // 1.5·2^23: the sum's low bits are the rounded number

struct Call {
  const u16 *x, *other;        // x: of the activation, if there is one; other: the norm's weight (K), or what it multiplies
  const u32* sign;             // of each thread's numbers, a bit each: (pair, low or high)
  const u16* plus;             // (rows, K): the norm is of x + plus
  u16 *sum, *keep;             // (rows, K): x + plus, and what a norm returns
  u8* codes;                   // (rows, K) int8
  float* unit;                 // (rows)
  i64 x_stride, other_stride, plus_stride;  // of rows, in numbers
  float eps, shift, scale;     // scale: of the rotation
  int rows, early;             // early: where the kernel behind this one is let in, 1 behind the loads, 2 before
};

DEVICE int piece_of(int t, int i) { return t / 32 * 1024 + i * 256 + t % 32 * 8; }  // of 8 numbers, of a thread
DEVICE void load(u32 (&to)[E / 2], const u16* from, int t) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint4 a = {0, 0, 0, 0};
    if (piece_of(t, i) < K) a = *(const uint4*)(from + piece_of(t, i));
    to[4 * i] = a.x, to[4 * i + 1] = a.y, to[4 * i + 2] = a.z, to[4 * i + 3] = a.w;
  }
}
DEVICE void keep(u16* to, const u32 (&from)[E / 2], int t) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (piece_of(t, i) < K)
      *(uint4*)(to + piece_of(t, i)) = make_uint4(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]);
}
DEVICE void team_sync(int team) {  // the threads of a Hadamard block
  if (TEAM <= 32) __syncwarp();
  else if (TEAM == THREADS) __syncthreads();
  else named_sync(team + 1, TEAM);
}
DEVICE float sigmoid(float x) { return inverse(1.f + exp2_(x * -1.4426950408889634f)); }
DEVICE float activated(float x) {
  return x * sigmoid(ACT ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x);
}
// (y0 + y1, y0 - y1) of registers that differ in `bit`
template <int N> DEVICE void butterfly(float (&v)[N], int bit) {
#pragma unroll
  for (int r = 0; r < N; r++)
    if (!(r >> bit & 1)) {
      const float a = v[r], b = v[r | 1 << bit];
      v[r] = a + b, v[r | 1 << bit] = a - b;
    }
}
DEVICE int late_first(int t) {  // a thread's number behind the exchange whose bits in registers are 0
  int i = 0;
#pragma unroll
  for (int bit = 0, from = 0; bit < BITS; bit++)
    if (!(late_mask() >> bit & 1)) i |= (t >> from++ & 1) << bit;
  return i + t / TEAM * BLOCK;
}
constexpr int late_number(int r) {
  int i = 0;
  for (int bit = 0; bit < 5; bit++) i |= (r >> bit & 1) << late(bit);
  return i;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) quantize(const __grid_constant__ Call c) {
  extern __shared__ __align__(128) u8 memory[];
  float *floats = (float*)memory, *sums = floats + FLOATS;
  int* tops = (int*)sums + WARPS;  // of this row and of the one before it, which some warps may still read
  u8* bytes = memory + BYTES_AT;
  const int t = threadIdx.x, lane = t & 31, warp = t / 32, team = t / TEAM;
  if (c.early == 2) start_next();
  u32 x[E / 2], other[E / 2], plus[E / 2], h[4];
  const u32 sign = c.sign[t], one = BF16 ? 0x3F80u : 0x3C00u;
#pragma unroll
  for (int i = 0; i < 4; i++) {  // of the ±1 of a row and two columns
    const int row = lane / 4 + i % 2 * 8, column = lane % 4 * 2 + i / 2 * 8;
    h[i] = one | one << 16 | (__popc(row & column) & 1) << 15 | u32(__popc(row & (column + 1)) & 1) << 31;
  }
  // where this thread writes and reads: bits 6 and 7 are in its lane's low bits behind the product, 0, 3 and 4 in the others
  float* put = floats + place(warp * 1024 + lane % 4 * 64 + (lane >> 2 & 1) + (lane >> 3) * 8);
  const int second = late_first(t);
  wait_for_previous();
  int row = blockIdx.x;
  load(x, c.x + row * c.x_stride, t);
  if (ADD) load(plus, c.plus + row * c.plus_stride, t);
  if (MODE) load(other, c.other + (MODE == 2 ? row * c.other_stride : 0), t);
  if (MODE == 1 && !ONCE && c.shift != 0)
#pragma unroll
    for (int i = 0; i < E / 2; i++) other[i] = two_16(wide_low(other[i]) + c.shift, wide_high(other[i]) + c.shift);
  if (c.early == 1) start_next();
  for (int turns = 0; row < c.rows; turns ^= 1) {
    u32 now[E / 2];
    if (ADD) {
#pragma unroll
      for (int i = 0; i < E / 2; i++) x[i] = plus_16(x[i], plus[i]);
      keep(c.sum + i64(row) * K, x, t);
    }
    if (MODE == 1) {
      float square = 0;
#pragma unroll
      for (int i = 0; i < E / 2; i++) {
        square = fmaf(wide_low(x[i]), wide_low(x[i]), square);
        square = fmaf(wide_high(x[i]), wide_high(x[i]), square);
      }
#pragma unroll
      for (int n = 16; n; n >>= 1) square += __shfl_xor_sync(~0u, square, n);
      if (lane == 0) sums[warp] = square;
      __syncthreads();
      square = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) square += sums[w];
      const float inv = inverse_root(square * (1.f / K) + c.eps);
#pragma unroll
      for (int i = 0; i < E / 2; i++) {
        const float low = wide_low(x[i]) * inv, high = wide_high(x[i]) * inv;
        now[i] = ONCE ? two_16(low * (wide_low(other[i]) + c.shift), high * (wide_high(other[i]) + c.shift))
                      : times_16(two_16(low, high), other[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < E / 2; i++)
        now[i] = MODE == 2 ? times_16(two_16(activated(wide_low(x[i])), activated(wide_high(x[i]))), other[i]) : x[i];
    }
    const int next = row + gridDim.x;
    if (next < c.rows) {
      load(x, c.x + next * c.x_stride, t);
      if (ADD) load(plus, c.plus + next * c.plus_stride, t);
      if (MODE == 2) load(other, c.other + next * c.other_stride, t);
    }
    if (MODE == 1) keep(c.keep + i64(row) * K, now, t);
#pragma unroll
    for (int i = 0; i < E / 2; i++) now[i] ^= sign << (15 - i) & 0x80008000u;
    float v[E];  // registers by bits 1, 8, 9, 5, 2
#pragma unroll
    for (int i = 0; i < 8; i++) {  // by bits 1, 8, 9
      const int at = i % 2 + i / 2 * 4;
      float d[4] = {0, 0, 0, 0};
      mma_16(d, h, now[at], now[at + 2]);
#pragma unroll
      for (int k = 0; k < 4; k++) v[i + 8 * k] = d[k];
    }
    butterfly(v, 0);
    if (has(8)) butterfly(v, 1);
    if (has(9)) butterfly(v, 2);
    butterfly(v, 3);
#pragma unroll
    for (int i = 0; i < 8; i++) {  // by bits 8, 9, 5: the four of bits 1 and 2
      const int at = i * 2;
      *(float4*)(put + place((i & 3) * 256 + (i >> 2) * 32)) = make_float4(v[at], v[at + 1], v[at + 16], v[at + 17]);
    }
    team_sync(team);
    float w[E], top = 0;
#pragma unroll
    for (int r = 0; r < E; r++) w[r] = floats[place(second) + place(late_number(r))];
#pragma unroll
    for (int bit = 0; bit < 5; bit++)
      if (late(bit) == 6 || late(bit) == 7 || late(bit) >= 10) butterfly(w, bit);
#pragma unroll
    for (int r = 0; r < E; r++) top = larger(top, w[r]);
    int most = warp_max(int(__float_as_uint(top)));
    if (lane == 0) tops[turns * WARPS + warp] = most;
    __syncthreads();
    for (int i = lane; i < WARPS; i += 32) most = max(most, tops[turns * WARPS + i]);
    top = __uint_as_float(warp_max(most));  // of this row; a NaN is above all numbers
    const bool finite = top < __uint_as_float(0x7F800000u);
    if (t == 0) c.unit[row] = finite ? fmaxf(top * c.scale / 127.f, 1e-30f) : NOT_A_NUMBER;
    const float factor = c.scale * inverse(fmaxf(top * (c.scale / 127.f), 1e-30f));
#pragma unroll
    for (int r = 0; r < E; r++) bytes[second + late_number(r)] = u8(__float_as_uint(fmaf(w[r], factor, MAGIC)));
    team_sync(team);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int at = team * BLOCK + (t % TEAM + i * TEAM) * 16;
      uint4 codes = *(const uint4*)(bytes + at);
      if (!finite) codes = make_uint4(0, 0, 0, 0);
      if (at < K) *(uint4*)(c.codes + i64(row) * K + at) = codes;
    }
    row = next;
  }
}
