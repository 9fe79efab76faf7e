// The type Copies of expertd_server._codec: copies of host memory that are noted one by one and done together, without
// the interpreter where that is worth while. A batch has as many as its requests have tensors; to leave the interpreter
// and come back for each would cost more than most of them.
#pragma once
#include <new>
#include <vector>

#include "copy_threads.h"
#include "wire.h"

namespace expertd {

class CopyList {
 public:
  CopyList() = default;
  CopyList(const CopyList&) = delete;
  CopyList& operator=(const CopyList&) = delete;
  ~CopyList() { clear(); }

  // The destination belongs to `owner`, which is kept until the copy is done; the source is the caller's to keep.
  void note(PyObject* owner, uint8_t* to, const uint8_t* from, Py_ssize_t num_bytes) {
    Copy copy{to, from, num_bytes, Py_NewRef(owner), {}, {}};
    add(copy);
  }

  // Into a writable buffer, from `start` on; false, with an exception, where the bytes do not fit. The source as above.
  bool note(PyObject* memory, Py_ssize_t start, const uint8_t* from, Py_ssize_t num_bytes) {
    Py_buffer to;
    if (PyObject_GetBuffer(memory, &to, PyBUF_WRITABLE) < 0) return false;
    if (start < 0 || num_bytes < 0 || num_bytes > to.len || start > to.len - num_bytes) {
      PyErr_Format(PyExc_ValueError, "%zd bytes at %zd do not fit into %zd", num_bytes, start, to.len);
      PyBuffer_Release(&to);
      return false;
    }
    add({static_cast<uint8_t*>(to.buf) + start, from, num_bytes, nullptr, to, {}});
    return true;
  }

  // Both are kept until the copy is done.
  void note(Py_buffer to, Py_ssize_t offset, Py_buffer from) {
    Copy copy{static_cast<uint8_t*>(to.buf) + offset, static_cast<uint8_t*>(from.buf), from.len, nullptr, to, from};
    add(copy);
  }

  // With the interpreter's lock, which is let go of meanwhile if there is much to do.
  void run() {
    if (num_bytes_ >= kFreeInterpreterBytes) {
      PyThreadState* state = PyEval_SaveThread();
      copy_all();
      PyEval_RestoreThread(state);
    } else {
      copy_all();
    }
    clear();
  }

 private:
  struct Copy {
    uint8_t* to;
    const uint8_t* from;
    Py_ssize_t num_bytes;
    PyObject* owner;
    Py_buffer to_buffer, from_buffer;  // held where there is no owner
  };

  void add(Copy copy) {
    if (copy.to == copy.from) copy.num_bytes = 0;  // a device has put it in its place, see ForwardCall.place
    copies_.push_back(copy);
    num_bytes_ += copy.num_bytes;
  }

  void copy_all() const {
    if (static_cast<size_t>(num_bytes_) >= CopyThreads::kWorthWhile) {
      std::vector<Span> spans;
      spans.reserve(copies_.size());
      for (const Copy& copy : copies_) spans.push_back({copy.to, copy.from, static_cast<size_t>(copy.num_bytes)});
      CopyThreads::shared().copy(std::move(spans));
      return;
    }
    for (const Copy& copy : copies_) {
      if (copy.num_bytes) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.num_bytes));
    }
  }

  void clear() {
    std::vector<Copy> done;
    done.swap(copies_);  // releasing may run Python, which may come back here
    num_bytes_ = 0;
    for (Copy& copy : done) {
      Py_XDECREF(copy.owner);
      if (copy.owner == nullptr) {
        PyBuffer_Release(&copy.from_buffer);
        PyBuffer_Release(&copy.to_buffer);
      }
    }
    done.clear();
    if (copies_.empty()) copies_.swap(done);  // its memory is used again
  }

  std::vector<Copy> copies_;
  Py_ssize_t num_bytes_ = 0;
};

struct Copies {
  PyObject_HEAD;
  CopyList* list;
};

inline PyTypeObject copies_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

inline CopyList& list_of(PyObject* self) { return *reinterpret_cast<Copies*>(self)->list; }

