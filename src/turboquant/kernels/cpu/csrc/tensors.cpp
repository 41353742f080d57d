#include "tensors.h"

#include <stdexcept>

namespace nb = nanobind;

namespace tq {
namespace {

// of DLPack 1 (dlpack.h), as far as it is needed here
struct DLTensor {
  void* data;
  int32_t device_type, device;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ExchangeTable {
  uint32_t major, minor;
  void* previous;
  void *allocate, *to_managed, *from_managed;
  int (*to_view)(void* object, DLTensor* out);
};
constexpr int DL_CPU = 1;

// never freed: the interpreter may be gone before they are
struct Torch {
  PyObject* type = nullptr;
  PyObject* dtypes[OTHER] = {};
  const ExchangeTable* table = nullptr;
};
Torch torch;

Kind kind_of(uint8_t code, uint8_t bits) {
  enum { INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4, BOOLEAN = 6 };
  switch (code) {
    case FLOAT: return bits == 32 ? FLOAT32 : bits == 16 ? FLOAT16 : OTHER;
    case BFLOAT: return bits == 16 ? BFLOAT16 : OTHER;
    case INT: return bits == 64 ? INT64 : bits == 32 ? INT32 : OTHER;
    case UINT: return bits == 8 ? UINT8 : OTHER;
    case BOOLEAN: return bits == 8 ? BOOL : OTHER;
    default: return OTHER;
  }
}

bool by_table(nb::handle x, View& to) {
  DLTensor t{};
  if (torch.table->to_view(x.ptr(), &t)) {
    PyErr_Clear();  // what DLPack cannot describe
    return false;
  }
  if (t.device_type != DL_CPU || t.lanes != 1 || t.ndim > View::MOST) return false;
  to.data = static_cast<char*>(t.data) + t.byte_offset, to.ndim = t.ndim, to.kind = kind_of(t.code, t.bits);
  bool empty = false;
  for (int i = 0; i < t.ndim; i++) to.shape[i] = t.shape[i], to.stride[i] = t.strides[i], empty |= !t.shape[i];
  return t.data || empty;  // a tensor without memory is one of the compiler's
}

bool by_methods(nb::handle x, View& to) {
  if (!nb::cast<bool>(x.attr("is_cpu"))) return false;
  const nb::tuple shape = nb::tuple(x.attr("shape")), stride = nb::tuple(x.attr("stride")());
  if (shape.size() > size_t(View::MOST)) return false;
  to.data = reinterpret_cast<void*>(nb::cast<uintptr_t>(x.attr("data_ptr")())), to.ndim = int(shape.size()), to.kind = OTHER;
  for (int i = 0; i < to.ndim; i++) to.shape[i] = nb::cast<int64_t>(shape[i]), to.stride[i] = nb::cast<int64_t>(stride[i]);
  const nb::object dtype = x.attr("dtype");
  for (int i = 0; i < OTHER; i++) {
    if (dtype.ptr() == torch.dtypes[i]) to.kind = Kind(i);
  }
  return true;
}

}  // namespace

bool view_of(nb::handle x, View& to) {
  if (!torch.type || !PyObject_TypeCheck(x.ptr(), reinterpret_cast<PyTypeObject*>(torch.type))) return false;
  return torch.table ? by_table(x, to) : by_methods(x, to);
}

void use_tensors(nb::object type, nb::tuple dtypes, nb::object table) {
  if (dtypes.size() != OTHER) throw std::invalid_argument("another number of dtypes is known");
  for (int i = 0; i < OTHER; i++) torch.dtypes[i] = nb::object(dtypes[i]).release().ptr();
  torch.type = type.release().ptr(), torch.table = nullptr;
  if (table.is_none()) return;
  const auto* found = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
  if (!found) PyErr_Clear();
  if (found && found->major == 1 && found->to_view) torch.table = found;
}

}  // namespace tq
