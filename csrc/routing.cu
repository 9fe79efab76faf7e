// Routing: logits (or ready ids) -> ids, weights, and the permutation that groups (token, expert) pairs by local expert.
//
// A block owns 64 tokens, a warp one token at a time. Each block keeps one 64-bit word per local expert: bit t is set
// where its token t chose the expert. A token's place among the rows of an expert is then a prefix of counts plus a
// popcount: no sort, no order of arrival, the same rows in every run.
//
// Up to 64 tokens one launch does everything; more take a second launch that adds up the blocks' counts.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>

#include "check.h"
#include "params.h"
#include "sm90.cuh"

namespace expertd {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

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

struct Smem {
  uint32_t bitmaps[kMaxExperts][2];
  int row_start[kMaxExperts];  // of each expert, this block's share
  int before[kMaxExperts];     // rows of the expert in earlier blocks
  int total[kMaxExperts];
  int ids[kRouteBlockTokens * kMaxTopK];  // local expert ids, -1 where not local
  long long warp_sums[kWarps];
};

__device__ __forceinline__ float load_float(const void* data, DType dtype, size_t i) {
  if (dtype == DType::kFloat32) return __ldg(static_cast<const float*>(data) + i);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
}

// Unsigned keys in the order of the floats, NaN greatest: a row that holds NaN shows it. 0: taken or excluded.
__device__ __forceinline__ uint32_t order_key(float f) {
  if (f != f) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(__fadd_rn(f, 0.0f));  // -0 ties with +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float key_value(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// NOTE: xor shuffles add in one fixed order, so that a token's weights do not depend on where it runs.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v = __fadd_rn(v, __shfl_xor_sync(kAll, v, mask));
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v = fmaxf(v, __shfl_xor_sync(kAll, v, mask));
  return v;
}

__device__ __forceinline__ float sigmoid(float x) { return __fdiv_rn(1.0f, __fadd_rn(1.0f, expf(-x))); }

// What the selection and the weight of one expert of a token are made of.
struct Scores {
  float max, sum;  // softmax over all experts, where the method asks for it
};
__device__ __forceinline__ bool uses_softmax(int method) { return method == kDefault || method == kRenormalizeNaive; }

__device__ __forceinline__ float selection_score(const RouteParams& p, const Scores& s, float logit, int expert) {
  switch (p.method) {
    case kDefault:
    case kRenormalizeNaive: return __fdiv_rn(expf(__fsub_rn(logit, s.max)), s.sum);
    case kRenormalize:
    case kLlama4:
    case kTopK: return logit;
    case kDeepSeekV3:
    case kMiniMax2: {
      const float score = sigmoid(logit);
      return p.bias == nullptr ? score : __fadd_rn(score, load_float(p.bias, p.bias_dtype, expert));
    }
    default: return sigmoid(logit);
  }
}

// Weight of slot `lane` (< top_k) from the logit it selected.
__device__ __forceinline__ float slot_weight(const RouteParams& p, const Scores& s, float logit, bool active) {
  switch (p.method) {
    case kDefault: return __fdiv_rn(expf(__fsub_rn(logit, s.max)), s.sum);
    case kRenormalize: {
      const float top = warp_max(active ? logit : -INFINITY);
      const float e = active ? expf(__fsub_rn(logit, top)) : 0.0f;
      return __fdiv_rn(e, warp_sum(e));
    }
    case kRenormalizeNaive: {
      const float v = active ? __fdiv_rn(expf(__fsub_rn(logit, s.max)), s.sum) : 0.0f;
      return p.norm_topk_prob ? __fdiv_rn(v, warp_sum(v)) : v;
    }
    case kTopK: return logit;
    case kLlama4:
    case kSigmoid: return sigmoid(logit);
    default: {
      const float v = active ? sigmoid(logit) : 0.0f;
      const float share = __fdiv_rn(v, __fadd_rn(warp_sum(v), 1e-20f));
      if (p.method == kSigmoidRenorm) return p.norm_topk_prob ? share : v;
      return __fmul_rn(share, p.routed_scaling_factor);
    }
  }
}

// Excludes the experts of all but the topk_group best groups. A group's score: the sum of its two highest.
template <int kPerLane>
__device__ __forceinline__ void keep_groups(const RouteParams& p, uint32_t (&keys)[kPerLane], uint32_t* group_keys,
                                            int lane) {
  const int size = p.num_experts / p.n_group;
  for (int g = 0; g < p.n_group; ++g) {
    const int first = g * size, last = first + size;
    uint32_t first_key = 0, second_key = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = lane + 32 * i;
      if (i * 32 + 31 < first || i * 32 >= last) continue;  // uniform: no lane of this line is in the group
      const uint32_t key = expert >= first && expert < last ? keys[i] : 0;
      second_key = max(second_key, min(first_key, key));
      first_key = max(first_key, key);
    }
    const uint32_t best = __reduce_max_sync(kAll, first_key);
    const unsigned holders = __ballot_sync(kAll, first_key == best);
    const uint32_t rest = first_key == best && __popc(holders) == 1 ? second_key : first_key;
    const uint32_t second = __reduce_max_sync(kAll, rest);
    if (lane == 0) group_keys[g] = order_key(__fadd_rn(key_value(best), key_value(second)));
  }
  __syncwarp();
  // Each lane ranks its experts' groups; E / n_group >= 2, so a lane does at most kPerLane of them.
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane + 32 * i;
    if (expert < p.num_experts) {
      const int group = expert / size;
      const uint32_t mine = group_keys[group];
      int better = 0;
      for (int g = 0; g < p.n_group; ++g) {
        const uint32_t other = group_keys[g];
        better += other > mine || (other == mine && g < group);
      }
      if (better >= p.topk_group) keys[i] = 0;
    }
  }
  __syncwarp();
}

