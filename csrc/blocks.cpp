// expertd_server._blocks: requests and answers in blocks of shared memory, as blocks.py specifies them, and the rings
// and arenas of ring.cpp. Torch-free and CUDA-free. Tests hold it and the Python together.
#include <cmath>
#include <limits>

#include "ring.h"
#include "wire.h"

namespace {

constexpr int kNumParts = 4;    // of a request: hidden_states, routing_logits, topk_ids, topk_weights
constexpr int kMaxTensors = 5;  // of an answer
constexpr Py_ssize_t kAlignment = 64;
constexpr Py_ssize_t kMaxErrorBytes = 8192;

struct CallHead {
  uint64_t layer_id;
  double deadline_s;  // infinite: none
  uint64_t num_tokens, output_dtype, do_finalize, return_routing;
};

struct AnswerHead {
  uint64_t timing[6];  // in the order of the proto's Timing
  uint64_t weights_version, queue_tokens;
};

struct Entry {
  uint64_t dtype, rank, rows, columns, at;  // dtype 0: the tensor is absent; at: where its bytes start in the block
};

constexpr Py_ssize_t kDirectoryAt = sizeof(AnswerHead);
static_assert(sizeof(CallHead) <= kDirectoryAt);

constexpr Py_ssize_t aligned(Py_ssize_t num_bytes) { return (num_bytes + kAlignment - 1) / kAlignment * kAlignment; }

constexpr Py_ssize_t kDataAt = aligned(kDirectoryAt + kMaxTensors * static_cast<Py_ssize_t>(sizeof(Entry)));

// A block's bytes for as long as a function runs.
struct Block {
  Py_buffer buffer{};
  bool is_held = false;

  // Raises BufferError, TypeError or ValueError.
  bool take(PyObject* from, int flags) {
    if (PyObject_GetBuffer(from, &buffer, flags) < 0) return false;
    is_held = true;
    if (buffer.len >= kDataAt) return true;
    PyErr_Format(PyExc_ValueError, "a block of %zd bytes has no room for its %zd bytes of header", buffer.len, kDataAt);
    return false;
  }

  ~Block() {
    if (is_held) PyBuffer_Release(&buffer);
  }

  uint8_t* at(Py_ssize_t offset) const { return static_cast<uint8_t*>(buffer.buf) + offset; }

  template <typename T>
  T read(Py_ssize_t offset) const {
    T value;
    std::memcpy(&value, at(offset), sizeof(T));
    return value;
  }

  template <typename T>
  void write(Py_ssize_t offset, const T& value) const {
    std::memcpy(at(offset), &value, sizeof(T));
  }

  void write_entry(int index, const Entry& entry) const { write(kDirectoryAt + index * sizeof(Entry), entry); }

  // Raises ValueError where the tensor does not lie in the block.
  bool read_entry(int index, Entry* entry, Py_ssize_t* num_bytes) const {
    *entry = read<Entry>(kDirectoryAt + index * sizeof(Entry));
    *num_bytes = 0;
    if (entry->dtype == 0) return true;
    const auto length = static_cast<uint64_t>(buffer.len);
    const uint64_t item = item_bytes(static_cast<uint32_t>(entry->dtype));
    const bool is_good = entry->at <= length && (entry->columns == 0 || entry->rows <= length / entry->columns) &&
                         entry->rows * entry->columns * item <= length - entry->at;
    if (!is_good) {
      PyErr_Format(PyExc_ValueError, "tensor %d does not lie in its block of %zd bytes", index, buffer.len);
      return false;
    }
    *num_bytes = static_cast<Py_ssize_t>(entry->rows * entry->columns * item);
    return true;
  }

