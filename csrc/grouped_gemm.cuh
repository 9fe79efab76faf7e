// The grouped matrix products: out[rows of expert e] = x[rows of e] * weights[e]^T, weights as the M operand of wgmma
// and tokens as N, so that few tokens cost few columns. One kernel template for both products and all sizes.
//
// A CTA takes tiles (weight rows x tokens) from a dynamic counter. One warpgroup produces: one thread of it streams
// weights into a ring by TMA, 128 bytes of K (or more) per stage; its other warps stream tokens into a second ring, by
// TMA (product 2) or gathered row by row with cp.async (product 1). The other warpgroups consume: wgmma over the rings,
// then the epilogue, while the producers already fill the next tile's stages.
//
// Wide tiles work in clusters of two CTAs: the same weights, neighbouring token tiles of one expert. Each CTA loads
// half of the weights for both (multicast), because L2 cannot deliver them twice as fast as the tensor cores take them.
//
// NOTE: every output element is one chain over K in ascending order by one warpgroup, whatever the family. The tensor
// core's sum does not depend on N or on neighbouring columns, so all families give the same bits. Do not split K.
#pragma once
#include "epilogue.cuh"
#include "gemm.h"
#include "params.h"
#include "sm90.cuh"
#include "wgmma.cuh"

namespace expertd {

constexpr int kBoxK = 128;  // bytes of K in one box: a row of the 128-byte swizzle

template <class F_, Output kOut_>
struct GemmTraits {
  using F = F_;
  static constexpr Output kOut = kOut_;
  static constexpr bool kGated = kOut == kSwiglu || kOut == kGeglu;
  static constexpr bool kGather = kOut != kBFloat16;
  static constexpr int kWarpgroups = F::kWarpgroups;
  static constexpr int kAtoms = F::kTileM / (64 * kWarpgroups);
  static constexpr int kConsumerWarps = 4 * kWarpgroups;
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr int kThreads = kConsumers + 128;
  // The producers: a warp (one thread of it) for weights, then one for tokens (one thread), or three that gather them.
  static constexpr int kTokenWarps = kGather ? 3 : 1;
  static constexpr int kStepK = F::kBoxes * kBoxK;  // bytes of K per stage: boxes side by side
  static constexpr int kCluster = F::kCluster, kShareM = F::kTileM / kCluster;  // weight rows that this CTA loads
  static constexpr bool kPair = kCluster == 2;
  static_assert(kCluster <= 2, "a CTA has one neighbour at most");
  static constexpr int kWeightBox = F::kTileM * kBoxK, kTokenBox = F::kTileN * kBoxK;
  static constexpr int kWeightBytes = F::kBoxes * kWeightBox, kTokenBytes = F::kBoxes * kTokenBox;
  static constexpr int kRingBytes = F::kStages * (kWeightBytes + kTokenBytes);
  static constexpr int kBarriers = 4 * F::kStages + 4;
  // Shared memory besides the staging of results: alignment, rings, barriers, tile slots.
  static constexpr int kFixedBytes = 1024 + kRingBytes + ((kBarriers * 8 + 15) & ~15) + 2 * 16;
  static constexpr int kMaxSmem = 232448 / F::kCtasPerSm - (F::kCtasPerSm > 1 ? 1024 : 0);
  static constexpr int kPitch = kOut == kBFloat16 ? 144 : (kGated ? 32 : 64) * kAtoms + 16;
  // Results are staged for so many tokens at a time, while others are being written out, as there is room for.
  static constexpr int staging_bytes(int tokens, int buffers) { return kWarpgroups * tokens * buffers * kPitch; }
  static constexpr int kPassTokens = F::kTileN >= 32 && kFixedBytes + staging_bytes(32, 1) <= kMaxSmem ? 32 : 16;
  static constexpr int kStagingBuffers = kGather && kFixedBytes + staging_bytes(kPassTokens, 2) <= kMaxSmem ? 2 : 1;
  static constexpr int kStagingBytes = kStagingBuffers * kPassTokens * kPitch;  // of one warpgroup
  static constexpr int kSmem = kFixedBytes + staging_bytes(kPassTokens, kStagingBuffers);
  static_assert(kSmem <= kMaxSmem, "shared memory");
  // Arrivals that free a tile's slot: warps that consume, and warps or threads that produce.
  static constexpr int kTileReaders = kCluster * (kConsumerWarps + kTokenWarps) + kCluster - 1;
  static constexpr int kAccumulators = kAtoms * F::kTileN / 2;
  // A release for the whole GPU waits until all that was stored has arrived. Where sums are long enough, it is done
  // while the tensor cores already work on the next tile.
  static constexpr bool kLateRelease = kGather && F::kTileM == 256;
  // Wide tiles move registers from the producers to the consumers; the sums must fit what the launch allocated.
  static constexpr bool kMoveRegs = kAccumulators > 80;
  static constexpr int kProducerRegs = kGather ? 72 : 40, kConsumerRegs = kGather ? 216 : 232;
  static_assert(!kMoveRegs || (128 * kProducerRegs + kConsumers * kConsumerRegs <= 65536 / kThreads / 8 * 8 * kThreads),
                "a launch allocates equally, and raising waits for ever for what nobody gave up");
};

// Stages of one operand in shared memory, each with a barrier that says it is full and one that says it is free.
template <int kStages_, int kBytes>
struct Ring {
  static constexpr int kStages = kStages_;
  uint32_t data, barriers;
  __device__ __forceinline__ uint32_t stage(uint32_t step) const { return data + step % kStages * kBytes; }
  __device__ __forceinline__ uint32_t full(uint32_t step) const { return barriers + step % kStages * 8; }
  __device__ __forceinline__ uint32_t empty(uint32_t step) const { return barriers + (kStages + step % kStages) * 8; }
  __device__ __forceinline__ void wait_full(uint32_t step) const {
    sm90::mbarrier_wait(full(step), (step / kStages) & 1);
  }
  __device__ __forceinline__ void wait_empty(uint32_t step) const {
    sm90::mbarrier_wait(empty(step), ((step / kStages) & 1) ^ 1);
  }
};

// What the warps of a CTA (and its neighbour) share.
template <class G>
struct Shared {
  Ring<G::F::kStages, G::kWeightBytes> weights;
  Ring<G::F::kStages, G::kTokenBytes> tokens;
  uint32_t staging, tile_full, tile_empty, slots, rank;

