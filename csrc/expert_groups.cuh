// Routing in groups of experts (DeepSeekV3): the experts of all but the best groups are excluded.
#pragma once
#include <cstdint>

#include "order_key.cuh"
#include "params.h"
#include "warp.cuh"

namespace expertd {

// Excludes the experts of all but the topk_group best groups. A group's score: the sum of its two highest.
// Groups of whole lanes; `lanes` of them, a power of two.
template <int kPer>
__device__ __forceinline__ void keep_groups(const RouteParams& p, uint32_t (&keys)[kPer], int lanes, int lane) {
  uint32_t first = 0, second = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    second = max(second, min(first, keys[i]));
    first = max(first, keys[i]);
  }
#pragma unroll 1
  for (int mask = 1; mask < lanes; mask *= 2) {
    const uint32_t other_first = __shfl_xor_sync(kAllLanes, first, mask),
                   other_second = __shfl_xor_sync(kAllLanes, second, mask);
    second = max(min(first, other_first), max(second, other_second));
    first = max(first, other_first);
  }
  const uint32_t mine = order_key(__fadd_rn(key_value(first), key_value(second)));
  const int group = lane / lanes;
  int better = 0;
#pragma unroll 4
  for (int other = 0; other < p.n_group; ++other) {
    const uint32_t key = __shfl_sync(kAllLanes, mine, other * lanes);
    better += key > mine || (key == mine && other < group);
  }
  if (better >= p.topk_group) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) keys[i] = 0;
  }
}

// The same for groups of any size, through memory of the warp's own: [num_experts + n_group].
template <int kPer>
__device__ __forceinline__ void keep_odd_groups(const RouteParams& p, uint32_t (&keys)[kPer], uint32_t* memory,
                                                int lane) {
  const int size = p.num_experts / p.n_group;
  uint32_t* group_keys = memory + p.num_experts;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (lane * kPer + i < p.num_experts) memory[lane * kPer + i] = keys[i];
  }
  __syncwarp();
#pragma unroll 1
  for (int g = lane; g < p.n_group; g += 32) {
    uint32_t first = 0, second = 0;
#pragma unroll 1
    for (int i = 0; i < size; ++i) {
      const uint32_t key = memory[g * size + i];
      second = max(second, min(first, key));
      first = max(first, key);
    }
    group_keys[g] = order_key(__fadd_rn(key_value(first), key_value(second)));
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int group = min((lane * kPer + i) / size, p.n_group - 1);
    const uint32_t mine = group_keys[group];
    int better = 0;
#pragma unroll 1
    for (int other = 0; other < p.n_group; ++other) {
      better += group_keys[other] > mine || (group_keys[other] == mine && other < group);
    }
    if (better >= p.topk_group) keys[i] = 0;
  }
  __syncwarp();  // before the next token writes there
}

// Lanes that share a group where groups are whole lanes, a power of two of them; else 0.
template <int kPer>
__host__ __device__ __forceinline__ int lanes_per_group(const RouteParams& p) {
  const int size = p.num_experts / p.n_group, lanes = size / kPer;
  return size % kPer == 0 && (lanes & (lanes - 1)) == 0 ? lanes : 0;
}

}  // namespace expertd
