// The permutation: from the local experts of a block's tokens to the rows that group (token, expert) pairs by expert,
// and to the token tiles that the products work on.
#pragma once
#include <cuda_bf16.h>

#include <type_traits>

#include "params.h"
#include "warp.cuh"

namespace expertd {

constexpr int kMaxThreads = 1024;   // of any block
constexpr int kMaxTileCluster = 4;  // RouteParams::cluster

// Rows and token tiles of some experts, and how many of the rows are the block's own tokens.
struct Extent {
  int rows, tiles, own;
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

// An expert whose tiles the block writes.
struct WrittenExpert {
  int rows, first_row, first_tile;
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

  __device__ __forceinline__ int count(int expert) const { return num_bits(bitmaps[expert]); }
};

// More of it where there are many tokens, whose rows are written in their order.
struct ByRowSmem {
  uint16_t slots[kRouteBlockTokens * kMaxTopK];  // the block's slots of local experts, ordered by row
  int num_slots;
  uint32_t before_words[kMaxExperts];  // of each expert: how many of its bits lie before each of its words, a byte each
  WrittenExpert written[kMaxExperts / (kManyBlocks / 2)];  // every so manieth
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
// With `by_row` rows that follow each other are written together.
template <bool kByRow, int kWords, class RowsOf>
__device__ __forceinline__ void write_permutation(const RouteParams& p, RouteSmem<kWords>& smem, const Share& share,
                                                  const RowsOf& rows_of, ByRowSmem* by_row = nullptr) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr bool kOneEach = kWords > 2;  // there are as many threads as experts
  // One sum for rows and tiles, where there are at most 256 tokens: as many times kMaxTopK rows, and kMaxTileCluster
  // times as many tiles.
  constexpr bool kPacked = kWords == 2;
  const auto pack = [](const Extent& e) { return static_cast<uint32_t>(e.rows | e.tiles << 16); };
  const auto unpack = [](uint32_t v) { return Extent{static_cast<int>(v & 0xffff), static_cast<int>(v >> 16), 0}; };
  int per_thread = 1;
  while (!kOneEach && per_thread * static_cast<int>(blockDim.x) < p.num_local) ++per_thread;
  const int first_expert = threadIdx.x * per_thread, end_expert = min(first_expert + per_thread, p.num_local);
  const bool has_experts = warp * 32 * per_thread < p.num_local;  // the warp
  Extent mine = {0, 0, 0}, at;                                    // of the thread's experts; of those before them
  if (has_experts) {
#pragma unroll 1
    for (int e = first_expert; e < end_expert; ++e) {
      const ExpertRows rows = rows_of(e);
      smem.row_start[e] = rows.before, smem.total[e] = rows.total;
      mine.rows += rows.total, mine.tiles += num_tiles(p, rows.total);
      if constexpr (kByRow) {
        uint32_t before = 0;
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
          before |= static_cast<uint32_t>(mine.own) << (8 * word);
          mine.own += __popc(smem.bitmaps[e][word]);
        }
        by_row->before_words[e] = before;
      }
    }
    at = mine;
    if constexpr (kPacked) {
      uint32_t upto = pack(mine);
#pragma unroll
      for (int d = 1; d < 32; d <<= 1) {
        const uint32_t other = __shfl_up_sync(kAllLanes, upto, d);
        upto += lane >= d ? other : 0;
      }
      at = unpack(upto);
    } else {
#pragma unroll
      for (int d = 1; d < 32; d <<= 1) {
        const int rows = __shfl_up_sync(kAllLanes, at.rows, d), tiles = __shfl_up_sync(kAllLanes, at.tiles, d),
                  own = kByRow ? __shfl_up_sync(kAllLanes, at.own, d) : 0;
        if (lane >= d) at.rows += rows, at.tiles += tiles, at.own += own;
      }
    }
    if (lane == 31) smem.warp_extents[warp] = at;
  }
  __syncthreads();
  const int writers = 1 << (31 - __clz(share.num_blocks));  // blocks that write tiles: a power of two of them
  if (has_experts) {
    const Extent earlier = lane < warp ? smem.warp_extents[lane] : Extent{0, 0, 0};
    const auto add = [](int v) { return static_cast<int>(__reduce_add_sync(kAllLanes, v)); };
    if constexpr (kPacked) {
      const Extent all = unpack(add(pack(earlier)));
      at.rows += all.rows - mine.rows, at.tiles += all.tiles - mine.tiles;
    } else {
      at.rows += add(earlier.rows) - mine.rows, at.tiles += add(earlier.tiles) - mine.tiles;
    }
    if constexpr (kByRow) at.own += add(earlier.own) - mine.own;
    int first_row = at.rows;
#pragma unroll 1
    for (int e = first_expert; e < end_expert; ++e) {
      smem.row_start[e] += first_row;
      first_row += kOneEach ? mine.rows : smem.total[e];
      if constexpr (kByRow) {
        smem.total[e] = at.own;
        if ((e & (writers - 1)) == share.block) by_row->written[e / writers] = {mine.rows, at.rows, at.tiles};
      }
    }
    if (first_expert < end_expert && end_expert == p.num_local) {
      if constexpr (kByRow) by_row->num_slots = at.own + mine.own;
      if (share.block == 0) *p.schedule = Schedule{at.tiles + mine.tiles, at.rows + mine.rows, {0, 0}};
    }
  }
  __syncthreads();