  __device__ __forceinline__ explicit Shared(const void* smem) {
    rank = G::kPair ? sm90::cluster_ctarank() : 0;
    weights.data = (sm90::smem_address(smem) + 1023u) & ~1023u;  // the swizzle wants stages on 1024-byte boundaries
    tokens.data = weights.data + G::F::kStages * G::kWeightBytes;
    staging = weights.data + G::kRingBytes;
    weights.barriers = staging + G::kWarpgroups * G::kStagingBytes;
    tokens.barriers = weights.barriers + 2 * G::F::kStages * 8;
    tile_full = tokens.barriers + 2 * G::F::kStages * 8;
    tile_empty = tile_full + 16;
    slots = tile_empty + 16;
  }

  // A consumer warp is done with a step. Weights are written by both CTAs of a cluster, so both have to know.
  __device__ __forceinline__ void release_step(uint32_t step, int lane) const {
    if (lane == 0) sm90::mbarrier_arrive(weights.empty(step));
    if (lane == 1) sm90::mbarrier_arrive(tokens.empty(step));
    if constexpr (G::kPair) {
      if (lane == 2) sm90::mbarrier_arrive_cluster(weights.empty(step), rank ^ 1);
    }
  }

  __device__ __forceinline__ void wait_tile(uint32_t n) const {
    sm90::mbarrier_wait(tile_full + (n & 1) * 8, (n >> 1) & 1);
  }
  // Tile n from its slot, to be released: in one thread.
  __device__ __forceinline__ int4 tile(uint32_t n) const {
    wait_tile(n);
    return sm90::ld_shared_v4(slots + (n & 1) * 16);
  }
  // The same in all lanes of a warp; one reads, so that one arrival says that all have it.
  __device__ __forceinline__ int4 tile_for_warp(uint32_t n, int lane) const {
    wait_tile(n);
    int4 v = {};
    if (lane == 0) v = sm90::ld_shared_v4(slots + (n & 1) * 16);
    constexpr unsigned kAll = 0xffffffffu;
    return {__shfl_sync(kAll, v.x, 0), __shfl_sync(kAll, v.y, 0), __shfl_sync(kAll, v.z, 0), __shfl_sync(kAll, v.w, 0)};
  }
  // The thread that fills the slots, in the cluster's first CTA, has to know that a reader has taken tile n.
  __device__ __forceinline__ void release_tile(uint32_t n) const {
    if (rank == 0) {
      sm90::mbarrier_arrive(tile_empty + (n & 1) * 8);
    } else {
      sm90::mbarrier_arrive_cluster(tile_empty + (n & 1) * 8, 0);
    }
  }
};

// ---- tiles

// A tile of the product, as it travels through shared memory: {row tile | expert << 16, token tile, first row, rows}.
struct Tile {
  int4 v;
  __device__ __forceinline__ bool is_end() const { return v.x < 0; }
  __device__ __forceinline__ int m_tile() const { return v.x & 0xffff; }
  __device__ __forceinline__ int expert() const { return v.x >> 16; }
  __device__ __forceinline__ int token_tile() const { return v.y; }
  __device__ __forceinline__ int first_row() const { return v.z; }
  __device__ __forceinline__ int rows() const { return v.w; }
  // Columns of the product: rows rounded up. Without rows: one quantum, for the neighbour that shares the weights.
  template <class F>
  __device__ __forceinline__ int width() const {
    const int rows = F::kCluster > 1 ? max(v.w, 1) : v.w;
    return (rows + F::kTileQuantum - 1) / F::kTileQuantum * F::kTileQuantum;
  }
};
constexpr int4 kEndTile = {-1, 0, 0, 0};

// Tiles q of the list, one for each CTA of a cluster: the same weights, neighbouring token tiles. The token tiles of a
// block share the weights of each row tile, token tile fastest.
template <int kCluster>
struct Tiles {
  Tile of[kCluster];
};
template <int kCluster>
__device__ __forceinline__ Tiles<kCluster> find_tiles(const GemmParams& p, int q, int m_tiles) {
  Tiles<kCluster> found;
  const int near_index = q / m_tiles * kCluster;  // of some token tile of the same block
  const TokenTile near = __ldcg(p.tiles + min(near_index, p.max_token_tiles - 1));
  if (near_index >= __ldcg(&p.schedule->num_token_tiles)) {
#pragma unroll
    for (int i = 0; i < kCluster; ++i) found.of[i] = {kEndTile};
    return found;
  }
  const int in_block = (near.x >> 16) / kCluster, local = q - near.w / kCluster * m_tiles;
  if (kCluster == 1 && in_block == 1) {
    found.of[0] = {{local | near.x << 16, near.w, near.y, near.z}};
    return found;
  }
  const int index = near.w + local % in_block * kCluster;
#pragma unroll
  for (int i = 0; i < kCluster; ++i) {
    const TokenTile own = __ldcg(p.tiles + index + i);
    found.of[i] = {{local / in_block | own.x << 16, index + i, own.y, own.z}};
  }
  return found;
}

// ---- producer

// This CTA's share of the weights of a stage, into all CTAs of the cluster.
template <class G>
__device__ __forceinline__ void load_weights(const CUtensorMap* map, uint32_t dst, uint32_t bar, int step,
                                             const Tile& t, uint64_t policy, uint32_t rank) {
  constexpr uint16_t kAll = (1 << G::kCluster) - 1;
  const int first = t.m_tile() * G::F::kTileM + rank * G::kShareM;
#pragma unroll
  for (int box = 0; box < G::F::kBoxes; ++box) {
    const int k = step * G::kStepK + box * kBoxK;
    const uint32_t at = dst + box * G::kWeightBox + rank * (G::kShareM * kBoxK);
    if constexpr (G::kGated && G::kPair) {
      sm90::cp_async_bulk_tensor_5d_multicast(at, map, bar, k, 0, 0, first / 16, t.expert(), kAll, policy);
    } else if constexpr (G::kGated) {
      sm90::cp_async_bulk_tensor_5d(at, map, bar, k, 0, 0, first / 16, t.expert(), policy);
    } else if constexpr (G::kPair) {
      sm90::cp_async_bulk_tensor_3d_multicast(at, map, bar, k, first, t.expert(), kAll, policy);
    } else {
      sm90::cp_async_bulk_tensor_3d(at, map, bar, k, first, t.expert(), policy);
    }
  }
}

// One CTA's share of the weights of a step, into L2.
template <class G>
__device__ __forceinline__ void prefetch_weights(const CUtensorMap* map, int step, int m_tile, int expert,
                                                 uint32_t rank) {
  const int first = m_tile * G::F::kTileM + rank * G::kShareM;
#pragma unroll
  for (int box = 0; box < G::F::kBoxes; ++box) {
    const int k = step * G::kStepK + box * kBoxK;
    if constexpr (G::kGated) {
      sm90::cp_async_bulk_prefetch_tensor_5d(map, k, 0, 0, first / 16, expert);
    } else {
      sm90::cp_async_bulk_prefetch_tensor_3d(map, k, first, expert);
    }
  }
}

template <class G>
__device__ __forceinline__ int num_steps(const GemmParams& p) {
  return (p.k + G::kStepK - 1) / G::kStepK;
}

// One thread of a cluster picks the tiles and hands them to everybody through two slots in each CTA.
template <class G>
struct TileQueue {
  using Found = Tiles<G::kCluster>;
  const GemmParams& p;
  const Shared<G>& shared;
  int next = blockIdx.x / G::kCluster;

