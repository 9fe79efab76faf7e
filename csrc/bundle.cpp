// Requests that may share a batch, taken through the engine together: what Python does for a request it does for a
// bundle, and the rest is here. bundle.py specifies it; spans.py, blocks.py and pinning.py say how the parts are done
// one by one, and tests hold both together.
//
// NOTE: the interpreter's lock makes every method atomic; none of them lets go of it.
#include "bundle.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "block_format.h"
#include "held_memory.h"
#include "ring.h"
#include "spans.h"

namespace {

constexpr Py_ssize_t kCopyHereBytes = 16 * 1024;     // less is copied before it could be noted and handed on
constexpr uint64_t kMostTokens = uint64_t{1} << 32;  // of a member: a front-end lets far fewer pass

// Bytes in one of a bundle's memories.
struct Piece {
  size_t memory = 0;
  uint8_t* start = nullptr;
  Py_ssize_t num_bytes = 0;
};

// Who asked: an object of the gate's, and the ring of answers. Borrowed by members, by its index in their bundle.
struct Source {
  Ref object, ring;
};

struct Member {
  size_t source;
  uint64_t number, num_tokens;
  Py_ssize_t offset, num_bytes;  // of its block
  uint8_t* block;
  double deadline_s;
  double joined_s;  // when it was read
  Piece parts[3];   // hidden states; logits, or ids and weights
  Piece place;      // where the output goes
  bool is_placed;   // in a caller's memory, not in the block
  bool is_direct;   // the device puts it there
};

struct Kind {
  uint64_t layer_id, hidden_dtype, output_dtype;
  bool is_routed;

