// What the compiled modules of the data path share: the contract's data types, and a writer of protobuf's wire format.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <cstring>

// Below this a copy is over before another thread could make use of the interpreter.
constexpr Py_ssize_t kFreeInterpreterBytes = 1 << 18;
// Of an answer without its elements: keys, lengths, shape, timing and version, each number of at most ten bytes.
constexpr size_t kMaxHeadBytes = 256;

enum DataType : uint32_t { kUnset = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3, kFp8 = 4, kInt32 = 5 };

inline Py_ssize_t item_bytes(uint32_t dtype) {
  switch (dtype) {
    case kFloat32:
    case kInt32:
      return 4;
    case kBFloat16:
    case kFloat16:
      return 2;
    default:
      return 1;
  }
}

// Of float32 or bfloat16 elements at any address. No early exit, so that the compiler makes vectors of it.
inline bool has_nan(uint32_t dtype, const uint8_t* data, Py_ssize_t num_bytes) {
  uint32_t found = 0;
  if (dtype == kFloat32) {
    for (Py_ssize_t at = 0; at < num_bytes; at += 4) {
      int32_t bits;
      std::memcpy(&bits, data + at, 4);
      found |= (bits & 0x7FFFFFFF) > 0x7F800000;
    }
  } else {
    for (Py_ssize_t at = 0; at < num_bytes; at += 2) {
      int16_t bits;
      std::memcpy(&bits, data + at, 2);
      found |= static_cast<int16_t>(bits & 0x7FFF) > static_cast<int16_t>(0x7F80);
    }
  }
  return found != 0;
}

struct Writer {
  uint8_t bytes[kMaxHeadBytes];
  size_t size = 0;

  void varint(uint64_t value) {
    for (; value > 0x7F; value >>= 7) bytes[size++] = static_cast<uint8_t>(value) | 0x80;
    bytes[size++] = static_cast<uint8_t>(value);
  }

  // A varint field, left out when zero.
  void number(int field, uint64_t value) {
    if (value == 0) return;
    bytes[size++] = static_cast<uint8_t>(field << 3);
    varint(value);
  }

  // What starts a length-delimited field.
  void head(int field, uint64_t num_bytes) {
    bytes[size++] = static_cast<uint8_t>(field << 3 | 2);
    varint(num_bytes);
  }

  void append(const Writer& other) {
    std::memcpy(bytes + size, other.bytes, other.size);
    size += other.size;
  }
};

// Arguments of a method that takes nothing but numbers; raises TypeError or OverflowError.
inline bool numbers_of(PyObject* const* arguments, Py_ssize_t given, Py_ssize_t expected, unsigned long long* numbers) {
  if (given != expected) {
    PyErr_Format(PyExc_TypeError, "%zd arguments are given, expected %zd", given, expected);
    return false;
  }
  for (Py_ssize_t n = 0; n < expected; ++n) {
    numbers[n] = PyLong_AsUnsignedLongLong(arguments[n]);
    if (numbers[n] == static_cast<unsigned long long>(-1) && PyErr_Occurred()) return false;
  }
  return true;
}
