// One token in one warp: logits -> the experts of its slots and their weights.
//
// A lane owns kPer consecutive experts, so that of equal scores the lower lane holds the smaller id. It sorts its
// scores once; a slot is then a maximum over the lanes' heads, and the lane that had it moves up. Which expert a head
// was is looked up after the last slot, for all slots at once.
#pragma once
#include <cuda_bf16.h>

#include "expert_groups.cuh"
#include "order_key.cuh"
#include "params.h"
#include "warp.cuh"

namespace expertd {

enum Method {
  kDefault = 0,
  kRenormalize = 1,
  kDeepSeekV3 = 2,
  kLlama4 = 3,
  kRenormalizeNaive = 4,
  kTopK = 5,
  kSigmoidRenorm = 6,
  kMiniMax2 = 7,
  kSigmoid = 8,
};

// What experts are chosen by. NOTE: routing runs once per layer, its instructions long evicted by the weights, so what
// is not needed is not compiled in.
enum Score { kByLogit, kBySoftmax, kBySigmoid };

__device__ __forceinline__ float load_float(const void* data, DType dtype, size_t i) {
  if (dtype == DType::kFloat32) return __ldg(static_cast<const float*>(data) + i);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
}

// values[i] = row[first + i] where first + i < n, else 0. In 16-byte loads where the row is whole and aligned.
template <int kPer>
__device__ __forceinline__ void load_floats(const void* data, DType dtype, size_t row, int n, int first,
                                            float (&values)[kPer]) {
  const char* base = static_cast<const char*>(data) + (row + first) * (dtype == DType::kFloat32 ? 4 : 2);
  const bool whole = n == 32 * kPer;
  if constexpr (kPer % 4 == 0) {
    if (whole && dtype == DType::kFloat32 && (reinterpret_cast<uintptr_t>(data) & 15) == 0) {
#pragma unroll
      for (int i = 0; i < kPer; i += 4) {
        const float4 v = __ldg(reinterpret_cast<const float4*>(base) + i / 4);
        values[i] = v.x, values[i + 1] = v.y, values[i + 2] = v.z, values[i + 3] = v.w;
      }
      return;
    }
    if (whole && dtype == DType::kBFloat16 && (reinterpret_cast<uintptr_t>(data) & 7) == 0) {
#pragma unroll
      for (int i = 0; i < kPer; i += 4) {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(base) + i / 4);
        values[i] = __uint_as_float(v.x << 16), values[i + 1] = __uint_as_float(v.x & 0xffff0000u);
        values[i + 2] = __uint_as_float(v.y << 16), values[i + 3] = __uint_as_float(v.y & 0xffff0000u);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) values[i] = first + i < n ? load_float(data, dtype, row + first + i) : 0.0f;
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, __fadd_rn(1.0f, expf(-x))); }

// Lane k returns the expert of slot k, and its weight; lanes past top_k return 0 for both.
// `memory`: of the warp, for odd groups. `tell`: called with the expert, by all lanes, as soon as it is known.
template <Score kScore, int kPer, class Tell>
__device__ __forceinline__ int route_token(const RouteParams& p, int token, uint32_t* memory, int lane, float& weight,
                                           const Tell& tell) {
  const size_t row = static_cast<size_t>(token) * p.num_experts;
  const int first_expert = lane * kPer;
  float values[kPer];
  load_floats<kPer>(p.logits, p.logits_dtype, row, p.num_experts, first_expert, values);
  uint32_t keys[kPer];
  float top = 0.0f, inverse = 1.0f;
  if constexpr (kScore == kBySigmoid) {
    float bias[kPer] = {};
    if (p.bias != nullptr) load_floats<kPer>(p.bias, p.bias_dtype, 0, p.num_experts, first_expert, bias);
#pragma unroll
    for (int i = 0; i < kPer; ++i) keys[i] = order_key(__fadd_rn(sigmoid(values[i]), bias[i]));
  } else if constexpr (kScore == kBySoftmax) {
    top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPer; ++i) top = first_expert + i < p.num_experts ? fmaxf(top, values[i]) : top;
    top = warp_max(top);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      values[i] = first_expert + i < p.num_experts ? expf(__fsub_rn(values[i], top)) : 0.0f;
      sum = __fadd_rn(sum, values[i]);
    }
    inverse = __fdividef(1.0f, warp_sum(sum));
#pragma unroll
    for (int i = 0; i < kPer; ++i) keys[i] = order_key(__fmul_rn(values[i], inverse));
  } else {
#pragma unroll
    for (int i = 0; i < kPer; ++i) keys[i] = order_key(values[i]);
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (first_expert + i >= p.num_experts) keys[i] = 0;
  }
  if constexpr (kScore == kBySigmoid) {
    if (p.n_group > 1) {
      const int lanes = lanes_per_group<kPer>(p);
      if (lanes > 0) {
        keep_groups<kPer>(p, keys, lanes, lane);
      } else {
        keep_odd_groups<kPer>(p, keys, memory, lane);
      }
    }
  }

  uint32_t sorted[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) sorted[i] = keys[i];
  sort_descending(sorted);
  uint32_t my_key = 0;
  int my_owner = lane;  // a lane without a slot must not look like another's
