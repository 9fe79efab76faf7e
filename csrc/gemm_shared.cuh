// The shared memory of a CTA and its barriers: a ring of stages for each operand, two slots for tiles.
#pragma once
#include "gemm_traits.cuh"
#include "sm90.cuh"

namespace expertd {

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
  Ring<G::F::kWeightStages, G::kWeightBytes> weights;
  Ring<G::F::kTokenStages, G::kTokenBytes> tokens;
  uint32_t staging, tile_full, tile_empty, slots, rank;

  __device__ __forceinline__ explicit Shared(const void* smem) {
    rank = G::kPair ? sm90::cluster_ctarank() : 0;
    weights.data = (sm90::smem_address(smem) + 1023u) & ~1023u;  // the swizzle wants stages on 1024-byte boundaries
    tokens.data = weights.data + G::F::kWeightStages * G::kWeightBytes;
    staging = weights.data + G::kRingBytes;
    weights.barriers = staging + G::kWarpgroups * G::kStagingBytes;
    tokens.barriers = weights.barriers + 2 * G::F::kWeightStages * 8;
    tile_full = tokens.barriers + 2 * G::F::kTokenStages * 8;
    tile_empty = tile_full + 16;
    slots = tile_empty + 16;
  }

  // A consumer warp is done with a stage. Weights are written by both CTAs of a cluster, so both have to know.
  __device__ __forceinline__ void release_weights(uint32_t step, int lane) const {
    if (lane == 0) sm90::mbarrier_arrive(weights.empty(step));
    if constexpr (G::kPair) {
      if (lane == 2) sm90::mbarrier_arrive_cluster(weights.empty(step), rank ^ 1);
    }
  }
  __device__ __forceinline__ void release_tokens(uint32_t step, int lane) const {
    if (lane == 1) sm90::mbarrier_arrive(tokens.empty(step));
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

}  // namespace expertd