  __device__ __forceinline__ TileQueue(const GemmParams& p, const Shared<G>& shared) : p(p), shared(shared) {}
  __device__ __forceinline__ Found load() const {
    return find_tiles<G::kCluster>(p, next, (p.weight_rows + G::F::kTileM - 1) / G::F::kTileM);
  }
  __device__ __forceinline__ void advance() {
    next = gridDim.x / G::kCluster + atomicAdd(&p.schedule->next_tile[G::kOut == kBFloat16], 1);
  }
  __device__ __forceinline__ void publish(const Found& tiles, uint32_t n) const {
    const uint32_t slot = shared.slots + (n & 1) * 16, full = shared.tile_full + (n & 1) * 8;
    wait_empty(n);
    sm90::st_shared_v4(slot, tiles.of[0].v);
    sm90::mbarrier_arrive(full);
#pragma unroll
    for (int i = 1; i < G::kCluster; ++i) {
      sm90::send_v4(slot, tiles.of[i].v, full, i);
    }
  }
  // After the end, told as tile n, which no consumer works on.
  __device__ __forceinline__ void close(uint32_t n) const {
    if (G::kPair) wait_empty(n + 1);  // NOTE: the shared memory must live until the other CTA's last arrivals
  }
  __device__ __forceinline__ void wait_empty(uint32_t n) const {
    sm90::mbarrier_wait(shared.tile_empty + (n & 1) * 8, ((n >> 1) & 1) ^ 1);
  }
};

template <class G>
__device__ __forceinline__ uint64_t weight_policy() {
  // Decode reads weights once; wide tiles share them between neighbouring token tiles.
  return G::F::kTileN > 128 ? sm90::createpolicy_evict_normal() : sm90::createpolicy_evict_first();
}

// Weights; in one thread. It also deals out the tiles.
// NOTE: in product 2 this does not wait for product 1. The tile list is older than that: product 1 let this kernel
// start only after it had itself waited for routing. So weights are under way before product 1 ends.
template <class G>
__device__ __forceinline__ void produce_weights(const GemmParams& p, const Shared<G>& shared, const CUtensorMap* map) {
  const uint64_t policy = weight_policy<G>();
  const int steps = num_steps<G>(p);
  TileQueue<G> queue(p, shared);
  typename TileQueue<G>::Found next;
  if (shared.rank == 0) {
    next = queue.load();
    queue.publish(next, 0);
  }
  // The next tile is found early and told early, so that its tokens' rows can be looked up while this one's are loaded;
  // but not before the consumers are on this tile, and have let go of the slot.
  const int find_at = min(1, steps - 1), tell_at = min(G::F::kStages + 1, steps - 1);
  uint32_t step = 0, n = 0;
  for (;; ++n) {
    Tile t;
    if (shared.rank == 0) {
      t = next.of[0];
      if (t.is_end()) break;
      queue.advance();
    } else {
      t = {shared.tile(n)};
      if (t.is_end()) break;
      shared.release_tile(n);
    }
#pragma unroll 1
    for (int ks = 0; ks < steps; ++ks, ++step) {
      const uint32_t full = shared.weights.full(step);
      shared.weights.wait_empty(step);
      sm90::mbarrier_arrive_expect_tx(full, G::kWeightBytes);
      load_weights<G>(map, shared.weights.stage(step), full, ks, t, policy, shared.rank);
      if (shared.rank == 0) {
        if (ks == find_at) next = queue.load();
        if (ks == tell_at) queue.publish(next, n + 1);
      }
    }
  }
  if (shared.rank == 0) queue.close(n);
  if constexpr (G::kPair) {
    // NOTE: a CTA's shared memory must live until the neighbour's last arrivals, which these waits see.
    for (uint32_t last = step + G::F::kStages; step != last; ++step) shared.weights.wait_empty(step);
  }
}

// Product 2, tokens: the rows of a tile lie side by side. In one thread of another warp: one thread alone cannot issue
// both operands' copies as fast as memory delivers them.
// NOTE: waits for the rows of its own tile, not for the whole of product 1. That cannot deadlock: this kernel's CTAs
// get a place only once all of product 1's have one.
template <class G>
__device__ __forceinline__ void produce_tokens(const GemmParams& p, const Shared<G>& shared, const CUtensorMap* map,
                                               const CUtensorMap* map_part) {
  using F = typename G::F;
  const uint64_t policy = sm90::createpolicy_evict_last();
  const int steps = num_steps<G>(p);
  sm90::griddepcontrol_launch_dependents();
  uint32_t step = 0;
  int ready_tile = -1;
  for (uint32_t n = 0;; ++n) {
    const Tile t = {shared.tile(n)};
    if (t.is_end()) break;
    shared.release_tile(n);
    if (t.token_tile() != ready_tile) {
      ready_tile = t.token_tile();
      while (sm90::ld_acquire(p.tile_ready + ready_tile) < p.ready_count) {
      }
      sm90::fence_proxy_async_global();  // product 1 wrote through the generic proxy, the copies read through the async
    }
    const int width = t.width<F>();
#pragma unroll 1
    for (int ks = 0; ks < steps; ++ks, ++step) {
      const uint32_t full = shared.tokens.full(step);
      shared.tokens.wait_empty(step);
      sm90::mbarrier_arrive_expect_tx(full, F::kBoxes * width * kBoxK);
#pragma unroll
      for (int box = 0; box < F::kBoxes; ++box) {
        const uint32_t dst = shared.tokens.stage(step) + box * G::kTokenBox;
        const int k = ks * G::kStepK + box * kBoxK;
        if (width == F::kTileN) {
          sm90::cp_async_bulk_tensor_2d(dst, map, full, k, t.first_row(), policy);
        } else {
#pragma unroll 1
          for (int i = 0; i < width; i += F::kTileQuantum) {
            sm90::cp_async_bulk_tensor_2d(dst + i * kBoxK, map_part, full, k, t.first_row() + i, policy);
          }
        }
      }
    }
  }
  sm90::griddepcontrol_wait();  // NOTE: this grid must not complete before product 1: later kernels rely on the order
}

// Product 1, tokens: the rows of a tile are gathered from wherever their tokens are. In kTokenWarps warps; a warp's
// lanes hold 8 chunks of 16 bytes of 4 rows, and the warps take such groups in turn.
template <class G>
__device__ __forceinline__ void gather_tokens(const GemmParams& p, const Shared<G>& shared, int warp, int lane) {
  using F = typename G::F;
  constexpr int kRowStride = 4 * G::kTokenWarps, kRowsPerThread = (F::kTileN + kRowStride - 1) / kRowStride;
  static_assert(G::kTokenWarps % 2 == 1, "the swizzle below alternates from turn to turn");
  const int steps = num_steps<G>(p);
  const int chunk = lane & 7, row0 = 4 * warp + (lane >> 3);
  // The swizzle by hand: chunk ^ row % 8. A turn further on is 12 rows, so row % 8 has changed by 4.
  const uint32_t even = row0 * kBoxK + ((chunk ^ (row0 & 7)) << 4), odd = even ^ (4 << 4);
  uint32_t step = 0;
  int tokens[kRowsPerThread];
  Tile t = {shared.tile_for_warp(0, lane)};
  const auto look_up = [&] {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      // Columns of padding repeat a valid row; nobody stores them.
      const int row = max(min(row0 + kRowStride * i, t.rows() - 1), 0);
      tokens[i] = __ldcg(p.row_token + t.first_row() + row);
    }
  };
  if (!t.is_end()) look_up();
  for (uint32_t n = 0; !t.is_end(); ++n) {
    if (lane == 0) shared.release_tile(n);
    uint32_t source[kRowsPerThread];  // fits: T * H stays below 2^32 in one call
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      source[i] = static_cast<uint32_t>(tokens[i]) * static_cast<uint32_t>(p.k) + chunk * 16;
    }
    const int turns = (t.width<F>() - row0 + kRowStride - 1) / kRowStride;
    for (int ks = 0; ks < steps; ++ks, ++step) {
      if (ks == steps - 1) {  // under way while this step waits for its stage
        t = {shared.tile_for_warp(n + 1, lane)};
        if (!t.is_end()) look_up();
      }
      shared.tokens.wait_empty(step);
      const uint32_t stage = shared.tokens.stage(step);
#pragma unroll
      for (int box = 0; box < F::kBoxes; ++box) {
        // Past the end of K both operands must be true zeros: the other one may hold anything, and 0 * NaN is NaN.
        const int k = ks * G::kStepK + box * kBoxK;
        const uint32_t bytes = k + chunk * 16 < p.k ? 16 : 0;
        const uint8_t* x = p.x + k;
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) {
          const uint32_t dst = stage + box * G::kTokenBox + i * (kRowStride * kBoxK) + (i % 2 == 0 ? even : odd);
          if (i < turns) sm90::cp_async_16(dst, x + source[i], bytes);
        }
      }
      sm90::cp_async_mbarrier_arrive_noinc(shared.tokens.full(step));
    }
  }
  sm90::cp_async_wait_all();
}

