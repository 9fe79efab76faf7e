// Which copies bring a batch to a device or back, as spans.py makes them up.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <vector>

#include "held_memory.h"
#include "packed_span.h"

inline constexpr Py_ssize_t kMaxGapBytes = 64 * 1024;  // _MAX_GAP_BYTES

class Spans {
 public:
  // Spans.add
  void add(Py_ssize_t start, Py_ssize_t num_bytes) {
    if (num_bytes == 0) return;
    if (!spans_.empty()) {
      PackedSpan& last = spans_.back();
      if (last.address == 0 && start - (last.start + last.num_bytes) <= kMaxGapBytes) {
        last.num_bytes = start + num_bytes - last.start;
        return;
      }
    }
    spans_.push_back({start, num_bytes, 0});
  }

  // Spans.add_direct
  void add_direct(Py_ssize_t start, Py_ssize_t num_bytes, uintptr_t address) {
    for (;;) {
      const auto left = static_cast<Py_ssize_t>(kPieceBytes - address % kPieceBytes);
      if (num_bytes <= left) break;
      spans_.push_back({start, left, address});
      start += left;
      num_bytes -= left;
      address += static_cast<uintptr_t>(left);
    }
    spans_.push_back({start, num_bytes, address});
  }

  // Take the last of a list of spans, which may grow, off it; false, with an exception set, where it is none.
  bool continue_from(PyObject* list) {
    const Py_ssize_t last = PyList_GET_SIZE(list) - 1;
    if (last < 0) return true;
    Py_ssize_t start, num_bytes;
    unsigned long long address;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(list, last), "nnK", &start, &num_bytes, &address)) return false;
    spans_.push_back({start, num_bytes, address});
    return PyList_SetSlice(list, last, last + 1, nullptr) == 0;
  }

  bool append_to(PyObject* list) const {
    for (const PackedSpan& span : spans_) {
      Ref item(Py_BuildValue("(LLK)", static_cast<long long>(span.start), static_cast<long long>(span.num_bytes),
                             static_cast<unsigned long long>(span.address)));
      if (!item || PyList_Append(list, item.get()) < 0) return false;
    }
    return true;
  }

  // As spans.PackedSpans.
  PyObject* packed() const {
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(spans_.data()),
                                     static_cast<Py_ssize_t>(spans_.size() * sizeof(PackedSpan)));
  }

 private:
  std::vector<PackedSpan> spans_;
};
