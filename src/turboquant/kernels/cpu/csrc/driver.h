#pragma once
#include "dense.h"
#include "product.h"
#include "spec.h"

namespace tq {

const Kernels& kernels_of(const char* isa);  // "" or the name of an instruction set this machine has
const Encoder& encoder_of(const char* isa);
const Quantizer& quantizer_of(const char* isa);
const Multiplier& multiplier_of(const char* isa);
const DenseMultiplier& dense_of(const char* isa);
const char* isa_in_use();  // that of TURBOQUANT_CPU_ISA (std::invalid_argument if it does not run here), else the best
const char* const* isa_names(int* count);    // those compiled in and runnable here, the best first

constexpr const char* OUTSIDE = "the table names a page outside the pool";

void attention(const Call& call, const Kernels& k, int threads);
void append(const Call& call, const Encoder& e, int threads);

}  // namespace tq
