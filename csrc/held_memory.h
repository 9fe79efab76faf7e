// Memory of others that is held while requests lie in it, and whether a GPU may copy from and to it: pinning.py says
// how.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>

inline constexpr uintptr_t kPieceBytes = 4 * 1024 * 1024;  // PIECE_BYTES of pinning.py
inline constexpr char kPinned = 2;                         // _PINNED

// An owned reference, nullptr: none.
class Ref {
 public:
  explicit Ref(PyObject* owned = nullptr) : object_(owned) {}
  Ref(Ref&& other) noexcept : object_(other.object_) { other.object_ = nullptr; }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  Ref& operator=(Ref&&) = delete;
  ~Ref() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

// Memory that tensors of members lie in, held; and whether a GPU may copy from and to it.
class Memory {
 public:
  Memory() = default;
  Memory(Memory&& other) noexcept
      : number(other.number),
        buffer_(other.buffer_),
        mapping_(other.mapping_),
        states_(other.states_),
        first_piece_(other.first_piece_) {
    other.mapping_ = other.states_ = nullptr;
    other.buffer_ = {};
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  Memory& operator=(Memory&&) = delete;
  ~Memory() {
    Py_XDECREF(mapping_);
    Py_XDECREF(states_);
    if (buffer_.obj != nullptr) PyBuffer_Release(&buffer_);
  }

  // false, with an exception set, where the view cannot be had.
  bool take(PyObject* view) {
    if (PyObject_GetBuffer(view, &buffer_, PyBUF_WRITABLE) < 0) return false;
    // Of pinning._Bytes, which is the object of every view of memory that may be pinned.
    PyObject* owner = PyMemoryView_Check(view) ? PyMemoryView_GET_BUFFER(view)->obj : nullptr;
    if (owner == nullptr) return true;
    mapping_ = PyObject_GetAttrString(owner, "mapping");
    if (mapping_ == nullptr) {
      PyErr_Clear();
      return true;
    }
    states_ = PyObject_GetAttrString(mapping_, "states");
    Ref base(PyObject_GetAttrString(mapping_, "address"));
    if (states_ == nullptr || !base) return false;
    if (!PyByteArray_Check(states_)) {
      PyErr_SetString(PyExc_TypeError, "a mapping's states are no bytearray");
      return false;
    }
    first_piece_ = PyLong_AsUnsignedLongLong(base.get()) / kPieceBytes;
    return !PyErr_Occurred();
  }

  // Hold what another holds; false, with an exception set, where that fails.
  bool take_again(const Memory& other) {
    if (PyObject_GetBuffer(other.buffer_.obj, &buffer_, PyBUF_WRITABLE) < 0) return false;
    number = other.number;
    mapping_ = Py_XNewRef(other.mapping_);
    states_ = Py_XNewRef(other.states_);
    first_piece_ = other.first_piece_;
    return true;
  }

  // nullptr where the bytes do not lie in it.
  uint8_t* at(uint64_t offset, uint64_t num_bytes) const {
    const auto size = static_cast<uint64_t>(buffer_.len);
    if (offset > size || num_bytes > size - offset) return nullptr;
    return static_cast<uint8_t*>(buffer_.buf) + offset;
  }

  // Whether a GPU may copy from and to there; if not, that is asked for. -1, with an exception set, where that fails.
  int is_pinned(const uint8_t* start, Py_ssize_t num_bytes) const {
    if (mapping_ == nullptr) return 0;
    const auto address = reinterpret_cast<uintptr_t>(start);
    const uintptr_t first = address / kPieceBytes - first_piece_;
    const uintptr_t stop = (address + num_bytes - 1) / kPieceBytes - first_piece_ + 1;
    if (stop > static_cast<uintptr_t>(PyByteArray_GET_SIZE(states_))) {
      PyErr_SetString(PyExc_ValueError, "a mapping has not as many states as pieces");
      return -1;
    }
    const char* state = PyByteArray_AS_STRING(states_);
    if (std::all_of(state + first, state + stop, [](char each) { return each == kPinned; })) return 1;
    Ref asked(PyObject_CallMethod(mapping_, "ask", "Kn", static_cast<unsigned long long>(address), num_bytes));
    return asked ? 0 : -1;
  }

  uint64_t number = 0;  // of the region; 0: the blocks'

 private:
  Py_buffer buffer_{};
  PyObject* mapping_ = nullptr;  // pinning._Mapping
  PyObject* states_ = nullptr;   // of its pieces
  uintptr_t first_piece_ = 0;
};
