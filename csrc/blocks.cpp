// expertd_server._blocks: requests and answers in blocks of shared memory, as blocks.py specifies them, and the rings
// and arenas of ring.cpp. Torch-free and CUDA-free. Tests hold it and the Python together.
#include <cmath>
#include <limits>

#include "block_format.h"
#include "bundle.h"
#include "ring.h"

namespace {

// Copies without the interpreter where that is worth while.
class FreeInterpreter {
 public:
  explicit FreeInterpreter(Py_ssize_t num_bytes)
      : state_(num_bytes >= kFreeInterpreterBytes ? PyEval_SaveThread() : nullptr) {}
  ~FreeInterpreter() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }

 private:
  PyThreadState* state_;
};

bool has_arguments(Py_ssize_t given, Py_ssize_t least, Py_ssize_t most) {
  if (least <= given && given <= most) return true;
  PyErr_Format(PyExc_TypeError, "%zd arguments are given, expected %zd to %zd", given, least, most);
  return false;
}

// The n-th argument where it is given and not None, else nullptr.
PyObject* optional(PyObject* const* arguments, Py_ssize_t given, Py_ssize_t n) {
  return n < given && arguments[n] != Py_None ? arguments[n] : nullptr;
}

// Raises TypeError or OverflowError.
bool read_where(PyObject* from, Where* where) {
  *where = {};
  if (from == nullptr) return true;
  if (!PyTuple_Check(from) || PyTuple_GET_SIZE(from) != 3) {
    PyErr_SetString(PyExc_TypeError, "a place in a region is no tuple of 3, expected a Where or None");
    return false;
  }
  where->region = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(from, 0));
  where->offset = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(from, 1));
  where->num_bytes = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(from, 2));
  return !PyErr_Occurred();
}

// A view of bytes of a region, among those that are mapped here by number; raises ValueError where they are not.
PyObject* view_of(PyObject* regions, const Where& where) {
  PyObject* number = PyLong_FromUnsignedLongLong(where.region);
  if (number == nullptr) return nullptr;
  PyObject* region = PyDict_GetItemWithError(regions, number);
  Py_DECREF(number);
  if (region == nullptr && PyErr_Occurred()) return nullptr;
  const Py_ssize_t length = region == nullptr ? 0 : PyObject_Size(region);  // of elements that are bytes
  if (length < 0) return nullptr;
  const auto size = static_cast<uint64_t>(length);
  if (region == nullptr || where.offset > size || where.num_bytes > size - where.offset) {
    PyErr_Format(PyExc_ValueError, "%llu bytes at %llu of region %llu are not mapped here: %zd bytes of it are",
                 static_cast<unsigned long long>(where.num_bytes), static_cast<unsigned long long>(where.offset),
                 static_cast<unsigned long long>(where.region), length);
    return nullptr;
  }
  const auto start = static_cast<Py_ssize_t>(where.offset);
  return PySequence_GetSlice(region, start, start + static_cast<Py_ssize_t>(where.num_bytes));
}

// ---- requests ----

// A CheckedRequest, see wire_check.py.
struct Request {
  uint64_t num_tokens, output_dtype;
  bool do_finalize, return_routing;
  uint32_t dtypes[kNumParts];
  PyObject* parts[kNumParts];  // what holds the elements, borrowed; nullptr: the part is absent

  bool read(PyObject* from) {
    if (!PyTuple_Check(from) || PyTuple_GET_SIZE(from) != kNumParts + 4) {
      PyErr_SetString(PyExc_TypeError, "request is no tuple of 8, expected a CheckedRequest");
      return false;
    }
    num_tokens = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(from, 0));
    output_dtype = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(from, kNumParts + 1));
    do_finalize = PyObject_IsTrue(PyTuple_GET_ITEM(from, kNumParts + 2)) == 1;
    return_routing = PyObject_IsTrue(PyTuple_GET_ITEM(from, kNumParts + 3)) == 1;
    for (int n = 0; n < kNumParts; ++n) {
      PyObject* part = PyTuple_GET_ITEM(from, n + 1);
      parts[n] = nullptr;
      if (part == Py_None) continue;
      if (!PyTuple_Check(part) || PyTuple_GET_SIZE(part) != 2) {
        PyErr_SetString(PyExc_TypeError, "a part of the request is no tuple of 2, expected a Part or None");
        return false;
      }
      dtypes[n] = static_cast<uint32_t>(PyLong_AsUnsignedLong(PyTuple_GET_ITEM(part, 0)));
      parts[n] = PyTuple_GET_ITEM(part, 1);
    }
    return !PyErr_Occurred();
  }
};

