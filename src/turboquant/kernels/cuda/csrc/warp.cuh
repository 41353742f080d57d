// What one warp needs: the macros' derived sizes, levels from codes.
#pragma once
#include "tensor.cuh"
// config.cuh, written by attention.py: D, KEY_BITS, VALUE_BITS, HOT, BLOCK (of the rotation), BF16, ROWS (of a tile, 4 or
// 8), TILES, WARPS, BUFFERS, PAGE_BYTES, VALUE_PART, AT_… offsets of the page, units and tables of levels, SIGN_BITS.
constexpr int P = 64;                                  // tokens of a page
constexpr int NT = P / 8, KC = P / 32;                 // token tiles of 8, chunks of 32
constexpr int OCTETS = D / 8;                          // groups of 8 channels
constexpr int KS = (D + 31) / 32;                      // steps of 32 channels; a lane of four holds an octet of each
constexpr int NV = (D + 63) / 64;                      // octets of a row's 8 lanes
constexpr int KEY_ROW = D * KEY_BITS / 8, VALUE_ROW = D * VALUE_BITS / 8;
constexpr int LANES = 32 / ROWS, NB = D / BLOCK, RUN = BLOCK / LANES, E = D / LANES;  // the rotation: lanes of a row
constexpr int R = ROWS * TILES;                        // query rows of a work item
constexpr int HALVES = ROWS == 4 ? 2 : 1;              // of the tokens, and of the channels of the values, for a row's lanes
constexpr int OWN_NT = NT / HALVES;                    // token tiles of a lane
constexpr int QW = KS * 16 + (KS % 2 ? 0 : 16);          // words of a row of the quantized query; rows half a bank line apart
constexpr int HW = (HOT + 3) / 4 ? (HOT + 3) / 4 : 1;  // words of hot codes of a token
constexpr float TOP = 32512.f;                         // 127·256: the largest 16-bit number whose bytes are hi·256 + lo
constexpr float MAGIC = 12583040.f;                    // 1.5·2^23 + 128: adding it leaves round(x) + 128 in the low bits

DEVICE float max4(float x) {  // over the four lanes of a row of an accumulator
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
template <class T> DEVICE T sum4(T x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
// ---- codes to levels: every level is an int8 times a unit, and comes as the byte level + 128
struct Tables {  // of four bits, in registers: `zero` is 0, which the compiler must not know
  u32 up0, up1, down0, down1, minus;  // minus: -1
  DEVICE explicit Tables(u32 zero)
      : up0(LEVELS4_UP0 ^ zero), up1(LEVELS4_UP1 ^ zero), down0(LEVELS4_DOWN0 ^ zero), down1(LEVELS4_DOWN1 ^ zero),
        minus(~zero) {}
  template <int BITS> DEVICE u32 levels4(u32 codes) const {  // of four codes, in the nibbles of the low 16 bits
    if constexpr (BITS == 4) {
      // prmt repeats a byte's sign where the selector's top bit is set: 0 for these tables, so each covers one half; that
      // of the upper levels is backwards, for its selector is ~codes, here as a product, whose units are less busy
      return prmt(up0, up1, mad(codes, minus, minus)) + 0x80808080u - prmt(down0, down1, codes);
    } else if constexpr (BITS == 3) {
      return prmt(LEVELS3_0, LEVELS3_1, codes);
    } else {
      return prmt(LEVELS2, LEVELS2, codes);
    }
  }
};
constexpr int channel(int bits, int i) { return bits == 2 ? (i < 4 ? 2 * i : 2 * i - 7) : i; }  // of an octet's nibble
// the codes of the octet that begins `at` as nibbles, nibble i being channel(BITS, i); up to 4 bits
template <int BITS> DEVICE u32 nibbles(const u8* at) {
  if constexpr (BITS == 4) return *(const u32*)at;
  if constexpr (BITS == 3) {
    u32 w = at[0] | u32(at[1]) << 8 | u32(at[2]) << 16;
    w = (w & 0xFFFu) | (w & 0xFFF000u) << 4;
    w = (w & 0x003F003Fu) | (w & 0x0FC00FC0u) << 2;
    return (w & 0x07070707u) | (w & 0x38383838u) << 1;
  }
  const u32 w = *(const u16*)at;
  return (w & 0x3333u) | (w & 0xCCCCu) << 14;
}