  bool operator==(const Kind& other) const {
    return layer_id == other.layer_id && hidden_dtype == other.hidden_dtype && output_dtype == other.output_dtype &&
           is_routed == other.is_routed;
  }
};

struct Requests {
  Kind kind{};
  std::vector<Source> sources;
  std::vector<Memory> memories;
  std::vector<Member> members;
  uint64_t num_tokens = 0;
  bool has_begun = false;
  double begun_s = 0.0;
  bool is_spent = false;  // answers may lie over requests
};

struct Bundle {
  PyObject_HEAD;
  Requests* requests;
};

PyTypeObject bundle_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

Requests& of(PyObject* self) { return *reinterpret_cast<Bundle*>(self)->requests; }

PyObject* new_bundle(const Kind& kind) {
  PyObject* self = bundle_type.tp_alloc(&bundle_type, 0);
  if (self == nullptr) return nullptr;
  auto* requests = reinterpret_cast<Bundle*>(self)->requests = new (std::nothrow) Requests();
  if (requests == nullptr) {
    Py_DECREF(self);
    return PyErr_NoMemory();
  }
  requests->kind = kind;
  return self;
}

void bundle_dealloc(PyObject* self) {
  delete reinterpret_cast<Bundle*>(self)->requests;
  Py_TYPE(self)->tp_free(self);
}

// What BlockPlace of bundle.py describes.
PyObject* place_of(const Requests& requests, const Member& member) {
  return Py_BuildValue("(OKnn)", requests.sources[member.source].object.get(),
                       static_cast<unsigned long long>(member.number), member.offset, member.num_bytes);
}

// The index of who asked, which is added where it is new.
size_t source_of(Requests* requests, PyObject* object, PyObject* ring) {
  auto& sources = requests->sources;
  for (size_t n = 0; n < sources.size(); ++n) {
    if (sources[n].object.get() == object) return n;
  }
  sources.push_back({Ref(Py_NewRef(object)), Ref(Py_NewRef(ring))});
  return sources.size() - 1;
}

// ---- making bundles ----

// What is asked in a block, where that is a plain request; members' memories are looked up later.
struct Asked {
  Kind kind;
  CallHead head;
  Entry parts[3];
  Py_ssize_t part_bytes[3];
};

// Whether it is one that bundles are for: a whole sum, no routing back, and types that need no conversion.
bool is_plain(const Block& block, Asked* asked) {
  asked->head = block.read<CallHead>(0);
  const CallHead& head = asked->head;
  if (!head.do_finalize || head.return_routing || head.num_tokens > kMostTokens) return false;
  Entry entries[kNumParts];
  Py_ssize_t num_bytes[kNumParts];
  for (int n = 0; n < kNumParts; ++n) {
    if (!block.read_entry(n, &entries[n], &num_bytes[n], head.hidden_states.region != 0)) {
      PyErr_Clear();  // who reads it alone says so
      return false;
    }
  }
  const bool is_routed = entries[2].dtype != 0;
  if (is_routed ? entries[1].dtype != 0 || entries[2].dtype != kInt32 || entries[3].dtype != kBFloat16
                : entries[1].dtype != kFloat32 || entries[3].dtype != 0) {
    return false;
  }
  if (head.hidden_states.region != 0) num_bytes[0] = static_cast<Py_ssize_t>(head.hidden_states.num_bytes);
  for (int n = 0, part = 0; n < kNumParts; ++n) {
    if (entries[n].dtype == 0) continue;
    asked->parts[part] = entries[n];
    asked->part_bytes[part++] = num_bytes[n];
  }
  asked->kind = {head.layer_id, entries[0].dtype, head.output_dtype, is_routed};
  return entries[0].dtype != 0;
}

// The index of a region among a bundle's memories; -1: it is not mapped here, or with an exception set.
Py_ssize_t memory_of(Requests* requests, uint64_t region, PyObject* regions) {
  auto& memories = requests->memories;
  for (size_t n = 0; n < memories.size(); ++n) {
    if (memories[n].number == region) return static_cast<Py_ssize_t>(n);
  }
  Ref number(PyLong_FromUnsignedLongLong(region));
  PyObject* view = number ? PyDict_GetItemWithError(regions, number.get()) : nullptr;
  if (view == nullptr) return -1;
  Memory memory;
  memory.number = region;
  if (!memory.take(view)) return -1;
  memories.push_back(std::move(memory));
  return static_cast<Py_ssize_t>(memories.size()) - 1;
}

// Where bytes of a region lie; false: not here, or with an exception set.
bool find(Requests* requests, const Where& where, PyObject* regions, Piece* piece) {
  const Py_ssize_t memory = memory_of(requests, where.region, regions);
  if (memory < 0) return false;
  piece->memory = static_cast<size_t>(memory);
  piece->start = requests->memories[piece->memory].at(where.offset, where.num_bytes);
  piece->num_bytes = static_cast<Py_ssize_t>(where.num_bytes);
  return piece->start != nullptr;
}

// Add a request; false: who reads it alone says what is wrong, or with an exception set.
bool add_member(Requests* requests, const Asked& asked, Member member, PyObject* regions) {
  const CallHead& head = asked.head;
  member.num_tokens = head.num_tokens;
  member.deadline_s = head.deadline_s;
  for (int n = 0; n < 2 + asked.kind.is_routed; ++n) {
    member.parts[n] = {0, member.block + asked.parts[n].at, asked.part_bytes[n]};
  }
  if (head.hidden_states.region != 0 && !find(requests, head.hidden_states, regions, &member.parts[0])) return false;
  member.is_placed = head.place.region != 0;
  if (!member.is_placed) {
    member.place = {0, member.block + kDataAt, member.num_bytes - kDataAt};
  } else if (!find(requests, head.place, regions, &member.place)) {
    return false;
  }
  member.is_direct = false;
  requests->members.push_back(member);
  requests->num_tokens += member.num_tokens;
  return true;
}

PyDoc_STRVAR(bundles_of_doc,
             "bundles_of(descriptors, kind, source, ring, memory, regions, most_tokens, now_s)\n\nSee bundle.py.");

PyObject* bundles_of(PyObject*, PyObject* arguments) {
  PyObject *descriptors, *source, *ring, *memory, *regions;
  unsigned long long kind_wanted, most_tokens;
  double now_s;
  if (!PyArg_ParseTuple(arguments, "O!KOOOO!Kd:bundles_of", &PyList_Type, &descriptors, &kind_wanted, &source, &ring,
                        &memory, &PyDict_Type, &regions, &most_tokens, &now_s) ||
      !is_ring(ring)) {
    return nullptr;
  }
  Ref bundles(PyList_New(0)), others(PyList_New(0));
  Memory blocks;
  if (!bundles || !others || !blocks.take(memory)) return nullptr;
  std::vector<PyObject*> open;  // borrowed from `bundles`; few, as they differ in kind
  for (Py_ssize_t n = 0; n < PyList_GET_SIZE(descriptors); ++n) {
    PyObject* descriptor = PyList_GET_ITEM(descriptors, n);
    unsigned long long kind, number, offset, num_bytes;
    if (!PyTuple_Check(descriptor) || !PyArg_ParseTuple(descriptor, "KKKK", &kind, &number, &offset, &num_bytes)) {
      return nullptr;
    }
    Member member{};
    member.number = number;
    member.offset = static_cast<Py_ssize_t>(offset);
    member.num_bytes = static_cast<Py_ssize_t>(num_bytes);
    member.block = blocks.at(offset, num_bytes);
    member.joined_s = now_s;
    Asked asked{};
    Block block;
    bool is_taken = false;
    if (kind == kind_wanted && member.block != nullptr && member.num_bytes >= kDataAt) {
      block.buffer.buf = member.block;
      block.buffer.len = member.num_bytes;
      if (is_plain(block, &asked)) {
        const auto same = std::find_if(open.begin(), open.end(), [&](PyObject* each) {
          return of(each).kind == asked.kind && of(each).num_tokens + asked.head.num_tokens <= most_tokens;
        });
        PyObject* bundle = same == open.end() ? nullptr : *same;
        Ref made(bundle == nullptr ? new_bundle(asked.kind) : nullptr);
        if (bundle == nullptr) {
          bundle = made.get();
          Requests* requests = bundle == nullptr ? nullptr : &of(bundle);
          Memory first;
          if (requests == nullptr || !first.take(memory)) return nullptr;
          requests->memories.push_back(std::move(first));
          (void)source_of(requests, source, ring);
        }
        is_taken = add_member(&of(bundle), asked, member, regions);
        if (PyErr_Occurred()) return nullptr;
        if (is_taken && made) {
          if (PyList_Append(bundles.get(), bundle) < 0) return nullptr;
          open.push_back(bundle);
        }
      }
    }
    if (!is_taken && PyList_Append(others.get(), descriptor) < 0) return nullptr;
  }
  return PyTuple_Pack(2, bundles.get(), others.get());
}

// Whether a device is to copy so many bytes from or to there; -1, with an exception set, where that cannot be said.
int is_direct(const Requests& requests, const Piece& piece, Py_ssize_t num_bytes, Py_ssize_t least) {
  return num_bytes < least || num_bytes == 0 ? 0 : requests.memories[piece.memory].is_pinned(piece.start, num_bytes);
}

// Copy now, or note it in a native.Copies; both ends are the caller's to keep until that has run.
bool copy(PyObject* copies, uint8_t* to, const uint8_t* from, Py_ssize_t num_bytes) {
  if (num_bytes == 0) return true;  // there may be no address of nothing
  if (num_bytes < kCopyHereBytes) {
    std::memcpy(to, from, static_cast<size_t>(num_bytes));
    return true;
  }
  Ref view(PyMemoryView_FromMemory(reinterpret_cast<char*>(to), num_bytes, PyBUF_WRITE));
  if (!view) return false;
  Ref noted(PyObject_CallMethod(copies, "add_memory", "OnKn", view.get(), Py_ssize_t{0},
                                static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(from)), num_bytes));
  return static_cast<bool>(noted);
}

