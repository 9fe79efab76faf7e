// expertd_server._codec: the wire format of the data path, for requests that are as they should be.
//
// Everything here is done by wire_parse.py, wire_check.py and wire_answer.py too, which specify it and which say what
// is wrong with a request. This module reads what clients send and answers None to whatever else there is; then Python
// decides. Tests hold the two together. Torch-free and CUDA-free; ownership stays in Python: a Request keeps the bytes
// that it was read from.
#include "copies.h"
#include "message_memory.h"
#include "request_fields.h"
#include "wire.h"

namespace {

// ---- the type Request ----

struct Request {
  PyObject_HEAD;
  PyObject* data;                // the bytes that everything below points into
  PyObject* bound[kAnswer + 1];  // but for what lies elsewhere, see bind
  bool is_stream;
  Fields fields;
};

void request_dealloc(PyObject* self) {
  auto* request = reinterpret_cast<Request*>(self);
  Py_XDECREF(request->data);
  for (PyObject* bound : request->bound) Py_XDECREF(bound);
  Py_TYPE(self)->tp_free(self);
}

const Fields& fields_of(PyObject* self) { return reinterpret_cast<Request*>(self)->fields; }

PyObject* get_data(PyObject* self, void*) { return Py_NewRef(reinterpret_cast<Request*>(self)->data); }

PyObject* get_is_stream(PyObject* self, void*) { return PyBool_FromLong(reinterpret_cast<Request*>(self)->is_stream); }

PyObject* get_id(PyObject* self, void*) { return PyLong_FromUnsignedLongLong(fields_of(self).id); }

PyObject* get_timeout_ms(PyObject* self, void*) { return PyLong_FromUnsignedLongLong(fields_of(self).timeout_ms); }

PyObject* get_weights_version(PyObject* self, void*) {
  return PyLong_FromUnsignedLongLong(fields_of(self).weights_version);
}

PyObject* get_num_tokens(PyObject* self, void*) {
  return PyLong_FromUnsignedLongLong(fields_of(self).tensors[0].shape[0]);
}

PyObject* get_layer(PyObject* self, void*) {
  const Fields& fields = fields_of(self);
  return PyUnicode_DecodeUTF8(reinterpret_cast<const char*>(fields.layer), fields.layer_bytes, nullptr);
}

PyObject* slice_of(const Slice& slice) {
  if (!slice.is_given) return Py_NewRef(Py_None);
  return Py_BuildValue("(KKK)", static_cast<unsigned long long>(slice.region),
                       static_cast<unsigned long long>(slice.offset), static_cast<unsigned long long>(slice.num_bytes));
}

PyObject* get_slices(PyObject* self, void*) {
  const Fields& fields = fields_of(self);
  if (!fields.has_slices()) Py_RETURN_NONE;
  return Py_BuildValue("(NNNNN)", slice_of(fields.slice(0)), slice_of(fields.slice(1)), slice_of(fields.slice(2)),
                       slice_of(fields.slice(3)), slice_of(fields.slice(kAnswer)));
}

PyDoc_STRVAR(bind_doc,
             "bind(number, data)\n\n"
             "Say what lies in a slice, by its number in the order of slices; data: bytes, or a view of them.");

PyObject* request_bind(PyObject* self, PyObject* const* arguments, Py_ssize_t given) {
  if (given != 2) {
    PyErr_Format(PyExc_TypeError, "%zd arguments are given, expected 2", given);
    return nullptr;
  }
  const Py_ssize_t number = PyLong_AsSsize_t(arguments[0]);
  if (number == -1 && PyErr_Occurred()) return nullptr;
  auto* request = reinterpret_cast<Request*>(self);
  if (number < 0 || number > kAnswer || !request->fields.slice(static_cast<int>(number)).is_given) {
    PyErr_Format(PyExc_ValueError, "number is %zd, expected that of a slice", number);
    return nullptr;
  }
  Py_buffer data;
  if (PyObject_GetBuffer(arguments[1], &data, PyBUF_SIMPLE) < 0) return nullptr;
  if (number != kAnswer) {
    Tensor& tensor = request->fields.tensors[number];
    tensor.data = static_cast<const uint8_t*>(data.buf);
    tensor.num_bytes = data.len;
  }
  PyBuffer_Release(&data);  // the object keeps its memory where it is
  Py_XSETREF(request->bound[number], Py_NewRef(arguments[1]));
  Py_RETURN_NONE;
}

PyObject* request_bound(PyObject* self, PyObject* argument) {
  const Py_ssize_t number = PyLong_AsSsize_t(argument);
  if (number == -1 && PyErr_Occurred()) return nullptr;
  auto* request = reinterpret_cast<Request*>(self);
  if (number < 0 || number > kAnswer || request->bound[number] == nullptr) Py_RETURN_NONE;
  return Py_NewRef(request->bound[number]);
}

// (dtype, a view of the elements); None where there is no such tensor.
PyObject* part_of(PyObject* whole, const Request* request, int number) {
  const Tensor& tensor = request->fields.tensors[number];
  if (!tensor.is_given) return Py_NewRef(Py_None);
  if (request->bound[number] != nullptr) return Py_BuildValue("(IO)", tensor.dtype, request->bound[number]);
  const auto* base = reinterpret_cast<const uint8_t*>(PyBytes_AS_STRING(request->data));
  const Py_ssize_t start = tensor.data == nullptr ? 0 : tensor.data - base;
  PyObject* view = PySequence_GetSlice(whole, start, start + tensor.num_bytes);
  return view == nullptr ? nullptr : Py_BuildValue("(IN)", tensor.dtype, view);
}

PyDoc_STRVAR(check_doc,
             "check(hidden_size, num_experts, top_k, takes_wide, max_tokens, max_answer_bytes)\n\n"
             "(num_tokens, hidden_states, routing_logits, topk_ids, topk_weights, output_dtype, do_finalize,\n"
             "return_routing), tensors as (dtype, view) or None; None: it is not good, or not for this module.");

PyObject* request_check(PyObject* self, PyObject* const* arguments, Py_ssize_t given) {
  unsigned long long n[6];
  if (!numbers_of(arguments, given, 6, n)) return nullptr;
  const uint64_t hidden_size = n[0], num_experts = n[1], top_k = n[2], takes_wide = n[3], max_tokens = n[4];
  auto* request = reinterpret_cast<Request*>(self);
  const Fields& fields = request->fields;
  const Tensor& hidden = fields.tensors[0];
  const uint64_t num_tokens = hidden.shape[0];
  const uint32_t output_dtype = fields.output_dtype == kUnset ? kBFloat16 : fields.output_dtype;

  bool is_good = hidden.is_given && hidden.dtype >= kFloat32 && hidden.dtype <= kFp8 &&
                 (takes_wide || hidden.dtype == kFp8) && num_tokens <= max_tokens &&
                 is_matrix(hidden, num_tokens, hidden_size) && output_dtype >= kFloat32 && output_dtype <= kFloat16;
  const Tensor& logits = fields.tensors[1];
  const Tensor& ids = fields.tensors[2];
  const Tensor& weights = fields.tensors[3];
  for (int number = 0; number <= kAnswer; ++number) {
    is_good &= !fields.slice(number).is_given || request->bound[number] != nullptr;
  }
  if (is_good && logits.is_given) {
    is_good = !ids.is_given && !weights.is_given && is_real(logits) && is_matrix(logits, num_tokens, num_experts) &&
              !has_nan(logits);
  } else if (is_good) {
    is_good = ids.is_given && weights.is_given && ids.dtype == kInt32 && is_real(weights) &&
              is_matrix(ids, num_tokens, top_k) && is_matrix(weights, num_tokens, top_k) &&
              ids_in_range(ids, static_cast<int32_t>(num_experts)) && !has_nan(weights);
  }
  if (is_good) {  // as wire._answer_bytes
    const uint64_t slots = num_tokens * top_k;
    const uint64_t rows = fields.do_finalize ? num_tokens * item_bytes(output_dtype) : slots * 2;
    is_good = rows * hidden_size + slots * 10 + 4096 <= n[5];
  }
  if (!is_good) Py_RETURN_NONE;

  PyObject* whole = PyMemoryView_FromObject(request->data);
  if (whole == nullptr) return nullptr;
  PyObject* parts[kNumTensors];
  for (int number = 0; number < kNumTensors; ++number) parts[number] = part_of(whole, request, number);
  Py_DECREF(whole);
  if (parts[0] == nullptr || parts[1] == nullptr || parts[2] == nullptr || parts[3] == nullptr) {
    for (PyObject* part : parts) Py_XDECREF(part);
    return nullptr;
  }
  return Py_BuildValue("(KNNNNIOO)", static_cast<unsigned long long>(num_tokens), parts[0], parts[1], parts[2],
                       parts[3], output_dtype, fields.do_finalize ? Py_True : Py_False,
                       fields.return_routing ? Py_True : Py_False);
}

PyGetSetDef request_members[] = {
    {"data", get_data, nullptr, "The bytes that it was read from.", nullptr},
    {"is_stream", get_is_stream, nullptr, "Whether they were a ForwardStreamRequest.", nullptr},
    {"id", get_id, nullptr, "ForwardStreamRequest.id.", nullptr},
    {"timeout_ms", get_timeout_ms, nullptr, "ForwardStreamRequest.timeout_ms.", nullptr},
    {"layer", get_layer, nullptr, "ForwardRequest.layer.", nullptr},
    {"weights_version", get_weights_version, nullptr, "ForwardRequest.weights_version.", nullptr},
    {"slices", get_slices, nullptr,
     "(region, offset, nbytes) or None of hidden_states, routing_logits, topk_ids, topk_weights and the answer; None: "
     "all None.",
     nullptr},
    {"num_tokens", get_num_tokens, nullptr, "Rows of hidden_states as the request itself says.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMethodDef request_methods[] = {
    {"check", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(request_check)), METH_FASTCALL, check_doc},
    {"bind", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(request_bind)), METH_FASTCALL, bind_doc},
    {"bound", request_bound, METH_O, "What was bound to a slice, by number; None: nothing."},
    {nullptr, nullptr, 0, nullptr},
};

