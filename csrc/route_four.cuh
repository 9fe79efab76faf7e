// Four tokens in one warp, eight lanes each, where there are many tokens: a third to a half of the instructions for
// each.
//
// No score is sorted. A bound is found that at least eight of a token's scores reach, and hardly more; the few that do,
// its candidates, are listed in shared memory, and a candidate's slot is how many others are better.
//
// A lane owns every eighth four of consecutive experts. Its two best fours give two values, and the eighth of a token's
// sixteen values is the bound: so many different experts reach it. Sigmoids of more than 128 experts: `route_near.cuh`.
//
// NOTE: scores are compared as floats here, by instructions that ignore NaN. A NaN is greater than any score, so that
// the bound only gets lower; and it is always a candidate, as the sign of what it gives less the bound is plus.
#pragma once
#include <cstdint>

#include "order_key.cuh"
#include "params.h"
#include "route_token.cuh"
#include "sm90.cuh"
#include "warp.cuh"

namespace expertd {

constexpr int kFour = 4, kTokenLanes = 32 / kFour;
constexpr int kFourSlots = 8;       // of a token, at most
constexpr int kMaxCandidates = 32;  // of a token; there are 9 to 11 on average, and more than these if scores are equal
constexpr int kFourGroupSize = 32;  // experts of a group

// Shared memory of a warp. Candidates are {~id, key}: the greater is better, and {0, 0} is none.
struct FourSmem {
  alignas(16) uint2 candidates[kFour][kMaxCandidates + 2];  // two more: no bank conflicts
  uint2 slots[kFour][kFourSlots];                           // {id, what the weight is made of}
  alignas(8) uint64_t logits_here;
};

__host__ __device__ __forceinline__ int bytes_of_row(const RouteParams& p) {
  return p.num_experts * (p.logits_dtype == DType::kFloat32 ? 4 : 2);
}

// Whether tokens can be routed in this way, or nearly, by kPer fours a lane.
template <Score kScore, int kPer>
bool routes_four(const RouteParams& p) {
  const bool copies = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && bytes_of_row(p) % 16 == 0;
  const bool groups = p.n_group == kTokenLanes && p.num_experts == kTokenLanes * kFourGroupSize && kPer == kTokenLanes;
  return p.logits != nullptr && p.top_k <= kFourSlots && copies &&
         (kScore != kBySigmoid || p.n_group <= 1 || (groups && p.top_k <= 2 * p.topk_group));
}

// Starts the copy of the logits of `count` tokens into the warp's shared memory, in one piece, as they lie in a row. By
// one lane; all have to wait for smem.logits_here.
__device__ __forceinline__ void fetch_logits(const RouteParams& p, int first_token, int count, void* logits,
                                             FourSmem& smem) {
  const uint32_t bar = sm90::smem_address(&smem.logits_here);
  const int row = bytes_of_row(p);
  sm90::mbarrier_arrive_expect_tx(bar, count * row);
  sm90::cp_async_bulk(sm90::smem_address(logits),
                      static_cast<const char*>(p.logits) + static_cast<size_t>(first_token) * row, count * row, bar);
}

// The two greatest of some values.
struct Two {
  float first, second;
};
__device__ __forceinline__ Two two(float a, float b) { return {fmaxf(a, b), fminf(a, b)}; }
__device__ __forceinline__ Two greatest_two(Two a, Two b) {
  return {fmaxf(a.first, b.first), fmaxf(fminf(a.first, b.first), fmaxf(a.second, b.second))};
}
template <int kN>
__device__ __forceinline__ Two greatest_two(const float (&values)[kN]) {
  Two best = two(values[0], values[1]);
#pragma unroll
  for (int i = 2; i < kN; i += 2) best = greatest_two(best, two(values[i], values[i + 1]));
  return best;
}
__device__ __forceinline__ float from_lane_xor(float v, int mask) { return __shfl_xor_sync(kAllLanes, v, mask); }

// What eight scores of a token reach at least: the eighth greatest of its lanes' two values each.
__device__ __forceinline__ float eighth(Two own) {
  float four[4] = {own.first, own.second, from_lane_xor(own.first, 1), from_lane_xor(own.second, 1)};
  merge_descending<2, 2>(four);
  float eight[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) eight[i] = four[i], eight[i + 4] = from_lane_xor(four[i], 2);
  merge_descending<4, 4>(eight);
  float least = fmaxf(eight[0], from_lane_xor(eight[7], 4));
#pragma unroll
  for (int i = 1; i < 8; ++i) least = fminf(least, fmaxf(eight[i], from_lane_xor(eight[7 - i], 4)));
  return least;
}

// A bound that eight of a token's scores reach at least.
template <int kN>
__device__ __forceinline__ float bound_of_fours(const float (&scores)[kN]) {
  float fours[kN / 4];
#pragma unroll
  for (int i = 0; i < kN; i += 4) {
    fours[i / 4] = fmaxf(fmaxf(scores[i], scores[i + 1]), fmaxf(scores[i + 2], scores[i + 3]));
  }
  return eighth(greatest_two(fours));
}

// Logits -> softmax values, to the bit as `route_logits` has them of lanes of four experts: these are our fours. With a
// NaN anywhere the sum is one, and so is every value, whatever the greatest logit is taken to be.
__device__ __forceinline__ void softmax(float (&scores)[16]) {
  float tops[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) tops[i] = fmaxf(scores[i], scores[i + 8]);
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) tops[i] = fmaxf(tops[i], tops[i + half]);
  }
  float top = tops[0];
