#include "product.cu"

extern "C" void run(const Call* call, int x, int y, int threads, int cluster) {
  Three grid;
  grid.x = x, grid.y = y;
  const Call c = *call;
  launch(grid, threads, [&] { product(c); }, cluster);
}
