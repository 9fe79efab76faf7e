// The functions pin and unpin of expertd_server._cuda.
#pragma once
#include <pybind11/pybind11.h>

namespace expertd {

void bind_pinning(pybind11::module_& m);

}  // namespace expertd