// ---- methods ----

PyObject* bundle_absorb(PyObject* self, PyObject* arguments) {
  PyObject* other;
  unsigned long long most_tokens, most_requests;
  if (!PyArg_ParseTuple(arguments, "O!KK:absorb", &bundle_type, &other, &most_tokens, &most_requests)) return nullptr;
  if (other == self) {
    PyErr_SetString(PyExc_ValueError, "a bundle absorbs another bundle");
    return nullptr;
  }
  Requests &requests = of(self), &others = of(other);
  if (!(requests.kind == others.kind) || requests.has_begun || others.has_begun) {
    PyErr_SetString(PyExc_ValueError, "both bundles must be of one kind, and neither have begun");
    return nullptr;
  }
  size_t count = 0;  // in order of arrival: nobody passes one that does not fit
  uint64_t num_tokens = 0;
  for (; count < others.members.size() && count < most_requests; ++count) {
    if (num_tokens + others.members[count].num_tokens > most_tokens) break;
    num_tokens += others.members[count].num_tokens;
  }
  if (count == 0) Py_RETURN_NONE;
  std::vector<size_t> sources;
  for (const Source& source : others.sources) {
    sources.push_back(source_of(&requests, source.object.get(), source.ring.get()));
  }
  const size_t first_memory = requests.memories.size();
  for (const Memory& memory : others.memories) {
    Memory again;
    if (!again.take_again(memory)) return nullptr;
    requests.memories.push_back(std::move(again));
  }
  const auto first = others.members.begin(), end = first + static_cast<std::ptrdiff_t>(count);
  for (auto member = first; member != end; ++member) {
    member->source = sources[member->source];
    for (Piece& part : member->parts) part.memory += first_memory;
    member->place.memory += first_memory;
    requests.members.push_back(*member);
  }
  requests.num_tokens += num_tokens;
  others.members.erase(first, end);
  others.num_tokens -= num_tokens;
  Py_RETURN_NONE;
}

