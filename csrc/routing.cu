// Routing: logits (or ready ids) -> ids, weights, and the permutation that groups (token, expert) pairs by local
// expert.
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

// What experts are chosen by. NOTE: a routing kernel runs once per layer, its instructions long evicted by the weights:
// fetching them is most of its time. So the kernel is compiled per kind and its loops stay rolled.
enum Score { kByLogit, kBySoftmax, kBySigmoid };

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

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, __fadd_rn(1.0f, expf(-x))); }

// Words of shared memory that a warp needs: keys of the experts, keys of the groups, a bit for each group.
__host__ __device__ __forceinline__ int scratch_words(const RouteParams& p) {
  return p.num_experts + p.n_group + (p.n_group + 31) / 32;
}

// Excludes the experts of all but the topk_group best groups. A group's score: the sum of its two highest.
__device__ __forceinline__ void keep_groups(const RouteParams& p, uint32_t* keys, uint32_t* group_keys, int lane) {
  const int size = p.num_experts / p.n_group;
  const int lanes_log2 = p.n_group >= 32 ? 0 : 5 - (32 - __clz(p.n_group - 1));  // lanes that share a group
  const int lanes = 1 << lanes_log2, part = lane & (lanes - 1);
#pragma unroll 1
  for (int g0 = 0; g0 < p.n_group; g0 += 32 >> lanes_log2) {
    const int g = g0 + (lane >> lanes_log2);
    uint32_t first = 0, second = 0;
    const int rotation = (lane & ~(lanes - 1)) % size;
    if (g < p.n_group) {
#pragma unroll 4
      for (int i = part; i < size; i += lanes) {
        // Start at another member in each group: the same one would be in the same bank.
        int member = i + rotation;
        if (member >= size) member -= size;
        const uint32_t key = keys[g * size + member];
        second = max(second, min(first, key));
        first = max(first, key);
      }
    }
#pragma unroll 1
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      const uint32_t other_first = __shfl_xor_sync(kAll, first, mask),
                     other_second = __shfl_xor_sync(kAll, second, mask);
      second = max(min(first, other_first), max(second, other_second));
      first = max(first, other_first);
    }
    if (part == 0 && g < p.n_group) group_keys[g] = order_key(__fadd_rn(key_value(first), key_value(second)));
  }
  __syncwarp();
  uint32_t* kept = group_keys + p.n_group;  // one bit a group; every lane writes the same words
#pragma unroll 1
  for (int g0 = 0; g0 < p.n_group; g0 += 32) {
    const int g = g0 + lane;
    int better = 0;
    const uint32_t mine = g < p.n_group ? group_keys[g] : 0;
#pragma unroll 4
    for (int other = 0; other < p.n_group; ++other) {
      const uint32_t key = group_keys[other];
      better += key > mine || (key == mine && other < g);
    }
    kept[g0 / 32] = __ballot_sync(kAll, g < p.n_group && better < p.topk_group);
  }
  const int shift = __ffs(size) - 1;
  const bool power_of_two = 1 << shift == size;
#pragma unroll 4
  for (int e = lane; e < p.num_experts; e += 32) {
    const int g = power_of_two ? e >> shift : e / size;
    if ((kept[g / 32] >> (g & 31) & 1) == 0) keys[e] = 0;
  }
}

// The best of a lane's experts lane, lane + 32, ...; of equals the smaller id.
__device__ __forceinline__ void best_of_lane(const uint32_t* keys, int num_experts, int lane, uint32_t& key, int& id) {
  key = 0;
  id = lane;
#pragma unroll 4
  for (int e = lane; e < num_experts; e += 32) {
    const uint32_t k = keys[e];
    if (k > key) key = k, id = e;
  }
}

