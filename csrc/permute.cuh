// The permutation: from the local experts of a block's tokens to the rows that group (token, expert) pairs by expert,
// and to the token tiles that the products work on.
#pragma once
#include <cuda_bf16.h>

#include "params.h"
#include "warp.cuh"

namespace expertd {

constexpr int kPermuteThreads = 1024;  // of the second launch, and the most of any block

// Rows and token tiles of some experts.
struct Extent {
  int rows, tiles;
};

// Shared memory of a block.
struct RouteSmem {
  uint32_t bitmaps[kMaxExperts][2];  // of each local expert: bit t, this block's token t chose it
  int row_start[kMaxExperts];        // of each expert, this block's share
  int before[kMaxExperts];           // rows of the expert in earlier blocks
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

// What lies before this thread's experts, and `total`, what all have.
__device__ __forceinline__ Extent block_scan(RouteSmem& smem, Extent mine, Extent& total) {
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
__device__ __forceinline__ void write_permutation(const RouteParams& p, RouteSmem& smem, const Share& share) {
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

}  // namespace expertd
