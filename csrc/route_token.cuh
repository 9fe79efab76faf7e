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
#include "sm90.cuh"
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

// values[i] = row[first + i] where first + i < n, else -infinity. In 16-byte loads where the row is whole and aligned.
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
  for (int i = 0; i < kPer; ++i) values[i] = first + i < n ? load_float(data, dtype, row + first + i) : -INFINITY;
}

// NOTE: __fdividef(1, y) to the bit, without what it does for y below the normal numbers, since here y >= 1.
__device__ __forceinline__ float sigmoid(float x) { return sm90::rcp_approx(__fadd_rn(1.0f, expf(-x))); }

// The sum of the values of the lanes below n; those of the others must be zeros. `warp_sum` to the bit in these lanes.
__device__ __forceinline__ float sum_of_first(float v, int n) {
#pragma unroll 1
  for (int mask = n > 16 ? 16 : n > 8 ? 8 : n > 4 ? 4 : n > 2 ? 2 : n - 1; mask > 0; mask >>= 1) {
    v = __fadd_rn(v, __shfl_xor_sync(kAllLanes, v, mask));
  }
  return v;
}

// The logits of a token, as a lane of its warp holds them.
template <int kPer>
__device__ __forceinline__ void load_logits(const RouteParams& p, int token, int lane, float (&values)[kPer]) {
  load_floats<kPer>(p.logits, p.logits_dtype, static_cast<size_t>(token) * p.num_experts, p.num_experts, lane * kPer,
                    values);
}

// One slot: the greatest of the lanes' heads, and which lanes have it; the lowest of them moves up, within the first
// `kDepth` of its keys.
template <int kDepth, int kPer>
__device__ __forceinline__ uint32_t pop(uint32_t (&sorted)[kPer], int lane, unsigned& heads) {
  const uint32_t greatest = __reduce_max_sync(kAllLanes, sorted[0]);
  heads = __ballot_sync(kAllLanes, sorted[0] == greatest);
  const bool mine = (heads & (2u * (1u << lane) - 1)) == 1u << lane;
#pragma unroll
  for (int i = 0; i < kPer && i < kDepth; ++i) sorted[i] = mine ? i + 1 < kPer ? sorted[i + 1] : 0 : sorted[i];
  return greatest;
}

// Lane k gets the key of slot k and the lanes that had it as their head.
template <int kPer>
__device__ __forceinline__ void pick(uint32_t (&sorted)[kPer], int top_k, int lane, uint32_t& key, unsigned& heads) {
#pragma unroll 1
  for (int k = 0; k < top_k; ++k) {
    unsigned lanes;
    const uint32_t greatest = pop<kPer>(sorted, lane, lanes);
    if (lane == k) key = greatest, heads = lanes;
  }
}

// The same for slots k ... kSlots - 1 of as many as are known in advance: what cannot be picked any more stays behind.
template <int kSlots, int k = 0, int kPer>
__device__ __forceinline__ void pick(uint32_t (&sorted)[kPer], int lane, uint32_t& key, unsigned& heads) {
  unsigned lanes;
  const uint32_t greatest = pop<kSlots - 1 - k>(sorted, lane, lanes);
  if (lane == k) key = greatest, heads = lanes;
  if constexpr (k + 1 < kSlots) pick<kSlots, k + 1>(sorted, lane, key, heads);
}

// A slot's weight, before its rounding. `value`: what it is made of, the logit or score by kScore, without bias. Lane k
// of each kLanes holds slot k of their token; `active`: there is one.
template <Score kScore, int kLanes>
__device__ __forceinline__ float slot_weight(const RouteParams& p, float value, bool active) {
  float weight = active ? value : 0.0f;
  if constexpr (kScore == kBySoftmax) {
    if (p.method == kRenormalizeNaive && p.norm_topk_prob) weight = __fdividef(weight, sum_of_first(weight, p.top_k));
  } else if constexpr (kScore == kByLogit) {
    if (p.method == kLlama4) return active ? sigmoid(value) : 0.0f;
    if (p.method == kRenormalize) {
      const float greatest = __shfl_sync(kAllLanes, value, 0, kLanes);  // NOTE: by all lanes, so not in the condition
      const float e = active ? expf(__fsub_rn(value, greatest)) : 0.0f;
      weight = __fdividef(e, sum_of_first(e, p.top_k));
    }
  } else {
    const bool shares = p.method != kSigmoid && (p.method != kSigmoidRenorm || p.norm_topk_prob);
    if (shares) weight = __fdividef(weight, __fadd_rn(sum_of_first(weight, p.top_k), 1e-20f));
    if (p.method == kDeepSeekV3 || p.method == kMiniMax2) weight = __fmul_rn(weight, p.routed_scaling_factor);
  }
  return active ? weight : 0.0f;
}