  bool has_room(Py_ssize_t offset, Py_ssize_t num_bytes) const {
    if (num_bytes <= buffer.len - offset) return true;
    PyErr_Format(PyExc_ValueError, "%zd bytes at %zd do not fit into a block of %zd", num_bytes, offset, buffer.len);
    return false;
  }
};

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

bool has_arguments(Py_ssize_t given, Py_ssize_t expected) {
  if (given == expected) return true;
  PyErr_Format(PyExc_TypeError, "%zd arguments are given, expected %zd", given, expected);
  return false;
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

PyDoc_STRVAR(block_bytes_doc, "block_bytes(request, hidden_size, top_k)\n\nSee blocks.py.");

PyObject* block_bytes(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  Request request;
  if (!has_arguments(given, 3) || !request.read(arguments[0])) return nullptr;
  const Py_ssize_t hidden_size = PyLong_AsSsize_t(arguments[1]), top_k = PyLong_AsSsize_t(arguments[2]);
  if (PyErr_Occurred()) return nullptr;
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
  const Py_ssize_t answer = aligned(rows * hidden_size) + aligned(slots * 2) + 2 * aligned(slots * 4);
  const Py_ssize_t most = asked > answer ? asked : answer;
  return PyLong_FromSsize_t(kDataAt + (most > kMaxErrorBytes ? most : kMaxErrorBytes));
}

PyDoc_STRVAR(write_call_doc, "write_call(block, request, layer_id, deadline_s)\n\nSee blocks.py.");

PyObject* write_call(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  Request request;
  Block block;
  if (!has_arguments(given, 4) || !block.take(arguments[0], PyBUF_WRITABLE) || !request.read(arguments[1])) {
    return nullptr;
  }
  const uint64_t layer_id = PyLong_AsUnsignedLongLong(arguments[2]);
  const double deadline_s =
      arguments[3] == Py_None ? std::numeric_limits<double>::infinity() : PyFloat_AsDouble(arguments[3]);
  if (PyErr_Occurred()) return nullptr;
  block.write(0, CallHead{layer_id, deadline_s, request.num_tokens, request.output_dtype, request.do_finalize,
                          request.return_routing});
  Py_ssize_t at = kDataAt;
  for (int n = 0; n < kNumParts; ++n) {
    if (request.parts[n] == nullptr) {
      block.write_entry(n, Entry{});
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
    }
    at += aligned(data.len);
    PyBuffer_Release(&data);
    if (!fits) return nullptr;
  }
  Py_RETURN_NONE;
}

PyDoc_STRVAR(read_call_doc, "read_call(block)\n\nSee blocks.py.");

PyObject* read_call(PyObject*, PyObject* memory) {
  Block block;
  if (!block.take(memory, PyBUF_SIMPLE)) return nullptr;
  const auto head = block.read<CallHead>(0);
  PyObject* parts[kNumParts] = {nullptr};
  bool is_good = true;
  for (int n = 0; n < kNumParts && is_good; ++n) {
    Entry entry;
    Py_ssize_t num_bytes;
    is_good = block.read_entry(n, &entry, &num_bytes);
    if (!is_good) break;
    if (entry.dtype == 0) {
      parts[n] = Py_NewRef(Py_None);
      continue;
    }
    const auto at = static_cast<Py_ssize_t>(entry.at);
    PyObject* view = PySequence_GetSlice(memory, at, at + num_bytes);
    parts[n] = view == nullptr ? nullptr : Py_BuildValue("(KN)", static_cast<unsigned long long>(entry.dtype), view);
    is_good = parts[n] != nullptr;
  }
  if (!is_good) {
    for (PyObject* part : parts) Py_XDECREF(part);
    return nullptr;
  }
  PyObject* deadline_s = std::isinf(head.deadline_s) ? Py_NewRef(Py_None) : PyFloat_FromDouble(head.deadline_s);
  return Py_BuildValue("(KN(KNNNNKOO))", static_cast<unsigned long long>(head.layer_id), deadline_s,
                       static_cast<unsigned long long>(head.num_tokens), parts[0], parts[1], parts[2], parts[3],
                       static_cast<unsigned long long>(head.output_dtype), head.do_finalize ? Py_True : Py_False,
                       head.return_routing ? Py_True : Py_False);
}

// ---- answers ----

PyDoc_STRVAR(
    write_matrix_head_doc,
    "write_matrix_head(block, dtype, num_tokens, hidden_size, queue_us, copy_in_us, compute_us, copy_out_us,\n"
    "batch_tokens, batch_requests, weights_version, queue_tokens)\n\n"
    "write_answer of blocks.py for an answer that is one [num_tokens, hidden_size] matrix, all but its elements;\n"
    "where in the block these go.");

PyObject* write_matrix_head(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  unsigned long long n[11];
  Block block;
  if (!has_arguments(given, 12) || !block.take(arguments[0], PyBUF_WRITABLE) || !numbers_of(arguments + 1, 11, 11, n)) {
    return nullptr;
  }
  const auto num_bytes = static_cast<Py_ssize_t>(n[1] * n[2] * item_bytes(static_cast<uint32_t>(n[0])));
  if (!block.has_room(kDataAt, num_bytes)) return nullptr;
  block.write(0, AnswerHead{{n[3], n[4], n[5], n[6], n[7], n[8]}, n[9], n[10]});
  block.write_entry(0, Entry{n[0], 2, n[1], n[2], kDataAt});
  for (int index = 1; index < kMaxTensors; ++index) block.write_entry(index, Entry{});
  return PyLong_FromSsize_t(kDataAt);
}

PyDoc_STRVAR(encode_answer_doc,
             "encode_answer(block, is_stream, request_id, queue_depth_tokens)\n\n"
             "A serialised ForwardResponse from the answer in a block; is_stream: within a ForwardStreamResponse.");

PyObject* encode_answer(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  unsigned long long n[3];
  Block block;
  if (!has_arguments(given, 4) || !block.take(arguments[0], PyBUF_SIMPLE) || !numbers_of(arguments + 1, 3, 3, n)) {
    return nullptr;
  }
  const auto answer = block.read<AnswerHead>(0);
  Entry entries[kMaxTensors];
  Py_ssize_t num_bytes[kMaxTensors], data_bytes = 0, response_bytes = 0;
  Writer heads[kMaxTensors];
  for (int index = 0; index < kMaxTensors; ++index) {
    const Entry& entry = entries[index];
    if (!block.read_entry(index, &entries[index], &num_bytes[index])) return nullptr;
    if (entry.dtype == 0) continue;
    Writer shape, tensor;
    if (entry.rank > 0) shape.varint(entry.rows);
    if (entry.rank > 1) shape.varint(entry.columns);
    tensor.number(1, entry.dtype);
    tensor.head(2, shape.size);
    tensor.append(shape);
    if (num_bytes[index]) tensor.head(3, num_bytes[index]);  // an empty field is left out
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
    {"read_call", read_call, METH_O, read_call_doc},
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
  if (self != nullptr && !add_ring_types(self)) {
    Py_DECREF(self);
    return nullptr;
  }
  return self;
}