// Take members out, as long as none has begun: those that `is_meant`, or with them all that are like them. They are
// returned as places; nullptr, with an exception set, where that fails.
template <typename IsMeant>
PyObject* take_out(Requests* requests, IsMeant is_meant) {
  Ref places(PyList_New(0));
  if (!places) return nullptr;
  auto& members = requests->members;
  for (const Member& member : members) {
    if (!is_meant(member)) continue;
    Ref place(place_of(*requests, member));
    if (!place || PyList_Append(places.get(), place.get()) < 0) return nullptr;
    requests->num_tokens -= member.num_tokens;
  }
  members.erase(std::remove_if(members.begin(), members.end(), is_meant), members.end());
  return places.release();
}

PyObject* bundle_cancel(PyObject* self, PyObject* arguments) {
  PyObject *source, *number = Py_None;
  if (!PyArg_ParseTuple(arguments, "O|O:cancel", &source, &number)) return nullptr;
  const uint64_t wanted = number == Py_None ? 0 : PyLong_AsUnsignedLongLong(number);
  if (PyErr_Occurred()) return nullptr;
  Requests& requests = of(self);
  if (requests.has_begun) return PyList_New(0);
  return take_out(&requests, [&](const Member& member) {
    return requests.sources[member.source].object.get() == source && (number == Py_None || member.number == wanted);
  });
}

PyObject* bundle_begin(PyObject* self, PyObject* argument) {
  const double now_s = PyFloat_AsDouble(argument);
  if (PyErr_Occurred()) return nullptr;
  Requests& requests = of(self);
  requests.has_begun = true;
  requests.begun_s = now_s;
  const auto is_late = [&](const Member& member) { return member.deadline_s <= now_s; };
  Ref waited(PyList_New(0));
  if (!waited) return nullptr;
  for (const Member& member : requests.members) {
    if (!is_late(member)) continue;
    Ref seconds(PyFloat_FromDouble(std::max(0.0, now_s - member.joined_s)));
    if (!seconds || PyList_Append(waited.get(), seconds.get()) < 0) return nullptr;
  }
  Ref places(take_out(&requests, is_late));
  return places ? PyTuple_Pack(2, places.get(), waited.get()) : nullptr;
}

// Have a part of the members' rows written to host memory of `room` bytes, from `*start` on, and go on to where they
// end; false, with an exception set, where that fails.
bool gather_part(const Requests& requests, int part, uint8_t* host, Py_ssize_t room, Py_ssize_t* start,
                 Py_ssize_t row_bytes, Py_ssize_t least_direct, Spans* spans, PyObject* copies) {
  if (part < 0 || part >= 2 + requests.kind.is_routed) {
    PyErr_Format(PyExc_ValueError, "there is no part %d", part);
    return false;
  }
  for (const Member& member : requests.members) {
    const Piece& piece = member.parts[part];
    const auto num_bytes = static_cast<Py_ssize_t>(member.num_tokens) * row_bytes;
    if (piece.num_bytes != num_bytes || *start < 0 || num_bytes > room - *start) {
      PyErr_Format(PyExc_ValueError, "part %d of a request of %llu tokens has %zd bytes, expected %zd, and %zd fit in",
                   part, static_cast<unsigned long long>(member.num_tokens), piece.num_bytes, num_bytes, room - *start);
      return false;
    }
    const int is_there = is_direct(requests, piece, num_bytes, least_direct);
    if (is_there < 0) return false;
    if (is_there) {
      spans->add_direct(*start, num_bytes, reinterpret_cast<uintptr_t>(piece.start));
    } else {
      if (!copy(copies, host + *start, piece.start, num_bytes)) return false;
      spans->add(*start, num_bytes);
    }
    *start += num_bytes;
  }
  return true;
}

