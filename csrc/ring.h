// The types Ring, Arena and Block of _blocks, see ring.py.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

// Add them to a module; false, with an exception set, where that fails.
bool add_ring_types(PyObject* module);
