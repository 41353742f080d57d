// Tensors as the caller has them: address, shape, strides and dtype of a Python object, without linking against torch. A
// torch that has DLPack's exchange table (2.10) answers in one C call; of an older one the methods of the tensor are asked.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>

namespace tq {

enum Kind : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, UINT8, INT32, INT64, BOOL, OTHER };  // floats as in DType

struct View {
  static constexpr int MOST = 5;
  void* data = nullptr;
  int ndim = 0;
  Kind kind = OTHER;
  int64_t shape[MOST] = {}, stride[MOST] = {};  // strides in elements

  bool is(Kind k, std::initializer_list<int64_t> sizes) const {  // of that kind and shape, and contiguous
    if (kind != k || ndim != int(sizes.size())) return false;
    int i = 0;
    for (int64_t n : sizes) {
      if (shape[i++] != n) return false;
    }
    return contiguous();
  }
  bool contiguous() const {
    int64_t next = 1;
    for (int i = 0; i < ndim; i++) {
      if (shape[i] == 0) return true;
    }
    for (int i = ndim - 1; i >= 0; i--) {
      if (shape[i] != 1 && stride[i] != next) return false;
      next *= shape[i];
    }
    return true;
  }
};

// whether x is a dense tensor on the CPU of at most View::MOST dimensions
bool view_of(nanobind::handle x, View& to);

// type: torch.Tensor; dtypes: its dtypes in the order of Kind; table: its __dlpack_c_exchange_api__, or None
void use_tensors(nanobind::object type, nanobind::tuple dtypes, nanobind::object table);

}  // namespace tq