// Where the bytes of a writable buffer lie, which the caller holds as long as this runs.
bool writable(PyObject* memory, uint8_t** start, Py_ssize_t* num_bytes) {
  Py_buffer whole;
  if (PyObject_GetBuffer(memory, &whole, PyBUF_WRITABLE) < 0) return false;
  *start = static_cast<uint8_t*>(whole.buf);
  *num_bytes = whole.len;
  PyBuffer_Release(&whole);
  return true;
}

PyObject* bundle_gather(PyObject* self, PyObject* arguments) {
  int part;
  PyObject *destination, *list, *copies;
  Py_ssize_t start, row_bytes, least_direct, room;
  if (!PyArg_ParseTuple(arguments, "iOnnnO!O:gather", &part, &destination, &start, &row_bytes, &least_direct,
                        &PyList_Type, &list, &copies)) {
    return nullptr;
  }
  uint8_t* host;
  Spans spans;
  const bool is_good = writable(destination, &host, &room) && spans.continue_from(list) &&
                       gather_part(of(self), part, host, room, &start, row_bytes, least_direct, &spans, copies) &&
                       spans.append_to(list);
  return is_good ? PyLong_FromSsize_t(start) : nullptr;
}

PyObject* bundle_gather_all(PyObject* self, PyObject* arguments) {
  PyObject *destination, *parts, *copies;
  Py_ssize_t first_bytes, least_direct, room;
  if (!PyArg_ParseTuple(arguments, "OnO!nO:gather_all", &destination, &first_bytes, &PyTuple_Type, &parts,
                        &least_direct, &copies)) {
    return nullptr;
  }
  uint8_t* host;
  if (!writable(destination, &host, &room)) return nullptr;
  Spans spans;
  spans.add(0, first_bytes);
  for (Py_ssize_t n = 0; n < PyTuple_GET_SIZE(parts); ++n) {
    int part;
    Py_ssize_t start, row_bytes;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(parts, n), "inn", &part, &start, &row_bytes) ||
        !gather_part(of(self), part, host, room, &start, row_bytes, least_direct, &spans, copies)) {
      return nullptr;
    }
  }
  return spans.packed();
}

// Have the device copy the members' outputs, from `*start` in the slot on, to where they are wanted, or to the slot's
// host memory. Whether any goes where it is wanted; -1, with an exception set, where that fails.
int scatter_rows(Requests* requests, Py_ssize_t* start, Py_ssize_t row_bytes, Py_ssize_t least_direct, Spans* spans) {
  bool is_any_direct = false;
  for (Member& member : requests->members) {
    const auto num_bytes = static_cast<Py_ssize_t>(member.num_tokens) * row_bytes;
    int is_there = 0;
    if (num_bytes <= member.place.num_bytes) is_there = is_direct(*requests, member.place, num_bytes, least_direct);
    if (is_there < 0) return -1;
    if (is_there) {
      spans->add_direct(*start, num_bytes, reinterpret_cast<uintptr_t>(member.place.start));
    } else {
      spans->add(*start, num_bytes);
    }
    member.is_direct = is_there;
    is_any_direct = is_any_direct || is_there;
    *start += num_bytes;
  }
  requests->is_spent = requests->is_spent || is_any_direct;
  return is_any_direct;
}

PyObject* bundle_scatter(PyObject* self, PyObject* arguments) {
  Py_ssize_t start, row_bytes, least_direct;
  PyObject* list;
  if (!PyArg_ParseTuple(arguments, "nnnO!:scatter", &start, &row_bytes, &least_direct, &PyList_Type, &list)) {
    return nullptr;
  }
  Spans spans;
  if (!spans.continue_from(list)) return nullptr;
  const int is_any_direct = scatter_rows(&of(self), &start, row_bytes, least_direct, &spans);
  if (is_any_direct < 0 || !spans.append_to(list)) return nullptr;
  return Py_BuildValue("(nO)", start, is_any_direct ? Py_True : Py_False);
}