// Selects top_k experts of a token; lane k returns the id of slot k.
template <int kPerLane>
__device__ __forceinline__ int select_experts(const RouteParams& p, uint32_t (&keys)[kPerLane], int lane) {
  uint32_t best = 0;
  int best_i = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (keys[i] > best) best = keys[i], best_i = i;  // the first of equals: the smaller id
  }
  int mine = 0;
  for (int k = 0; k < p.top_k; ++k) {
    const uint32_t top = __reduce_max_sync(kAll, best);
    const int id = __reduce_min_sync(kAll, best == top ? lane + 32 * best_i : INT_MAX);
    if (lane == k) mine = id;
    if (lane == (id & 31)) {  // only the owner looks again
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (i == best_i) keys[i] = 0;
      }
      best = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (keys[i] > best) best = keys[i], best_i = i;
      }
    }
  }
  return mine;
}

template <int kPerLane>
__device__ __forceinline__ int route_token(const RouteParams& p, int token, uint32_t* group_keys, int lane,
                                           float& weight) {
  const size_t row = static_cast<size_t>(token) * p.num_experts;
  float logits[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane + 32 * i;
    logits[i] = expert < p.num_experts ? load_float(p.logits, p.logits_dtype, row + expert) : -INFINITY;
  }
  Scores s = {0.0f, 1.0f};
  if (uses_softmax(p.method)) {
    float top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) top = fmaxf(top, logits[i]);
    s.max = warp_max(top);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane + 32 * i < p.num_experts) sum = __fadd_rn(sum, expf(__fsub_rn(logits[i], s.max)));
    }
    s.sum = warp_sum(sum);
  }
  uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane + 32 * i;
    keys[i] = expert < p.num_experts ? order_key(selection_score(p, s, logits[i], expert)) : 0;
  }
  if (p.n_group > 1) keep_groups<kPerLane>(p, keys, group_keys, lane);
  const int id = select_experts<kPerLane>(p, keys, lane);
  const bool active = lane < p.top_k;
  const float logit = active ? load_float(p.logits, p.logits_dtype, row + id) : 0.0f;
  weight = slot_weight(p, s, logit, active);
  return id;
}

// ---- permutation

__device__ __forceinline__ int num_valid_tokens(const RouteParams& p) {
  return p.num_valid == nullptr ? p.num_tokens : min(p.num_tokens, max(0, *p.num_valid));
}

// Exclusive prefix sums over the block: of `value`, thread by thread; `total` of all.
__device__ __forceinline__ long long block_scan(Smem& smem, long long value, long long& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  long long inclusive = value;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const long long below = __shfl_up_sync(kAll, inclusive, d);
    if (lane >= d) inclusive += below;
  }
  if (lane == 31) smem.warp_sums[warp] = inclusive;
  __syncthreads();
  long long sum = smem.warp_sums[lane];
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const long long below = __shfl_up_sync(kAll, sum, d);
    if (lane >= d) sum += below;
  }
  total = __shfl_sync(kAll, sum, 31);
  const long long earlier = __shfl_sync(kAll, sum, max(warp - 1, 0));
  return inclusive - value + (warp > 0 ? earlier : 0);
}