inline PyObject* copies_new(PyTypeObject* type, PyObject*, PyObject*) {
  PyObject* self = type->tp_alloc(type, 0);
  if (self == nullptr) return nullptr;
  reinterpret_cast<Copies*>(self)->list = new (std::nothrow) CopyList();
  if (reinterpret_cast<Copies*>(self)->list == nullptr) {
    Py_DECREF(self);
    return PyErr_NoMemory();
  }
  return self;
}

inline void copies_dealloc(PyObject* self) {
  delete reinterpret_cast<Copies*>(self)->list;
  Py_TYPE(self)->tp_free(self);
}

// The buffers of destination, offset, source, where the source fits; else an exception is set.
inline bool buffers_of(PyObject* const* arguments, Py_ssize_t given, Py_buffer* to, Py_ssize_t* offset,
                       Py_buffer* from) {
  if (given != 3) {
    PyErr_Format(PyExc_TypeError, "%zd arguments are given, expected 3", given);
    return false;
  }
  *offset = PyLong_AsSsize_t(arguments[1]);
  if (*offset == -1 && PyErr_Occurred()) return false;
  if (PyObject_GetBuffer(arguments[0], to, PyBUF_WRITABLE) < 0) return false;
  if (PyObject_GetBuffer(arguments[2], from, PyBUF_SIMPLE) < 0) {
    PyBuffer_Release(to);
    return false;
  }
  if (*offset >= 0 && from->len <= to->len && *offset <= to->len - from->len) return true;
  PyErr_Format(PyExc_ValueError, "%zd bytes at %zd do not fit into %zd", from->len, *offset, to->len);
  PyBuffer_Release(from);
  PyBuffer_Release(to);
  return false;
}

inline PyObject* copies_add(PyObject* self, PyObject* const* arguments, Py_ssize_t given) {
  Py_buffer to, from;
  Py_ssize_t offset;
  if (!buffers_of(arguments, given, &to, &offset, &from)) return nullptr;
  list_of(self).note(to, offset, from);
  Py_RETURN_NONE;
}

inline PyObject* copies_add_memory(PyObject* self, PyObject* const* arguments, Py_ssize_t given) {
  if (given != 4) {
    PyErr_Format(PyExc_TypeError, "%zd arguments are given, expected 4", given);
    return nullptr;
  }
  const Py_ssize_t offset = PyLong_AsSsize_t(arguments[1]), num_bytes = PyLong_AsSsize_t(arguments[3]);
  const auto* from = static_cast<const uint8_t*>(PyLong_AsVoidPtr(arguments[2]));
  if (PyErr_Occurred() || !list_of(self).note(arguments[0], offset, from, num_bytes)) return nullptr;
  Py_RETURN_NONE;
}

inline PyObject* copies_run(PyObject* self, PyObject*) {
  list_of(self).run();
  Py_RETURN_NONE;
}

inline PyMethodDef copies_methods[] = {
    {"add", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(copies_add)), METH_FASTCALL,
     "add(destination, offset, source)\n\n"
     "Note that a buffer's bytes go into a writable one. Raises ValueError where they do not fit."},
    {"add_memory", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(copies_add_memory)), METH_FASTCALL,
     "add_memory(destination, offset, address, num_bytes)\n\n"
     "The same of memory that the caller keeps until it is done."},
    {"run", copies_run, METH_NOARGS, "Do what was noted."},
    {nullptr, nullptr, 0, nullptr},
};

inline bool ready_copies_type() {
  copies_type.tp_name = "expertd_server._codec.Copies";
  copies_type.tp_basicsize = sizeof(Copies);
  copies_type.tp_flags = Py_TPFLAGS_DEFAULT;
  copies_type.tp_doc = "Copies of host memory that are done together; for one thread at a time.";
  copies_type.tp_new = copies_new;
  copies_type.tp_dealloc = copies_dealloc;
  copies_type.tp_methods = copies_methods;
  return PyType_Ready(&copies_type) == 0;
}

}  // namespace expertd