// Product 1, while routing runs and memory is idle: into L2 with the weights of the tile that this CTA gets if the
// guess holds. A wrong guess costs traffic that nobody waits for.
template <class G>
__device__ __forceinline__ void prefetch_likely_weights(const GemmParams& p, const CUtensorMap* map) {
  using F = typename G::F;
  const int m_tiles = (p.weight_rows + F::kTileM - 1) / F::kTileM, per_expert = m_tiles * p.likely_token_tiles;
  const int expert = blockIdx.x / per_expert, m_tile = blockIdx.x % per_expert / p.likely_token_tiles;
  if (expert >= p.num_experts) return;
  const int steps = min(F::kStages, num_steps<G>(p));
#pragma unroll 1
  for (int step = 0; step < steps; ++step) prefetch_weights<G>(map, step, m_tile, expert, blockIdx.x % G::kCluster);
}

// ---- consumers

// All of K for one tile of N tokens. done: the counter of the tile before, where that is still to be told.
template <class G, int N>
__device__ __forceinline__ void multiply(float* acc, uint32_t& step, int steps, const Shared<G>& shared, int group,
                                         int lane, int* done) {
  const uint32_t weight_offset = group * (64 * G::kAtoms * kBoxK);
  for (int ks = 0; ks < steps; ++ks, ++step) {
    shared.tokens.wait_full(step);
    shared.weights.wait_full(step);
    if constexpr (G::kGather) sm90::fence_proxy_async_shared();  // cp.async wrote through the generic proxy
    const uint64_t w = sm90::matrix_descriptor(shared.weights.stage(step) + weight_offset);
    const uint64_t x = sm90::matrix_descriptor(shared.tokens.stage(step));
    sm90::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4 * G::F::kBoxes; ++kk) {
      const uint64_t w_box = w + kk / 4 * (G::kWeightBox / 16) + kk % 4 * 2;
      const uint64_t x_box = x + kk / 4 * (G::kTokenBox / 16) + kk % 4 * 2;
#pragma unroll
      for (int atom = 0; atom < G::kAtoms; ++atom) {
        sm90::Wgmma<N>::mma(acc + atom * (G::F::kTileN / 2), w_box + atom * 512, x_box, (ks | kk) != 0);
      }
    }
    sm90::wgmma_commit_group();
    if constexpr (G::kLateRelease) {
      if (ks == 1 && done != nullptr && (threadIdx.x & 127) == 0) sm90::red_release_add(done, 1);
    }
    sm90::wgmma_wait_group<1>();  // the previous step is done
    if (ks > 0) shared.release_step(step - 1, lane);
  }
  sm90::wgmma_wait_group<0>();
  shared.release_step(step - 1, lane);
}

