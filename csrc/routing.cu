// Routing: logits (or ready ids) -> ids, weights, and the permutation that groups (token, expert) pairs by local
// expert.
//
// A block owns up to 64 tokens, a warp one token at a time. Each block keeps one 64-bit word per local expert: bit t is
// set where its token t chose the expert. A token's place among the rows of an expert is then a prefix of counts plus a
// popcount: no sort, no order of arrival, the same rows in every run.
//
// Few tokens: one launch, the blocks are a cluster and read each other's words from shared memory. Many: the blocks
// leave their words in memory, a second launch adds them up.
#include <algorithm>
#include <climits>

#include "check.h"
#include "params.h"
#include "permute.cuh"
#include "route_few.cuh"
#include "route_token.cuh"
#include "sm90.cuh"
#include "warp.cuh"

namespace expertd {
namespace {

constexpr int kMinWarps = 8, kMaxWarps = 16;
constexpr int kMaxClusterBlocks = 8;
constexpr int kClusterTokens = 128;  // up to here one launch

// How blocks learn of each other's tokens: they are a cluster; through memory and a second launch.
enum Way { kCluster, kMany };

// ---- kernels

template <Score kScore, int kPer>
__device__ __forceinline__ void route_tokens(const RouteParams& p, RouteSmem& smem, const Share& share,
                                             uint32_t* memory) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int t = warp; t < share.num_tokens; t += blockDim.x / 32) {
    const int token = share.first_token + t;
    const size_t slot = static_cast<size_t>(token) * p.top_k + lane;
    float weight = 0.0f;
    int id = -1;
    if (p.logits != nullptr) {
      id = route_token<kScore, kPer>(p, token, memory, lane, weight, [](int) {});
    } else if (lane < p.top_k) {
      id = p.in_ids[slot];
      weight = load_float(p.in_weights, p.in_weights_dtype, slot);
    }
    if (lane < p.top_k) {
      const int local = id - p.local_offset;
      const bool held = static_cast<unsigned>(local) < static_cast<unsigned>(p.num_local);
      smem.ids[t * p.top_k + lane] = held ? local : -1;
      if (held) atomicOr(&smem.bitmaps[local][t >> 5], 1u << (t & 31));
      p.topk_ids[slot] = id;
      reinterpret_cast<__nv_bfloat16*>(p.topk_weights)[slot] = __float2bfloat16_rn(weight);
      if (p.replay != nullptr) p.replay[slot] = static_cast<int16_t>(id);
    }
  }
}

template <Score kScore, int kPer, Way kWay>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) route_kernel(const __grid_constant__ RouteParams p) {
  __shared__ RouteSmem smem;
  extern __shared__ uint32_t memory[];  // [warps, num_experts + n_group], for odd groups
  for (int e = threadIdx.x; e < p.num_local; e += blockDim.x) smem.bitmaps[e][0] = smem.bitmaps[e][1] = 0;
  __syncthreads();
  sm90::griddepcontrol_wait();
  sm90::griddepcontrol_launch_dependents();
  const Share share = share_of(p);
  route_tokens<kScore, kPer>(p, smem, share, memory + threadIdx.x / 32 * (p.num_experts + p.n_group));
  if constexpr (kWay == kCluster) {
    sm90::cluster_arrive();
    sm90::cluster_wait();
    for (int e = threadIdx.x; e < p.num_local; e += blockDim.x) {
      const uint32_t mine = sm90::smem_address(&smem.bitmaps[e]);
      uint2 words[kMaxClusterBlocks];
#pragma unroll
      for (int b = 0; b < kMaxClusterBlocks; ++b) {  // all under way before the first is used
        words[b] = sm90::ld_shared_cluster_v2(sm90::mapa(mine, min(b, share.num_blocks - 1)));
      }
      int before = 0, total = 0;
#pragma unroll
      for (int b = 0; b < kMaxClusterBlocks; ++b) {
        const int count = b < share.num_blocks ? __popc(words[b].x) + __popc(words[b].y) : 0;
        before += b < share.block ? count : 0;
        total += count;
      }
      smem.before[e] = before;
      smem.total[e] = total;
    }
    sm90::cluster_arrive();
    __syncthreads();
    write_permutation(p, smem, share);
    sm90::cluster_wait();  // NOTE: a block's shared memory lives until the others have read it
  } else {
    __syncthreads();
    for (int e = threadIdx.x; e < p.num_local; e += blockDim.x) {
      const size_t i = static_cast<size_t>(share.block) * p.num_local + e;
      p.bitmaps[i] = static_cast<uint64_t>(smem.bitmaps[e][1]) << 32 | smem.bitmaps[e][0];
      p.counts[i] = static_cast<uint8_t>(__popc(smem.bitmaps[e][0]) + __popc(smem.bitmaps[e][1]));
    }
  }
}

