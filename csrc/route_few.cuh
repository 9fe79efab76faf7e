// Routing of a handful of tokens in one block: a warp routes each, and another places its slots, a slot to a lane,
// while the first still computes their weights. Nothing here waits for memory but the logits: what counts is the
// instructions of one warp, one after the other.
//
// The permutation: a token's experts are a set, a lane holding 32 of them. Where a row or a tile lies is then a prefix
// of counts plus a popcount. No scan over the experts, and an expert has one tile, because every family's tiles hold
// more rows than there are tokens.
#pragma once
#include <cuda_bf16.h>

#include "params.h"
#include "permute.cuh"
#include "route_token.cuh"
#include "sm90.cuh"
#include "warp.cuh"

namespace expertd {

constexpr int kFewTokens = 8;

struct FewSmem {
  alignas(16) int local[kFewTokens][kMaxTopK];    // local experts of the slots, -1 where not held or no slot
  float weights[kFewTokens][kMaxTopK];            // as topk_weights has them; only where rows are weighted
  ListSmem lists[kFewTokens];                     // of the warps that route
  uint32_t chosen[kFewTokens][kMaxExperts / 32];  // by token: its experts
  int before[kFewTokens][kMaxExperts / 32];       // how many of them in lower words
};

// Named barriers of the block.
constexpr int kTold = 1, kPlacing = 2, kWeighed = 3;

__device__ __forceinline__ int inclusive_scan(int v, int lane) {
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int other = __shfl_up_sync(kAllLanes, v, d);
    v += lane >= d ? other : 0;
  }
  return v;
}

// Where a slot, or its expert's tile, lies.
struct Place {
  int row, tile, first_row, rows, num_tiles, num_rows;
};

// One token whose experts differ: the rank of an expert's id is its row and its tile.
__device__ __forceinline__ Place place_one(const RouteParams& p, const FewSmem& smem, int local) {
  int rank = 0;
#pragma unroll 2
  for (int k = 0; k < p.top_k; k += 4) {
    const int4 v = *reinterpret_cast<const int4*>(&smem.local[0][k]);
    const auto before = [&](int other) {
      return static_cast<unsigned>(other) < static_cast<unsigned>(local);
    };  // not -1
    rank += before(v.x) + before(v.y) + before(v.z) + before(v.w);
  }
  const int held = __popc(__ballot_sync(kAllLanes, local >= 0));
  return {rank, rank, rank, 1, held, held};
}

// By p.num_tokens warps. Slots of one token with the same expert share a row.
__device__ __forceinline__ Place place_few(const RouteParams& p, FewSmem& smem, int token, int lane, int local) {
  uint32_t word = 0;
#pragma unroll 4
  for (int k = 0; k < p.top_k; ++k) {
    const int other = __shfl_sync(kAllLanes, local, k);
    word |= other >> 5 == lane ? 1u << (other & 31) : 0;  // -1 is nobody's
  }
  const int upto = inclusive_scan(__popc(word), lane);
  smem.chosen[token][lane] = word;
  smem.before[token][lane] = upto - __popc(word);
  sm90::bar_sync(kPlacing, p.num_tokens * 32);

  const int at = max(local, 0) >> 5, bit = local & 31;
  const uint32_t lower = (1u << bit) - 1;
  uint32_t any = 0;
  Place place = {};
  int earlier = 0;
#pragma unroll
  for (int t = 0; t < kFewTokens; ++t) {
    if (t >= p.num_tokens) break;
    const uint32_t chosen = smem.chosen[t][at];
    const int has = chosen >> bit & 1;
    any |= smem.chosen[t][lane];
    place.first_row += smem.before[t][at] + __popc(chosen & lower);
    place.rows += has;
    earlier += t < token ? has : 0;
    place.num_rows += smem.before[t][31] + __popc(smem.chosen[t][31]);
  }
  const int tiles = inclusive_scan(__popc(any), lane);
  place.row = place.first_row + earlier;
  place.tile = __shfl_sync(kAllLanes, tiles - __popc(any), at) + __popc(__shfl_sync(kAllLanes, any, at) & lower);
  place.num_tiles = __shfl_sync(kAllLanes, tiles, 31);
  return place;
}