PyTypeObject request_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

// A Request, or None where these bytes are not for this module.
PyObject* parse(PyObject* data, bool is_stream) {
  if (!PyBytes_Check(data)) {
    PyErr_Format(PyExc_TypeError, "data is %s, expected bytes", Py_TYPE(data)->tp_name);
    return nullptr;
  }
  const auto* start = reinterpret_cast<const uint8_t*>(PyBytes_AS_STRING(data));
  const Reader in{start, start + PyBytes_GET_SIZE(data)};
  Fields fields;
  const bool is_good = is_stream ? read_stream_request(in, &fields) && fields.has_request : read_request(in, &fields);
  if (!is_good || (!is_stream && fields.has_slices()) || fields.layer_bytes == 0 || fields.layer_bytes > kMaxNameBytes)
    Py_RETURN_NONE;
  for (Py_ssize_t n = 0; n < fields.layer_bytes; ++n) {
    if (fields.layer[n] >= 0x80) Py_RETURN_NONE;  // a name of other letters: Python knows UTF-8
  }
  PyObject* self = request_type.tp_alloc(&request_type, 0);
  if (self == nullptr) return nullptr;
  auto* request = reinterpret_cast<Request*>(self);
  request->data = Py_NewRef(data);
  request->is_stream = is_stream;
  request->fields = fields;
  return self;
}

