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
#include "route_token.cuh"
#include "sm90.cuh"

namespace expertd {
namespace {

constexpr int kMinWarps = 8, kMaxWarps = 16, kPermuteThreads = 1024;
constexpr int kMaxClusterBlocks = 8;
constexpr int kClusterTokens = 128;  // up to here one launch
constexpr int kFewSlots = 32;        // up to here, and kMinWarps tokens, one block without tables

// How blocks learn of each other's tokens: there is one; they are a cluster; through memory and a second launch.
enum Way { kFew, kCluster, kMany };

// Rows and token tiles of some experts.
struct Extent {
  int rows, tiles;
};

struct Smem {
  uint32_t bitmaps[kMaxExperts][2];
  int row_start[kMaxExperts];  // of each expert, this block's share
  int before[kMaxExperts];     // rows of the expert in earlier blocks
  int total[kMaxExperts];
  int ids[kRouteBlockTokens * kMaxTopK];  // local expert ids, -1 where not local
  Extent warp_extents[kPermuteThreads / 32];
};

// The tokens of one block.
struct Share {
  int block, num_blocks, first_token, num_tokens;
};

__device__ __forceinline__ Share share_of(const RouteParams& p) {
  const int tokens = p.num_valid == nullptr ? p.num_tokens : min(p.num_tokens, max(0, *p.num_valid));
  const int block = blockIdx.x, first = block * p.block_tokens;
  return {block, static_cast<int>(gridDim.x), first, min(p.block_tokens, tokens - first)};
}

// ---- tokens

template <Score kScore, int kPer>
__device__ __forceinline__ void route_tokens(const RouteParams& p, Smem& smem, const Share& share, uint32_t* memory,
                                             bool marks) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int t = warp; t < share.num_tokens; t += blockDim.x / 32) {
    const int token = share.first_token + t;
    const size_t slot = static_cast<size_t>(token) * p.top_k + lane;
    float weight = 0.0f;
    int id = -1;
    if (p.logits != nullptr) {
      id = route_token<kScore, kPer>(p, token, memory, lane, weight);
    } else if (lane < p.top_k) {
      id = p.in_ids[slot];
      weight = load_float(p.in_weights, p.in_weights_dtype, slot);
    }
    if (lane < p.top_k) {
      const int local = id - p.local_offset;
      const bool held = static_cast<unsigned>(local) < static_cast<unsigned>(p.num_local);
      smem.ids[t * p.top_k + lane] = held ? local : -1;
      if (held && marks) atomicOr(&smem.bitmaps[local][t >> 5], 1u << (t & 31));
      p.topk_ids[slot] = id;
      reinterpret_cast<__nv_bfloat16*>(p.topk_weights)[slot] = __float2bfloat16_rn(weight);
      if (p.replay != nullptr) p.replay[slot] = static_cast<int16_t>(id);
    }
  }
}

// ---- permutation

// What lies before this thread's experts, and `total`, what all have.
__device__ __forceinline__ Extent block_scan(Smem& smem, Extent mine, Extent& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Extent inclusive = mine;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int rows = __shfl_up_sync(kAllLanes, inclusive.rows, d),
              tiles = __shfl_up_sync(kAllLanes, inclusive.tiles, d);
    if (lane >= d) inclusive.rows += rows, inclusive.tiles += tiles;
  }
  if (lane == 31) smem.warp_extents[warp] = inclusive;
  __syncthreads();
  const Extent other = lane < blockDim.x / 32 ? smem.warp_extents[lane] : Extent{0, 0};
  total = {__reduce_add_sync(kAllLanes, other.rows), __reduce_add_sync(kAllLanes, other.tiles)};
  const bool earlier = lane < warp;
  return {inclusive.rows - mine.rows + __reduce_add_sync(kAllLanes, earlier ? other.rows : 0),
          inclusive.tiles - mine.tiles + __reduce_add_sync(kAllLanes, earlier ? other.tiles : 0)};
}

__device__ __forceinline__ int num_tiles(const RouteParams& p, int rows) {
  const int tiles = (rows + p.tile_n - 1) / p.tile_n;
  return (tiles + p.cluster - 1) / p.cluster * p.cluster;
}

// Near-equal tiles: 130 rows in tiles of up to 128 become 96 + 34 rather than 128 + 2.
__device__ __forceinline__ void write_tiles(const RouteParams& p, int expert, int rows, int row0, int tile0) {
  const int tiles = num_tiles(p, rows), units = (rows + p.tile_quantum - 1) / p.tile_quantum;
  const int quotient = tiles > 0 ? units / tiles : 0, longer = units - quotient * tiles;
  int at = 0, first = 0;
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    const int count = min(p.tile_quantum * (quotient + (i < longer)), rows - at);  // may be 0 in a cluster's last
    if (i - first == p.tiles_per_block) first = i;
    p.tile_ready[tile0 + i] = 0;
    p.tiles[tile0 + i] =
        make_int4(expert | min(p.tiles_per_block, tiles - first) << 16, row0 + min(at, rows - 1), count, tile0 + first);
    at += count;
  }
}

