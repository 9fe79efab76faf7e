// Addresses, as Python hands them in: integers.
#pragma once
#include <cstdint>

namespace expertd {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace expertd
