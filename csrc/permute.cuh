// The permutation: from the local experts of a block's tokens to the rows that group (token, expert) pairs by expert,
// and to the token tiles that the products work on.
#pragma once
#include <cuda_bf16.h>

#include "params.h"
#include "warp.cuh"

namespace expertd {

constexpr int kMaxThreads = 1024;   // of any block
constexpr int kMaxTileCluster = 4;  // RouteParams::cluster

// Rows and token tiles of some experts.
struct Extent {
  int rows, tiles;
};

// Rows of an expert: in earlier blocks, and in all.
struct ExpertRows {
  int before, total;
};

// How many of a block's tokens chose an expert, whose bits these are.
template <int kWords>
__device__ __forceinline__ int num_bits(const uint32_t (&bitmap)[kWords]) {
  int count = 0;
#pragma unroll
  for (const uint32_t word : bitmap) count += __popc(word);
  return count;
}

template <int kWords>
__device__ __forceinline__ void clear_bitmaps(uint32_t (*bitmaps)[kWords], int num_local) {
  for (int e = threadIdx.x; e < num_local; e += blockDim.x) {
    for (uint32_t& word : bitmaps[e]) word = 0;
  }
}

// The block's token t chose an expert.
template <int kWords>
__device__ __forceinline__ void mark_expert(const RouteParams& p, uint32_t (*bitmaps)[kWords], int t, int id) {
  const int local = id - p.local_offset;
  if (static_cast<unsigned>(local) < static_cast<unsigned>(p.num_local)) {
    atomicOr(&bitmaps[local][t >> 5], 1u << (t & 31));
  }
}

// Shared memory of a block of up to 64 tokens of a cluster.
struct RouteSmem {
  uint32_t bitmaps[kMaxExperts][2];  // of each local expert: bit t, this block's token t chose it
  int row_start[kMaxExperts];        // of each expert: rows of earlier blocks; then where this block's rows start
  int total[kMaxExperts];            // rows of each expert
  int ids[64 * kMaxTopK];            // local expert ids, -1 where not local
  Extent warp_extents[kMaxThreads / 32];