template <class G, int kUnits = 1>
__device__ __forceinline__ void multiply_width(int units, float* acc, uint32_t& step, int steps,
                                               const Shared<G>& shared, int group, int lane, int* done) {
  constexpr int kWidth = kUnits * G::F::kTileQuantum;
  if constexpr (kWidth >= G::F::kTileN) {
    multiply<G, kWidth>(acc, step, steps, shared, group, lane, done);
  } else {
    if (units == kUnits) {
      multiply<G, kWidth>(acc, step, steps, shared, group, lane, done);
    } else {
      multiply_width<G, kUnits + 1>(units, acc, step, steps, shared, group, lane, done);
    }
  }
}

template <class G>
__device__ __forceinline__ void consume(const GemmParams& p, const Shared<G>& shared, int warp, int lane) {
  using F = typename G::F;
  const int group = warp >> 2, steps = num_steps<G>(p);
  uint32_t step = 0;
  Tile t = {shared.tile_for_warp(0, lane)};
  int* done = nullptr;
  // NOTE: nothing may follow this loop, and nothing may leave it by break: ptxas 13.0 would then drop the register
  // budget that setmaxnreg raised, and spill.
  for (uint32_t n = 0; !t.is_end();) {
    float acc[G::kAccumulators];
    multiply_width<G>(t.width<F>() / F::kTileQuantum, acc, step, steps, shared, group, lane, done);
#pragma unroll
    for (int i = 0; i < G::kAccumulators; ++i) asm volatile("" : "+f"(acc[i])::"memory");
    __syncwarp();
    if (lane == 0) shared.release_tile(n);
    EpilogueTile e;
    e.scale = __ldg(p.scale + t.expert());
    e.scale_gate = G::kGather ? __ldg(p.scale_gate + t.expert()) : 0.0f;
    e.first_row = t.first_row();
    e.num_rows = t.rows();
    e.first_column = (t.m_tile() * F::kTileM + group * 64 * G::kAtoms) / (G::kGated ? 2 : 1);
    e.warp = warp & 3;
    e.lane = lane;
    e.barrier = 1 + group;
    e.staging = shared.staging + group * G::kStagingBytes;
    e.row_weight = p.row_weight;
    if constexpr (G::kOut == kBFloat16) {
      store_bfloat16<G::kAtoms, F::kTileN, G::kPassTokens>(acc, e, static_cast<__nv_bfloat16*>(p.out), p.out_columns);
    } else {
      constexpr bool kLong = G::kOut == kGelu || G::kOut == kGeglu;  // not worth having twice
      if (kLong || p.row_weight != nullptr) {
        store_activated<G::kOut, G::kAtoms, F::kTileN, G::kPassTokens, G::kPitch, G::kStagingBuffers, true>(
            acc, e, static_cast<uint8_t*>(p.out), p.out_columns);
      } else {
        store_activated<G::kOut, G::kAtoms, F::kTileN, G::kPassTokens, G::kPitch, G::kStagingBuffers, false>(
            acc, e, static_cast<uint8_t*>(p.out), p.out_columns);
      }
      sm90::fence_proxy_async_global();  // product 2 reads these rows through the async proxy
      sm90::bar_sync(e.barrier, 128);
      done = p.tile_ready + t.token_tile();
      if (!G::kLateRelease && (threadIdx.x & 127) == 0) sm90::red_release_add(done, 1);
    }
    ++n;
    t = {shared.tile_for_warp(n, lane)};
    if constexpr (G::kLateRelease) {
      if (t.is_end() || steps < 2) {
        if ((threadIdx.x & 127) == 0) sm90::red_release_add(done, 1);
        done = nullptr;
      }
    }
  }
}