// Needs bitmaps, before, total and ids of the block in shared memory, behind a barrier.
__device__ __forceinline__ void write_permutation(const RouteParams& p, Smem& smem, int block, int num_blocks) {
  const int expert = threadIdx.x;
  const int rows = expert < p.num_local ? smem.total[expert] : 0;
  const int tiles = (rows + p.tile_n - 1) / p.tile_n;
  long long sum;
  const long long prefix = block_scan(smem, static_cast<long long>(tiles) << 32 | rows, sum);
  const int row0 = static_cast<int>(prefix), tile0 = static_cast<int>(prefix >> 32);
  if (expert < p.num_local) smem.row_start[expert] = row0 + smem.before[expert];
  __syncthreads();

  if (block == 0 && threadIdx.x == 0) {
    *p.schedule = Schedule{static_cast<int>(sum >> 32), static_cast<int>(sum), {0, 0}};
  }
  if (expert % num_blocks == block) {
    // Near-equal tiles: 130 rows in tiles of up to 128 become 96 + 34 rather than 128 + 2.
    const int units = (rows + p.tile_quantum - 1) / p.tile_quantum;
    int at = 0;
    for (int i = 0; i < tiles; ++i) {
      const int count = min(p.tile_quantum * (units / tiles + (i < units % tiles)), rows - at);
      const int first = i / p.tiles_per_block * p.tiles_per_block;
      p.tiles[tile0 + i] =
          make_int4(expert | min(p.tiles_per_block, tiles - first) << 16, row0 + at, count, tile0 + first);
      at += count;
    }
  }

  const int first_token = block * kRouteBlockTokens;
  const int tokens = min(kRouteBlockTokens, num_valid_tokens(p) - first_token);
  for (int i = threadIdx.x; i < tokens * p.top_k; i += kThreads) {
    const int local = smem.ids[i], t = i / p.top_k;
    const size_t slot = static_cast<size_t>(first_token) * p.top_k + i;
    int row = -1;
    if (local >= 0) {
      const uint64_t chosen = static_cast<uint64_t>(smem.bitmaps[local][1]) << 32 | smem.bitmaps[local][0];
      row = smem.row_start[local] + __popcll(chosen & ((1ull << t) - 1));
      p.row_token[row] = first_token + t;
      if (p.row_weight != nullptr) {
        p.row_weight[row] = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(p.topk_weights)[slot]);
      }
    }
    p.expanded_to_row[slot] = row;
  }
}

template <int kPerLane>
__global__ void __launch_bounds__(kThreads, 1) route_kernel(const __grid_constant__ RouteParams p) {
  __shared__ Smem smem;
  extern __shared__ uint32_t group_keys[];  // [warps, n_group]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < p.num_local) {
    smem.bitmaps[threadIdx.x][0] = smem.bitmaps[threadIdx.x][1] = 0;
    smem.before[threadIdx.x] = 0;
  }
  __syncthreads();
  sm90::griddepcontrol_wait();
  sm90::griddepcontrol_launch_dependents();
  const int first_token = blockIdx.x * kRouteBlockTokens;
  const int tokens = min(kRouteBlockTokens, num_valid_tokens(p) - first_token);
  for (int t = warp; t < tokens; t += kWarps) {
    const int token = first_token + t;
    const size_t slot = static_cast<size_t>(token) * p.top_k + lane;
    float weight = 0.0f;
    int id = -1;
    if (p.logits != nullptr) {
      id = route_token<kPerLane>(p, token, group_keys + warp * max(p.n_group, 0), lane, weight);
    } else if (lane < p.top_k) {
      id = p.in_ids[slot];
      weight = load_float(p.in_weights, p.in_weights_dtype, slot);
    }
    if (lane < p.top_k) {
      p.topk_ids[slot] = id;
      reinterpret_cast<__nv_bfloat16*>(p.topk_weights)[slot] = __float2bfloat16_rn(weight);
      if (p.replay != nullptr) p.replay[slot] = static_cast<int16_t>(id);
      const int local = id - p.local_offset;
      const bool held = static_cast<unsigned>(local) < static_cast<unsigned>(p.num_local);
      smem.ids[t * p.top_k + lane] = held ? local : -1;
      if (held) atomicOr(&smem.bitmaps[local][t >> 5], 1u << (t & 31));
    }
  }
  __syncthreads();
  const int expert = threadIdx.x;
  int count = 0;
  if (expert < p.num_local) {
    count = __popc(smem.bitmaps[expert][0]) + __popc(smem.bitmaps[expert][1]);
    smem.total[expert] = count;
  }
  if (gridDim.x == 1) {
    write_permutation(p, smem, 0, 1);
  } else if (expert < p.num_local) {
    const size_t i = static_cast<size_t>(blockIdx.x) * p.num_local + expert;
    p.bitmaps[i] = static_cast<uint64_t>(smem.bitmaps[expert][1]) << 32 | smem.bitmaps[expert][0];
    p.counts[i] = static_cast<uint8_t>(count);
  }
}