#pragma unroll
  for (int mask = 1; mask < kTokenLanes; mask *= 2) top = fmaxf(top, from_lane_xor(top, mask));
  float sums[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float* four = scores + 4 * i;
#pragma unroll
    for (int j = 0; j < 4; ++j) four[j] = expf(__fsub_rn(four[j], top));
    sums[i] = __fadd_rn(__fadd_rn(__fadd_rn(four[0], four[1]), four[2]), four[3]);
  }
  float sum = __fadd_rn(__fadd_rn(sums[0], sums[2]), __fadd_rn(sums[1], sums[3]));  // NOTE: the order of `warp_sum`
#pragma unroll
  for (int mask = kTokenLanes / 2; mask > 0; mask /= 2) sum = __fadd_rn(sum, from_lane_xor(sum, mask));
  const float inverse = __fdividef(1.0f, sum);
#pragma unroll
  for (float& score : scores) score = __fmul_rn(score, inverse);
}

// The first expert of a lane's four i.
__device__ __forceinline__ int first_of_four(int i, int part) { return i * 4 * kTokenLanes + part * 4; }

// Four values of a row in shared memory, as floats.
template <DType kType>
__device__ __forceinline__ void load_four(const void* row, int first, float* four) {
  if constexpr (kType == DType::kFloat32) {
    const float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(row) + first);
    four[0] = v.x, four[1] = v.y, four[2] = v.z, four[3] = v.w;
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(row) + first);
    four[0] = __uint_as_float(v.x << 16), four[1] = __uint_as_float(v.x & 0xffff0000u);
    four[2] = __uint_as_float(v.y << 16), four[3] = __uint_as_float(v.y & 0xffff0000u);
  }
}

// A lane's kPer consecutive of a row's n values in shared memory; past the last any of them.
template <int kPer>
__device__ __forceinline__ void load_shared(const void* row, DType dtype, int n, int lane, float (&values)[kPer]) {
#pragma unroll
  for (int i = 0; i < kPer; i += 4) {
    const int first = min(lane * kPer + i, n - 4);
    if (dtype == DType::kFloat32) {
      load_four<DType::kFloat32>(row, first, values + i);
    } else {
      load_four<DType::kBFloat16>(row, first, values + i);
    }
  }
}

// A lane's logits of a token, -infinity past the last expert.
template <DType kType, int kN>
__device__ __forceinline__ void load_fours(const RouteParams& p, const void* row, int part, float (&logits)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; i += 4) load_four<kType>(row, min(first_of_four(i / 4, part), p.num_experts - 4), logits + i);
  if (p.num_experts == kTokenLanes * kN) return;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    if (first_of_four(i / 4, part) >= p.num_experts) logits[i] = -INFINITY;
  }
}

__device__ __forceinline__ float logit_of(const RouteParams& p, const void* row, int expert) {
  return p.logits_dtype == DType::kFloat32 ? static_cast<const float*>(row)[expert]
                                           : __bfloat162float(static_cast<const __nv_bfloat16*>(row)[expert]);
}

// A sum over the lanes of a token up to this one.
__device__ __forceinline__ int upto_lane(int v, int part) {
#pragma unroll
  for (int d = 1; d < kTokenLanes; d *= 2) {
    const int other = __shfl_up_sync(kAllLanes, v, d, kTokenLanes);
    v += part >= d ? other : 0;
  }
  return v;
}

// The last step: what lies in smem.slots. Of a token that has too many candidates nothing.
template <Score kScore>
__device__ __forceinline__ unsigned take_slots(const RouteParams& p, int count, const FourSmem& smem, int lane,
                                               bool too_many, int& id, float& weight) {
  const int token = lane / kTokenLanes, part = lane % kTokenLanes;
  const bool active = part < p.top_k && !too_many;
  const uint2 slot = smem.slots[token][part];
  id = active ? slot.x : 0;
  weight = slot_weight<kScore, kTokenLanes>(p, __uint_as_float(slot.y), active);
  return __ballot_sync(kAllLanes, too_many && token < count);
}

// Two candidates of a token among `most` or more of its list: one less for each that is better.
__device__ __forceinline__ void rank_in_list(const uint2* list, int most, const uint2 (&own)[2], int (&rank)[2]) {
  const auto look_at = [&](int m) {
    const uint4 others = *reinterpret_cast<const uint4*>(list + m);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rank[i] = sm90::less_if_below(rank[i], own[i], {others.x, others.y});
      rank[i] = sm90::less_if_below(rank[i], own[i], {others.z, others.w});
    }
  };