// Routes one token in one warp; `keys` is the warp's, of num_experts. Lane k returns the id and the weight of slot k.
template <Score kScore>
__device__ __forceinline__ int route_token(const RouteParams& p, int token, uint32_t* keys, uint32_t* group_keys,
                                           int lane, float& weight) {
  const size_t row = static_cast<size_t>(token) * p.num_experts;
  float top = 0.0f, inverse = 1.0f;
  constexpr int kInFlight = 8;  // loads come from memory one after the other otherwise
#pragma unroll 1
  for (int e0 = lane; e0 < p.num_experts; e0 += 32 * kInFlight) {
    float logits[kInFlight], bias[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int e = min(e0 + 32 * i, p.num_experts - 1);
      logits[i] = load_float(p.logits, p.logits_dtype, row + e);
      bias[i] = kScore == kBySigmoid && p.bias != nullptr ? load_float(p.bias, p.bias_dtype, e) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int e = e0 + 32 * i;
      if (e >= p.num_experts) break;
      if constexpr (kScore == kBySigmoid) {
        keys[e] = order_key(__fadd_rn(sigmoid(logits[i]), bias[i]));
      } else {
        keys[e] = kScore == kByLogit ? order_key(logits[i]) : __float_as_uint(logits[i]);
      }
    }
  }
  if constexpr (kScore == kBySoftmax) {
    top = -INFINITY;
    float sum = 0.0f;
#pragma unroll 4
    for (int e = lane; e < p.num_experts; e += 32) top = fmaxf(top, __uint_as_float(keys[e]));
    top = warp_max(top);
#pragma unroll 4
    for (int e = lane; e < p.num_experts; e += 32) {
      const float value = expf(__fsub_rn(__uint_as_float(keys[e]), top));
      keys[e] = __float_as_uint(value);
      sum = __fadd_rn(sum, value);
    }
    inverse = __fdividef(1.0f, warp_sum(sum));
#pragma unroll 4
    for (int e = lane; e < p.num_experts; e += 32) keys[e] = order_key(__fmul_rn(__uint_as_float(keys[e]), inverse));
  }
  __syncwarp();
  if (kScore == kBySigmoid && p.n_group > 1) keep_groups(p, keys, group_keys, lane);

  uint32_t best;
  int best_id, id = 0;
  best_of_lane(keys, p.num_experts, lane, best, best_id);
#pragma unroll 1
  for (int k = 0; k < p.top_k; ++k) {
    const uint32_t greatest = __reduce_max_sync(kAll, best);
    const int chosen = __reduce_min_sync(kAll, best == greatest ? best_id : INT_MAX);
    if (lane == k) id = chosen;
    if (lane == (chosen & 31)) {  // only the owner looks again
      keys[chosen] = 0;
      best_of_lane(keys, p.num_experts, lane, best, best_id);
    }
  }

  // Weights: lane k < top_k holds slot k, the others zeros.
  const bool active = lane < p.top_k;
  const float logit = active ? load_float(p.logits, p.logits_dtype, row + id) : 0.0f;
  if constexpr (kScore == kBySoftmax) {
    weight = active ? __fmul_rn(expf(__fsub_rn(logit, top)), inverse) : 0.0f;
    if (p.method == kRenormalizeNaive && p.norm_topk_prob) weight = __fdividef(weight, warp_sum(weight));
  } else if constexpr (kScore == kByLogit) {
    weight = logit;
    if (p.method == kLlama4) weight = sigmoid(logit);
    if (p.method == kRenormalize) {
      const float greatest = warp_max(active ? logit : -INFINITY);  // NOTE: by all lanes, so not inside the condition
      const float e = active ? expf(__fsub_rn(logit, greatest)) : 0.0f;
      weight = __fdividef(e, warp_sum(e));
    }
  } else {
    weight = active ? sigmoid(logit) : 0.0f;
    const bool shares = p.method != kSigmoid && (p.method != kSigmoidRenorm || p.norm_topk_prob);
    if (shares) weight = __fdividef(weight, __fadd_rn(warp_sum(weight), 1e-20f));
    if (p.method == kDeepSeekV3 || p.method == kMiniMax2) weight = __fmul_rn(weight, p.routed_scaling_factor);
  }
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
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      const int count = min(p.tile_quantum * (units / tiles + (i < units % tiles)), rows - at);
      const int first = i / p.tiles_per_block * p.tiles_per_block;
      p.tile_ready[tile0 + i] = 0;
      p.tiles[tile0 + i] =
          make_int4(expert | min(p.tiles_per_block, tiles - first) << 16, row0 + at, count, tile0 + first);
      at += count;
    }
  }

  const int first_token = block * kRouteBlockTokens;
  const int tokens = min(kRouteBlockTokens, num_valid_tokens(p) - first_token);
#pragma unroll 1
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

template <Score kScore>
__global__ void __launch_bounds__(kThreads, 1) route_kernel(const __grid_constant__ RouteParams p) {
  __shared__ Smem smem;
  extern __shared__ uint32_t scratch[];  // [warps, num_experts + n_group + kept words]
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
  uint32_t* keys = scratch + warp * scratch_words(p);
#pragma unroll 1
  for (int t = warp; t < tokens; t += kWarps) {
    const int token = first_token + t;
    const size_t slot = static_cast<size_t>(token) * p.top_k + lane;
    float weight = 0.0f;
    int id = -1;
    if (p.logits != nullptr) {
      __syncwarp();  // the last token's keys have been read
      id = route_token<kScore>(p, token, keys, keys + p.num_experts, lane, weight);
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

template <Score kScore>
void launch_route_kernel(const RouteParams& p, int blocks, const LaunchConfig& launch) {
  const int smem = p.logits == nullptr ? 0 : kWarps * scratch_words(p) * 4;
  check_cuda(cudaFuncSetAttribute(route_kernel<kScore>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem),
             "raising the shared memory limit of the routing kernel");
  check_cuda(launch_kernel(route_kernel<kScore>, blocks, kThreads, smem, launch, p), "launching the routing kernel");
}

}  // namespace

void launch_route(const RouteParams& p, const LaunchConfig& launch) {
  require(p.num_experts >= 1 && p.num_experts <= kMaxExperts, "num_experts must be 1 to 1024");
  require(p.top_k >= 1 && p.top_k <= std::min(kMaxTopK, p.num_experts), "top_k must be 1 to min(num_experts, 32)");
  require(p.local_offset >= 0 && p.num_local >= 1 && p.local_offset + p.num_local <= p.num_experts,
          "the local experts must lie inside 0 ... num_experts - 1");
  const int blocks = std::max(1, (p.num_tokens + kRouteBlockTokens - 1) / kRouteBlockTokens);
  switch (p.method) {
    case kRenormalize:
    case kLlama4:
    case kTopK:
      launch_route_kernel<kByLogit>(p, blocks, launch);
      break;
    case kDefault:
    case kRenormalizeNaive:
      launch_route_kernel<kBySoftmax>(p, blocks, launch);
      break;
    default:
      launch_route_kernel<kBySigmoid>(p, blocks, launch);
      break;
  }
  if (blocks > 1) {
    check_cuda(launch_kernel(permute_kernel, blocks, kThreads, 0, launch, p), "launching the permutation kernel");
  }
}

}  // namespace expertd