// ---- kernel

template <class G>
__global__ void __launch_bounds__(G::kThreads, G::F::kCtasPerSm)
    grouped_gemm_kernel(const __grid_constant__ CUtensorMap map_w, const __grid_constant__ CUtensorMap map_x,
                        const __grid_constant__ CUtensorMap map_x_part, const __grid_constant__ GemmParams p) {
  extern __shared__ uint8_t smem[];
  const Shared<G> shared(smem);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < G::F::kStages; ++s) {
      sm90::mbarrier_init(shared.weights.full(s), 1);
      sm90::mbarrier_init(shared.weights.empty(s), G::kCluster * G::kConsumerWarps);
      sm90::mbarrier_init(shared.tokens.full(s), G::kGather ? 32 * G::kTokenWarps : 1);
      sm90::mbarrier_init(shared.tokens.empty(s), G::kConsumerWarps);
    }
    for (int i = 0; i < 2; ++i) {
      sm90::mbarrier_init(shared.tile_full + i * 8, 1);
      sm90::mbarrier_init(shared.tile_empty + i * 8, G::kTileReaders);
    }
    sm90::fence_mbarrier_init();
    sm90::prefetch_tensormap(&map_w);
    if constexpr (!G::kGather) {
      sm90::prefetch_tensormap(&map_x);
      sm90::prefetch_tensormap(&map_x_part);
    }
  }
  if constexpr (G::kPair) {  // nobody reaches into a CTA whose barriers are not set up
    sm90::cluster_arrive();
    sm90::cluster_wait();
  } else {
    __syncthreads();
  }
  if constexpr (G::kGather) {
    if (p.likely_token_tiles > 0 && threadIdx.x == G::kConsumers) prefetch_likely_weights<G>(p, &map_w);
    sm90::griddepcontrol_wait();
    sm90::griddepcontrol_launch_dependents();
  }
  constexpr int kFirstProducer = 4 * G::kWarpgroups;
  if (warp >= kFirstProducer) {
    if constexpr (G::kMoveRegs) sm90::setmaxnreg_dec<G::kProducerRegs>();
    if (warp == kFirstProducer) {
      if (lane == 0) produce_weights<G>(p, shared, &map_w);
    } else if constexpr (G::kGather) {
      gather_tokens<G>(p, shared, warp - kFirstProducer - 1, lane);
    } else {
      // NOTE: only the tokens' thread waits for product 1; nobody touches its rows before that thread's copies arrive.
      if (warp == kFirstProducer + 1 && lane == 0) produce_tokens<G>(p, shared, &map_x, &map_x_part);
    }
  } else {
    if constexpr (G::kMoveRegs) sm90::setmaxnreg_inc<G::kConsumerRegs>();
    consume<G>(p, shared, warp, lane);
  }
}