PyObject* bundle_scatter_all(PyObject* self, PyObject* arguments) {
  Py_ssize_t first_bytes, start, row_bytes, least_direct;
  if (!PyArg_ParseTuple(arguments, "nnnn:scatter_all", &first_bytes, &start, &row_bytes, &least_direct)) return nullptr;
  Spans spans;
  spans.add(0, first_bytes);
  const int is_any_direct = scatter_rows(&of(self), &start, row_bytes, least_direct, &spans);
  if (is_any_direct < 0) return nullptr;
  return Py_BuildValue("(NO)", spans.packed(), is_any_direct ? Py_True : Py_False);
}

PyObject* bundle_answer(PyObject* self, PyObject* const* arguments, Py_ssize_t given) {
  constexpr Py_ssize_t kNumNumbers = 10;
  unsigned long long n[kNumNumbers];
  if (given != kNumNumbers + 1) {
    PyErr_Format(PyExc_TypeError, "%zd arguments are given, expected %zd", given, kNumNumbers + 1);
    return nullptr;
  }
  if (!numbers_of(arguments + 1, kNumNumbers, kNumNumbers, n)) return nullptr;
  PyObject* copies = arguments[0];
  Requests& requests = of(self);
  const uint64_t output_dtype = requests.kind.output_dtype;
  const auto hidden_size = static_cast<Py_ssize_t>(n[1]);
  const Py_ssize_t row_bytes = hidden_size * item_bytes(static_cast<uint32_t>(output_dtype));
  const auto* from = reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(n[0]));
  for (const Member& member : requests.members) {
    const auto num_bytes = static_cast<Py_ssize_t>(member.num_tokens) * row_bytes;
    if (num_bytes > member.place.num_bytes) {
      PyErr_Format(PyExc_ValueError, "an answer of %zd bytes does not fit into %zd", num_bytes, member.place.num_bytes);
      return nullptr;
    }
  }
  requests.is_spent = true;
  for (Member& member : requests.members) {
    const auto num_bytes = static_cast<Py_ssize_t>(member.num_tokens) * row_bytes;
    Block block;
    block.buffer.buf = member.block;
    block.buffer.len = member.num_bytes;
    const double waited_s = std::max(0.0, requests.begun_s - member.joined_s);
    const auto queue_us = n[2] + static_cast<uint64_t>(std::llround(waited_s * 1e6));
    block.write(0, AnswerHead{{queue_us, n[3], n[4], n[5], n[6], n[7]}, n[8], n[9]});
    const uint64_t at = member.is_placed ? kElsewhere : static_cast<uint64_t>(kDataAt);
    block.write_entry(0, Entry{output_dtype, 2, member.num_tokens, n[1], at});
    for (int index = 1; index < kMaxTensors; ++index) block.write_entry(index, Entry{});
    if (!member.is_direct && !copy(copies, member.place.start, from, num_bytes)) return nullptr;
    from += num_bytes;
  }
  Py_RETURN_NONE;
}

PyObject* bundle_places(PyObject* self, PyObject*) {
  const Requests& requests = of(self);
  const auto& members = requests.members;
  Ref places(PyList_New(static_cast<Py_ssize_t>(members.size())));
  if (!places) return nullptr;
  for (size_t n = 0; n < members.size(); ++n) {
    PyObject* place = place_of(requests, members[n]);
    if (place == nullptr) return nullptr;
    PyList_SET_ITEM(places.get(), static_cast<Py_ssize_t>(n), place);
  }
  return places.release();
}

PyObject* bundle_sources(PyObject* self, PyObject*) {
  const auto& sources = of(self).sources;
  PyObject* objects = PyList_New(static_cast<Py_ssize_t>(sources.size()));
  for (size_t n = 0; objects != nullptr && n < sources.size(); ++n) {
    PyList_SET_ITEM(objects, static_cast<Py_ssize_t>(n), Py_NewRef(sources[n].object.get()));
  }
  return objects;
}

