#include "append.cu"

extern "C" void run(const char* name, const Call* call, int x, int y, int z, int threads) {
  Three grid;
  grid.x = x, grid.y = y, grid.z = z;
  const Call c = *call;
  if (!std::strcmp(name, "encode")) launch(grid, threads, [&] { encode(c); });
  if (!std::strcmp(name, "stats")) launch(grid, threads, [&] { stats(c); });
  if (!std::strcmp(name, "rows")) launch(grid, threads, [&] { rows(c); });
  if (!std::strcmp(name, "store")) launch(grid, threads, [&] { store(c); });
}
