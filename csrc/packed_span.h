// What one copy between host and device moves, see PackedSpans of spans.py.
#pragma once
#include <cstdint>

struct PackedSpan {
  int64_t start, num_bytes;  // in the slot
  uint64_t address;          // of the host's end; 0: at the same place of the slot's host memory
};
static_assert(sizeof(PackedSpan) == 24);