__global__ void __launch_bounds__(kThreads, 1) permute_kernel(const __grid_constant__ RouteParams p) {
  __shared__ Smem smem;
  const int num_blocks = gridDim.x, block = blockIdx.x;
  if (threadIdx.x < p.num_local) smem.before[threadIdx.x] = smem.total[threadIdx.x] = 0;
  __syncthreads();
  sm90::griddepcontrol_wait();
  sm90::griddepcontrol_launch_dependents();
  // Threads share the blocks of an expert: few experts would otherwise leave most of them idle.
  int lanes = 32;
  while (lanes < p.num_local) lanes *= 2;
  const int expert = threadIdx.x & (lanes - 1), share = threadIdx.x / lanes, shares = kThreads / lanes;
  if (expert < p.num_local) {
    int before = 0, total = 0;
#pragma unroll 8
    for (int b = share; b < num_blocks; b += shares) {
      const int count = __ldcg(p.counts + static_cast<size_t>(b) * p.num_local + expert);
      before += b < block ? count : 0;
      total += count;
    }
    atomicAdd(&smem.before[expert], before);
    atomicAdd(&smem.total[expert], total);
  }
  if (threadIdx.x < p.num_local) {
    const uint64_t chosen = __ldcg(p.bitmaps + static_cast<size_t>(block) * p.num_local + threadIdx.x);
    smem.bitmaps[threadIdx.x][0] = static_cast<uint32_t>(chosen);
    smem.bitmaps[threadIdx.x][1] = static_cast<uint32_t>(chosen >> 32);
  }
  const int first_token = block * kRouteBlockTokens;
  const int tokens = min(kRouteBlockTokens, num_valid_tokens(p) - first_token);
  for (int i = threadIdx.x; i < tokens * p.top_k; i += kThreads) {
    const int local = __ldcg(p.topk_ids + static_cast<size_t>(first_token) * p.top_k + i) - p.local_offset;
    smem.ids[i] = static_cast<unsigned>(local) < static_cast<unsigned>(p.num_local) ? local : -1;
  }
  __syncthreads();
  write_permutation(p, smem, block, num_blocks);
}

template <int kPerLane>
void launch_route_kernel(const RouteParams& p, int blocks, const LaunchConfig& launch) {
  const int smem = p.n_group > 1 ? kWarps * p.n_group * 4 : 0;
  if (smem > 16 * 1024) {
    check_cuda(cudaFuncSetAttribute(route_kernel<kPerLane>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem),
               "raising the shared memory limit of the routing kernel");
  }
  check_cuda(launch_kernel(route_kernel<kPerLane>, blocks, kThreads, smem, launch, p), "launching the routing kernel");
}

}  // namespace

void launch_route(const RouteParams& p, const LaunchConfig& launch) {
  require(p.num_experts >= 1 && p.num_experts <= kMaxExperts, "num_experts must be 1 to 1024");
  require(p.top_k >= 1 && p.top_k <= std::min(kMaxTopK, p.num_experts), "top_k must be 1 to min(num_experts, 32)");
  require(p.local_offset >= 0 && p.num_local >= 1 && p.local_offset + p.num_local <= p.num_experts,
          "the local experts must lie inside 0 ... num_experts - 1");
  const int blocks = std::max(1, (p.num_tokens + kRouteBlockTokens - 1) / kRouteBlockTokens);
  const int lines = p.logits == nullptr ? 1 : (p.num_experts + 31) / 32;
  if (lines <= 1) {
    launch_route_kernel<1>(p, blocks, launch);
  } else if (lines <= 4) {
    launch_route_kernel<4>(p, blocks, launch);
  } else if (lines <= 8) {
    launch_route_kernel<8>(p, blocks, launch);
  } else if (lines <= 16) {
    launch_route_kernel<16>(p, blocks, launch);
  } else {
    launch_route_kernel<32>(p, blocks, launch);
  }
  if (blocks > 1) {
    check_cuda(launch_kernel(permute_kernel, blocks, kThreads, 0, launch, p), "launching the permutation kernel");
  }
}

}  // namespace expertd