PyObject* parse_request(PyObject*, PyObject* data) { return parse(data, false); }

PyObject* parse_stream_request(PyObject*, PyObject* data) { return parse(data, true); }

// ---- writing ----

// An answer that is one matrix.
struct Matrix {
  bool is_stream;
  uint64_t request_id;
  uint32_t dtype;
  uint64_t num_tokens, hidden_size;

  Py_ssize_t data_bytes() const { return static_cast<Py_ssize_t>(num_tokens * hidden_size * item_bytes(dtype)); }
};

// What precedes its elements, which follow unless they lie in a slice. tail_bytes: of what tail_of gives.
Writer head_of(const Matrix& matrix, const Slice& elsewhere, size_t tail_bytes) {
  const auto data_bytes = static_cast<uint64_t>(matrix.data_bytes());
  const uint64_t sent_bytes = elsewhere.is_given ? 0 : data_bytes;
  Writer shape, tensor, slice, message, head;
  shape.varint(matrix.num_tokens);
  shape.varint(matrix.hidden_size);
  tensor.number(1, matrix.dtype);
  tensor.head(2, shape.size);
  tensor.append(shape);
  if (elsewhere.is_given) {
    slice.number(1, elsewhere.region);
    slice.number(2, elsewhere.offset);
    slice.number(3, data_bytes);
    tensor.head(4, slice.size);
    tensor.append(slice);
  } else if (data_bytes) {  // an empty field is left out
    tensor.head(3, data_bytes);
  }
  message.head(1, tensor.size + sent_bytes);
  message.append(tensor);
  if (matrix.is_stream) {
    head.number(1, matrix.request_id);
    head.head(2, message.size + sent_bytes + tail_bytes);
  }
  head.append(message);
  return head;
}