#pragma unroll
  for (int m = 0; m < kListFirst; m += 2) look_at(m);
#pragma unroll 1
  for (int m = kListFirst; m < most; m += 4) look_at(m), look_at(m + 2);
}

// `count` tokens of a warp, up to four, whose logits lie in shared memory. Lane 8 t + k returns the expert of slot k of
// token t, and its weight. Returns a bit for each lane of a token that has too many candidates to be routed in this
// way. bias: [32 * kPer] in shared memory, only for kBySigmoid; -infinity past the last expert.
template <Score kScore, int kPer>
__device__ __forceinline__ unsigned route_four(const RouteParams& p, int count, const void* logits, const float* bias,
                                               FourSmem& smem, int lane, int& id, float& weight) {
  const int token = lane / kTokenLanes, part = lane % kTokenLanes;
  const void* row = static_cast<const char*>(logits) + min(token, count - 1) * bytes_of_row(p);
  float scores[4 * kPer];
  if (p.logits_dtype == DType::kFloat32) {
    load_fours<DType::kFloat32>(p, row, part, scores);
  } else {
    load_fours<DType::kBFloat16>(p, row, part, scores);
  }
  if constexpr (kScore == kBySoftmax) softmax(scores);
  if constexpr (kScore == kBySigmoid) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const float4 b = *reinterpret_cast<const float4*>(bias + first_of_four(i, part));
      const float biases[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[4 * i + j] = __fadd_rn(sigmoid(scores[4 * i + j]), biases[j]);
    }
  }

  const float less_bound = __fsub_rn(0.0f, bound_of_fours(scores));  // of a bound of zero +0, so that -0 reaches it
  uint32_t below = kPer < kTokenLanes ? ~0u : 0u;
#pragma unroll
  for (int n = 4 * kPer - 1; n >= 0; --n) {
    below = __funnelshift_l(__float_as_uint(__fadd_rn(scores[n], less_bound)), below, 1);
  }
  uint32_t reached = ~below;
  // A softmax value sorts as its bits do, so it is its own key. Those past the last expert may reach a bound of zero.
  constexpr bool kOwnKeys = kScore == kBySoftmax;
  if (kOwnKeys && p.num_experts != 32 * kPer) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) reached &= first_of_four(i, part) < p.num_experts ? ~0u : ~(0xfu << 4 * i);
  }

  const int own = __popc(reached), upto = upto_lane(own, part);
  const int candidates = __shfl_sync(kAllLanes, upto, kTokenLanes - 1, kTokenLanes);
  const bool too_many = candidates > kMaxCandidates;
  if (too_many) reached = 0;
  const int most = __reduce_max_sync(kAllLanes, too_many ? 0 : candidates);
  uint2* const list = smem.candidates[token];
  if constexpr (kOwnKeys) {  // empty ones will be behind them
#pragma unroll 1
    for (int first = 0; first < most; first += 2 * kTokenLanes) {
      *reinterpret_cast<uint4*>(list + first + 2 * part) = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
  }
  uint32_t at = sm90::smem_address(list + upto - own);  // as in `slots_of_list`
#pragma unroll
  for (int n = 0; n < 4 * kPer; ++n) {
    if ((reached >> n & 1) != 0) {
      sm90::st_shared_v2(at, ~(first_of_four(n / 4, part) + n % 4), __float_as_uint(scores[n]));
      at += sizeof(uint2);
    }
  }
  __syncwarp();

  if constexpr (!kOwnKeys) {
    // Their keys: a lane has one of each eight, two at a time. Empty ones behind them.
    const int listed = too_many ? 0 : candidates;
#pragma unroll 1
    for (int first = part; first < most + part; first += 2 * kTokenLanes) {
#pragma unroll
      for (int i = first; i < first + 2 * kTokenLanes; i += kTokenLanes) {
        const uint2 candidate = list[i];
        // Those past the last expert reach a bound of -infinity.
        const bool exists = i < listed && static_cast<int>(~candidate.x) < p.num_experts;
        const uint32_t key = order_key(__uint_as_float(candidate.y));
        list[i] = exists ? make_uint2(candidate.x, key) : make_uint2(0, 0);
      }
    }
    __syncwarp();
  }
#pragma unroll 1
  for (int first = part; first < most + part; first += 2 * kTokenLanes) {
    const uint2 own[2] = {list[first], list[first + kTokenLanes]};
    float values[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      values[i] = kOwnKeys ? __uint_as_float(own[i].y) : key_value(own[i].y);
      if constexpr (kScore == kBySigmoid) values[i] = sigmoid(logit_of(p, row, own[i].y != 0 ? ~own[i].x : 0));
    }
    int rank[2] = {};
    rank_in_list(list, most, own, rank);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (own[i].x != 0 && -rank[i] < p.top_k) {
        smem.slots[token][-rank[i]] = make_uint2(~own[i].x, __float_as_uint(values[i]));
      }
    }
  }
  __syncwarp();
  return take_slots<kScore>(p, count, smem, lane, too_many, id, weight);
}

}  // namespace expertd
