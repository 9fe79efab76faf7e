// Memory for the large objects of an interpreter, which its messages are: gRPC gives and takes bytes objects and
// nothing else. See message_memory.py.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "pieces.h"
#include "wire.h"

namespace expertd {

// One for a process, made at most once and never destroyed: nobody knows when the last object in there goes.
//
// NOTE: it is Python's allocator of objects, which is called with the interpreter's lock held, and that is its lock.
class MessageMemory {
 public:
  // As many bytes and more are worth a device's copy: MIN_DIRECT_BYTES of spans.py.
  static constexpr size_t kLeastBytes = 32 << 10;

  // nullptr: there is none.
  static MessageMemory* get() { return shared(); }

  // From now on large objects lie in this memory, as long as it has room. false: there is one, or no memory is left.
  static bool make(uint8_t* start, size_t num_bytes) {
    if (shared() != nullptr) return false;
    shared() = new (std::nothrow) MessageMemory(start, num_bytes);
    if (shared() == nullptr) return false;
    PyMemAllocatorEx allocator{shared(), allocate, allocate_zeros, reallocate, release};
    PyMem_GetAllocator(PYMEM_DOMAIN_OBJ, &shared()->other_);
    PyMem_SetAllocator(PYMEM_DOMAIN_OBJ, &allocator);
    return true;
  }

  bool contains(const void* at) const {
    const auto* byte = static_cast<const uint8_t*>(at);
    return start_ <= byte && byte < start_ + num_bytes_;
  }

  size_t free_bytes() const { return static_cast<size_t>(pieces_.free_bytes()); }

 private:
  static constexpr size_t kPageBytes = 4096;

  MessageMemory(uint8_t* start, size_t num_bytes)
      : start_(start),
        num_bytes_(num_bytes / kPageBytes * kPageBytes),
        pieces_(static_cast<std::ptrdiff_t>(num_bytes_)),
        num_pages_(num_bytes / kPageBytes) {}

  static MessageMemory*& shared() {
    static MessageMemory* memory = nullptr;
    return memory;
  }

  static size_t pages_of(size_t num_bytes) { return (num_bytes + kPageBytes - 1) / kPageBytes; }

  size_t page_of(const void* at) const { return (static_cast<const uint8_t*>(at) - start_) / kPageBytes; }

  void* take(size_t num_bytes) {
    if (num_bytes < kLeastBytes || num_bytes > num_bytes_) return nullptr;
    const size_t pages = pages_of(num_bytes);
    const std::ptrdiff_t start = pieces_.take(static_cast<std::ptrdiff_t>(pages * kPageBytes));
    if (start < 0) return nullptr;
    num_pages_[static_cast<size_t>(start) / kPageBytes] = static_cast<uint32_t>(pages);
    return start_ + start;
  }

  // Give back all pages of an object but the first few.
  void keep(void* at, size_t pages) {
    const size_t first = page_of(at), last = first + num_pages_[first];
    num_pages_[first] = static_cast<uint32_t>(pages);
    if (first + pages == last) return;
    pieces_.release(static_cast<std::ptrdiff_t>((first + pages) * kPageBytes),
                    static_cast<std::ptrdiff_t>((last - first - pages) * kPageBytes));
  }

  // ---- Python's allocator ----

  static MessageMemory& of(void* memory) { return *static_cast<MessageMemory*>(memory); }

  static void* allocate(void* memory, size_t num_bytes) {
    if (num_bytes >= kLeastBytes) {
      if (void* at = of(memory).take(num_bytes)) return at;
    }
    const PyMemAllocatorEx& other = of(memory).other_;
    return other.malloc(other.ctx, num_bytes);
  }

  static void* allocate_zeros(void* memory, size_t count, size_t num_bytes) {
    const PyMemAllocatorEx& other = of(memory).other_;
    return other.calloc(other.ctx, count, num_bytes);
  }

  static void* reallocate(void* memory, void* at, size_t num_bytes) {
    MessageMemory& self = of(memory);
    if (at == nullptr || !self.contains(at)) return self.other_.realloc(self.other_.ctx, at, num_bytes);
    const size_t held = self.num_pages_[self.page_of(at)] * kPageBytes;
    if (num_bytes <= held) {  // stays where it is: an Answer depends on it
      self.keep(at, pages_of(num_bytes ? num_bytes : 1));
      return at;
    }
    void* to = allocate(memory, num_bytes);
    if (to == nullptr) return nullptr;
    std::memcpy(to, at, held);
    self.keep(at, 0);
    return to;
  }

  static void release(void* memory, void* at) {
    MessageMemory& self = of(memory);
    if (at != nullptr && self.contains(at)) {
      self.keep(at, 0);
    } else {
      self.other_.free(self.other_.ctx, at);
    }
  }

  uint8_t* const start_;
  const size_t num_bytes_;
  Pieces pieces_;
  std::vector<uint32_t> num_pages_;  // of an object, by its first page
  PyMemAllocatorEx other_{};         // for all else
};

}  // namespace expertd
