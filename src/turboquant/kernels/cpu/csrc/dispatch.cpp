// Which instruction set runs: the best this machine has.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(TQ_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "driver.h"

namespace tq {

#define TQ_DECLARE(ns)            \
  namespace ns {                  \
  extern const Kernels kernels;   \
  extern const Encoder encoder;   \
  extern const Quantizer quantizer; \
  extern const Multiplier multiplier; \
  extern const DenseMultiplier dense; \
  }

TQ_DECLARE(portable)
#if defined(TQ_X86)
TQ_DECLARE(avx2)
TQ_DECLARE(avx512)
TQ_DECLARE(avx512vnni)
#endif
#if defined(TQ_ARM) || defined(TQ_EMULATED_NEON)
TQ_DECLARE(neondot)
#endif

namespace {

#if defined(TQ_ARM)
bool dot_products() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
  return true;  // every Mac on arm64
#endif
}
#elif defined(TQ_EMULATED_NEON)
bool dot_products() { return true; }
#endif

constexpr int MOST_ISAS = 5;

struct Table {
  const Kernels* kernels[MOST_ISAS];
  const Encoder* encoder[MOST_ISAS];
  const Quantizer* quantizer[MOST_ISAS];
  const Multiplier* multiplier[MOST_ISAS];
  const DenseMultiplier* dense[MOST_ISAS];
  const char* names[MOST_ISAS];
  int count = 0;
  void take(const Kernels& k, const Encoder& e, const Quantizer& q, const Multiplier& m,
            const DenseMultiplier& d) {
    dense[count] = &d;
    kernels[count] = &k, encoder[count] = &e, quantizer[count] = &q, multiplier[count] = &m, names[count++] = k.name;
  }
  Table() {
#if defined(TQ_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) {
        take(avx512vnni::kernels, avx512::encoder, avx512::quantizer, avx512vnni::multiplier,
             avx512::dense);
      }
      take(avx512::kernels, avx512::encoder, avx512::quantizer, avx512::multiplier, avx512::dense);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      take(avx2::kernels, avx2::encoder, avx2::quantizer, avx2::multiplier, avx2::dense);
    }
#endif
#if defined(TQ_ARM) || defined(TQ_EMULATED_NEON)
    if (dot_products()) {
      take(neondot::kernels, portable::encoder, portable::quantizer, neondot::multiplier, portable::dense);
    }
#endif
    take(portable::kernels, portable::encoder, portable::quantizer, portable::multiplier, portable::dense);
  }
  int find(const char* isa) const {
    for (int i = 0; i < count; i++) {
      if (std::strcmp(names[i], isa) == 0) return i;
    }
    return 0;
  }
};

const Table& table() {
  static const Table t;
  return t;
}

}  // namespace

const Kernels& kernels_of(const char* isa) { return *table().kernels[table().find(isa)]; }
const Encoder& encoder_of(const char* isa) { return *table().encoder[table().find(isa)]; }
const Quantizer& quantizer_of(const char* isa) { return *table().quantizer[table().find(isa)]; }
const Multiplier& multiplier_of(const char* isa) { return *table().multiplier[table().find(isa)]; }
const DenseMultiplier& dense_of(const char* isa) { return *table().dense[table().find(isa)]; }
const char* isa_in_use() {
  const char* asked = std::getenv("TURBOQUANT_CPU_ISA");
  if (!asked || !*asked) return table().names[0];
  const char* found = table().names[table().find(asked)];
  if (std::strcmp(found, asked) != 0) {
    throw std::invalid_argument(std::string("TURBOQUANT_CPU_ISA=") + asked + " does not run here");
  }
  return found;
}
const char* const* isa_names(int* count) {
  *count = table().count;
  return table().names;
}

}  // namespace tq
