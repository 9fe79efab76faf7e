// The permutation of many tokens: the second launch of routing. What is before a block's tokens, and in all, is added
// up from the counts that the blocks of the first left in memory.
#pragma once
#include <cuda_bf16.h>

#include "params.h"
#include "permute.cuh"
#include "sm90.cuh"
#include "warp.cuh"

namespace expertd {

constexpr int kByRowTokens = 32;                         // of a block; from here on rows are written in order
constexpr int kMaxSlots = kRouteBlockTokens * kMaxTopK;  // of a block
constexpr int kCountBlocks = 16;                         // whose counts of an expert a lane reads at a time
constexpr int kFewestWriters = 64;                       // blocks that write tiles, where rows are written in order

// An expert whose tiles the block writes.
struct WrittenExpert {
  int rows, first_row, first_tile;
};

// Rows and token tiles of some experts, and how many of the rows are the block's own.
struct ManyExtent {
  int rows, tiles, own;
};

struct ManySmem {
  uint4 first_ones[kCountBlocks + 1];  // of 16 bytes the first n: 1
  alignas(16) uint32_t
      bitmaps[kMaxExperts][kRouteBlockTokens / 32];  // of each local expert: bit t, this block's token t chose it
  int row_start[kMaxExperts];                        // of each expert: where this block's rows start
  uint32_t before_words[kMaxExperts];  // how many of an expert's bits lie before each of its words, a byte each
  uint16_t own_start[kMaxExperts];     // how many of the block's rows are of earlier experts
  // The block's rows, and their tokens, in order: those that follow each other are written together.
  int rows[kMaxSlots];
  uint8_t tokens[kMaxSlots];
  int num_rows;
  ManyExtent warp_extents[kMaxThreads / 32];
  WrittenExpert written[kMaxExperts / kFewestWriters];  // every so manieth of the experts
};

// Where a block leaves its count of an expert: those of 16 blocks lie together, as one lane reads them.
__device__ __forceinline__ int count_at(int block, int expert, int num_local) {
  return (block / kCountBlocks * num_local + expert) * kCountBlocks + block % kCountBlocks;
}

template <int kWords>
__device__ __forceinline__ void leave_counts(const RouteParams& p, const uint32_t (*bitmaps)[kWords], int block) {
  for (int e = threadIdx.x; e < p.num_local; e += blockDim.x) {
    p.counts[count_at(block, e, p.num_local)] = num_bits(bitmaps[e]);
  }
}

// How many lanes add up the counts of one expert: as many as there are threads for, up to 8.
constexpr int kMaxSumLanes = 8;
inline int sum_lanes(int num_local) {
  int lanes = kMaxSumLanes;
  while (lanes * num_local > kMaxThreads) lanes /= 2;
  return lanes;
}

// Rows of an expert in earlier blocks, and in all: by kLanes lanes side by side, from what the blocks left in memory.
template <int kLanes>
__device__ __forceinline__ ExpertRows add_up_counts(const RouteParams& p, const ManySmem& smem, const Share& share,
                                                    int expert, int part) {
  constexpr int kLoads = kMaxSumLanes / kLanes;  // at a time
  unsigned before = 0, total = 0;
#pragma unroll 1
  for (int first = part * kCountBlocks; first < share.num_blocks; first += kMaxSumLanes * kCountBlocks) {
    uint4 counts[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int b = first + i * kLanes * kCountBlocks;
      counts[i] = expert < p.num_local && b < share.num_blocks
                      ? __ldcg(reinterpret_cast<const uint4*>(p.counts + count_at(b, expert, p.num_local)))
                      : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int b = first + i * kLanes * kCountBlocks;
      const uint4 earlier = smem.first_ones[min(max(share.block - b, 0), kCountBlocks)],
                  all = smem.first_ones[min(max(share.num_blocks - b, 0), kCountBlocks)];
      before = __dp4a(counts[i].x, earlier.x, __dp4a(counts[i].y, earlier.y, before));
      before = __dp4a(counts[i].z, earlier.z, __dp4a(counts[i].w, earlier.w, before));
      total = __dp4a(counts[i].x, all.x, __dp4a(counts[i].y, all.y, total));
      total = __dp4a(counts[i].z, all.z, __dp4a(counts[i].w, all.w, total));
    }
  }
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    before += __shfl_xor_sync(kAllLanes, before, mask);
    total += __shfl_xor_sync(kAllLanes, total, mask);
  }
  return {static_cast<int>(before), static_cast<int>(total)};
}

