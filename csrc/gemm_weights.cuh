// The producer of weights: TMA into the ring of a CTA, or of both in its cluster. One thread, which deals tiles too.
#pragma once
#include "gemm_shared.cuh"
#include "gemm_tiles.cuh"
#include "params.h"
#include "sm90.cuh"

namespace expertd {

// First of the weight rows that CTA `rank` of a cluster loads for a warpgroup.
template <class G>
__device__ __forceinline__ int first_weight_row(int m_tile, int group, uint32_t rank) {
  return m_tile * G::F::kTileM + group * G::kGroupRows + rank * G::kShareRows;
}

// This CTA's share of the weights of a stage, into all CTAs of the cluster.
template <class G>
__device__ __forceinline__ void load_weights(const CUtensorMap* map, uint32_t dst, uint32_t bar, int block, int group,
                                             const Tile& t, uint64_t policy, uint32_t rank) {
  constexpr uint16_t kAll = (1 << G::kCluster) - 1;
  const int first = first_weight_row<G>(t.m_tile(), group, rank);
#pragma unroll
  for (int box = 0; box < G::F::kWeightBoxes; ++box) {
    const int k = block * G::kBlockK + box * kBoxK;
    const uint32_t at = dst + box * G::kWeightBox + rank * (G::kShareRows * kBoxK);
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

// One CTA's share of the weights of a stage, into L2.
template <class G>
__device__ __forceinline__ void prefetch_weights(const CUtensorMap* map, int block, int group, int m_tile, int expert,
                                                 uint32_t rank) {
  const int first = first_weight_row<G>(m_tile, group, rank);
#pragma unroll
  for (int box = 0; box < G::F::kWeightBoxes; ++box) {
    const int k = block * G::kBlockK + box * kBoxK;
    if constexpr (G::kGated) {
      sm90::cp_async_bulk_prefetch_tensor_5d(map, k, 0, 0, first / 16, expert);
    } else {
      sm90::cp_async_bulk_prefetch_tensor_3d(map, k, first, expert);
    }
  }
}

// Weights; in one thread. It also deals out the tiles.
// NOTE: in product 2 this does not wait for product 1. The tile list is older than that: product 1 let this kernel
// start only after it had itself waited for routing. So weights are under way before product 1 ends.
template <class G>
__device__ __forceinline__ void produce_weights(const GemmParams& p, const Shared<G>& shared, const CUtensorMap* map,
                                                TileQueue<G>& queue, typename TileQueue<G>::Found next) {
  // What is read once makes way first. Not product 2's in clusters, which is slower with it.
  constexpr bool kMakeWay = G::kGather || !G::kPair;
  const uint64_t once = sm90::createpolicy_evict_first(), again = sm90::createpolicy_evict_normal();
  const int blocks = num_blocks<G>(p);
  if (shared.rank == 0) queue.publish(next, 0);
  // The next tile is found early and told early, so that its tokens' rows can be looked up while this one's are loaded;
  // but not before the consumers are on this tile, and have let go of the slot.
  const int find_at = min(1, blocks - 1), tell_at = min(G::F::kWeightStages / G::kWarpgroups + 1, blocks - 1);
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
    const uint64_t policy = kMakeWay && t.read_once() ? once : again;
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
#pragma unroll 1
      for (int group = 0; group < G::kWarpgroups; ++group, ++step) {
        const uint32_t full = shared.weights.full(step);
        shared.weights.wait_empty(step);
        sm90::mbarrier_arrive_expect_tx(full, G::kWeightBytes);
        load_weights<G>(map, shared.weights.stage(step), full, block, group, t, policy, shared.rank);
      }
      if (shared.rank == 0) {
        if (block == find_at) next = queue.load();
        if (block == tell_at) queue.publish(next, n + 1);
      }
    }
  }
  if (shared.rank == 0) queue.close(n);
  if constexpr (G::kPair) {
    // NOTE: a CTA's shared memory must live until the neighbour's last arrivals, which these waits see.
    for (uint32_t last = step + G::F::kWeightStages; step != last; ++step) shared.weights.wait_empty(step);
  }
}

// Product 1, while routing runs and memory is idle: into L2 with the weights of the tile that this CTA gets if the
// guess holds. A wrong guess costs traffic that nobody waits for.
template <class G>
__device__ __forceinline__ void prefetch_likely_weights(const GemmParams& p, const CUtensorMap* map) {
  const int per_expert = num_m_tiles<G>(p) * p.likely_token_tiles;
  const int expert = blockIdx.x / per_expert, m_tile = blockIdx.x % per_expert / p.likely_token_tiles;
  if (expert >= p.num_experts) return;
  const int steps = min(G::kEarlyStages, num_blocks<G>(p) * G::kWarpgroups);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int block = step / G::kWarpgroups, group = step % G::kWarpgroups;
    prefetch_weights<G>(map, block, group, m_tile, expert, blockIdx.x % G::kCluster);
  }
}

}  // namespace expertd
