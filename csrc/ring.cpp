// Rings of descriptors and arenas of blocks in shared memory, as ring.py specifies them.
//
// NOTE: the interpreter's lock makes every method atomic within its process; none of them lets go of it.
#include "ring.h"

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <new>

#include "pieces.h"

namespace {

constexpr Py_ssize_t kAlignment = 4096;  // ALIGNMENT_BYTES of ring.py
constexpr size_t kCacheLine = 64;

// ---- Ring ----

struct Descriptor {
  uint64_t kind, request_id, offset, num_bytes;
};

// What both processes see, at the start of a ring's memory, all zero at first.
struct RingHead {
  alignas(kCacheLine) std::atomic<uint64_t> num_put;
  // Whether the reader will come by itself: its eventfd was written since it took descriptors last. So a reader that is
  // busy costs its writer no system calls.
  alignas(kCacheLine) std::atomic<uint64_t> is_woken;
};
static_assert(sizeof(RingHead) == 2 * kCacheLine && std::atomic<uint64_t>::is_always_lock_free);

struct Ring {
  PyObject_HEAD;
  Py_buffer memory;
  RingHead* head;  // nullptr: the ring was never made
  Descriptor* slots;
  uint64_t num_slots;
  uint64_t next;       // how many this end has put or taken
  uint64_t num_woken;  // for how many of them the writer has woken the reader
  int eventfd;
  bool is_closed;
};

Ring* ring_of(PyObject* self) { return reinterpret_cast<Ring*>(self); }

int ring_init(PyObject* self, PyObject* arguments, PyObject* keywords) {
  Ring* ring = ring_of(self);
  PyObject* memory;
  if (keywords != nullptr || ring->head != nullptr) {
    PyErr_SetString(PyExc_TypeError, "Ring takes memory and eventfd, once and by position");
    return -1;
  }
  if (!PyArg_ParseTuple(arguments, "Oi:Ring", &memory, &ring->eventfd)) return -1;
  if (PyObject_GetBuffer(memory, &ring->memory, PyBUF_WRITABLE) < 0) return -1;
  auto* start = static_cast<uint8_t*>(ring->memory.buf);
  const auto head_bytes = static_cast<Py_ssize_t>(sizeof(RingHead));
  if (reinterpret_cast<uintptr_t>(start) % kCacheLine != 0 || ring->memory.len <= head_bytes) {
    PyErr_Format(PyExc_ValueError, "memory has %zd bytes, expected more than %zd, aligned to %zu", ring->memory.len,
                 head_bytes, kCacheLine);
    PyBuffer_Release(&ring->memory);
    return -1;
  }
  ring->head = reinterpret_cast<RingHead*>(start);
  ring->slots = reinterpret_cast<Descriptor*>(start + head_bytes);
  ring->num_slots = (ring->memory.len - head_bytes) / static_cast<Py_ssize_t>(sizeof(Descriptor));
  return 0;
}

void ring_dealloc(PyObject* self) {
  Ring* ring = ring_of(self);
  if (ring->head != nullptr) PyBuffer_Release(&ring->memory);
  Py_TYPE(self)->tp_free(self);
}

// Without effect on a closed ring.
void put(Ring* ring, const Descriptor& descriptor) {
  if (ring->is_closed) return;
  ring->slots[ring->next % ring->num_slots] = descriptor;
  ring->head->num_put.store(++ring->next, std::memory_order_release);
}

// False, with an exception set, where the arguments are wrong.
bool put(Ring* ring, PyObject* const* arguments, Py_ssize_t given) {
  uint64_t numbers[4] = {0, 0, 0, 0};
  if (given < 2 || given > 4 || ring->head == nullptr) {
    PyErr_Format(PyExc_TypeError, "%zd arguments are given, expected 2 to 4", given);
    return false;
  }
  for (Py_ssize_t n = 0; n < given; ++n) numbers[n] = PyLong_AsUnsignedLongLong(arguments[n]);
  if (PyErr_Occurred()) return false;
  put(ring, {numbers[0], numbers[1], numbers[2], numbers[3]});
  return true;
}

PyObject* ring_put(PyObject* self, PyObject* const* arguments, Py_ssize_t given) {
  if (!put(ring_of(self), arguments, given)) return nullptr;
  Py_RETURN_NONE;
}

// Wake the reader of a ring that is open, unless it comes by itself.
PyObject* wake_reader(Ring* ring) {
  // The exchange here and that of the reader are in one order. If this comes first, the reader sees the descriptors
  // when it comes to take; else it has said that it wants to be woken.
  if (ring->head->is_woken.exchange(1, std::memory_order_seq_cst) == 0) {
    const uint64_t one = 1;
    if (write(ring->eventfd, &one, sizeof(one)) < 0 && errno != EAGAIN) return PyErr_SetFromErrno(PyExc_OSError);
  }
  Py_RETURN_NONE;
}

// NOTE: the number of a closed ring's eventfd may be another file's by now.
bool is_open(const Ring* ring) { return ring->head != nullptr && !ring->is_closed; }

PyObject* ring_wake(PyObject* self, PyObject*) {
  Ring* ring = ring_of(self);
  if (!is_open(ring) || ring->num_woken == ring->next) Py_RETURN_NONE;
  ring->num_woken = ring->next;
  return wake_reader(ring);
}

PyObject* ring_announce(PyObject* self, PyObject*) {
  Ring* ring = ring_of(self);
  return is_open(ring) ? wake_reader(ring) : Py_NewRef(Py_None);
}

PyObject* ring_publish(PyObject* self, PyObject* const* arguments, Py_ssize_t given) {
  return put(ring_of(self), arguments, given) ? ring_wake(self, nullptr) : nullptr;
}

// What was put and not taken yet, for the reader. Raises ValueError where that is more than there is room for.
PyObject* descriptors_of(Ring* ring) {
  if (!is_open(ring)) return PyList_New(0);
  const uint64_t end = ring->head->num_put.load(std::memory_order_acquire), waiting = end - ring->next;
  if (waiting > ring->num_slots) {
    PyErr_Format(PyExc_ValueError, "%llu descriptors wait in a ring of %llu", static_cast<unsigned long long>(waiting),
                 static_cast<unsigned long long>(ring->num_slots));
    return nullptr;
  }
  PyObject* taken = PyList_New(0);
  if (taken == nullptr) return nullptr;
  for (; ring->next != end; ++ring->next) {
    const Descriptor& one = ring->slots[ring->next % ring->num_slots];
    PyObject* item = Py_BuildValue(
        "(KKKK)", static_cast<unsigned long long>(one.kind), static_cast<unsigned long long>(one.request_id),
        static_cast<unsigned long long>(one.offset), static_cast<unsigned long long>(one.num_bytes));
    const bool is_good = item != nullptr && PyList_Append(taken, item) == 0;
    Py_XDECREF(item);
    if (!is_good) {
      Py_DECREF(taken);
      return nullptr;
    }
  }
  return taken;
}

PyObject* ring_take(PyObject* self, PyObject*) {
  Ring* ring = ring_of(self);
  if (is_open(ring)) {
    uint64_t count;
    if (read(ring->eventfd, &count, sizeof(count)) < 0 && errno != EAGAIN) return PyErr_SetFromErrno(PyExc_OSError);
    ring->head->is_woken.exchange(0, std::memory_order_seq_cst);
  }
  return descriptors_of(ring);
}

PyObject* ring_look(PyObject* self, PyObject*) {
  Ring* ring = ring_of(self);
  // Not an exchange: nobody depends on when the writer sees it, but for not being woken once.
  if (is_open(ring)) ring->head->is_woken.store(1, std::memory_order_relaxed);
  return descriptors_of(ring);
}

PyObject* ring_take_within(PyObject* self, PyObject* seconds) {
  Ring* ring = ring_of(self);
  const double most = PyFloat_AsDouble(seconds);
  if (PyErr_Occurred()) return nullptr;
  if (is_open(ring)) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(most);
    ring->head->is_woken.store(1, std::memory_order_relaxed);  // as in ring_look
    Py_BEGIN_ALLOW_THREADS;
    while (ring->head->num_put.load(std::memory_order_relaxed) == ring->next &&
           std::chrono::steady_clock::now() < until) {
    }
    Py_END_ALLOW_THREADS;
  }
  return ring_take(self, nullptr);
}

