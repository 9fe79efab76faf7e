// One token in one warp: logits -> the experts of its slots and their weights.
//
// A lane owns kPer consecutive experts, so that of equal scores the lower lane holds the smaller id. Up to eight slots
// of 33 to 256 experts: a bound is found that at least eight scores reach, and hardly more; the few that do, the
// candidates, are listed in shared memory, and a candidate's slot is how many others are better. Else a lane sorts its
// scores once; a slot is then a maximum over the lanes' heads, and the lane that had it moves up. Which expert a head
// was is looked up after the last slot, for all slots at once.
#pragma once
#include <cuda_bf16.h>

#include "candidates.cuh"
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

// values[i] = row[first + i]; any other of the row's n values where first + i >= n. In loads of four where they lie so.
// NOTE: no load depends on a condition, or the warp would wait for it where the branches meet.
template <int kPer>
__device__ __forceinline__ void load_floats(const void* data, DType dtype, size_t row, int n, int first,
                                            float (&values)[kPer]) {
  if constexpr (kPer % 4 == 0) {
    const bool fours = n % 4 == 0;
    if (fours && dtype == DType::kFloat32 && (reinterpret_cast<uintptr_t>(data) & 15) == 0) {
#pragma unroll
      for (int i = 0; i < kPer; i += 4) {
        const float* four = static_cast<const float*>(data) + row + min(first + i, n - 4);
        const float4 v = __ldg(reinterpret_cast<const float4*>(four));
        values[i] = v.x, values[i + 1] = v.y, values[i + 2] = v.z, values[i + 3] = v.w;
      }
      return;
    }
    if (fours && dtype == DType::kBFloat16 && (reinterpret_cast<uintptr_t>(data) & 7) == 0) {
#pragma unroll
      for (int i = 0; i < kPer; i += 4) {
        const __nv_bfloat16* four = static_cast<const __nv_bfloat16*>(data) + row + min(first + i, n - 4);
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(four));
        values[i] = __uint_as_float(v.x << 16), values[i + 1] = __uint_as_float(v.x & 0xffff0000u);
        values[i + 2] = __uint_as_float(v.y << 16), values[i + 3] = __uint_as_float(v.y & 0xffff0000u);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) values[i] = load_float(data, dtype, row + min(first + i, n - 1));
}

// NOTE: __fdividef(1, y) to the bit, without what it does for y below the normal numbers, since here y >= 1.
__device__ __forceinline__ float sigmoid(float x) { return sm90::rcp_approx(__fadd_rn(1.0f, expf(-x))); }

// The sum of the values of the lanes below n, up to kLanes; those of the others must be zeros. `warp_sum` to the bit in
// these lanes.
template <int kLanes>
__device__ __forceinline__ float sum_of_first(float v, int n) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    if (mask < 8 || n > mask) v = __fadd_rn(v, __shfl_xor_sync(kAllLanes, v, mask));
  }
  return v;
}

// The logits of a token, as a lane of its warp holds them; past the last expert any.
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
    if (p.method == kRenormalizeNaive && p.norm_topk_prob)
      weight = __fdividef(weight, sum_of_first<kLanes>(weight, p.top_k));
  } else if constexpr (kScore == kByLogit) {
    if (p.method == kLlama4) return active ? sigmoid(value) : 0.0f;
    if (p.method == kRenormalize) {
      const float greatest = __shfl_sync(kAllLanes, value, 0, kLanes);  // NOTE: by all lanes, so not in the condition
      const float e = active ? expf(__fsub_rn(value, greatest)) : 0.0f;
      weight = __fdividef(e, sum_of_first<kLanes>(e, p.top_k));
    }
  } else {
    const bool shares = p.method != kSigmoid && (p.method != kSigmoidRenorm || p.norm_topk_prob);
    if (shares) weight = __fdividef(weight, __fadd_rn(sum_of_first<kLanes>(weight, p.top_k), 1e-20f));
    if (p.method == kDeepSeekV3 || p.method == kMiniMax2) weight = __fmul_rn(weight, p.routed_scaling_factor);
  }
  return active ? weight : 0.0f;
}

// The slots of a token, one to a lane: lane k has slot k. Lanes past top_k have zeros.
struct Slot {
  int id;
  float value;  // that `slot_weight` makes the weight of
};

template <Score kScore, int kPer>
__device__ __forceinline__ void load_bias(const RouteParams& p, int lane, float (&bias)[kPer]) {
#pragma unroll
  for (int i = 0; i < kPer; ++i) bias[i] = 0.0f;
  if (kScore == kBySigmoid && p.bias != nullptr) {
    load_floats<kPer>(p.bias, p.bias_dtype, 0, p.num_experts, lane * kPer, bias);
  }
}

// Lanes of so many experts list candidates where they may.
template <int kPer>
constexpr bool kMayList = kPer == 4 || kPer == 8;

// `values`, `bias`: from load_logits and load_bias. `memory`: of the warp, for odd groups. `list`: of the warp, or
// null. tell(slot, id): called once by all lanes, as soon as a lane knows of a slot; slot -1: it does not. kMany: for
// many tokens; more code, of which less is run.
template <Score kScore, int kPer, bool kMany = false, class Tell>
__device__ __forceinline__ Slot route_logits(const RouteParams& p, int token, const float (&values)[kPer],
                                             const float (&bias)[kPer], uint32_t* memory, ListSmem* list, int lane,
                                             const Tell& tell) {
  const int first_expert = lane * kPer;
  const bool active = lane < p.top_k;
  uint32_t keys[kPer];
  float scores[kPer];
  if (kMayList<kPer> && list != nullptr) clear_list(*list, lane);
  if constexpr (kScore == kBySigmoid) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      scores[i] = sigmoid(values[i]);
      keys[i] = order_key(__fadd_rn(scores[i], bias[i]));
    }
  } else if constexpr (kScore == kBySoftmax) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) scores[i] = first_expert + i < p.num_experts ? values[i] : -INFINITY;
    float top = scores[0];
#pragma unroll
    for (int i = 1; i < kPer; ++i) top = fmaxf(top, scores[i]);
    top = key_value(__reduce_max_sync(kAllLanes, order_key(top)));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      scores[i] = expf(__fsub_rn(scores[i], top));
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
  if constexpr (kMayList<kPer>) {
    if (list != nullptr && lists_candidates<kPer>(p)) {
      __syncwarp();  // the list is empty
      constexpr bool kScores = kScore == kBySigmoid;
      uint2 slot;
      float score;
      if (slots_of_list<kScores>(p, keys, scores, *list, lane, slot, score, tell)) {
        return active ? Slot{static_cast<int>(~slot.x), kScores ? score : key_value(slot.y)} : Slot{0, 0.0f};
      }
    }
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
  if (kMany && !kMayList<kPer> && p.top_k == 8) {
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
  const int id = active ? my_owner * kPer + __ffs(candidates) - 1 : 0;
  tell(active ? lane : -1, id);

  float value = key_value(my_key);
  if (kScore == kBySigmoid && p.bias != nullptr) {  // with a bias the key is not the score any more
    value = sigmoid(load_float(p.logits, p.logits_dtype, static_cast<size_t>(token) * p.num_experts + id));
  }
  return active ? Slot{id, value} : Slot{0, 0.0f};
}

}  // namespace expertd
