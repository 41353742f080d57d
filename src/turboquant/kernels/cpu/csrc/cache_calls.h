// A call on a cache: its numbers as the kernels read them, from the tensors of a CacheBuffers.
#pragma once
#include <nanobind/nanobind.h>

#include <vector>

#include "driver.h"
#include "tensors.h"

namespace tq {

// A call's numbers, and the buffers' tensors, which live as long as it
struct Prepared {
  enum Buffer { PAGES, TABLE, RING_K, RING_V, SINK_K, SINK_V, READERS, TRACKER, LENGTH, NONFINITE, BUFFERS };
  Call call{};
  std::vector<int64_t> start, position;
  std::vector<int32_t> column;
  nanobind::object alive[BUFFERS];

  // false: something is not as the kernels read it
  bool read(const Spec& s, nanobind::handle buffers, nanobind::handle q, nanobind::handle k, nanobind::handle v,
            nanobind::handle valid);
  // all but queries, keys, values and mask, for b sequences of h heads that n tokens come to, read by `group` queries each
  bool read_buffers(const Spec& s, nanobind::handle buffers, int64_t b, int64_t h, int64_t group, int64_t n, Kind dtype);
  void place();  // where each token of the chunk stands in its sequence
};

}  // namespace tq
