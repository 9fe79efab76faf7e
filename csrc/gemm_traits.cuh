// What follows from a tile family and an output at compile time: threads, registers, bytes of shared memory.
#pragma once
#include "gemm.h"
#include "params.h"

namespace expertd {

constexpr int kBoxK = 128;  // bytes of K in one box: a row of the 128-byte swizzle

template <class F_, Output kOut_>
struct GemmTraits {
  using F = F_;
  static constexpr Output kOut = kOut_;
  static constexpr bool kGated = kOut == kSwiglu || kOut == kGeglu;
  static constexpr bool kGather = kOut != kBFloat16;
  static constexpr int kWarpgroups = F::kWarpgroups;
  static constexpr int kGroupRows = F::kTileM / kWarpgroups, kAtoms = kGroupRows / 64;  // of one warpgroup
  static constexpr int kConsumerWarps = 4 * kWarpgroups;
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr int kThreads = kConsumers + 128;
  // The producers: a warp (one thread of it) for weights, then one for tokens (one thread), or three that gather them.
  static constexpr int kTokenWarps = kGather ? 3 : 1;
  // A block of K: a stage of weights for each warpgroup, and kParts stages of tokens, which all of them need.
  static constexpr int kBlockK = F::kWeightBoxes * kBoxK, kTokenK = F::kTokenBoxes * kBoxK, kParts = kBlockK / kTokenK;
  static_assert(kBlockK == kParts * kTokenK && kParts <= 2, "multiply() waits for one part or two");
  static constexpr int kCluster = F::kCluster, kShareRows = kGroupRows / kCluster;  // of a stage, that a CTA loads
  static constexpr bool kPair = kCluster == 2;
  static_assert(kCluster <= 2, "a CTA has one neighbour at most");
  static constexpr int kWeightBox = kGroupRows * kBoxK, kTokenBox = F::kTileN * kBoxK;
  static constexpr int kWeightBytes = F::kWeightBoxes * kWeightBox, kTokenBytes = F::kTokenBoxes * kTokenBox;
  static constexpr int kRingBytes = F::kWeightStages * kWeightBytes + F::kTokenStages * kTokenBytes;
  static constexpr int kBarriers = 2 * (F::kWeightStages + F::kTokenStages) + 4;
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
  // Stages that a CTA of product 1 brings into L2 while routing runs. NOTE: 32 KB, though a ring holds 128 to 160:
  // more is slower than none, in every family.
  static constexpr int kEarlyStages = 32768 / kWeightBytes;
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

// Blocks of K that the sums of a tile take.
template <class G>
__device__ __forceinline__ int num_blocks(const GemmParams& p) {
  return (p.k + G::kBlockK - 1) / G::kBlockK;
}

// Tiles over the weight rows of one expert.
template <class G>
__device__ __forceinline__ int num_m_tiles(const GemmParams& p) {
  return (p.weight_rows + G::F::kTileM - 1) / G::F::kTileM;
}

}  // namespace expertd
