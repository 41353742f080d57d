// Decode attention: each warp takes an equal share of all sequences' and heads' tiles of 16 tokens and pages, in order, and
// has one partial result per KV head that it meets and kind of token; sums.cuh adds them up, in order.
#include "exact.cuh"
#include "products.cuh"
#include "sums.cuh"

// Keys and values of tiles or pages, in turns, on their way to a warp's two buffers.
struct Stream {
  Scratch& x;
  int lane;
  u32 phase;
  int shift[2];  // where the buffers' contents begin
  DEVICE void ask(const void* from, int bytes, bool values, int at = 0) {  // to `at` bytes behind that
    u8* to = x.buffer[values] + at;
    shift[values] = shift_to(from, to);
    copy(to + shift[values], from, bytes, x.bar + values, lane);
  }
  DEVICE const u8* next(bool values) {
    wait(x.bar + values, phase);
    phase ^= values;
    return x.buffer[values] + shift[values];
  }
};

// tiles of 16 ring slots, `first` to `last`, then of 16 sinks; then(values): asks for what comes behind them
template <class Then>
DEVICE void exact_items(const Call& c, const Rows& w, int first, int last, Stream& stream, int lane, Softmax<1>& soft, Then then) {
  const int tiles = (c.slots + 15) / 16, g = lane >> 2;
  const i64 head = i64(w.b) * c.heads + w.h;
  auto tile_at = [&](int i) -> Tile { return {16 * (i < tiles ? i : i - tiles), i < tiles, nullptr, nullptr}; };
  bool plain = false;
  u32 copied = 0;  // slots of the next tile: those that some row reads, but for the chunk's tokens
  auto after = [&](int i) {  // the next tile of which some row reads something; plain: all rows read all of it
    for (i++; i < last; i++) {
      const Token j = token_in(c, w, tile_at(i), lane & 15);
      const bool is = read_at_all(c, w, j);
      if (!__any_sync(~0u, is)) continue;
      copied = __ballot_sync(~0u, is && j.pos < int(w.start)) & 0xFFFF;
      plain = __all_sync(~0u, j.ring && reads(c, w, j, int(w.start)) && reads(c, w, j, w.newest));
      break;
    }
    return i;
  };
  auto ask = [&](int i, bool values) {
    if (i >= last) return then(values);
    const Tile tile = tile_at(i);
    const int slots = tile.ring ? c.slots : c.sinks;
    const u16* from = (tile.ring ? values ? c.ring_v : c.ring_k : values ? c.sink_v : c.sink_k) + (head * slots + tile.first) * D;
    const int low = copied ? __ffs(copied) - 1 : 0, upto = copied ? 32 - __clz(copied) : 1;  // one at least
    stream.ask(from + low * D, (upto - low) * D * 2, values, low * D * 2);
  };
  int i = after(first - 1);
  ask(i, false), ask(i, true);
  const ExactQuery q(c, w, lane);
  while (i < last) {
    Tile tile = tile_at(i);
    const bool all = plain;
    tile.keys = (const u16*)stream.next(false);
    const u16* key[2] = {tile.keys + g * D, tile.keys + (8 + g) * D};
    if (!all) key[0] = token_in(c, w, tile, g).k, key[1] = token_in(c, w, tile, 8 + g).k;
    float logits[TALL][2][4];
    exact_logits(q, key, lane, logits);
    __syncwarp();
    i = after(i);
    ask(i, false);
    tile.values = (const u16*)stream.next(true);
    exact_values(c, w, q, tile, all, lane, logits, soft);
    __syncwarp();
    ask(i, true);
  }
}

struct Pages {  // of a KV head, `first` to `first + count`, and the numbers of the next two
  const int* table;
  int first, count, pool, number, next;
  DEVICE Pages(const Call& c, const Rows& w, int from, int to) : first(from), count(max(0, to - from)), pool(c.pool) {
    table = c.table + i64(w.b) * c.width + first, number = at(0), next = at(1);
  }
  DEVICE int at(int i) const { return i < count ? min(__ldg(table + i), pool - 1) : -1; }
  DEVICE void ask(const Call& c, const Rows& w, int i, int number, bool values, Stream& stream) const {
    if (i >= count) return no_copy();
    const u8* from = c.pages + (i64(max(0, number)) * c.heads + w.h) * PAGE_BYTES;
    stream.ask(from + (values ? VALUE_PART : 0), values ? PAGE_BYTES - VALUE_PART : VALUE_PART, values);
  }
};