PyDoc_STRVAR(block_bytes_doc,
             "block_bytes(request, hidden_size, top_k, hidden_states=None, place=None)\n\nSee blocks.py.");

PyObject* block_bytes(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  Request request;
  if (!has_arguments(given, 3, 5) || !request.read(arguments[0])) return nullptr;
  const Py_ssize_t hidden_size = PyLong_AsSsize_t(arguments[1]), top_k = PyLong_AsSsize_t(arguments[2]);
  if (PyErr_Occurred()) return nullptr;
  if (optional(arguments, given, 3) != nullptr) request.parts[0] = nullptr;
  Py_ssize_t asked = 0;
  for (PyObject* part : request.parts) {
    if (part == nullptr) continue;
    const Py_ssize_t size = PyObject_Size(part);  // of elements that are bytes
    if (size < 0) return nullptr;
    asked += aligned(size);
  }
  const auto num_tokens = static_cast<Py_ssize_t>(request.num_tokens);
  const Py_ssize_t slots = num_tokens * top_k;
  const Py_ssize_t rows =
      request.do_finalize ? num_tokens * item_bytes(static_cast<uint32_t>(request.output_dtype)) : slots * 2;
  const bool is_elsewhere = optional(arguments, given, 4) != nullptr;
  const Py_ssize_t answer =
      is_elsewhere ? 0 : aligned(rows * hidden_size) + aligned(slots * 2) + 2 * aligned(slots * 4);
  const Py_ssize_t most = asked > answer ? asked : answer;
  return PyLong_FromSsize_t(kDataAt + (most > kMaxErrorBytes ? most : kMaxErrorBytes));
}

PyDoc_STRVAR(write_call_doc,
             "write_call(block, request, layer_id, deadline_s, hidden_states=None, place=None)\n\nSee blocks.py.");

PyObject* write_call(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  Request request;
  Block block;
  Where hidden_states, place;
  if (!has_arguments(given, 4, 6) || !block.take(arguments[0], PyBUF_WRITABLE) || !request.read(arguments[1]) ||
      !read_where(optional(arguments, given, 4), &hidden_states) ||
      !read_where(optional(arguments, given, 5), &place)) {
    return nullptr;
  }
  const uint64_t layer_id = PyLong_AsUnsignedLongLong(arguments[2]);
  const double deadline_s =
      arguments[3] == Py_None ? std::numeric_limits<double>::infinity() : PyFloat_AsDouble(arguments[3]);
  if (PyErr_Occurred()) return nullptr;
  block.write(0, CallHead{layer_id, deadline_s, request.num_tokens, request.output_dtype, request.do_finalize,
                          request.return_routing, hidden_states, place});
  Py_ssize_t at = kDataAt;
  bool has_numbers = true;
  for (int n = 0; n < kNumParts; ++n) {
    if (request.parts[n] == nullptr) {
      block.write_entry(n, Entry{});
      continue;
    }
    if (n == 0 && hidden_states.region != 0) {
      const uint64_t num_items = hidden_states.num_bytes / item_bytes(request.dtypes[0]);
      block.write_entry(0, Entry{request.dtypes[0], 1, num_items, 1, kElsewhere});
      continue;
    }
    Py_buffer data;
    if (PyObject_GetBuffer(request.parts[n], &data, PyBUF_SIMPLE) < 0) return nullptr;
    const bool fits = block.has_room(at, data.len);
    if (fits) {
      const uint64_t num_items = data.len / item_bytes(request.dtypes[n]);
      block.write_entry(n, Entry{request.dtypes[n], 1, num_items, 1, static_cast<uint64_t>(at)});
      FreeInterpreter freed(data.len);
      std::memcpy(block.at(at), data.buf, data.len);
      const bool is_real = request.dtypes[n] == kFloat32 || request.dtypes[n] == kBFloat16;
      if (n == kLogits && is_real) has_numbers = !has_nan(request.dtypes[n], block.at(at), data.len);
    }
    at += aligned(data.len);
    PyBuffer_Release(&data);
    if (!fits) return nullptr;
  }
  return PyBool_FromLong(has_numbers);
}

