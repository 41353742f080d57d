// Work of an attention call: (sequence, KV head, block of query rows) x segments of pages at fixed token positions.
// Partial results are merged in the order of the segments, so the bits of a row do not depend on the threads, nor on
// what else is in the batch or the chunk.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <vector>

#include "driver.h"
#include "pool.h"

namespace tq {

int64_t attend_scratch_floats(const Spec& s) {
  return 2 * ROWS * LD + ROWS * std::max(s.page, EXACT) + TILE * MAX_D + 16 * MAX_D + 2 * MAX_D + 16 * MAX_D + s.hot * s.page +
         integer_floats(s) + 64;
}

namespace {

// memory that is kept between calls of a thread
float* workspace(size_t floats) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local size_t size = 0;
  if (size < floats) {
    memory.reset(new float[floats]);
    size = floats;
  }
  return memory.get();
}

constexpr int64_t ROW = LD + 2;

Rows rows_at(float* p, int rows) { return {p, p + rows, p + 2 * rows}; }

void clear(Rows r, int rows, int d) {
  std::fill(r.m, r.m + rows, -INFINITY);
  std::fill(r.l, r.l + rows, 0.0f);
  for (int i = 0; i < rows; i++) std::fill(r.o + i * LD, r.o + i * LD + d, 0.0f);
}

struct Plan {
  int64_t first_page, last_page;  // of a sequence, over all its queries
};

}  // namespace

void attention(const Call& call, const Kernels& k, int threads) {
  const Spec& s = *call.spec;
  const int64_t rows_total = int64_t(call.group) * call.n;
  const int block = int(std::min<int64_t>(ROWS, rows_total));
  const int64_t blocks = (rows_total + block - 1) / block, heads = int64_t(call.batch) * call.heads;
  const int64_t per = std::max(1, SEGMENT / s.page);
  std::vector<Plan> plan(call.batch);
  int64_t segments = 0;
  for (int b = 0; b < call.batch; b++) {
    int64_t newest = -1;
    for (int i = 0; i < call.n; i++) newest = std::max(newest, call.position[int64_t(b) * call.n + i]);
    int64_t last = std::min(call.start[b] / s.page, int64_t(call.width));
    last = newest - call.ring < 0 ? 0 : std::min(last, (newest - call.ring) / s.page + 1);
    const int64_t oldest = call.window < 0 ? 0 : std::max<int64_t>(0, call.start[b] - call.window + 1);
    plan[b] = {std::min(oldest / s.page, last), last};
    for (int64_t i = plan[b].first_page; i < last; i++) {
      if (call.table[int64_t(b) * call.width + i] >= call.pool) throw std::invalid_argument(OUTSIDE);
    }
    if (last > plan[b].first_page) segments = std::max(segments, (last + per - 1) / per - plan[b].first_page / per);
  }
  const int64_t scratch = attend_scratch_floats(s), part = block * ROW;
  const auto each_segment = [&](int b, const auto& f) {  // f(index, first page, last page)
    const int64_t from = plan[b].first_page / per;
    for (int64_t i = from; i * per < plan[b].last_page; i++) {
      f(i - from, std::max(i * per, plan[b].first_page), std::min((i + 1) * per, plan[b].last_page));
    }
  };
  const bool split = segments > 0 && heads * blocks < 8 * int64_t(threads) && threads > 1;
  if (!split) {
    float* memory = workspace(size_t(threads) * (scratch + 3 * part));
    parallel(heads * blocks, threads, [&](int64_t task, int worker) {
      task = heads * blocks - 1 - task;  // the last rows of a causal chunk have the most to do
      const int64_t block_index = task / heads, bh = task % heads;
      const int b = int(bh / call.heads), h = int(bh % call.heads);
      const int r0 = int(block_index * block), r1 = int(std::min<int64_t>(r0 + block, rows_total)), rows = r1 - r0;
      float* mine = memory + worker * (scratch + 3 * part);
      const Rows total = rows_at(mine + scratch, rows), piece = rows_at(mine + scratch + part, rows),
                 near = rows_at(mine + scratch + 2 * part, rows);
      clear(total, rows, s.d), clear(near, rows, s.d);
      each_segment(b, [&](int64_t, int64_t p0, int64_t p1) {
        clear(piece, rows, s.d);
        k.attend_pages(call, b, h, r0, r1, p0, p1, piece, mine);
        k.merge(s, rows, total, piece);
      });
      k.attend_exact(call, b, h, r0, r1, near, mine);
      k.finish(call, b, h, r0, r1, total, near);
    });
    return;
  }
  const int64_t units = segments + 1;  // unit 0: the 16-bit part
  float* memory = workspace(size_t(threads) * scratch + size_t(heads * blocks * units) * part);
  float* parts = memory + threads * scratch;
  std::unique_ptr<std::atomic<int64_t>[]> done(new std::atomic<int64_t>[heads * blocks]());
  const int64_t owners = heads * blocks;
  parallel(owners * units, threads, [&](int64_t i, int worker) {
    // segments first: the 16-bit parts, which take less, even out when the workers end
    const int64_t unit = i < owners * segments ? i % segments + 1 : 0, owner = unit ? i / segments : i - owners * segments;
    const int64_t task = owner * units + unit, bh = owner % heads, block_index = owner / heads;
    const int b = int(bh / call.heads), h = int(bh % call.heads);
    const int r0 = int(block_index * block), r1 = int(std::min<int64_t>(r0 + block, rows_total)), rows = r1 - r0;
    float* mine = memory + worker * scratch;
    const Rows piece = rows_at(parts + task * part, rows);
    clear(piece, rows, s.d);
    if (unit == 0) {
      k.attend_exact(call, b, h, r0, r1, piece, mine);
    } else {
      each_segment(b, [&](int64_t i, int64_t p0, int64_t p1) {
        if (i == unit - 1) k.attend_pages(call, b, h, r0, r1, p0, p1, piece, mine);
      });
    }
    if (done[owner].fetch_add(1) + 1 < units) return;
    float* all = parts + owner * units * part;
    const Rows total = units > 1 ? rows_at(all + part, rows) : piece;
    for (int64_t i = 2; i < units; i++) k.merge(s, rows, total, rows_at(all + i * part, rows));
    k.finish(call, b, h, r0, r1, total, rows_at(all, rows));
  });
}

}  // namespace tq
