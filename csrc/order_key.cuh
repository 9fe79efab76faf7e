// Scores as unsigned keys that sort like them, and a sort of a lane's keys in registers.
#pragma once
#include <cstdint>

namespace expertd {

// Unsigned keys in the order of the floats, NaN greatest: a row that holds NaN shows it. 0: taken, excluded, no expert.
__device__ __forceinline__ uint32_t order_key(float f) {
  // -0 ties with +0. NOTE: the sum of a NaN has neither sign nor payload, 0x7fffffff: the greatest key, as it must be.
  const uint32_t bits = __float_as_uint(__fadd_rn(f, 0.0f));
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float key_value(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Batcher's odd-even merge sort, one step and all that follow. NOTE: a template, because unrolled loops over the steps
// leave the larger arrays in local memory.
template <int kP, int kK, int kN, class Key>
__device__ __forceinline__ void merge_descending(Key (&keys)[kN]) {
#pragma unroll
  for (int i = 0; i + kK < kN; ++i) {
    const bool compares = i >= kK % kP && (i - kK % kP) / kK % 2 == 0 && i / (2 * kP) == (i + kK) / (2 * kP);
    if (compares) {
      const Key a = keys[i], b = keys[i + kK];
      keys[i] = max(a, b);
      keys[i + kK] = min(a, b);
    }
  }
  if constexpr (kK > 1) {
    merge_descending<kP, kK / 2>(keys);
  } else if constexpr (2 * kP < kN) {
    merge_descending<2 * kP, 2 * kP>(keys);
  }
}

template <int kN>
__device__ __forceinline__ void sort_descending(uint32_t (&keys)[kN]) {
  if constexpr (kN > 1) merge_descending<1, 1>(keys);
}

}  // namespace expertd
