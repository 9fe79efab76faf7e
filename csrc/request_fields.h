// What a request says, read from protobuf's wire format and checked, without a word of Python: for codec.cpp alone.
//
// `wire_parse.py` and `wire_check.py` specify it. Whatever is not read here, or not found good, they look at again.
#pragma once

#include "wire.h"

// One more than any tensor of the contract has.
constexpr int kMaxRank = 3;
constexpr int kMaxLengthBytes = 5;  // protobuf refuses a length that has more, whatever its value
constexpr Py_ssize_t kMaxNameBytes = 256;

// ---- reading ----

struct Reader {
  const uint8_t* at;
  const uint8_t* end;

  // A varint below 2^63.
  bool varint(uint64_t* value) {
    uint64_t result = 0;
    for (int shift = 0; shift < 63; shift += 7) {
      if (at >= end) return false;
      const uint8_t byte = *at++;
      result |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) {
        *value = result;
        return true;
      }
    }
    return false;
  }

  // What a length announces, as a reader of its own.
  bool delimited(Reader* inner) {
    const uint8_t* start = at;
    uint64_t length;
    if (!varint(&length) || at - start > kMaxLengthBytes || length > static_cast<uint64_t>(end - at)) return false;
    *inner = {at, at + length};
    at += length;
    return true;
  }
};

// Which fields were seen; each may come once.
struct Seen {
  uint32_t fields = 0;

  bool first(uint8_t key) {
    const uint32_t bit = 1u << (key >> 3);
    if (key >= 0x80 || (fields & bit)) return false;
    fields |= bit;
    return true;
  }
};

// A RegionSlice: bytes of memory that the caller shares.
struct Slice {
  bool is_given = false;
  uint64_t region = 0, offset = 0, num_bytes = 0;
};

struct Tensor {
  bool is_given = false;
  uint32_t dtype = 0;
  int rank = 0;
  uint64_t shape[kMaxRank] = {0, 0, 0};
  const uint8_t* data = nullptr;  // in the request's bytes, or in what was bound to its slice
  Py_ssize_t num_bytes = 0;
  Slice slice;
};

// hidden_states, routing_logits, topk_ids, topk_weights.
constexpr int kNumTensors = 4;
constexpr int kAnswer = kNumTensors;  // its slice comes after those of the tensors

struct Fields {
  uint64_t id = 0;
  uint64_t timeout_ms = 0;
  bool has_request = false;
  const uint8_t* layer = nullptr;
  Py_ssize_t layer_bytes = 0;
  Tensor tensors[kNumTensors];
  Slice answer_slice;
  uint32_t output_dtype = 0;
  bool do_finalize = true;
  bool return_routing = false;
  uint64_t weights_version = 0;

  const Slice& slice(int number) const { return number == kAnswer ? answer_slice : tensors[number].slice; }

  bool has_slices() const {
    bool found = false;
    for (int number = 0; number <= kAnswer; ++number) found |= slice(number).is_given;
    return found;
  }
};

inline bool read_slice(Reader in, Slice* slice) {
  slice->is_given = true;
  Seen seen;
  while (in.at < in.end) {
    const uint8_t key = *in.at++;
    uint64_t value;
    if (!seen.first(key) || !in.varint(&value)) return false;
    if (key == 0x08 && value <= UINT32_MAX) {
      slice->region = value;
    } else if (key == 0x10) {
      slice->offset = value;
    } else if (key == 0x18) {
      slice->num_bytes = value;
    } else {
      return false;
    }
  }
  return true;
}

inline bool read_shape(Reader in, Tensor* tensor) {
  while (in.at < in.end) {
    uint64_t extent;
    if (tensor->rank == kMaxRank || !in.varint(&extent) || extent > UINT32_MAX) return false;
    tensor->shape[tensor->rank++] = extent;
  }
  return true;
}