PyObject* ring_close(PyObject* self, PyObject*) {
  Ring* ring = ring_of(self);
  if (is_open(ring)) {
    ring->is_closed = true;
    close(ring->eventfd);
  }
  Py_RETURN_NONE;
}

PyObject* ring_eventfd(PyObject* self, void*) { return PyLong_FromLong(ring_of(self)->eventfd); }

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef ring_methods[] = {
    {"put", fast(ring_put), METH_FASTCALL, "put(kind, request_id, offset=0, nbytes=0)\n\nSee ring.py."},
    {"wake", ring_wake, METH_NOARGS, "See ring.py."},
    {"announce", ring_announce, METH_NOARGS, "See ring.py."},
    {"publish", fast(ring_publish), METH_FASTCALL, "publish(kind, request_id, offset=0, nbytes=0)\n\nSee ring.py."},
    {"take", ring_take, METH_NOARGS, "See ring.py."},
    {"look", ring_look, METH_NOARGS, "See ring.py."},
    {"take_within", ring_take_within, METH_O, "take_within(seconds)\n\nSee ring.py."},
    {"close", ring_close, METH_NOARGS, "See ring.py."},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef ring_members[] = {
    {"eventfd", ring_eventfd, nullptr, "Readable when there is something to take.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyTypeObject ring_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

// ---- Arena ----

using expertd::Pieces;

struct Arena {
  PyObject_HEAD;
  PyObject* memory;  // nullptr: the arena was never made
  Py_ssize_t num_bytes;
  Pieces free;
};

struct Block {
  PyObject_HEAD;
  PyObject* arena;
  PyObject* view;
  Py_ssize_t offset, num_bytes;
};

PyTypeObject block_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

Arena* arena_of(PyObject* self) { return reinterpret_cast<Arena*>(self); }

PyObject* arena_new(PyTypeObject* type, PyObject*, PyObject*) {
  PyObject* self = type->tp_alloc(type, 0);
  if (self != nullptr) new (&arena_of(self)->free) Pieces();
  return self;
}

int arena_init(PyObject* self, PyObject* arguments, PyObject*) {
  Arena* arena = arena_of(self);
  PyObject* memory;
  if (arena->memory != nullptr) {
    PyErr_SetString(PyExc_TypeError, "an Arena is made once");
    return -1;
  }
  if (!PyArg_ParseTuple(arguments, "O!:Arena", &PyMemoryView_Type, &memory)) return -1;
  arena->num_bytes = PyMemoryView_GET_BUFFER(memory)->len;
  arena->memory = Py_NewRef(memory);
  arena->free = Pieces(arena->num_bytes);
  return 0;
}

void arena_dealloc(PyObject* self) {
  arena_of(self)->free.~Pieces();
  Py_XDECREF(arena_of(self)->memory);
  Py_TYPE(self)->tp_free(self);
}

PyObject* arena_allocate(PyObject* self, PyObject* argument) {
  Arena* arena = arena_of(self);
  const Py_ssize_t wanted = PyLong_AsSsize_t(argument);
  if (wanted == -1 && PyErr_Occurred()) return nullptr;
  if (arena->memory == nullptr || wanted > arena->num_bytes) Py_RETURN_NONE;
  const Py_ssize_t size = ((wanted > 1 ? wanted : 1) + kAlignment - 1) / kAlignment * kAlignment;
  const Py_ssize_t start = arena->free.take(size);
  if (start < 0) Py_RETURN_NONE;
  PyObject* view = PySequence_GetSlice(arena->memory, start, start + size);
  PyObject* self_block = view == nullptr ? nullptr : block_type.tp_alloc(&block_type, 0);
  if (self_block == nullptr) {
    Py_XDECREF(view);
    arena->free.release(start, size);
    return nullptr;
  }
  auto* block = reinterpret_cast<Block*>(self_block);
  block->arena = Py_NewRef(self);
  block->view = view;
  block->offset = start;
  block->num_bytes = size;
  return self_block;
}

PyObject* arena_free_bytes(PyObject* self, PyObject*) { return PyLong_FromSsize_t(arena_of(self)->free.free_bytes()); }

PyObject* arena_nbytes(PyObject* self, void*) { return PyLong_FromSsize_t(arena_of(self)->num_bytes); }

PyMethodDef arena_methods[] = {
    {"allocate", arena_allocate, METH_O, "allocate(nbytes)\n\nSee ring.py."},
    {"free_bytes", arena_free_bytes, METH_NOARGS, "See ring.py."},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef arena_members[] = {
    {"nbytes", arena_nbytes, nullptr, "Bytes of all blocks and free pieces together.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyTypeObject arena_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

// ---- Block ----

Block* block_of(PyObject* self) { return reinterpret_cast<Block*>(self); }

void block_dealloc(PyObject* self) {
  Block* block = block_of(self);
  arena_of(block->arena)->free.release(block->offset, block->num_bytes);
  Py_DECREF(block->view);
  Py_DECREF(block->arena);
  Py_TYPE(self)->tp_free(self);
}

PyObject* block_view(PyObject* self, void*) { return Py_NewRef(block_of(self)->view); }

PyObject* block_offset(PyObject* self, void*) { return PyLong_FromSsize_t(block_of(self)->offset); }

PyObject* block_nbytes(PyObject* self, void*) { return PyLong_FromSsize_t(block_of(self)->num_bytes); }

PyGetSetDef block_members[] = {
    {"view", block_view, nullptr, "[nbytes] bytes, writable, of unspecified contents.", nullptr},
    {"offset", block_offset, nullptr, "In the arena.", nullptr},
    {"nbytes", block_nbytes, nullptr, "Of the block.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

}  // namespace

bool is_ring(PyObject* object) {
  if (PyObject_TypeCheck(object, &ring_type) && ring_of(object)->head != nullptr) return true;
  PyErr_Format(PyExc_TypeError, "a %s is given, expected a Ring", Py_TYPE(object)->tp_name);
  return false;
}

void put_descriptor(PyObject* ring, uint64_t kind, uint64_t request_id) {
  put(ring_of(ring), {kind, request_id, 0, 0});
}

bool add_ring_types(PyObject* module) {
  ring_type.tp_name = "expertd_server._blocks.Ring";
  ring_type.tp_basicsize = sizeof(Ring);
  ring_type.tp_doc = "Descriptors from one process to another, see ring.py.";
  ring_type.tp_new = PyType_GenericNew;
  ring_type.tp_init = ring_init;
  ring_type.tp_dealloc = ring_dealloc;
  ring_type.tp_methods = ring_methods;
  ring_type.tp_getset = ring_members;
  arena_type.tp_name = "expertd_server._blocks.Arena";
  arena_type.tp_basicsize = sizeof(Arena);
  arena_type.tp_doc = "Blocks of a memory, see ring.py.";
  arena_type.tp_new = arena_new;
  arena_type.tp_init = arena_init;
  arena_type.tp_dealloc = arena_dealloc;
  arena_type.tp_methods = arena_methods;
  arena_type.tp_getset = arena_members;
  block_type.tp_name = "expertd_server._blocks.Block";
  block_type.tp_basicsize = sizeof(Block);
  block_type.tp_doc = "A piece of an arena; it returns there when the last reference to it goes.";
  block_type.tp_dealloc = block_dealloc;
  block_type.tp_getset = block_members;
  for (PyTypeObject* type : {&ring_type, &arena_type, &block_type}) {
    type->tp_flags = Py_TPFLAGS_DEFAULT;
    if (PyType_Ready(type) < 0) return false;
  }
  return PyModule_AddObjectRef(module, "Ring", reinterpret_cast<PyObject*>(&ring_type)) == 0 &&
         PyModule_AddObjectRef(module, "Arena", reinterpret_cast<PyObject*>(&arena_type)) == 0 &&
         PyModule_AddObjectRef(module, "Block", reinterpret_cast<PyObject*>(&block_type)) == 0;
}
