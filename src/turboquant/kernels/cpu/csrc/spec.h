// What the Python side hands over: sizes and offsets (from PageLayout, none is known here), tables (from maths/), and
// raw pointers of tensors that the caller keeps alive. Plain structs, so that every instruction set's object file
// agrees on them.
#pragma once
#include <cstdint>

namespace tq {

constexpr int MAX_D = 256, MAX_HOT = 64, MAX_PAGE = 512;
constexpr int LD = MAX_D + 16;    // floats between rows of per-row scratch: no power of two, so rows share no L1 set
constexpr int ROWS = 64;          // query rows of a task
constexpr int TILE = 32;          // tokens decoded at a time: a tile of 32 x 128 fp32 lies in the L1 cache
constexpr int EXACT = 64;         // tokens of a block of the 16-bit part
constexpr int TRIALS = 8, SEARCH_CELLS = 192;  // of the search for a row's scale, maths/codec.py
constexpr int SEGMENT = 1024;     // tokens whose partial result is one unit of work, at fixed positions

enum DType : int { F32 = 0, BF16 = 1, F16 = 2 };

struct Spec {
  int page, d, hot, plain, key_bits, value_bits, block, reader_stride, states;
  int ring, slots, sinks, samples;  // tokens and slots of the ring, stored sinks, reader samples
  int64_t page_bytes;
  int64_t key_mean_code, key_log_s, key_log_scale, key_hot_mean, key_hot_step, key_base, key_mean_step, key_hot_index,
      key_hot_codes, key_codes, key_scale, value_base, value_log_scale, value_codes, value_scale;
  int key_row, value_row;  // bytes of a token's codes
  float norm;              // block^-1/2
  float s_steps, row_steps;  // steps per octave of key_log_s and of the log scales
  int code_cells;  // of a scale: what key_edges and value_edges of live codes of up to 4 bit are in
  int search_units, search_cell;  // a row's RMS, and a cell of |y|, in units of the search for a scale
  int8_t key_search[SEARCH_CELLS * TRIALS], value_search[SEARCH_CELLS * TRIALS];  // levels of a cell at each trial
  float decay_old, decay_new, blend_old, blend_new;
  float signs[MAX_D];
  float s_table[256], a_table[256];  // log_decode of key_log_s; 2^(-code/row_steps) of log scales, 0 at 255
  int octaves;             // the tables are 16 and 32 numbers times powers of two
  int key_count, value_count;        // levels
  float key_levels[256], value_levels[256], key_edges[256], value_edges[256];
  uint8_t key_bytes[64], value_bytes[64];  // level/unit + 128 of each code, repeated (2 to 4 bit)
  float key_unit, value_unit;  // of which the levels of live codes are whole multiples, -127 to 127
};

struct Strided {  // (batch, head, token, d) with the last dimension dense; strides in elements
  void* data;
  int64_t sb, sh, sn;
  int dtype;
};

struct Call {
  const Spec* spec;
  uint8_t* pages;
  const int32_t* table;
  void *ring_k, *ring_v, *sink_k, *sink_v, *readers;
  float* tracker;
  int64_t *length, *nonfinite;
  int batch, heads, group, n, slots, sinks, samples, states, width, pool;  // pages of a table row, of the pool
  int dtype;                                                 // of ring, sinks and readers
  Strided q, k, v, out;
  const uint8_t* valid;  // (B, n) or null
  const uint8_t* mask;   // (B or 1, n, n) or null
  int64_t mask_sb;
  float scaling, softcap;  // softcap 0: none
  int64_t window, ring;    // window < 0: none
  const float* sink_logits;
  // filled by the driver, per sequence
  const int64_t* start;      // length before the chunk
  const int64_t* position;   // (B, n) of each column, -1 for padding
  const int32_t* column;     // (B, n): column of the i-th real token
};

struct Rows {  // running softmax of some query rows
  float *m, *l, *o;  // (rows), (rows), (rows, LD)
};

struct Kernels {
  const char* name;
  // query rows r0 <= r < r1 of (b, h) over pages [first, last), values still rotated
  void (*attend_pages)(const Call&, int b, int h, int r0, int r1, int64_t first, int64_t last, Rows, float* scratch);
  void (*attend_exact)(const Call&, int b, int h, int r0, int r1, Rows, float* scratch);
  // total <- total merged with part (an empty side leaves the other's bits as they are)
  void (*merge)(const Spec&, int rows, Rows total, Rows part);
  // outputs of the rows from the packed (rotated) and the exact part
  void (*finish)(const Call&, int b, int h, int r0, int r1, Rows packed, Rows exact);
};

struct PageInput {
  const float *k, *v;  // (page, d) finite
  const uint8_t* usable;
  const float* stats;  // (3, d) mean, variance, power frozen for the page
  uint8_t* out;
};

enum Worst : int { USABLE = 0, TOO_LARGE = 1, NONFINITE = 2 };  // TOO_LARGE: finite, but beyond fp16

struct Encoder {
  const char* name;
  // one row as fp32, NaN replaced by 0 and the rest clamped to +-65504; returns the worst of its numbers
  Worst (*load_finite)(const void* src, int dtype, int d, float* dst);
  void (*page_stats)(const Spec&, const float* k, const uint8_t* usable, const float* power, float* stats);
  void (*encode)(const Spec&, const PageInput&, float* scratch);
};

enum Before : int { PLAIN = 0, NORM = 1, GATE = 2 };  // what is computed of a row before it is rotated
enum Activation : int { SILU = 0, GELU_TANH = 1 };

struct RowsToQuantize {  // rows of `width` numbers, `stride` elements apart
  const void* x;
  int dtype, block;
  int64_t width, stride;
  const float* signs;  // (width)
  float norm;          // block^-1/2
  int8_t* codes;       // (rows, width)
  float* scale;        // (rows)
  Before before = PLAIN;
  // NORM: (width) of x's dtype, and y <- x / sqrt(mean(x²) + eps) · (weight + shift), (rows, width)
  const void* weight = nullptr;
  void* y = nullptr;
  float eps = 0, shift = 0;
  int once = 0;  // rounded to the dtype once, at the end; else before the product with the weight too
  // GATE: rows like x; activation(x)·up
  const void* up = nullptr;
  int activation = SILU;
};

struct Quantizer {
  void (*row)(const RowsToQuantize&, int64_t row, float* scratch);  // scratch: (width)
};

inline int64_t integer_tile_floats(const Spec& s) { return int64_t(s.page) * MAX_D / 4; }
inline int64_t integer_floats(const Spec& s) {  // the tile, and three digits of each row
  return integer_tile_floats(s) + ROWS * 3 * (MAX_PAGE + 64) / 4;
}
int64_t attend_scratch_floats(const Spec&);
constexpr int64_t ENCODE_SCRATCH = 2 * MAX_PAGE * MAX_D + 16 * MAX_D;

}  // namespace tq
