// The slots of one token in one warp, up to eight of them, without sorting: a bound is found that at least as many
// scores reach, and hardly more; the few that do, the candidates, are listed in shared memory, and a candidate's slot
// is how many others are better.
//
// The bound: each two lanes' greatest score is a value, and the k-th greatest of these 16 is reached by k scores, 10 or
// 11 on average where k is eight. Of eight groups the two greatest scores are known anyway, and the least of those that
// stay is one.
#pragma once
#include <cstdint>

#include "order_key.cuh"
#include "params.h"
#include "sm90.cuh"
#include "warp.cuh"

namespace expertd {

constexpr int kListSlots = 8;    // of a token, at most
constexpr int kListGroups = 8;   // or none
constexpr int kListLength = 32;  // of candidates
constexpr int kListFirst = 12;   // that are always looked at; there are seldom more

// Shared memory of a warp. Candidates are {~id, key}: the greater is better, and {0, 0} is none.
struct ListSmem {
  alignas(16) uint2 candidates[kListLength];
  float scores[kListLength];  // of each, before its bias
};

// Whether a layer's tokens may be routed in this way by kPer experts a lane.
template <int kPer>
__device__ __forceinline__ bool lists_candidates(const RouteParams& p) {
  const bool groups = p.n_group == kListGroups && p.num_experts == 32 * kPer && p.top_k <= 2 * p.topk_group;
  return p.top_k <= kListSlots && (p.n_group <= 1 || groups);
}

// The two greatest of some keys.
struct TwoKeys {
  uint32_t first, second;
};
__device__ __forceinline__ TwoKeys greatest_two(TwoKeys a, TwoKeys b) {
  return {max(a.first, b.first), max(min(a.first, b.first), max(a.second, b.second))};
}
template <int kFrom, int kTo, int kPer>
__device__ __forceinline__ TwoKeys two_of_lane(const uint32_t (&keys)[kPer]) {
  if constexpr (kTo - kFrom == 2) {
    return {max(keys[kFrom], keys[kFrom + 1]), min(keys[kFrom], keys[kFrom + 1])};
  } else {
    constexpr int kHalf = (kFrom + kTo) / 2;
    return greatest_two(two_of_lane<kFrom, kHalf>(keys), two_of_lane<kHalf, kTo>(keys));
  }
}

__device__ __forceinline__ uint32_t from_lane_xor(uint32_t v, int mask) { return __shfl_xor_sync(kAllLanes, v, mask); }

// A bound that at least top_k keys reach. 0 where too few lanes have experts.
template <int kPer>
__device__ __forceinline__ uint32_t bound_of_pairs(const uint32_t (&keys)[kPer], int top_k) {
  uint32_t greatest[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) greatest[i] = keys[i];
#pragma unroll
  for (int half = kPer / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) greatest[i] = max(greatest[i], greatest[i + half]);
  }
  const uint32_t pair = max(greatest[0], from_lane_xor(greatest[0], 1));
  int better = 0;
#pragma unroll
  for (int mask = 2; mask < 32; mask += 2) better += from_lane_xor(pair, mask) > pair;
  return __reduce_min_sync(kAllLanes, better < top_k ? pair : ~0u);
}

// The same of eight groups of four lanes each; `stays`: the lane's group is one of the best. As `keep_groups`.
template <int kPer>
__device__ __forceinline__ uint32_t bound_of_eight_groups(const RouteParams& p, const uint32_t (&keys)[kPer], int lane,
                                                          bool& stays) {
  TwoKeys best = two_of_lane<0, kPer>(keys);
  best = greatest_two(best, {from_lane_xor(best.first, 1), from_lane_xor(best.second, 1)});
  best = greatest_two(best, {from_lane_xor(best.first, 2), from_lane_xor(best.second, 2)});
  // NOTE: less one, so that there is a key above that of NaN. Equal groups: the lower one is better.
  const uint32_t mine = order_key(__fadd_rn(key_value(best.first), key_value(best.second))) - 1;
  const auto least_better = [&](int lanes) { return mine + ((lane & lanes) == 0 ? 1 : 0); };
  const uint32_t if_4 = least_better(4), if_8 = least_better(8), if_16 = least_better(16);
  int better = 0;
#pragma unroll
  for (int mask = 4; mask < 32; mask += 4) {
    better += from_lane_xor(mine, mask) >= (mask < 8 ? if_4 : mask < 16 ? if_8 : if_16);
  }
  stays = better < p.topk_group;
  return __reduce_min_sync(kAllLanes, stays ? best.second : ~0u);
}

