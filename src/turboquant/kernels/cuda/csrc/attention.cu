// Decode attention: each warp takes an equal share of all sequences' and heads' tiles of 16 tokens and pages, in order, and
// has one partial result per KV head that it meets and kind of token; sums.cuh adds them up, in order.
#include "exact.cuh"
#include "sums.cuh"

// Halves (keys, then values) of tiles or pages on their way to a warp's buffers, in order.
struct Stream {
  Scratch& x;
  int lane;
  u32 asked, taken;
  DEVICE void ask(const void* from, int bytes) {
    copy(x.buffer[asked % BUFFERS], from, bytes, x.bar + asked % BUFFERS, lane);
    asked++;
  }
  DEVICE const u8* next() {
    const int buffer = taken % BUFFERS;
    wait(x.bar + buffer, taken / BUFFERS & 1);
    taken++;
    return x.buffer[buffer];
  }
};

// tiles of 16 ring slots, `first` to `last`, then of 16 sinks; then(values): asks for what comes behind them
template <class Then>
DEVICE void exact_items(const Call& c, const Rows& w, int first, int last, Stream& stream, int lane, Softmax& soft, Then then) {
  const int tiles = (c.slots + 15) / 16, g = lane >> 2;
  const i64 head = i64(w.b) * c.heads + w.h;
  auto tile_at = [&](int i) -> Tile { return {16 * (i < tiles ? i : i - tiles), i < tiles, nullptr, nullptr}; };
  bool plain = false;
  auto after = [&](int i) {  // the next tile of which some row reads something; plain: all rows read all of it
    for (i++; i < last; i++) {
      const Token j = token_in(c, w, tile_at(i), lane & 15);
      if (!__any_sync(~0u, read_at_all(c, w, j))) continue;
      plain = __all_sync(~0u, j.ring && reads(c, w, j, int(w.start)) && reads(c, w, j, w.newest));
      break;
    }
    return i;
  };
  auto ask = [&](int i, bool values) {
    if (i >= last) return then(values);
    const Tile tile = tile_at(i);
    const int slots = tile.ring ? c.slots : c.sinks;
    stream.ask((tile.ring ? values ? c.ring_v : c.ring_k : values ? c.sink_v : c.sink_k) + (head * slots + tile.first) * D, min(16, slots - tile.first) * D * 2);
  };
  int i = after(first - 1);
  ask(i, false), ask(i, true);
  const ExactQuery q(c, w, lane);
  while (i < last) {
    Tile tile = tile_at(i);
    const bool all = plain;
    tile.keys = (const u16*)stream.next();
    const u16* key[2] = {tile.keys + g * D, tile.keys + (8 + g) * D};
    if (!all) key[0] = token_in(c, w, tile, g).k, key[1] = token_in(c, w, tile, 8 + g).k;
    float logits[TALL][2][4];
    exact_logits(q, key, lane, logits);
    __syncwarp();
    i = after(i);
    ask(i, false);
    tile.values = (const u16*)stream.next();
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
    if (values) stream.ask(from + VALUE_PART, PAGE_BYTES - VALUE_PART);
    else stream.ask(from, VALUE_PART);
  }
};

// the first page has been asked for
DEVICE void packed_items(const Call& c, const Rows& w, Pages pages, Stream& stream, int lane, const Tables& tables,
                         const float (&sign)[(D + 31) / 32], Softmax& soft) {
  Scratch& x = stream.x;
  const int g = lane >> 2, t = lane & 3;
  for (int i = 0; i < pages.count; i++) {
    u32 q[E / 2];
    const u16* row = c.q + query_at(c, w, lane / LANES);
    load_query(row, lane, q);
    const u8* page = stream.next();
    const float unit = half_(*(const u16*)(page + AT_VALUE_BASE)) * (VALUE_UNIT / TOP);
    read_header(page, x, lane, sign);
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      if (m) row = c.q + query_at(c, w, m * ROWS + lane / LANES), load_query(row, lane, q);
      turn_query(c, row, page, x, m, lane, q);
    }
    __syncwarp();
    float logits[TILES][NT][2];
    logits_of(tables, page, x, lane, logits);
    __syncwarp();
    pages.ask(c, w, i + 1, pages.next, false, stream);
    const i64 from = i64(pages.first + i) * P;
    const bool whole = from >= c.sinks && from + P - 1 <= w.start - c.ring && pages.number >= 0 &&
                       (!c.window || w.start + c.tokens - 1 - from < c.window);
    if (CAP || !whole) {
#pragma unroll
      for (int m = 0; m < TILES; m++) {  // row g reads tokens low to high of the page
        const i64 at = position(c, w, m * ROWS + g % ROWS);
        const int low = int(max(max(i64(c.sinks), c.window ? at - c.window + 1 : 0) - from, i64(0)));
        const int high = pages.number < 0 ? -1 : int(min(at - c.ring - from, i64(P)));
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int pos = token(j, 2 * t + e);
            logits[m][j][e] = pos >= low && pos <= high ? capped(c, logits[m][j][e]) : NEG;
          }
      }
    }
    const u8* values = stream.next();
    read_value_scales(values, x, lane);
    Weights weights[TILES];