// ---- launch

template <class F, Output kOut>
void launch_grouped_gemm(const GemmMaps& maps, const GemmParams& p, int grid, const LaunchConfig& launch) {
  using G = GemmTraits<F, kOut>;
  const auto kernel = grouped_gemm_kernel<G>;
  require(p.weight_rows <= 0xffff * F::kTileM, "too many weight rows in one expert");
  require(p.k % 16 == 0 && p.out_columns % 16 == 0, "hidden_size and intermediate_size must be multiples of 16");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSmem),
             "raising the shared memory limit of a grouped GEMM");
  const LaunchConfig config = {launch.stream, launch.pdl, F::kCluster};
  check_cuda(launch_kernel(kernel, grid, G::kThreads, G::kSmem, config, maps.weights, maps.tokens, maps.tokens_part, p),
             "launching a grouped GEMM");
}

template <class F>
void launch_family(Output output, const GemmMaps& maps, const GemmParams& p, int grid, const LaunchConfig& launch) {
  switch (output) {
    case kGelu:
      return launch_grouped_gemm<F, kGelu>(maps, p, grid, launch);
    case kSwiglu:
      return launch_grouped_gemm<F, kSwiglu>(maps, p, grid, launch);
    case kGeglu:
      return launch_grouped_gemm<F, kGeglu>(maps, p, grid, launch);
    case kRelu2:
      return launch_grouped_gemm<F, kRelu2>(maps, p, grid, launch);
    case kIdentity:
      return launch_grouped_gemm<F, kIdentity>(maps, p, grid, launch);
    case kBFloat16:
      return launch_grouped_gemm<F, kBFloat16>(maps, p, grid, launch);
  }
}

}  // namespace expertd