// Lane k returns the expert of slot k, and its weight; lanes past top_k return 0 for both.
// `values`: from load_logits. `memory`: of the warp, for odd groups. `tell`: called with the expert, by all lanes, as
// soon as it is known. kMany: for many tokens; more code, of which less is run.
template <Score kScore, int kPer, bool kMany = false, class Tell>
__device__ __forceinline__ int route_logits(const RouteParams& p, int token, const float (&values)[kPer],
                                            uint32_t* memory, int lane, float& weight, const Tell& tell) {
  const int first_expert = lane * kPer;
  uint32_t keys[kPer];
  if constexpr (kScore == kBySigmoid) {
    float bias[kPer] = {};
    if (p.bias != nullptr) load_floats<kPer>(p.bias, p.bias_dtype, 0, p.num_experts, first_expert, bias);
#pragma unroll
    for (int i = 0; i < kPer; ++i) keys[i] = order_key(__fadd_rn(sigmoid(values[i]), bias[i]));
  } else if constexpr (kScore == kBySoftmax) {
    float top = values[0];
#pragma unroll
    for (int i = 1; i < kPer; ++i) top = fmaxf(top, values[i]);
    top = key_value(__reduce_max_sync(kAllLanes, order_key(top)));
    float sum = 0.0f, scores[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      scores[i] = expf(__fsub_rn(values[i], top));
      sum = __fadd_rn(sum, scores[i]);
    }
    const float inverse = __fdividef(1.0f, warp_sum(sum));
#pragma unroll
    for (int i = 0; i < kPer; ++i) keys[i] = order_key(__fmul_rn(scores[i], inverse));
  } else {
#pragma unroll
    for (int i = 0; i < kPer; ++i) keys[i] = order_key(values[i]);
  }
  if (p.num_experts != 32 * kPer) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) keys[i] = first_expert + i < p.num_experts ? keys[i] : 0;
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
  unsigned my_heads = 1u << lane;  // a lane without a slot must not look like another's
  if (kMany && p.top_k == 8) {
    pick<8>(sorted, lane, my_key, my_heads);
  } else {
    pick(sorted, p.top_k, lane, my_key, my_heads);
  }
  const int my_owner = __ffs(my_heads) - 1;
  uint32_t candidates = 0;  // of slot k: its owner's experts with that key
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    candidates |= __shfl_sync(kAllLanes, keys[i], my_owner) == my_key ? 1u << i : 0u;
  }
  if constexpr (kPer > 1) {
    // An owner with several of them fills slots that follow each other, the lowest expert first.
    const bool goes_on = (__shfl_up_sync(kAllLanes, my_key, 1) == my_key) &
                         (__shfl_up_sync(kAllLanes, my_owner, 1) == my_owner) & (lane > 0);
    const unsigned going_on = __ballot_sync(kAllLanes, goes_on);
    for (int earlier = __clz(~(going_on << (31 - lane))); earlier > 0; --earlier) candidates &= candidates - 1;
  }
  const bool active = lane < p.top_k;
  const int id = active ? my_owner * kPer + __ffs(candidates) - 1 : 0;
  tell(id);

  float value = key_value(my_key);
  if (kScore == kBySigmoid && p.bias != nullptr) {  // with a bias the key is not the score any more
    value = sigmoid(load_float(p.logits, p.logits_dtype, static_cast<size_t>(token) * p.num_experts + id));
  }
  weight = slot_weight<kScore, 32>(p, value, active);
  return id;
}

template <Score kScore, int kPer, class Tell>
__device__ __forceinline__ int route_token(const RouteParams& p, int token, uint32_t* memory, int lane, float& weight,
                                           const Tell& tell) {
  float values[kPer];
  load_logits<kPer>(p, token, lane, values);
  return route_logits<kScore, kPer>(p, token, values, memory, lane, weight, tell);
}

}  // namespace expertd