constexpr int kNumTimes = 7;  // in the order of the proto's Timing
constexpr size_t kMaxTailBytes = 96;

// What follows the elements.
Writer tail_of(const unsigned long long* times, uint64_t weights_version) {
  Writer timing, tail;
  for (int n = 0; n < kNumTimes; ++n) timing.number(n + 1, times[n]);
  tail.head(6, timing.size);
  tail.append(timing);
  tail.number(7, weights_version);
  return tail;
}

PyDoc_STRVAR(
    encode_doc,
    "encode_response(is_stream, request_id, dtype, num_tokens, hidden_size, address, queue_us, copy_in_us,\n"
    "compute_us, copy_out_us, batch_tokens, batch_requests, queue_depth_tokens, weights_version, copies,\n"
    "place=None)\n\n"
    "A serialised ForwardResponse whose output is the [num_tokens, hidden_size] matrix at the address, which\n"
    "is there when the Copies have run, or at once where copies is None; is_stream: within a\n"
    "ForwardStreamResponse. place: (memory, start, region, offset) where the matrix goes instead, and how the\n"
    "message is to name it.");

PyObject* encode_response(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  constexpr Py_ssize_t kNumNumbers = 6 + kNumTimes + 1;
  if (given < kNumNumbers + 1 || given > kNumNumbers + 2) {
    PyErr_Format(PyExc_TypeError, "%zd arguments are given, expected %zd or %zd", given, kNumNumbers + 1,
                 kNumNumbers + 2);
    return nullptr;
  }
  unsigned long long n[kNumNumbers];
  if (!numbers_of(arguments, kNumNumbers, kNumNumbers, n)) return nullptr;
  PyObject* copies = arguments[kNumNumbers];
  const bool is_at_once = copies == Py_None;
  if (!is_at_once && !PyObject_TypeCheck(copies, &expertd::copies_type)) {
    PyErr_Format(PyExc_TypeError, "copies is %s, expected Copies or None", Py_TYPE(copies)->tp_name);
    return nullptr;
  }
  expertd::CopyList own;
  expertd::CopyList& list = is_at_once ? own : expertd::list_of(copies);
  const Matrix matrix{n[0] != 0, n[1], static_cast<uint32_t>(n[2]), n[3], n[4]};
  const auto* from = reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(n[5]));
  Py_ssize_t sent_bytes = matrix.data_bytes();  // in the message
  Slice elsewhere;
  if (given > kNumNumbers + 1 && arguments[kNumNumbers + 1] != Py_None) {
    PyObject* memory;
    Py_ssize_t start;
    unsigned long long region, offset;
    if (!PyArg_ParseTuple(arguments[kNumNumbers + 1], "OnKK", &memory, &start, &region, &offset)) return nullptr;
    if (!list.note(memory, start, from, matrix.data_bytes())) return nullptr;
    elsewhere = {true, region, offset};
    sent_bytes = 0;
  }
  const Writer tail = tail_of(n + 6, n[kNumNumbers - 1]), head = head_of(matrix, elsewhere, tail.size);
  const auto head_bytes = static_cast<Py_ssize_t>(head.size), tail_bytes = static_cast<Py_ssize_t>(tail.size);
  PyObject* answer = PyBytes_FromStringAndSize(nullptr, head_bytes + sent_bytes + tail_bytes);
  if (answer == nullptr) return nullptr;
  auto* to = reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(answer));
  std::memcpy(to, head.bytes, head.size);
  if (sent_bytes) list.note(answer, to + head.size, from, sent_bytes);
  std::memcpy(to + head_bytes + sent_bytes, tail.bytes, tail.size);
  if (is_at_once) list.run();
  return answer;
}

// ---- the type Answer ----

