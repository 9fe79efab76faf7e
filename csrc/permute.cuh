// The permutation: from the local experts of a block's tokens to the rows that group (token, expert) pairs by expert,
// and to the token tiles that the products work on.
#pragma once
#include <cuda_bf16.h>

#include <type_traits>

#include "params.h"
#include "warp.cuh"

namespace expertd {

constexpr int kMaxThreads = 1024;  // of any block

// Rows and token tiles of some experts, and how many of the rows are the block's own tokens.
struct Extent {
  int rows, tiles, own;
};

// Shared memory of a block of up to 32 * kWords tokens.
template <int kWords>
struct RouteSmem {
  uint32_t bitmaps[kMaxExperts][kWords];  // of each local expert: bit t, this block's token t chose it
  int row_start[kMaxExperts];             // of each expert: rows of earlier blocks; then where this block's rows start
  int total[kMaxExperts];                 // rows of each expert; then how many of the block's are of earlier experts
  // Local expert ids, -1 where not local; of many tokens in 16 bits, for room.
  std::conditional_t<kWords == 2, int, int16_t> ids[32 * kWords * kMaxTopK];
  Extent warp_extents[kMaxThreads / 32];

  __device__ __forceinline__ int count(int expert) const {
    int count = 0;
    for (const uint32_t word : bitmaps[expert]) count += __popc(word);
    return count;
  }
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
template <bool kByRow, int kWords>
__device__ __forceinline__ Extent block_scan(RouteSmem<kWords>& smem, Extent mine, Extent& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Extent inclusive = mine;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int rows = __shfl_up_sync(kAllLanes, inclusive.rows, d),
              tiles = __shfl_up_sync(kAllLanes, inclusive.tiles, d),
              own = kByRow ? __shfl_up_sync(kAllLanes, inclusive.own, d) : 0;
    if (lane >= d) inclusive.rows += rows, inclusive.tiles += tiles, inclusive.own += own;
  }
  if (lane == 31) smem.warp_extents[warp] = inclusive;
  __syncthreads();
  const Extent other = lane < blockDim.x / 32 ? smem.warp_extents[lane] : Extent{0, 0, 0};
  const auto add = [](int v) { return static_cast<int>(__reduce_add_sync(kAllLanes, v)); };
  total = {add(other.rows), add(other.tiles), kByRow ? add(other.own) : 0};
  const bool earlier = lane < warp;
  return {inclusive.rows - mine.rows + add(earlier ? other.rows : 0),
          inclusive.tiles - mine.tiles + add(earlier ? other.tiles : 0),
          kByRow ? inclusive.own - mine.own + add(earlier ? other.own : 0) : 0};
}

// n / divisor, from the divisor's inverse (RouteParams).
__device__ __forceinline__ int divide(int n, uint32_t inverse) { return inverse == 0 ? n : __umulhi(n, inverse); }

__device__ __forceinline__ int num_tiles(const RouteParams& p, int rows) {
  const int tiles = divide(rows + p.tile_n - 1, p.tile_n_inverse);
  return p.cluster == 1 ? tiles : (tiles + p.cluster - 1) / p.cluster * p.cluster;
}

// Near-equal tiles: 130 rows in tiles of up to 128 become 96 + 34 rather than 128 + 2.
__device__ __forceinline__ void write_tiles(const RouteParams& p, int expert, int rows, int row0, int tile0) {
  const int tiles = num_tiles(p, rows);
  if (tiles <= 1) {
    if (tiles == 1) p.tile_ready[tile0] = 0, p.tiles[tile0] = make_int4(expert | 1 << 16, row0, rows, tile0);
    return;
  }
  const int units = divide(rows + p.tile_quantum - 1, p.tile_quantum_inverse);
  const int quotient = units / tiles, longer = units - quotient * tiles;
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

// Needs bitmaps, row_start (rows of earlier blocks), total and ids of the block in shared memory, behind a barrier.
// Many tokens: `by_row` has room for the block's slots, so that rows that follow each other are written together.
template <bool kByRow, int kWords>
__device__ __forceinline__ void write_permutation(const RouteParams& p, RouteSmem<kWords>& smem, const Share& share,
                                                  uint16_t* by_row = nullptr) {
  int per_thread = 1;
  while (per_thread * static_cast<int>(blockDim.x) < p.num_local) ++per_thread;
  const int first_expert = threadIdx.x * per_thread, end_expert = min(first_expert + per_thread, p.num_local);
  Extent mine = {0, 0, 0}, all;
#pragma unroll 1
  for (int e = first_expert; e < end_expert; ++e) {
    mine.rows += smem.total[e], mine.tiles += num_tiles(p, smem.total[e]);
    if constexpr (kByRow) mine.own += smem.count(e);
  }
  Extent at = block_scan<kByRow>(smem, mine, all);
  const int writers = 1 << (31 - __clz(share.num_blocks));  // blocks that write tiles: a power of two of them
#pragma unroll 1
  for (int e = first_expert; e < end_expert; ++e) {
    const int rows = smem.total[e];
    smem.row_start[e] += at.rows;
    smem.total[e] = at.own;
    if ((e & (writers - 1)) == share.block) write_tiles(p, e, rows, at.rows, at.tiles);
    at.rows += rows, at.tiles += num_tiles(p, rows);
    if constexpr (kByRow) at.own += smem.count(e);
  }
  if (share.block == 0 && threadIdx.x == 0) *p.schedule = Schedule{all.tiles, all.rows, {0, 0}};
  __syncthreads();

  const size_t first_slot = static_cast<size_t>(share.first_token) * p.top_k;
  const auto write_row = [&](int row, int i) {
    p.row_token[row] = share.first_token + divide(i, p.top_k_inverse);
    if (p.row_weight != nullptr) {
      p.row_weight[row] = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(p.topk_weights)[first_slot + i]);
    }
  };
#pragma unroll 1
  for (int i = threadIdx.x; i < share.num_tokens * p.top_k; i += blockDim.x) {
    const int local = smem.ids[i], t = divide(i, p.top_k_inverse);
    int row = -1;
    if (local >= 0) {
      int earlier = 0;  // of the block's tokens before t, those that chose the expert
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        const uint32_t chosen = smem.bitmaps[local][word];
        earlier += __popc(t >= 32 * word + 32 ? chosen : t > 32 * word ? chosen & ((1u << (t - 32 * word)) - 1) : 0);
      }
      row = smem.row_start[local] + earlier;
      if constexpr (kByRow) {
        by_row[smem.total[local] + earlier] = i;
      } else {
        write_row(row, i);
      }
    }
    p.expanded_to_row[first_slot + i] = row;
  }
  if constexpr (kByRow) {
    __syncthreads();
#pragma unroll 1
    for (int n = threadIdx.x; n < all.own; n += blockDim.x) {
      const int i = by_row[n], local = smem.ids[i];
      write_row(smem.row_start[local] + n - smem.total[local], i);
    }
  }
}

}  // namespace expertd
