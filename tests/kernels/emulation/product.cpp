#include "product.cu"

// 0 if copies that are done late and copies that are done at once give the same bits
extern "C" int run(const Call* call, int x, int y, int threads, int cluster) {
  Three grid;
  grid.x = x, grid.y = y;
  const Call c = *call;
  std::vector<u16> late;
  for (bool now : {false, true}) {
    unfair = at_once = now;
    launch(grid, threads, [&] { product(c); }, cluster);
    if (!now) late.assign(c.out, c.out + i64(c.rows) * c.n);
  }
  return std::memcmp(late.data(), c.out, late.size() * 2);
}
