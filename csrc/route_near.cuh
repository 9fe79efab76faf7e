// Four tokens in one warp by sigmoids of 129 to 256 experts. As `route_four.cuh`, but whose scores cost most: first all
// of them nearly, in half the instructions, which is enough to find the candidates; then those of the candidates, ten
// or so of 256, exactly. What is written is to the bit what the exact scores of all give.
//
// The list is of experts: a lane finds a candidate's score again from its logit, since registers cannot be indexed.
//
// Of experts in groups a lane owns a group: it knows the two greatest of its scores, and which groups stay. Where near
// scores do not tell that, once in 15000 tokens of random logits, the token goes the other way, as where more than 32
// experts reach the bound.
#pragma once
#include <cstdint>

#include "params.h"
#include "route_four.cuh"
#include "sm90.cuh"
#include "warp.cuh"

namespace expertd {

constexpr int kNearPer = 8;                // fours of a lane
constexpr int kNearScores = 4 * kNearPer;  // of a lane

// More shared memory of a warp.
struct NearSmem {
  float values[kFour][kMaxCandidates];    // of each candidate: its score before the bias
  uint8_t listed[kFour][kMaxCandidates];  // the candidates' experts
};

// `sigmoid`, off by 1.2e-7 at most: over all floats, on an H100.
constexpr float kNearOff = 1.3e-7f;
__device__ __forceinline__ float near_sigmoid(float x) {
  return sm90::rcp_approx(__fadd_rn(1.0f, sm90::ex2_approx(__fmul_rn(x, -1.44269504f))));
}

// What a near score is off by at most: the sigmoid, its sum with the bias, and the rounding of the exact score.
__device__ __forceinline__ float near_off(float greatest_bias) {
  return __fmaf_rn(1.0f + greatest_bias, 0x1p-23f, kNearOff);
}

// The two greatest of some values, NaN greater than all.
__device__ __forceinline__ Two nan_two(float a, float b) { return {sm90::max_nan(a, b), sm90::min_nan(a, b)}; }
__device__ __forceinline__ Two nan_greatest_two(Two a, Two b) {
  return {sm90::max_nan(a.first, b.first),
          sm90::max_nan(sm90::min_nan(a.first, b.first), sm90::max_nan(a.second, b.second))};
}
template <int kFrom, int kTo, int kN>
__device__ __forceinline__ Two nan_greatest_two(const float (&values)[kN]) {
  if constexpr (kTo - kFrom == 2) {
    return nan_two(values[kFrom], values[kFrom + 1]);
  } else {
    constexpr int kHalf = (kFrom + kTo) / 2;
    return nan_greatest_two(nan_greatest_two<kFrom, kHalf>(values), nan_greatest_two<kHalf, kTo>(values));
  }
}

// The bound of a token in groups, each of a lane; `stays`: the lane's is one of the best. scores: near ones, `off` by
// that at most. False, in some lane, where they do not tell.
__device__ __forceinline__ bool bound_of_groups(const RouteParams& p, const float (&scores)[kNearScores], float off,
                                                float& bound, bool& stays) {
  const Two best = nan_greatest_two<0, kNearScores>(scores);
  const float mine = __fadd_rn(best.first, best.second);
  // NOTE: a sum's two scores are off by `off` each, and so is at most what it and the exact sum are rounded by; here
  // and there that makes eight, and the threshold's own rounding is less. Comparisons with NaN are false, and tell
  // nothing.
  const float above = __fmaf_rn(9.0f, off, mine), under = __fmaf_rn(-9.0f, off, mine);
  int better = 0, worse = 0;
#pragma unroll
  for (int mask = 1; mask < kTokenLanes; ++mask) {
    const float other = from_lane_xor(mine, mask);
    better += other > above;
    worse += other < under;
  }
  stays = better < p.topk_group;
  bound = stays ? best.second : INFINITY;
#pragma unroll
  for (int mask = 1; mask < kTokenLanes; mask *= 2) bound = sm90::min_nan(bound, from_lane_xor(bound, mask));
  return !stays || worse >= kTokenLanes - p.topk_group;
}

// Whose a lane's score n is. A lane reads a group in an order of its own, so that the lanes of a token meet in no bank.
template <bool kGroups>
__device__ __forceinline__ int expert_of(int n, int part) {
  return kGroups ? part * (kFourGroupSize + 4) ^ n : first_of_four(n / 4, part) + n % 4;
}

// A lane's logits of a token; past the last expert any of the token's.
template <DType kType, bool kGroups>
__device__ __forceinline__ void load_near(const RouteParams& p, const void* row, int part,
                                          float (&logits)[kNearScores]) {
#pragma unroll
  for (int n = 0; n < kNearScores; n += 4) {
    const int first = expert_of<kGroups>(n, part);
    load_four<kType>(row, kGroups ? first : min(first, p.num_experts - 4), logits + n);
  }
}

// As `route_four`. bias: [256] in shared memory, -infinity past the last expert; off: `near_off`.
template <bool kGroups>
__device__ __forceinline__ unsigned route_near(const RouteParams& p, int count, const void* logits, const float* bias,
                                               float off, FourSmem& smem, NearSmem& near, int lane, int& id,
                                               float& weight) {
  const int token = lane / kTokenLanes, part = lane % kTokenLanes;
  const void* row = static_cast<const char*>(logits) + min(token, count - 1) * bytes_of_row(p);
  float scores[kNearScores];
  if (p.logits_dtype == DType::kFloat32) {
    load_near<DType::kFloat32, kGroups>(p, row, part, scores);
  } else {
    load_near<DType::kBFloat16, kGroups>(p, row, part, scores);
  }
#pragma unroll
  for (int n = 0; n < kNearScores; n += 4) {
    float biases[4];
    load_four<DType::kFloat32>(bias, expert_of<kGroups>(n, part), biases);
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n + i] = __fadd_rn(near_sigmoid(scores[n + i]), biases[i]);
  }