#pragma unroll 1
  for (int k = 0; k < p.top_k; ++k) {
    const uint32_t greatest = __reduce_max_sync(kAllLanes, sorted[0]);
    const int owner = __ffs(__ballot_sync(kAllLanes, sorted[0] == greatest)) - 1;
    if (lane == k) my_key = greatest, my_owner = owner;
    const bool mine = lane == owner;
#pragma unroll
    for (int i = 0; i + 1 < kPer; ++i) sorted[i] = mine ? sorted[i + 1] : sorted[i];
    sorted[kPer - 1] = mine ? 0 : sorted[kPer - 1];
  }
  // The expert of slot k: of its owner's experts with that key the next after those of earlier slots.
  uint32_t candidates = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    candidates |= __shfl_sync(kAllLanes, keys[i], my_owner) == my_key ? 1u << i : 0u;
  }
  const bool active = lane < p.top_k;
  const unsigned slots = p.top_k == 32 ? kAllLanes : (1u << p.top_k) - 1;
  const unsigned same = __match_any_sync(kAllLanes, my_key) & __match_any_sync(kAllLanes, my_owner) & slots;
  for (int earlier = __popc(same & ((1u << lane) - 1)); earlier > 0; --earlier) candidates &= candidates - 1;
  const int id = active ? my_owner * kPer + __ffs(candidates) - 1 : 0;
  tell(id);

  // Weights: lane k < top_k holds slot k, the others zeros.
  if constexpr (kScore == kBySoftmax) {
    weight = active ? key_value(my_key) : 0.0f;
    if (p.method == kRenormalizeNaive && p.norm_topk_prob) weight = __fdividef(weight, warp_sum(weight));
  } else if constexpr (kScore == kByLogit) {
    const float logit = active ? key_value(my_key) : 0.0f;
    weight = logit;
    if (p.method == kLlama4) weight = active ? sigmoid(logit) : 0.0f;
    if (p.method == kRenormalize) {
      const float greatest = warp_max(active ? logit : -INFINITY);  // NOTE: by all lanes, so not inside the condition
      const float e = active ? expf(__fsub_rn(logit, greatest)) : 0.0f;
      weight = __fdividef(e, warp_sum(e));
    }
  } else {
    // With a bias the key is not the score any more.
    const float score = p.bias == nullptr ? key_value(my_key) : sigmoid(load_float(p.logits, p.logits_dtype, row + id));
    weight = active ? score : 0.0f;
    const bool shares = p.method != kSigmoid && (p.method != kSigmoidRenorm || p.norm_topk_prob);
    if (shares) weight = __fdividef(weight, __fadd_rn(warp_sum(weight), 1e-20f));
    if (p.method == kDeepSeekV3 || p.method == kMiniMax2) weight = __fmul_rn(weight, p.routed_scaling_factor);
  }
  return id;
}

}  // namespace expertd
