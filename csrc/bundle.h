// The type Bundle of _blocks, see bundle.py.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

// Add it, and the function that makes bundles, to a module; false, with an exception set, where that fails.
bool add_bundle_type(PyObject* module);