__global__ void __launch_bounds__(kPermuteThreads, 1) permute_kernel(const __grid_constant__ RouteParams p) {
  __shared__ RouteSmem smem;
  for (int e = threadIdx.x; e < p.num_local; e += blockDim.x) smem.before[e] = smem.total[e] = 0;
  __syncthreads();
  sm90::griddepcontrol_wait();
  sm90::griddepcontrol_launch_dependents();
  const Share share = share_of(p);
  // Threads share the blocks of an expert: few experts would otherwise leave most of them idle.
  int lanes = 32;
  while (lanes < p.num_local) lanes *= 2;
  const int expert = threadIdx.x & (lanes - 1), part = threadIdx.x / lanes, parts = kPermuteThreads / lanes;
  if (expert < p.num_local) {
    int before = 0, total = 0;
#pragma unroll 8
    for (int b = part; b < share.num_blocks; b += parts) {
      const int count = __ldcg(p.counts + static_cast<size_t>(b) * p.num_local + expert);
      before += b < share.block ? count : 0;
      total += count;
    }
    atomicAdd(&smem.before[expert], before);
    atomicAdd(&smem.total[expert], total);
  }
  for (int e = threadIdx.x; e < p.num_local; e += blockDim.x) {
    const uint64_t chosen = __ldcg(p.bitmaps + static_cast<size_t>(share.block) * p.num_local + e);
    smem.bitmaps[e][0] = static_cast<uint32_t>(chosen);
    smem.bitmaps[e][1] = static_cast<uint32_t>(chosen >> 32);
  }
  for (int i = threadIdx.x; i < share.num_tokens * p.top_k; i += blockDim.x) {
    const int local = __ldcg(p.topk_ids + static_cast<size_t>(share.first_token) * p.top_k + i) - p.local_offset;
    smem.ids[i] = static_cast<unsigned>(local) < static_cast<unsigned>(p.num_local) ? local : -1;
  }
  __syncthreads();
  write_permutation(p, smem, share);
}

// ---- launch

template <Score kScore, int kPer>
void launch_one(void (*kernel)(RouteParams), const RouteParams& p, int blocks, int warps, const LaunchConfig& launch) {
  const bool odd_groups = p.logits != nullptr && p.n_group > 1 && lanes_per_group<kPer>(p) == 0;
  const int memory = odd_groups ? warps * (p.num_experts + p.n_group) * 4 : 0;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory),
             "raising the shared memory limit of the routing kernel");
  check_cuda(launch_kernel(kernel, blocks, warps * 32, memory, launch, p), "launching the routing kernel");
}

template <Score kScore, int kPer>
void launch_size(const RouteParams& p, int blocks, const LaunchConfig& launch) {
  const int warps = std::clamp(p.block_tokens, kMinWarps, kMaxWarps);
  if (p.num_tokens <= kFewTokens && p.cluster == 1) {
    launch_one<kScore, kPer>(route_few_kernel<kScore, kPer>, p, 1, 2 * p.num_tokens, launch);
  } else if (p.num_tokens <= kClusterTokens) {
    launch_one<kScore, kPer>(route_kernel<kScore, kPer, kCluster>, p, blocks, warps,
                             {launch.stream, launch.pdl, blocks});
  } else {
    launch_one<kScore, kPer>(route_kernel<kScore, kPer, kMany>, p, blocks, warps, launch);
    check_cuda(launch_kernel(permute_kernel, blocks, kPermuteThreads, 0, launch, p),
               "launching the permutation kernel");
  }
}

template <Score kScore>
void launch_score(const RouteParams& p, int blocks, const LaunchConfig& launch) {
  if (p.num_experts <= 32) return launch_size<kScore, 1>(p, blocks, launch);
  if (p.num_experts <= 128) return launch_size<kScore, 4>(p, blocks, launch);
  if (p.num_experts <= 256) return launch_size<kScore, 8>(p, blocks, launch);
  if (p.num_experts <= 512) return launch_size<kScore, 16>(p, blocks, launch);
  return launch_size<kScore, 32>(p, blocks, launch);
}

}  // namespace

int max_route_blocks(int num_tokens) {
  return std::max(kManyBlocks, (num_tokens + kRouteBlockTokens - 1) / kRouteBlockTokens);
}

void launch_route(RouteParams p, const LaunchConfig& launch) {
  require(p.num_experts >= 1 && p.num_experts <= kMaxExperts, "num_experts must be 1 to 1024");
  require(p.top_k >= 1 && p.top_k <= std::min(kMaxTopK, p.num_experts), "top_k must be 1 to min(num_experts, 32)");
  require(p.cluster >= 1 && p.tiles_per_block % p.cluster == 0, "tiles_per_block must be a multiple of cluster");
  require(p.local_offset >= 0 && p.num_local >= 1 && p.local_offset + p.num_local <= p.num_experts,
          "the local experts must lie inside 0 ... num_experts - 1");
  int blocks = 1;
  if (p.num_tokens <= kClusterTokens) {
    while (blocks < kMaxClusterBlocks && blocks * kMinWarps < p.num_tokens) blocks *= 2;
    p.block_tokens = std::max(1, (p.num_tokens + blocks - 1) / blocks);
  } else {
    p.block_tokens = std::clamp((p.num_tokens + kManyBlocks - 1) / kManyBlocks, kMinBlockTokens, kRouteBlockTokens);
    blocks = (p.num_tokens + p.block_tokens - 1) / p.block_tokens;
  }
  switch (p.method) {
    case kRenormalize:
    case kLlama4:
    case kTopK:
      return launch_score<kByLogit>(p, blocks, launch);
    case kDefault:
    case kRenormalizeNaive:
      return launch_score<kBySoftmax>(p, blocks, launch);
    default:
      return launch_score<kBySigmoid>(p, blocks, launch);
  }
}

}  // namespace expertd