  __device__ __forceinline__ int count(int expert) const { return num_bits(bitmaps[expert]); }
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

// n / divisor, from the divisor's inverse (RouteParams).
__device__ __forceinline__ int divide(int n, uint32_t inverse) { return inverse == 0 ? n : __umulhi(n, inverse); }

__device__ __forceinline__ int num_tiles(const RouteParams& p, int rows) {
  const int tiles = divide(rows + p.tile_n - 1, p.tile_n_inverse);
  return (tiles + p.cluster - 1) & -p.cluster;
}

// Tiles first, first + step, ... of an expert, whose rows begin at row0 and whose tiles at tile0. Near-equal ones: 130
// rows in tiles of up to 128 become 96 + 34 rather than 128 + 2.
__device__ __forceinline__ void write_tiles(const RouteParams& p, int expert, int rows, int row0, int tile0, int first,
                                            int step) {
  const int tiles = num_tiles(p, rows);
  if (tiles <= 1) {
    if (first < tiles) p.tile_ready[tile0] = 0, p.tiles[tile0] = make_int4(expert | 1 << 16, row0, rows, tile0);
    return;
  }
  const int units = divide(rows + p.tile_quantum - 1, p.tile_quantum_inverse);
  const int quotient = units / tiles, longer = units - quotient * tiles;
#pragma unroll 1
  for (int i = first; i < tiles; i += step) {
    const int at = min(p.tile_quantum * (quotient * i + min(i, longer)), rows);
    const int count = min(p.tile_quantum * (quotient + (i < longer)), rows - at);  // may be 0 in a cluster's last
    const int block = divide(i, p.tiles_per_block_inverse) * p.tiles_per_block;
    p.tile_ready[tile0 + i] = 0;
    p.tiles[tile0 + i] =
        make_int4(expert | min(p.tiles_per_block, tiles - block) << 16, row0 + min(at, rows - 1), count, tile0 + block);
  }
}

// Needs bitmaps and ids of the block in shared memory, behind a barrier. rows_of(e): ExpertRows of a local expert.
template <class RowsOf>
__device__ __forceinline__ void write_permutation(const RouteParams& p, RouteSmem& smem, const Share& share,
                                                  const RowsOf& rows_of) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // One sum for rows and tiles: there are at most 256 tokens, as many times kMaxTopK rows, and kMaxTileCluster times as
  // many tiles.
  const auto pack = [](const Extent& e) { return static_cast<uint32_t>(e.rows | e.tiles << 16); };
  const auto unpack = [](uint32_t v) { return Extent{static_cast<int>(v & 0xffff), static_cast<int>(v >> 16)}; };
  int per_thread = 1;
  while (per_thread * static_cast<int>(blockDim.x) < p.num_local) ++per_thread;
  const int first_expert = threadIdx.x * per_thread, end_expert = min(first_expert + per_thread, p.num_local);
  const bool has_experts = warp * 32 * per_thread < p.num_local;  // the warp
  Extent mine = {0, 0}, at;                                       // of the thread's experts; of those before them
  if (has_experts) {
#pragma unroll 1
    for (int e = first_expert; e < end_expert; ++e) {
      const ExpertRows rows = rows_of(e);
      smem.row_start[e] = rows.before, smem.total[e] = rows.total;
      mine.rows += rows.total, mine.tiles += num_tiles(p, rows.total);
    }
    uint32_t upto = pack(mine);
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      const uint32_t other = __shfl_up_sync(kAllLanes, upto, d);
      upto += lane >= d ? other : 0;
    }
    at = unpack(upto);
    if (lane == 31) smem.warp_extents[warp] = at;
  }
  __syncthreads();
  const int writers = 1 << (31 - __clz(share.num_blocks));  // blocks that write tiles: a power of two of them
  if (has_experts) {
    const Extent earlier = lane < warp ? smem.warp_extents[lane] : Extent{0, 0};
    const Extent all = unpack(__reduce_add_sync(kAllLanes, pack(earlier)));
    at.rows += all.rows - mine.rows, at.tiles += all.tiles - mine.tiles;
    int first_row = at.rows;
#pragma unroll 1
    for (int e = first_expert; e < end_expert; ++e) {
      smem.row_start[e] += first_row;
      first_row += smem.total[e];
    }
    if (first_expert < end_expert && end_expert == p.num_local && share.block == 0) {
      *p.schedule = Schedule{at.tiles + mine.tiles, at.rows + mine.rows, {0, 0}};
    }
  }
  __syncthreads();

  const size_t first_slot = static_cast<size_t>(share.first_token) * p.top_k;
  // By the last warps, as the first may have tiles to write.
#pragma unroll 1
  for (int i = blockDim.x - 1 - threadIdx.x; i < share.num_tokens * p.top_k; i += blockDim.x) {
    const int local = smem.ids[i], t = divide(i, p.top_k_inverse);
    int row = -1;
    if (local >= 0) {
      // Of the block's tokens before t, those that chose the expert.
      const uint32_t* bits = smem.bitmaps[local];
      row = smem.row_start[local] + __popc(bits[t >> 5] & ((1u << (t & 31)) - 1)) + (t < 32 ? 0 : __popc(bits[0]));
      p.row_token[row] = share.first_token + t;
      if (p.row_weight != nullptr) {
        p.row_weight[row] = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(p.topk_weights)[first_slot + i]);
      }
    }
    p.expanded_to_row[first_slot + i] = row;
  }
#pragma unroll 1
  for (int e = first_expert; e < end_expert; ++e) {
    const int rows = smem.total[e];
    if ((e & (writers - 1)) == share.block) write_tiles(p, e, rows, at.rows, at.tiles, 0, 1);
    at.rows += rows, at.tiles += num_tiles(p, rows);
  }
}

}  // namespace expertd
