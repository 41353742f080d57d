#include "attention.cu"

extern "C" void run(const char* name, const Call* call, int x, int y, int z, int threads) {
  Three grid;
  grid.x = x, grid.y = y, grid.z = z;
  const Call c = *call;
  if (!std::strcmp(name, "attend")) launch(grid, threads, [&] { attend(c); });
}