PyDoc_STRVAR(read_call_doc, "read_call(block, regions)\n\nSee blocks.py.");

PyObject* read_call(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  Block block;
  if (!has_arguments(given, 2, 2) || !block.take(arguments[0], PyBUF_SIMPLE)) return nullptr;
  PyObject *memory = arguments[0], *regions = arguments[1];
  if (!PyDict_Check(regions)) {
    PyErr_Format(PyExc_TypeError, "regions is %s, expected a dict", Py_TYPE(regions)->tp_name);
    return nullptr;
  }
  const auto head = block.read<CallHead>(0);
  PyObject* parts[kNumParts] = {nullptr};
  bool is_good = true;
  for (int n = 0; n < kNumParts && is_good; ++n) {
    Entry entry;
    Py_ssize_t num_bytes;
    const bool is_elsewhere = n == 0 && head.hidden_states.region != 0;
    is_good = block.read_entry(n, &entry, &num_bytes, is_elsewhere);
    if (!is_good) break;
    if (entry.dtype == 0) {
      parts[n] = Py_NewRef(Py_None);
      continue;
    }
    const auto at = static_cast<Py_ssize_t>(entry.at);
    PyObject* view =
        is_elsewhere ? view_of(regions, head.hidden_states) : PySequence_GetSlice(memory, at, at + num_bytes);
    parts[n] = view == nullptr ? nullptr : Py_BuildValue("(KN)", static_cast<unsigned long long>(entry.dtype), view);
    is_good = parts[n] != nullptr;
  }
  PyObject* place = nullptr;
  if (is_good) place = head.place.region == 0 ? Py_NewRef(Py_None) : view_of(regions, head.place);
  if (place == nullptr) {
    for (PyObject* part : parts) Py_XDECREF(part);
    return nullptr;
  }
  PyObject* deadline_s = std::isinf(head.deadline_s) ? Py_NewRef(Py_None) : PyFloat_FromDouble(head.deadline_s);
  return Py_BuildValue("(KN(KNNNNKOO)N)", static_cast<unsigned long long>(head.layer_id), deadline_s,
                       static_cast<unsigned long long>(head.num_tokens), parts[0], parts[1], parts[2], parts[3],
                       static_cast<unsigned long long>(head.output_dtype), head.do_finalize ? Py_True : Py_False,
                       head.return_routing ? Py_True : Py_False, place);
}

// ---- answers ----

PyDoc_STRVAR(
    write_matrix_head_doc,
    "write_matrix_head(block, dtype, num_tokens, hidden_size, queue_us, copy_in_us, compute_us, copy_out_us,\n"
    "batch_tokens, batch_requests, weights_version, queue_tokens, is_placed)\n\n"
    "write_answer of blocks.py for an answer that is one [num_tokens, hidden_size] matrix, all but its elements;\n"
    "where these go, in the block, or from the start of the place that the request names (is_placed).");

PyObject* write_matrix_head(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  constexpr Py_ssize_t kNumNumbers = 12;
  unsigned long long n[kNumNumbers];
  Block block;
  if (!has_arguments(given, kNumNumbers + 1, kNumNumbers + 1) || !block.take(arguments[0], PyBUF_WRITABLE) ||
      !numbers_of(arguments + 1, kNumNumbers, kNumNumbers, n)) {
    return nullptr;
  }
  const uint64_t at = n[11] ? kElsewhere : static_cast<uint64_t>(kDataAt);
  const auto num_bytes = static_cast<Py_ssize_t>(n[1] * n[2] * item_bytes(static_cast<uint32_t>(n[0])));
  if (at != kElsewhere && !block.has_room(kDataAt, num_bytes)) return nullptr;
  block.write(0, AnswerHead{{n[3], n[4], n[5], n[6], n[7], n[8]}, n[9], n[10]});
  block.write_entry(0, Entry{n[0], 2, n[1], n[2], at});
  for (int index = 1; index < kMaxTensors; ++index) block.write_entry(index, Entry{});
  return PyLong_FromUnsignedLongLong(at);
}