  bool stays = true, sure = true;
  float bound;
  if constexpr (kGroups) {
    sure = bound_of_groups(p, scores, off, bound, stays);
  } else {
    bound = bound_of_fours(scores);
  }
  const float less_bound = __fmaf_rn(3.0f, off, -bound);  // so that all that reach it exactly do
  constexpr int kHalf = kNearScores / 2;                  // two chains of instructions, side by side
  uint32_t below[2] = {};
#pragma unroll
  for (int n = kHalf - 1; n >= 0; --n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float over = __fadd_rn(scores[half * kHalf + n], less_bound);
      below[half] = __funnelshift_l(__float_as_uint(over), below[half], 1);
    }
  }
  uint32_t reached = stays ? ~(below[0] | below[1] << kHalf) : 0;

  const int own = __popc(reached), upto = upto_lane(own, part);
  const int candidates = __shfl_sync(kAllLanes, upto, kTokenLanes - 1, kTokenLanes);
  bool too_many = candidates > kMaxCandidates;
  if constexpr (kGroups) too_many |= (__ballot_sync(kAllLanes, !sure) >> (lane - part) & 0xff) != 0;
  if (too_many) reached = 0;
  const int listed = too_many ? 0 : candidates, most = __reduce_max_sync(kAllLanes, listed);
  uint8_t* at = &near.listed[token][upto - own];
#pragma unroll 1
  for (; reached != 0; reached &= reached - 1) *at++ = expert_of<kGroups>(__ffs(reached) - 1, part);
  __syncwarp();

  // Their keys: a lane has one of each eight, two at a time. Empty ones behind them.
#pragma unroll 1
  for (int first = part; first < most + part; first += 2 * kTokenLanes) {
    int experts[2];
    float values[2], biases[2];
    bool exist[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      experts[i] = near.listed[token][first + i * kTokenLanes];
      // Those past the last expert reach a bound of -infinity.
      exist[i] = first + i * kTokenLanes < listed && (kGroups || experts[i] < p.num_experts);
      if (!exist[i]) experts[i] = 0;
    }
    if (p.logits_dtype == DType::kFloat32) {
#pragma unroll
      for (int i = 0; i < 2; ++i) values[i] = static_cast<const float*>(row)[experts[i]];
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) values[i] = __bfloat162float(static_cast<const __nv_bfloat16*>(row)[experts[i]]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) biases[i] = bias[experts[i]];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      values[i] = sigmoid(values[i]);
      const uint32_t key = order_key(__fadd_rn(values[i], biases[i]));
      smem.candidates[token][first + i * kTokenLanes] = exist[i] ? make_uint2(~experts[i], key) : make_uint2(0, 0);
      near.values[token][first + i * kTokenLanes] = values[i];
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int first = part; first < most + part; first += 2 * kTokenLanes) {
    const uint2 own[2] = {smem.candidates[token][first], smem.candidates[token][first + kTokenLanes]};
    const float values[2] = {near.values[token][first], near.values[token][first + kTokenLanes]};
    int rank[2] = {};
    rank_in_list(smem.candidates[token], most, own, rank);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (own[i].y != 0 && -rank[i] < p.top_k) {
        smem.slots[token][-rank[i]] = make_uint2(~own[i].x, __float_as_uint(values[i]));
      }
    }
  }
  __syncwarp();
  return take_slots<kBySigmoid>(p, count, smem, lane, too_many, id, weight);
}

}  // namespace expertd
