// The types Ring, Arena and Block of _blocks, see ring.py.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

// Add them to a module; false, with an exception set, where that fails.
bool add_ring_types(PyObject* module);

// Whether it is a Ring; false with an exception set.
bool is_ring(PyObject* object);

// What Ring.put does, of a Ring.
void put_descriptor(PyObject* ring, uint64_t kind, uint64_t request_id);