PyDoc_STRVAR(encode_answer_doc,
             "encode_answer(block, is_stream, request_id, queue_depth_tokens, place=None)\n\n"
             "A serialised ForwardResponse from the answer in a block; is_stream: within a ForwardStreamResponse.\n"
             "place: (region, offset) by which the message is to name the output, where that does not lie in the\n"
             "block, but in the place that the request names.");

PyObject* encode_answer(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  unsigned long long n[3];
  Block block;
  if (!has_arguments(given, 4, 5) || !block.take(arguments[0], PyBUF_SIMPLE) || !numbers_of(arguments + 1, 3, 3, n)) {
    return nullptr;
  }
  PyObject* place = optional(arguments, given, 4);
  unsigned long long region = 0, offset = 0;
  if (place != nullptr && !PyArg_ParseTuple(place, "KK", &region, &offset)) return nullptr;
  const auto answer = block.read<AnswerHead>(0);
  Entry entries[kMaxTensors];
  Py_ssize_t num_bytes[kMaxTensors], data_bytes = 0, response_bytes = 0;
  Writer heads[kMaxTensors];
  for (int index = 0; index < kMaxTensors; ++index) {
    const Entry& entry = entries[index];
    if (!block.read_entry(index, &entries[index], &num_bytes[index], place != nullptr)) return nullptr;
    if (entry.dtype == 0) continue;
    Writer shape, tensor;
    if (entry.rank > 0) shape.varint(entry.rows);
    if (entry.rank > 1) shape.varint(entry.columns);
    tensor.number(1, entry.dtype);
    tensor.head(2, shape.size);
    tensor.append(shape);
    if (entry.at == kElsewhere) {
      Writer slice;
      slice.number(1, region);
      slice.number(2, offset);
      slice.number(3, num_bytes[index]);
      tensor.head(4, slice.size);
      tensor.append(slice);
      num_bytes[index] = 0;         // in the message
    } else if (num_bytes[index]) {  // an empty field is left out
      tensor.head(3, num_bytes[index]);
    }
    heads[index].head(index + 1, tensor.size + num_bytes[index]);
    heads[index].append(tensor);
    data_bytes += num_bytes[index];
    response_bytes += heads[index].size + num_bytes[index];
  }
  Writer timing, tail, head;
  for (int field = 1; field <= 6; ++field) timing.number(field, answer.timing[field - 1]);
  timing.number(7, n[2]);
  tail.head(6, timing.size);
  tail.append(timing);
  tail.number(7, answer.weights_version);
  response_bytes += tail.size;
  if (n[0]) {
    head.number(1, n[1]);
    head.head(2, response_bytes);
  }
  PyObject* encoded = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(head.size) + response_bytes);
  if (encoded == nullptr) return nullptr;
  auto* to = reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(encoded));
  const auto put = [&to](const void* from, size_t size) {
    std::memcpy(to, from, size);
    to += size;
  };
  FreeInterpreter freed(data_bytes);
  put(head.bytes, head.size);
  for (int index = 0; index < kMaxTensors; ++index) {
    put(heads[index].bytes, heads[index].size);
    put(block.at(static_cast<Py_ssize_t>(entries[index].at)), num_bytes[index]);
  }
  put(tail.bytes, tail.size);
  return encoded;
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef methods[] = {
    {"block_bytes", fast(block_bytes), METH_FASTCALL, block_bytes_doc},
    {"write_call", fast(write_call), METH_FASTCALL, write_call_doc},
    {"read_call", fast(read_call), METH_FASTCALL, read_call_doc},
    {"write_matrix_head", fast(write_matrix_head), METH_FASTCALL, write_matrix_head_doc},
    {"encode_answer", fast(encode_answer), METH_FASTCALL, encode_answer_doc},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_blocks",
    "Shared memory between front-ends and the engine.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__blocks() {
  PyObject* self = PyModule_Create(&module);
  if (self != nullptr && !(add_ring_types(self) && add_bundle_type(self))) {
    Py_DECREF(self);
    return nullptr;
  }
  return self;
}