  const size_t first_slot = static_cast<size_t>(share.first_token) * p.top_k;
  const auto write_row = [&](int row, int i) {
    p.row_token[row] = share.first_token + divide(i, p.top_k_inverse);
    if (p.row_weight != nullptr) {
      p.row_weight[row] = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(p.topk_weights)[first_slot + i]);
    }
  };
  // By the last warps, as the first may have tiles to write.
  const int first_i = kByRow ? threadIdx.x : blockDim.x - 1 - threadIdx.x;
#pragma unroll 1
  for (int i = first_i; i < share.num_tokens * p.top_k; i += blockDim.x) {
    const int local = smem.ids[i], t = divide(i, p.top_k_inverse);
    int row = -1;
    if (local >= 0) {
      // Of the block's tokens before t, those that chose the expert.
      int earlier = __popc(smem.bitmaps[local][t >> 5] & ((1u << (t & 31)) - 1));
      if constexpr (kByRow) {
        earlier += by_row->before_words[local] >> (8 * (t >> 5)) & 0xff;
      } else if constexpr (kWords == 2) {
        earlier += t < 32 ? 0 : __popc(smem.bitmaps[local][0]);
      }
      row = smem.row_start[local] + earlier;
      if constexpr (kByRow) {
        by_row->slots[smem.total[local] + earlier] = i;
      } else {
        write_row(row, i);
      }
    }
    p.expanded_to_row[first_slot + i] = row;
  }
  if constexpr (!kByRow) {
#pragma unroll 1
    for (int e = first_expert; e < end_expert; ++e) {
      const int rows = kOneEach ? mine.rows : smem.total[e];
      if ((e & (writers - 1)) == share.block) write_tiles(p, e, rows, at.rows, at.tiles, 0, 1);
      at.rows += rows, at.tiles += num_tiles(p, rows);
    }
  } else {
#pragma unroll 1
    for (int i = warp; share.block < writers && i * writers + share.block < p.num_local; i += blockDim.x / 32) {
      const WrittenExpert written = by_row->written[i];
      write_tiles(p, i * writers + share.block, written.rows, written.first_row, written.first_tile, lane, 32);
    }
    __syncthreads();
#pragma unroll 1
    for (int n = threadIdx.x; n < by_row->num_slots; n += blockDim.x) {
      const int i = by_row->slots[n], local = smem.ids[i];
      write_row(smem.row_start[local] + n - smem.total[local], i);
    }
  }
}

}  // namespace expertd