// the first page has been asked for
DEVICE void packed_items(const Call& c, const Rows& w, Pages pages, Stream& stream, int lane, const Tables& tables,
                         const float (&sign)[FOURS][4], Softmax<HALVES>& soft) {
  Scratch& x = stream.x;
  const int g = lane >> 2, t = lane & 3;
  // pages that all rows read whole
  const i64 before = w.start - c.ring - (P - 1) - i64(pages.first) * P, behind = c.window ? w.start + c.tokens - c.window : 0;
  const int upto = uniform(before < 0 ? 0 : int(before / P) + 1);
  const int since = uniform((int(max(i64(c.sinks), behind)) + P - 1) / P - pages.first);
  for (int i = 0; i < pages.count; i++) {
    u32 q[E / 2];
    const u16* row = c.q + query_at(c, w, lane / LANES);
    load_query(row, lane, q);
    const u8* page = stream.next(false);
    const float unit = half_(*(const u16*)(page + AT_VALUE_BASE)) * (VALUE_UNIT / TOP);
    read_header(page, x, lane, sign);
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      if (m) row = c.q + query_at(c, w, m * ROWS + lane / LANES), load_query(row, lane, q);
      turn_query(c, row, page, x, m, lane, q);
    }
    __syncwarp();
    float logits[TILES][OWN_NT][2];
    logits_of(tables, page, x, lane, logits);
    __syncwarp();
    pages.ask(c, w, i + 1, pages.next, false, stream);
    if (CAP || i < since || i >= upto || pages.number < 0) {
      const i64 from = i64(pages.first + i) * P;
#pragma unroll
      for (int m = 0; m < TILES; m++) {  // row g reads tokens low to high of the page
        const i64 at = position(c, w, m * ROWS + g % ROWS);
        const int low = int(max(max(i64(c.sinks), c.window ? at - c.window + 1 : 0) - from, i64(0)));
        const int high = pages.number < 0 ? -1 : int(min(at - c.ring - from, i64(P)));
#pragma unroll
        for (int j = 0; j < OWN_NT; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int pos = token(half_of(lane) * OWN_NT + j, 2 * t + e);
            logits[m][j][e] = pos >= low && pos <= high ? capped(c, logits[m][j][e]) : NEG;
          }
      }
    }
    const u8* values = stream.next(true);
    read_value_scales(values, x, lane);
    Weights weights[TILES];
#pragma unroll
    for (int m = 0; m < TILES; m++) weigh(x, lane, logits[m], unit, soft, m, weights[m]);
    add_values(tables, values + AT_VALUE_CODES - VALUE_PART, x, lane, weights, unit, soft);
    __syncwarp();
    pages.ask(c, w, i + 1, pages.next, true, stream);
    pages.number = pages.next, pages.next = pages.at(i + 2);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) attend(const __grid_constant__ Call c) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ Pair first;  // of the block
  // a scheduler has every fourth warp; of neighbours in the work each has another, and so have those four apart, for
  // where KV heads take four or eight warps these have the tiles
  const int nth = threadIdx.x >> 5, lane = threadIdx.x & 31, own = uniform((nth & ~3) | (nth - nth / 4 & 3));
  Scratch& x = ((Scratch*)memory)[own];
  for (int i = lane; i < int(sizeof(x.turned)) / 4; i += 32) ((u32*)&x.turned)[i] = 0;
  copies_init(x.bar, lane);
  Stream stream{x, lane, 0, {0, 0}};
  const Tables tables(c.batch >> 31);
  float sign[FOURS][4];
#pragma unroll
  for (int i = 0; i < 4 * FOURS; i++) {
    const int ch = i / 4 * 128 + 4 * lane + i % 4;
    sign[i / 4][i % 4] = ch < D && SIGN_BITS[ch / 32] >> ch % 32 & 1 ? 1.f : -1.f;
  }
  start_next();
  const i64 line = (i64(threadIdx.x) * gridDim.x + blockIdx.x) * 128;  // what all begin with, on its way early
  if (line < i64(c.batch) * 8) prefetch((const u8*)c.length + line);
  if (line < i64(c.batch) * c.width * 4) prefetch((const u8*)c.table + line);
  wait_for_previous();
  const Shares shares(c, work_of(c, lane));
  if (int(blockIdx.x) >= shares.blocks) return;
  const Block block(shares, blockIdx.x);
  const int warp = block.first + own;
  int from = 0, to = 0;
  if (own < block.warps) from = uniform(shares.unit(warp)), to = uniform(shares.unit(warp + 1));
  Pair pair{};
  if (from < to) pair = pair_at(c, from, lane);
  if (own == 0 && lane == 0) first = pair;
  while (from < to) {
    const Span span = pair.span;
    const int begin = from - pair.start, end = begin + min(to - from, span.units - begin);
    const int newest = int(span.start) + c.tokens - 1;
    Rows w{pair.b, pair.h, int(blockIdx.y), 0, span.start, newest, newest % c.slots};
    w.used = min(R, c.group * c.tokens - w.block * R);
    const i64 slot = slot_of(c, w.block, warp, i64(pair.b) * c.heads + pair.h);
    from += end - begin;
    // what a warp ends with stays in its buffers
    auto write = [&](auto& soft, bool packed, bool last) {
      const i64 at = slot + packed * R;
      if (last) soft.write(w, (float*)x.buffer, x.row[0], packed, lane);
      else soft.write(w, c.part + at * D, c.top + at * 2, packed, lane);
    };
    const Pages pages(c, w, span.first + max(0, begin - c.exact), min(span.last, span.first + end - c.exact));
    auto ask = [&](bool values) { pages.ask(c, w, 0, pages.number, values, stream); };
    if (begin < c.exact) {
      Softmax<1> soft;
      soft.clear();
      exact_items(c, w, begin, min(end, c.exact), stream, lane, soft, ask);
      write(soft, false, from == to && end <= c.exact);
    } else {
      ask(false), ask(true);
    }
    if (end > c.exact) {
      Softmax<HALVES> soft;
      soft.clear();
      packed_items(c, w, pages, stream, lane, tables, sign, soft);
      write(soft, true, from == to);
    }
    if (from < to) pair.advance(c, 1), pair = pair.known();
  }
  static_assert(R * D * 4 <= BUFFERS * HALF, "partial results do not fit the buffers");
  __syncthreads();
  add_up(c, shares, block, (const Scratch*)memory, first, own, lane);
}