// The bytes of an answer that is still to come, in the memory for messages, where others put its elements.
struct Answer {
  PyObject_HEAD;
  Matrix matrix;
  Py_ssize_t head_bytes;
  PyObject* message;  // bytes; the elements start behind head_bytes
  bool is_finished;
};

PyTypeObject answer_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

Answer* answer_of(PyObject* self) { return reinterpret_cast<Answer*>(self); }

uint8_t* bytes_of(const Answer* answer) { return reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(answer->message)); }

PyDoc_STRVAR(make_answer_doc,
             "make_answer(is_stream, request_id, dtype, num_tokens, hidden_size)\n\n"
             "An Answer, whose output is a [num_tokens, hidden_size] matrix; None: there is no room for it in the\n"
             "memory for messages, or no such memory.");

PyObject* make_answer(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  unsigned long long n[5];
  if (!numbers_of(arguments, given, 5, n)) return nullptr;
  const Matrix matrix{n[0] != 0, n[1], static_cast<uint32_t>(n[2]), n[3], n[4]};
  const auto* memory = expertd::MessageMemory::get();
  // The head has the length of what follows, whose own last bytes are not known: where they decide how long the head
  // is, as they do for one size in thousands, the answer is not made before it is known.
  const size_t head_bytes = head_of(matrix, {}, 0).size;
  if (memory == nullptr || matrix.data_bytes() < static_cast<Py_ssize_t>(expertd::MessageMemory::kLeastBytes) ||
      head_of(matrix, {}, kMaxTailBytes).size != head_bytes) {
    Py_RETURN_NONE;
  }
  const Py_ssize_t num_bytes = static_cast<Py_ssize_t>(head_bytes + kMaxTailBytes) + matrix.data_bytes();
  PyObject* message = PyBytes_FromStringAndSize(nullptr, num_bytes);
  if (message == nullptr) return nullptr;
  if (!memory->contains(message)) {
    Py_DECREF(message);
    Py_RETURN_NONE;
  }
  PyObject* self = answer_type.tp_alloc(&answer_type, 0);
  if (self == nullptr) {
    Py_DECREF(message);
    return nullptr;
  }
  Answer* answer = answer_of(self);
  answer->matrix = matrix;
  answer->head_bytes = static_cast<Py_ssize_t>(head_bytes);
  answer->message = message;
  return self;
}

void answer_dealloc(PyObject* self) {
  Py_XDECREF(answer_of(self)->message);
  Py_TYPE(self)->tp_free(self);
}

// The elements. The memory is this one's until it goes, also when the message is somebody else's as well.
int answer_buffer(PyObject* self, Py_buffer* view, int flags) {
  const Answer* answer = answer_of(self);
  return PyBuffer_FillInfo(view, self, bytes_of(answer) + answer->head_bytes, answer->matrix.data_bytes(), 0, flags);
}

PyDoc_STRVAR(finish_doc,
             "finish(queue_us, copy_in_us, compute_us, copy_out_us, batch_tokens, batch_requests,\n"
             "queue_depth_tokens, weights_version)\n\n"
             "The message, as encode_response makes it; once, when its elements are there.");

PyObject* answer_finish(PyObject* self, PyObject* const* arguments, Py_ssize_t given) {
  unsigned long long n[kNumTimes + 1];
  if (!numbers_of(arguments, given, kNumTimes + 1, n)) return nullptr;
  Answer* answer = answer_of(self);
  if (answer->is_finished) {
    PyErr_SetString(PyExc_RuntimeError, "an Answer is finished once");
    return nullptr;
  }
  answer->is_finished = true;
  const Writer tail = tail_of(n, n[kNumTimes]), head = head_of(answer->matrix, {}, tail.size);
  const Py_ssize_t data_bytes = answer->matrix.data_bytes();
  std::memcpy(bytes_of(answer), head.bytes, head.size);
  std::memcpy(bytes_of(answer) + answer->head_bytes + data_bytes, tail.bytes, tail.size);
  // It stays where it is, see MessageMemory.
  if (_PyBytes_Resize(&answer->message, answer->head_bytes + data_bytes + static_cast<Py_ssize_t>(tail.size)) < 0) {
    return nullptr;
  }
  return Py_NewRef(answer->message);
}

PyMethodDef answer_methods[] = {
    {"finish", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(answer_finish)), METH_FASTCALL, finish_doc},
    {nullptr, nullptr, 0, nullptr},
};