template <int kLanes>
__global__ void __launch_bounds__(kMaxThreads, 1) permute_kernel(const __grid_constant__ RouteParams p) {
  __shared__ ManySmem smem;
  constexpr int kRounds = kMaxSlots / kMaxThreads;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int expert = thread / kLanes, part = thread % kLanes;
  const bool has_experts = warp * (32 / kLanes) < p.num_local;  // the warp
  clear_bitmaps(smem.bitmaps, p.num_local);
  if (thread <= kCountBlocks) {
    const auto ones = [&](int first) { return __funnelshift_rc(0x01010101u, 0, max(32 - 8 * (thread - first), 0)); };
    smem.first_ones[thread] = make_uint4(ones(0), ones(4), ones(8), ones(12));
  }
  __syncthreads();
  sm90::griddepcontrol_wait();
  sm90::griddepcontrol_launch_dependents();
  const Share share = share_of(p);
  const int num_slots = share.num_tokens * p.top_k;
  const size_t first_slot = static_cast<size_t>(share.first_token) * p.top_k;
  const bool by_row = p.block_tokens >= kByRowTokens;
  // By the last warps where there are few slots, as the first have experts.
  const int first_i = by_row ? thread : kMaxThreads - 1 - thread;
  int ids[kRounds];  // on their way while the counts are added up
#pragma unroll
  for (int n = 0; n < kRounds; ++n) {
    const int i = first_i + n * kMaxThreads;
    if (n > 0 && num_slots <= n * kMaxThreads) break;
    if (i < num_slots) ids[n] = __ldcg(p.topk_ids + first_slot + i);
  }
  int own = 0, tiles = 0;
  ExpertRows rows = {};
  ManyExtent at = {};
  if (has_experts) {
    if (expert < p.num_local) own = __ldcg(p.counts + count_at(share.block, expert, p.num_local));
    rows = add_up_counts<kLanes>(p, smem, share, expert, part);
    tiles = num_tiles(p, rows.total);
    at = {rows.total, tiles, own};
#pragma unroll
    for (int d = kLanes; d < 32; d *= 2) {
      const int other_rows = __shfl_up_sync(kAllLanes, at.rows, d),
                other_tiles = __shfl_up_sync(kAllLanes, at.tiles, d), others = __shfl_up_sync(kAllLanes, at.own, d);
      if (lane >= d) at.rows += other_rows, at.tiles += other_tiles, at.own += others;
    }
    if (lane == 31) smem.warp_extents[warp] = at;
  }
#pragma unroll
  for (int n = 0; n < kRounds; ++n) {
    const int i = first_i + n * kMaxThreads, t = divide(i, p.top_k_inverse);
    if (n > 0 && num_slots <= n * kMaxThreads) break;
    if (i < num_slots) mark_expert(p, smem.bitmaps, t, ids[n]);
  }
  __syncthreads();

  const int writers_log2 = 31 - __clz(share.num_blocks), writers = 1 << writers_log2;  // blocks that write tiles
  const bool writes_tiles = part == 0 && expert < p.num_local && (expert & (writers - 1)) == share.block;
  if (has_experts) {
    const ManyExtent earlier = lane < warp ? smem.warp_extents[lane] : ManyExtent{};
    const auto add = [](int v) { return static_cast<int>(__reduce_add_sync(kAllLanes, v)); };
    at.rows += add(earlier.rows) - rows.total;
    at.tiles += add(earlier.tiles) - tiles;
    at.own += add(earlier.own) - own;
    if (part == 0 && expert < p.num_local) {
      smem.row_start[expert] = at.rows + rows.before;
      smem.own_start[expert] = at.own;
      uint32_t before = 0;
      int bits = 0;
#pragma unroll
      for (int word = 0; word < kRouteBlockTokens / 32; ++word) {
        before |= static_cast<uint32_t>(bits) << (8 * word);
        bits += __popc(smem.bitmaps[expert][word]);
      }
      smem.before_words[expert] = before;
      if (by_row && writes_tiles) smem.written[expert >> writers_log2] = {rows.total, at.rows, at.tiles};
      if (expert == p.num_local - 1) {
        smem.num_rows = at.own + own;
        if (share.block == 0) *p.schedule = Schedule{at.tiles + tiles, at.rows + rows.total, {0, 0}};
      }
    }
  }
  __syncthreads();

#pragma unroll
  for (int n = 0; n < kRounds; ++n) {
    const int i = first_i + n * kMaxThreads, t = divide(i, p.top_k_inverse);
    if (n > 0 && num_slots <= n * kMaxThreads) break;
    if (i >= num_slots) continue;
    const int local = ids[n] - p.local_offset;
    int row = -1;
    if (static_cast<unsigned>(local) < static_cast<unsigned>(p.num_local)) {
      // Of the block's tokens before t, those that chose the expert.
      const int earlier = (smem.before_words[local] >> (8 * (t >> 5)) & 0xff) +
                          __popc(smem.bitmaps[local][t >> 5] & ((1u << (t & 31)) - 1));
      row = smem.row_start[local] + earlier;
      if (by_row) {
        const int at_row = smem.own_start[local] + earlier;
        smem.rows[at_row] = row, smem.tokens[at_row] = t;
      } else {
        p.row_token[row] = share.first_token + t;
      }
      if (p.row_weight != nullptr) {
        p.row_weight[row] = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(p.topk_weights)[first_slot + i]);
      }
    }
    p.expanded_to_row[first_slot + i] = row;
  }
  if (!by_row) {
    if (writes_tiles) write_tiles(p, expert, rows.total, at.rows, at.tiles, 0, 1);
    return;
  }
#pragma unroll 1
  for (int i = warp; share.block < writers && i * writers + share.block < p.num_local; i += kMaxThreads / 32) {
    const WrittenExpert written = smem.written[i];
    write_tiles(p, i * writers + share.block, written.rows, written.first_row, written.first_tile, lane, 32);
  }
  __syncthreads();
#pragma unroll 1
  for (int n = thread; n < smem.num_rows; n += kMaxThreads) {
    p.row_token[smem.rows[n]] = share.first_token + smem.tokens[n];
  }
}

}  // namespace expertd
