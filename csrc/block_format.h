// How requests and answers lie in blocks of shared memory, as blocks.py specifies it.
#pragma once
#include "wire.h"

inline constexpr int kNumParts = 4;    // of a request: hidden_states, routing_logits, topk_ids, topk_weights
inline constexpr int kLogits = 1;      // of the parts
inline constexpr int kMaxTensors = 5;  // of an answer
inline constexpr Py_ssize_t kBlockAlignment = 64;
inline constexpr Py_ssize_t kMaxErrorBytes = 8192;
inline constexpr uint64_t kMostBytes = uint64_t{1} << 56;  // of a tensor anywhere

// Bytes of a caller's memory that both processes have mapped; region 0: none.
struct Where {
  uint64_t region, offset, num_bytes;
};

struct CallHead {
  uint64_t layer_id;
  double deadline_s;  // infinite: none
  uint64_t num_tokens, output_dtype, do_finalize, return_routing;
  Where hidden_states, place;  // place: where the output goes
};

struct AnswerHead {
  uint64_t timing[6];  // in the order of the proto's Timing
  uint64_t weights_version, queue_tokens;
};

struct Entry {
  uint64_t dtype, rank, rows, columns;  // dtype 0: the tensor is absent
  uint64_t at;                          // where its bytes start in the block; kElsewhere: not there
};

inline constexpr uint64_t kElsewhere =
    0;  // the first tensor alone: of a request in hidden_states, of an answer in place
inline constexpr Py_ssize_t kDirectoryAt = sizeof(CallHead);
static_assert(sizeof(AnswerHead) <= kDirectoryAt);

constexpr Py_ssize_t aligned(Py_ssize_t num_bytes) {
  return (num_bytes + kBlockAlignment - 1) / kBlockAlignment * kBlockAlignment;
}

inline constexpr Py_ssize_t kDataAt = aligned(kDirectoryAt + kMaxTensors * static_cast<Py_ssize_t>(sizeof(Entry)));

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

  // Raises ValueError where the tensor does not lie in the block, unless it is the first and `may_be_elsewhere`.
  bool read_entry(int index, Entry* entry, Py_ssize_t* num_bytes, bool may_be_elsewhere) const {
    *entry = read<Entry>(kDirectoryAt + index * sizeof(Entry));
    *num_bytes = 0;
    if (entry->dtype == 0) return true;
    const bool is_elsewhere = entry->at == kElsewhere;
    const auto length = is_elsewhere ? kMostBytes : static_cast<uint64_t>(buffer.len);
    const uint64_t item = item_bytes(static_cast<uint32_t>(entry->dtype));
    const bool is_good = (!is_elsewhere || (index == 0 && may_be_elsewhere)) && entry->at <= length &&
                         (entry->columns == 0 || entry->rows <= length / entry->columns) &&
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