PyBufferProcs answer_buffers = {answer_buffer, nullptr};

// ---- memory ----

PyDoc_STRVAR(
    use_message_memory_doc,
    "use_message_memory(memory)\n\n"
    "Have large bytes objects lie in a writable buffer from now on, as long as it has room. Once in a process,\n"
    "which keeps the buffer for good. Raises RuntimeError the second time.");

PyObject* use_message_memory(PyObject*, PyObject* memory) {
  Py_buffer buffer;
  if (PyObject_GetBuffer(memory, &buffer, PyBUF_WRITABLE) < 0) return nullptr;
  if (!expertd::MessageMemory::make(static_cast<uint8_t*>(buffer.buf), static_cast<size_t>(buffer.len))) {
    PyBuffer_Release(&buffer);
    PyErr_SetString(PyExc_RuntimeError, "a process has one memory for messages, and this one has it");
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* free_message_bytes(PyObject*, PyObject*) {
  const auto* memory = expertd::MessageMemory::get();
  return PyLong_FromSize_t(memory == nullptr ? 0 : memory->free_bytes());
}

PyDoc_STRVAR(set_copy_helpers_doc,
             "set_copy_helpers(count)\n\n"
             "How many threads help with large copies. By default one for every four cores, and three at most.");

PyObject* set_copy_helpers(PyObject*, PyObject* count) {
  const unsigned long helpers = PyLong_AsUnsignedLong(count);
  if (PyErr_Occurred()) return nullptr;
  expertd::CopyThreads::shared().set_helpers(static_cast<unsigned>(helpers));
  Py_RETURN_NONE;
}

PyDoc_STRVAR(copy_doc,
             "copy(destination, offset, source)\n\n"
             "Write a buffer's bytes into a writable one. Raises ValueError where they do not fit.");

PyObject* copy(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  Py_buffer to, from;
  Py_ssize_t offset;
  if (!expertd::buffers_of(arguments, given, &to, &offset, &from)) return nullptr;
  expertd::CopyList list;
  list.note(to, offset, from);
  list.run();
  Py_RETURN_NONE;
}

PyObject* address_of(PyObject*, PyObject* memory) {
  Py_buffer buffer;
  if (PyObject_GetBuffer(memory, &buffer, PyBUF_SIMPLE) < 0) return nullptr;
  PyObject* address = PyLong_FromVoidPtr(buffer.buf);
  PyBuffer_Release(&buffer);
  return address;
}

PyDoc_STRVAR(count_ids_doc,
             "count_ids(ids, first, counts)\n\n"
             "Add to counts[id - first], int64, for each of the ids, int16, int32 or int64, that is in range.");

template <typename Id>
void add_counts(const void* ids, Py_ssize_t num_ids, long long first, const Py_buffer& counts) {
  const auto* from = static_cast<const Id*>(ids);
  auto* to = static_cast<int64_t*>(counts.buf);
  const long long size = counts.len / static_cast<Py_ssize_t>(sizeof(int64_t));
  for (Py_ssize_t n = 0; n < num_ids; ++n) {
    const long long at = from[n] - first;
    if (at >= 0 && at < size) ++to[at];
  }
}

// Lets go of the counts; false, with an exception, where a type is none that can be counted.
bool add_counts(const void* ids, Py_ssize_t num_bytes, Py_ssize_t item_size, long long first, PyObject* into) {
  Py_buffer counts;
  if (PyObject_GetBuffer(into, &counts, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0) return false;
  const bool is_good = counts.itemsize == sizeof(int64_t) && (item_size == 2 || item_size == 4 || item_size == 8);
  if (!is_good) {
    PyErr_Format(PyExc_TypeError, "ids of %zd bytes and counts of %zd, expected 2, 4 or 8, and 8", item_size,
                 counts.itemsize);
  } else if (item_size == 2) {
    add_counts<int16_t>(ids, num_bytes / 2, first, counts);
  } else if (item_size == 4) {
    add_counts<int32_t>(ids, num_bytes / 4, first, counts);
  } else {
    add_counts<int64_t>(ids, num_bytes / 8, first, counts);
  }
  PyBuffer_Release(&counts);
  return is_good;
}

PyObject* count_ids(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  if (given != 3) {
    PyErr_Format(PyExc_TypeError, "%zd arguments are given, expected 3", given);
    return nullptr;
  }
  const long long first = PyLong_AsLongLong(arguments[1]);
  if (first == -1 && PyErr_Occurred()) return nullptr;
  Py_buffer ids;
  if (PyObject_GetBuffer(arguments[0], &ids, PyBUF_C_CONTIGUOUS) < 0) return nullptr;
  const bool is_good = add_counts(ids.buf, ids.len, ids.itemsize, first, arguments[2]);
  PyBuffer_Release(&ids);
  if (!is_good) return nullptr;
  Py_RETURN_NONE;
}

PyDoc_STRVAR(count_ids_at_doc,
             "count_ids_at(address, number, item_size, first, counts)\n\n"
             "As count_ids, of so many ids at an address, each of item_size bytes.");

PyObject* count_ids_at(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  constexpr Py_ssize_t kNumNumbers = 4;
  if (given != kNumNumbers + 1) {
    PyErr_Format(PyExc_TypeError, "%zd arguments are given, expected %zd", given, kNumNumbers + 1);
    return nullptr;
  }
  unsigned long long n[kNumNumbers];
  if (!numbers_of(arguments, kNumNumbers, kNumNumbers, n)) return nullptr;
  const auto* ids = reinterpret_cast<const void*>(static_cast<uintptr_t>(n[0]));
  const auto item_size = static_cast<Py_ssize_t>(n[2]);
  const auto num_bytes = static_cast<Py_ssize_t>(n[1]) * item_size;
  if (!add_counts(ids, num_bytes, item_size, static_cast<long long>(n[3]), arguments[kNumNumbers])) return nullptr;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"parse_request", parse_request, METH_O, "A Request from a serialised ForwardRequest, or None."},
    {"parse_stream_request", parse_stream_request, METH_O,
     "A Request from a serialised ForwardStreamRequest, or None."},
    {"encode_response", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(encode_response)), METH_FASTCALL,
     encode_doc},
    {"make_answer", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(make_answer)), METH_FASTCALL,
     make_answer_doc},
    {"use_message_memory", use_message_memory, METH_O, use_message_memory_doc},
    {"free_message_bytes", free_message_bytes, METH_NOARGS, "Bytes of the memory for messages that nothing lies in."},
    {"count_ids", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(count_ids)), METH_FASTCALL, count_ids_doc},
    {"count_ids_at", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(count_ids_at)), METH_FASTCALL,
     count_ids_at_doc},
    {"copy", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(copy)), METH_FASTCALL, copy_doc},
    {"address_of", address_of, METH_O, "Where a buffer's bytes lie, as long as that does not move them."},
    {"set_copy_helpers", set_copy_helpers, METH_O, set_copy_helpers_doc},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_codec",
    "The wire format of the data path.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__codec() {
  request_type.tp_name = "expertd_server._codec.Request";
  request_type.tp_basicsize = sizeof(Request);
  request_type.tp_flags = Py_TPFLAGS_DEFAULT;
  request_type.tp_doc = "A request, read and not checked.";
  request_type.tp_dealloc = request_dealloc;
  request_type.tp_getset = request_members;
  request_type.tp_methods = request_methods;
  answer_type.tp_name = "expertd_server._codec.Answer";
  answer_type.tp_basicsize = sizeof(Answer);
  answer_type.tp_flags = Py_TPFLAGS_DEFAULT;
  answer_type.tp_doc = "A buffer: the elements of an answer that is still to come, within its message.";
  answer_type.tp_dealloc = answer_dealloc;
  answer_type.tp_methods = answer_methods;
  answer_type.tp_as_buffer = &answer_buffers;
  if (PyType_Ready(&request_type) < 0 || PyType_Ready(&answer_type) < 0 || !expertd::ready_copies_type()) {
    return nullptr;
  }
  PyObject* self = PyModule_Create(&module);
  if (self != nullptr &&
      (PyModule_AddObjectRef(self, "Request", reinterpret_cast<PyObject*>(&request_type)) < 0 ||
       PyModule_AddObjectRef(self, "Answer", reinterpret_cast<PyObject*>(&answer_type)) < 0 ||
       PyModule_AddObjectRef(self, "Copies", reinterpret_cast<PyObject*>(&expertd::copies_type)) < 0)) {
    Py_DECREF(self);
    return nullptr;
  }
  return self;
}