PyObject* bundle_tell(PyObject* self, PyObject* argument) {
  const uint64_t kind = PyLong_AsUnsignedLongLong(argument);
  if (PyErr_Occurred()) return nullptr;
  const Requests& requests = of(self);
  for (const Member& member : requests.members) {
    put_descriptor(requests.sources[member.source].ring.get(), kind, member.number);
  }
  Py_RETURN_NONE;
}

PyObject* number_of(uint64_t value) { return PyLong_FromUnsignedLongLong(value); }

PyObject* bundle_kind(PyObject* self, void*) {
  const Kind& kind = of(self).kind;
  return Py_BuildValue("(KKOK)", static_cast<unsigned long long>(kind.layer_id),
                       static_cast<unsigned long long>(kind.hidden_dtype), kind.is_routed ? Py_True : Py_False,
                       static_cast<unsigned long long>(kind.output_dtype));
}

PyObject* bundle_is_spent(PyObject* self, void*) { return PyBool_FromLong(of(self).is_spent); }
PyObject* bundle_num_tokens(PyObject* self, void*) { return number_of(of(self).num_tokens); }
PyObject* bundle_num_requests(PyObject* self, void*) { return number_of(of(self).members.size()); }

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef bundle_methods[] = {
    {"absorb", bundle_absorb, METH_VARARGS, "absorb(bundle, most_tokens, most_requests)\n\nSee bundle.py."},
    {"cancel", bundle_cancel, METH_VARARGS, "cancel(source, number=None)\n\nSee bundle.py."},
    {"begin", bundle_begin, METH_O, "begin(now_s)\n\nSee bundle.py."},
    {"gather", bundle_gather, METH_VARARGS, "gather(part, destination, start, row_bytes, least_direct, spans, copies)"},
    {"gather_all", bundle_gather_all, METH_VARARGS,
     "gather_all(destination, first_bytes, parts, least_direct, copies)\n\nSee bundle.py."},
    {"scatter", bundle_scatter, METH_VARARGS, "scatter(start, row_bytes, least_direct, spans)"},
    {"scatter_all", bundle_scatter_all, METH_VARARGS,
     "scatter_all(first_bytes, start, row_bytes, least_direct)\n\nSee bundle.py."},
    {"answer", fast(bundle_answer), METH_FASTCALL,
     "answer(copies, address, hidden_size, wait_us, copy_in_us, compute_us, copy_out_us, batch_tokens,\n"
     "batch_requests, weights_version, queue_tokens)"},
    {"places", bundle_places, METH_NOARGS, "Of the members, see BlockPlace of bundle.py."},
    {"sources", bundle_sources, METH_NOARGS, "Who asked, each once; also whose members are gone."},
    {"tell", bundle_tell, METH_O, "tell(kind)\n\nPut a descriptor of this kind into the ring of each member."},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef bundle_members[] = {
    {"kind", bundle_kind, nullptr,
     "What all members share: what stands for the layer that they ask, pb.DataType of the hidden states, whether ids\n"
     "and weights come, not logits, and pb.DataType of the outputs.",
     nullptr},
    {"is_spent", bundle_is_spent, nullptr, "Whether answers may lie over what they are computed from.", nullptr},
    {"num_tokens", bundle_num_tokens, nullptr, "Of all members.", nullptr},
    {"num_requests", bundle_num_requests, nullptr, "Members.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMethodDef functions[] = {
    {"bundles_of", bundles_of, METH_VARARGS, bundles_of_doc},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_bundle_type(PyObject* module) {
  bundle_type.tp_name = "expertd_server._blocks.Bundle";
  bundle_type.tp_basicsize = sizeof(Bundle);
  bundle_type.tp_flags = Py_TPFLAGS_DEFAULT;
  bundle_type.tp_doc = "Requests that may share a batch, see bundle.py.";
  bundle_type.tp_dealloc = bundle_dealloc;
  bundle_type.tp_methods = bundle_methods;
  bundle_type.tp_getset = bundle_members;
  return PyType_Ready(&bundle_type) == 0 &&
         PyModule_AddObjectRef(module, "Bundle", reinterpret_cast<PyObject*>(&bundle_type)) == 0 &&
         PyModule_AddFunctions(module, functions) == 0;
}