#pragma unroll
    for (int m = 0; m < TILES; m++) weigh(x, lane, logits[m], unit, soft, m, weights[m]);
    add_values(tables, values + AT_VALUE_CODES - VALUE_PART, lane, weights, unit, soft);
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
  Stream stream{x, lane, 0, 0};
  const Tables tables(c.batch >> 31);
  float sign[(D + 31) / 32];
#pragma unroll
  for (int i = 0; i < (D + 31) / 32; i++) sign[i] = SIGN_BITS[i] >> lane & 1 ? 1.f : -1.f;
  start_next();
  const i64 line = (i64(threadIdx.x) * gridDim.x + blockIdx.x) * 128;  // what all begin with, on its way early
  if (line < i64(c.batch) * 8) prefetch((const u8*)c.length + line);
  if (line < i64(c.batch) * c.width * 4) prefetch((const u8*)c.table + line);
  wait_for_previous();
  const Shares shares(c, units_of(c, lane));
  if (int(blockIdx.x) >= shares.blocks) return;
  const Block block(shares, blockIdx.x);
  const int warp = block.first + own;
  int from = 0, to = 0;
  if (own < block.warps) from = uniform(shares.unit(warp)), to = uniform(shares.unit(warp + 1));
  Pair pair{};
  if (from < to) pair = pair_at(c, from, lane);
  if (own == 0 && lane == 0) first = pair;
  Softmax soft;
  const int exact = c.exact * TILE_UNITS;
  while (from < to) {
    const Span span = pair.span;
    const int begin = from - pair.start, end = begin + min(to - from, span.units - begin);
    const int newest = int(span.start) + c.tokens - 1;
    Rows w{pair.b, pair.h, int(blockIdx.y), 0, span.start, newest, newest % c.slots};
    w.used = min(R, c.group * c.tokens - w.block * R);
    const i64 slot = slot_of(c, w.block, warp, i64(pair.b) * c.heads + pair.h);
    from += end - begin;
    // what a warp ends with stays in its buffers
    auto write = [&](bool packed, bool last) {
      const i64 at = slot + packed * R;
      if (last) soft.write(w, (float*)x.buffer, x.row[0], packed, lane);
      else soft.write(w, c.part + at * D, c.top + at * 2, packed, lane);
    };
    // whose first unit it is takes a tile or a page
    auto page_of = [&](int unit) { return span.first + (max(0, unit - exact) + PAGE_UNITS - 1) / PAGE_UNITS; };
    const Pages pages(c, w, page_of(begin), end > exact ? min(span.last, page_of(end)) : 0);
    auto ask = [&](bool values) { pages.ask(c, w, 0, pages.number, values, stream); };
    if (begin < exact) {
      soft.clear();
      exact_items(c, w, (begin + TILE_UNITS - 1) / TILE_UNITS, (min(end, exact) + TILE_UNITS - 1) / TILE_UNITS, stream, lane, soft, ask);
      write(false, from == to && end <= exact);
    } else {
      ask(false), ask(true);
    }
    if (end > exact) {
      soft.clear();
      packed_items(c, w, pages, stream, lane, tables, sign, soft);
      write(true, from == to);
    }
    if (from < to) pair.advance(c, 1), pair = pair.known();
  }
  static_assert(R * D * 4 <= BUFFERS * HALF, "partial results do not fit the buffers");
  __syncthreads();
  add_up(c, shares, block, (const Scratch*)memory, first, own, lane);
}