// Needs bitmaps, before, total and ids of the block in shared memory, behind a barrier.
__device__ __forceinline__ void write_permutation(const RouteParams& p, Smem& smem, const Share& share) {
  const int per_thread = (p.num_local + blockDim.x - 1) / blockDim.x;
  const int first_expert = threadIdx.x * per_thread, end_expert = min(first_expert + per_thread, p.num_local);
  Extent mine = {0, 0}, all;
#pragma unroll 1
  for (int e = first_expert; e < end_expert; ++e) mine.rows += smem.total[e], mine.tiles += num_tiles(p, smem.total[e]);
  Extent at = block_scan(smem, mine, all);
#pragma unroll 1
  for (int e = first_expert; e < end_expert; ++e) {
    const int rows = smem.total[e];
    smem.row_start[e] = at.rows + smem.before[e];
    if (e % share.num_blocks == share.block) write_tiles(p, e, rows, at.rows, at.tiles);
    at.rows += rows, at.tiles += num_tiles(p, rows);
  }
  if (share.block == 0 && threadIdx.x == 0) *p.schedule = Schedule{all.tiles, all.rows, {0, 0}};
  __syncthreads();

#pragma unroll 1
  for (int i = threadIdx.x; i < share.num_tokens * p.top_k; i += blockDim.x) {
    const int local = smem.ids[i], t = i / p.top_k;
    const size_t slot = static_cast<size_t>(share.first_token) * p.top_k + i;
    int row = -1;
    if (local >= 0) {
      const uint64_t chosen = static_cast<uint64_t>(smem.bitmaps[local][1]) << 32 | smem.bitmaps[local][0];
      row = smem.row_start[local] + __popcll(chosen & ((1ull << t) - 1));
      p.row_token[row] = share.first_token + t;
      if (p.row_weight != nullptr) {
        p.row_weight[row] = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(p.topk_weights)[slot]);
      }
    }
    p.expanded_to_row[slot] = row;
  }
}

// A handful of slots, one to a lane: placed by comparing each with each. No tables, no scans, and an expert has one
// tile, because every family's tiles hold more rows than there are tokens.
__device__ __forceinline__ void write_few(const RouteParams& p, const int* ids, int num_slots) {
  const int slot = threadIdx.x % 32, expert = slot < num_slots ? ids[slot] : -1;
  int before = 0, earlier = 0, rows = 0, tile = 0;
#pragma unroll 8
  for (int j = 0; j < num_slots; ++j) {
    const int other = ids[j];
    before += other >= 0 && other < expert;
    rows += other == expert;
    earlier += other == expert && j < slot;
  }
  const unsigned held = __ballot_sync(kAllLanes, expert >= 0);
  const unsigned first = __ballot_sync(kAllLanes, expert >= 0 && earlier == 0);  // of their experts
#pragma unroll 8
  for (int j = 0; j < num_slots; ++j) tile += (first >> j & 1) != 0 && ids[j] < expert;
  if (slot == 0) *p.schedule = Schedule{__popc(first), __popc(held), {0, 0}};
  if (slot >= num_slots) return;
  const int row = before + earlier;
  p.expanded_to_row[slot] = expert >= 0 ? row : -1;
  if (expert < 0) return;
  p.row_token[row] = slot / p.top_k;
  if (p.row_weight != nullptr) {
    p.row_weight[row] = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(p.topk_weights)[slot]);
  }
  if (earlier == 0) {
    p.tile_ready[tile] = 0;
    p.tiles[tile] = make_int4(expert | 1 << 16, before, rows, tile);
  }
}

template <Score kScore, int kPer, Way kWay>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) route_kernel(const __grid_constant__ RouteParams p) {
  __shared__ Smem smem;
  extern __shared__ uint32_t memory[];  // [warps, num_experts + n_group], for odd groups
  if constexpr (kWay != kFew) {
    for (int e = threadIdx.x; e < p.num_local; e += blockDim.x) smem.bitmaps[e][0] = smem.bitmaps[e][1] = 0;
    __syncthreads();
  }
  sm90::griddepcontrol_wait();
  sm90::griddepcontrol_launch_dependents();
  const Share share = share_of(p);
  route_tokens<kScore, kPer>(p, smem, share, memory + threadIdx.x / 32 * (p.num_experts + p.n_group), kWay != kFew);
  if constexpr (kWay == kFew) {
    __syncthreads();
    if (threadIdx.x < 32) write_few(p, smem.ids, max(0, share.num_tokens) * p.top_k);
  } else if constexpr (kWay == kCluster) {
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
  __shared__ Smem smem;
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

template <Score kScore, int kPer, Way kWay>
void launch_way(const RouteParams& p, int blocks, const LaunchConfig& launch) {
  const int warps = kWay == kFew ? p.block_tokens : std::clamp(p.block_tokens, kMinWarps, kMaxWarps);
  const bool odd_groups = p.logits != nullptr && p.n_group > 1 && lanes_per_group<kPer>(p) == 0;
  const int memory = odd_groups ? warps * (p.num_experts + p.n_group) * 4 : 0;
  const auto kernel = route_kernel<kScore, kPer, kWay>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory),
             "raising the shared memory limit of the routing kernel");
  const LaunchConfig config = {launch.stream, launch.pdl, kWay == kCluster ? blocks : 1};
  check_cuda(launch_kernel(kernel, blocks, warps * 32, memory, config, p), "launching the routing kernel");
}

template <Score kScore, int kPer>
void launch_size(const RouteParams& p, int blocks, const LaunchConfig& launch) {
  if (blocks == 1 && p.block_tokens * p.top_k <= kFewSlots && p.cluster == 1) {
    launch_way<kScore, kPer, kFew>(p, blocks, launch);
  } else if (p.num_tokens <= kClusterTokens) {
    launch_way<kScore, kPer, kCluster>(p, blocks, launch);
  } else {
    launch_way<kScore, kPer, kMany>(p, blocks, launch);
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
