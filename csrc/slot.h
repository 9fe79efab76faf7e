// The Python classes Graph and SlotWork of expertd_server._cuda.
#pragma once
#include <pybind11/pybind11.h>

namespace expertd {

void bind_slot(pybind11::module_& m);

}  // namespace expertd