// Beside the block that routes, in one warp of another: asks for weights of a token's best expert, as memory is idle
// until product 1 knows its tiles. All experts are local here, so that product 1 needs them. (Groups may exclude the
// best expert, hardly ever; then they are read for nothing.)
template <Score kScore, int kPer>
__device__ __forceinline__ void fetch_early(const RouteParams& p, int block, int lane) {
  const int part = divide(block, p.num_tokens_inverse), token = block - part * p.num_tokens;
  const int num_tokens = p.num_valid == nullptr ? p.num_tokens : *p.num_valid;
  int expert;
  if (p.logits != nullptr) {
    float values[kPer], bias[kPer];
    load_logits<kPer>(p, token, lane, values);
    load_bias<kScore, kPer>(p, lane, bias);
    uint32_t keys[kPer], top = 0;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const float score = kScore == kBySigmoid ? __fadd_rn(sigmoid(values[i]), bias[i]) : values[i];
      keys[i] = lane * kPer + i < p.num_experts ? order_key(score) : 0;
      top = max(top, keys[i]);
    }
    const uint32_t best = __reduce_max_sync(kAllLanes, top);
    int mine = 0;
#pragma unroll
    for (int i = 1; i < kPer; ++i) mine = keys[i] == best ? i : mine;
    const int owner = __ffs(__ballot_sync(kAllLanes, top == best)) - 1;
    if (lane != owner) return;
    expert = lane * kPer + mine;
  } else {
    expert = p.in_ids[token * p.top_k];
    if (lane != 0 || static_cast<unsigned>(expert) >= static_cast<unsigned>(p.num_experts)) return;
  }
  if (token >= num_tokens) return;
  const uint8_t* weights = p.weights + expert * p.expert_bytes;
  sm90::cp_async_bulk_prefetch(weights + static_cast<size_t>(part) * p.early_stride, p.early_bytes);
}

// memory: of each warp that routes [num_experts + n_group], for odd groups. kEarly: whether there are blocks that fetch
// weights; without, nothing of them is between the start and the logits.
template <Score kScore, int kPer, bool kEarly>
__global__ void __launch_bounds__(2 * kFewTokens * 32, 1) route_few_kernel(const __grid_constant__ RouteParams p) {
  __shared__ FewSmem smem;
  extern __shared__ uint32_t memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, threads = 2 * p.num_tokens * 32;
  const bool routes = warp < p.num_tokens;
  const int token = routes ? warp : warp - p.num_tokens;
  const size_t slot = static_cast<size_t>(token) * p.top_k + lane;
  sm90::griddepcontrol_wait();
  sm90::griddepcontrol_launch_dependents();
  if (kEarly && blockIdx.x > 0) {
    if (warp == 0) fetch_early<kScore, kPer>(p, blockIdx.x - 1, lane);
    return;
  }
  const int num_tokens = share_of(p).num_tokens;
  const bool own = token < num_tokens && lane < p.top_k;
  if (routes) {
    float values[kPer], bias[kPer];
    const bool has_logits = p.logits != nullptr && token < num_tokens;
    if (has_logits) {
      load_logits<kPer>(p, token, lane, values);
      load_bias<kScore, kPer>(p, lane, bias);
    }
    smem.local[token][lane] = -1;
    __syncwarp();
    const auto tell = [&](int k, int id) {
      const int local = id - p.local_offset;
      if (k >= 0 && static_cast<unsigned>(local) < static_cast<unsigned>(p.num_local)) smem.local[token][k] = local;
      __syncwarp();
      sm90::bar_arrive(kTold, threads);
    };
    int id = -1;
    float weight = 0.0f;
    if (has_logits) {
      uint32_t* mine = memory + warp * (p.num_experts + p.n_group);
      const Slot routed = route_logits<kScore, kPer>(p, token, values, bias, mine, &smem.lists[warp], lane, tell);
      id = routed.id;
      weight = slot_weight<kScore, 32>(p, routed.value, lane < p.top_k);
    } else {
      if (own) id = p.in_ids[slot];
      tell(own ? lane : -1, id);
      if (own) weight = load_float(p.in_weights, p.in_weights_dtype, slot);
    }
    const __nv_bfloat16 rounded = __float2bfloat16_rn(weight);
    if (p.row_weight != nullptr) {
      smem.weights[token][lane] = __bfloat162float(rounded);
      __syncwarp();
      sm90::bar_arrive(kWeighed, threads);
    }
    if (own) {
      p.topk_ids[slot] = id;
      reinterpret_cast<__nv_bfloat16*>(p.topk_weights)[slot] = rounded;
      if (p.replay != nullptr) p.replay[slot] = static_cast<int16_t>(id);
    }
  } else {
    sm90::bar_sync(kTold, threads);
    const int local = smem.local[token][lane];
    const bool differ = p.num_tokens == 1 && p.logits != nullptr;
    const Place place = differ ? place_one(p, smem, local) : place_few(p, smem, token, lane, local);
    if (local >= 0) {
      if (place.row == place.first_row) {
        p.tiles[place.tile] = make_int4(local | 1 << 16, place.first_row, place.rows, place.tile);
        p.tile_ready[place.tile] = 0;
      }
      p.row_token[place.row] = token;
    }
    if (warp == p.num_tokens && lane == 0) *p.schedule = Schedule{place.num_tiles, place.num_rows, {0, 0}};
    if (own) p.expanded_to_row[slot] = local >= 0 ? place.row : -1;
    if (p.row_weight != nullptr) {
      sm90::bar_sync(kWeighed, threads);
      if (local >= 0) p.row_weight[place.row] = smem.weights[token][lane];
    }
  }
}

}  // namespace expertd