inline bool read_tensor(Reader in, Tensor* tensor) {
  tensor->is_given = true;
  Seen seen;
  while (in.at < in.end) {
    const uint8_t key = *in.at++;
    if (!seen.first(key)) return false;
    if (key == 0x08) {
      uint64_t dtype;
      if (!in.varint(&dtype) || dtype >= 128) return false;
      tensor->dtype = static_cast<uint32_t>(dtype);
      continue;
    }
    Reader inner;
    if (!in.delimited(&inner)) return false;
    if (key == 0x1A) {
      tensor->data = inner.at;
      tensor->num_bytes = inner.end - inner.at;
    } else if (!(key == 0x12 && read_shape(inner, tensor)) && !(key == 0x22 && read_slice(inner, &tensor->slice))) {
      return false;
    }
  }
  return !(tensor->slice.is_given && tensor->data != nullptr);  // one of them: Python says so
}

inline bool read_options(Reader in, Fields* fields) {
  Seen seen;
  while (in.at < in.end) {
    const uint8_t key = *in.at++;
    uint64_t value;
    if (!seen.first(key) || !in.varint(&value)) return false;
    if (key == 0x08 && value < 128) {
      fields->output_dtype = static_cast<uint32_t>(value);
    } else if (key == 0x10) {
      fields->do_finalize = value != 0;
    } else if (key == 0x18) {
      fields->return_routing = value != 0;
    } else {
      return false;
    }
  }
  return true;
}

inline bool read_request(Reader in, Fields* fields) {
  fields->has_request = true;
  Seen seen;
  while (in.at < in.end) {
    const uint8_t key = *in.at++;
    if (!seen.first(key)) return false;
    if (key == 0x38) {
      if (!in.varint(&fields->weights_version)) return false;
      continue;
    }
    Reader inner;
    if (!in.delimited(&inner)) return false;
    bool is_good = true;
    switch (key) {
      case 0x0A:
        fields->layer = inner.at;
        fields->layer_bytes = inner.end - inner.at;
        break;
      case 0x12:
      case 0x1A:
      case 0x22:
      case 0x2A:
        is_good = read_tensor(inner, &fields->tensors[(key >> 3) - 2]);
        break;
      case 0x32:
        is_good = read_options(inner, fields);
        break;
      case 0x42:
        is_good = read_slice(inner, &fields->answer_slice);
        break;
      default:
        is_good = false;
    }
    if (!is_good) return false;
  }
  return true;
}

inline bool read_stream_request(Reader in, Fields* fields) {
  Seen seen;
  while (in.at < in.end) {
    const uint8_t key = *in.at++;
    if (!seen.first(key)) return false;
    if (key == 0x12) {
      Reader inner;
      if (!in.delimited(&inner) || !read_request(inner, fields)) return false;
      continue;
    }
    uint64_t value;
    if (!in.varint(&value)) return false;
    if (key == 0x08) {
      fields->id = value;
    } else if (key == 0x18 && value <= UINT32_MAX) {
      fields->timeout_ms = value;
    } else {
      return false;
    }
  }
  return true;
}

// ---- checking ----

inline bool is_matrix(const Tensor& tensor, uint64_t rows, uint64_t columns) {
  return tensor.rank == 2 && tensor.shape[0] == rows && tensor.shape[1] == columns &&
         static_cast<uint64_t>(tensor.num_bytes) == rows * columns * item_bytes(tensor.dtype);
}

inline bool is_real(const Tensor& tensor) { return tensor.dtype == kFloat32 || tensor.dtype == kBFloat16; }

inline bool has_nan(const Tensor& tensor) { return has_nan(tensor.dtype, tensor.data, tensor.num_bytes); }

inline bool ids_in_range(const Tensor& tensor, int32_t num_experts) {
  uint32_t found = 0;
  for (Py_ssize_t at = 0; at < tensor.num_bytes; at += 4) {
    int32_t id;
    std::memcpy(&id, tensor.data + at, 4);
    found |= (id < -1) | (id >= num_experts);
  }
  return found == 0;
}