// Lane k gets the candidate of slot k, and its score. False, for all lanes, where there are too many candidates.
// keys: 0 for none, else in the experts' order; scores: of the same experts. kScores: whether scores are asked for.
// tell(slot, id): called once by all lanes, as soon as a lane knows of a slot; slot -1: it does not.
// The list must be empty: `clear_list`.
template <bool kScores, int kPer, class Tell>
__device__ __forceinline__ bool slots_of_list(const RouteParams& p, const uint32_t (&keys)[kPer],
                                              const float (&scores)[kPer], ListSmem& smem, int lane, uint2& slot,
                                              float& score, const Tell& tell) {
  bool stays = true;
  const uint32_t bound =
      max(p.n_group > 1 ? bound_of_eight_groups(p, keys, lane, stays) : bound_of_pairs(keys, p.top_k), 1u);
  uint32_t reached = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) reached |= keys[i] >= bound ? 1u << i : 0;
  if (!stays) reached = 0;
  const int own = __popc(reached);
  const uint32_t earlier_lanes = (1u << lane) - 1;
  int at = 0, listed = 0;
#pragma unroll
  for (int bit = 1; bit <= kPer; bit *= 2) {
    const uint32_t lanes = __ballot_sync(kAllLanes, (own & bit) != 0);
    at += bit * __popc(lanes & earlier_lanes);
    listed += bit * __popc(lanes);
  }
  if (listed > kListLength) return false;
  // NOTE: addresses, because the compiler would make a new one of an index for each candidate.
  uint32_t key_at = sm90::smem_address(smem.candidates + at), score_at = sm90::smem_address(smem.scores + at);
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if ((reached >> i & 1) != 0) {
      sm90::st_shared_v2(key_at, ~(lane * kPer + i), keys[i]);
      key_at += sizeof(uint2);
      if constexpr (kScores) {
        sm90::st_shared(score_at, __float_as_uint(scores[i]));
        score_at += sizeof(float);
      }
    }
  }
  __syncwarp();
  const uint2 mine = smem.candidates[lane];
  const float my_score = kScores ? smem.scores[lane] : 0.0f;
  int rank = 0;  // below 0
  const auto look_at = [&](int n) {
    const uint4 others = *reinterpret_cast<const uint4*>(&smem.candidates[n]);
    rank = sm90::less_if_below(rank, mine, {others.x, others.y});
    rank = sm90::less_if_below(rank, mine, {others.z, others.w});
  };
#pragma unroll
  for (int n = 0; n < kListFirst; n += 2) look_at(n);
#pragma unroll 1
  for (int n = kListFirst; n < listed; n += 4) look_at(n), look_at(n + 2);
  const int better = -rank;
  const bool chosen = mine.y != 0 && better < p.top_k;
  tell(chosen ? better : -1, static_cast<int>(~mine.x));
  __syncwarp();
  if (chosen) {
    smem.candidates[better] = mine;
    if constexpr (kScores) smem.scores[better] = my_score;
  }
  __syncwarp();
  slot = smem.candidates[lane];
  score = kScores ? smem.scores[lane] : 0.0f;
  return true;
}

// Behind it other lanes may write there only after a barrier of the warp.
__device__ __forceinline__ void clear_list(ListSmem& smem, int lane) { smem.candidates[lane] = make_uint2(0, 0); }

}  // namespace expertd
