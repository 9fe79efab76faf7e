// The grouped matrix products: out[rows of expert e] = x[rows of e] * weights[e]^T, weights as the M operand of wgmma
// and tokens as N, so that few tokens cost few columns. One kernel template for both products and all sizes.
//
// A CTA takes tiles (weight rows x tokens) from a dynamic counter. One warpgroup produces: one thread of it streams
// weights into a ring by TMA, a stage for each warpgroup in turn; its other warps stream tokens into a second ring, by
// TMA (product 2) or gathered row by row with cp.async (product 1). The other warpgroups consume: wgmma over the rings,
// then the epilogue, while the producers already fill the next tile's stages.
//
// Wide tiles work in clusters of two CTAs: the same weights, neighbouring token tiles of one expert. Each CTA loads
// half of the weights for both (multicast), because L2 cannot deliver them twice as fast as the tensor cores take them.
//
// NOTE: every output element is one chain over K in ascending order by one warpgroup, whatever the family. The tensor
// core's sum does not depend on N or on neighbouring columns, so all families give the same bits. Do not split K.
//
// Where what is:
//   gemm.h            the tile families
//   gemm_traits.cuh   what follows from a family: threads, registers, bytes
//   gemm_shared.cuh   shared memory: rings, barriers, tile slots
//   gemm_tiles.cuh    which tile is whose, and how a CTA's warps learn of it
//   gemm_weights.cuh  producer of weights
//   gemm_tokens.cuh   producers of tokens
//   gemm_consume.cuh  consumers: the products; epilogue.cuh: from sums to results
//   here              the kernel, which gives each warp its part, and its launch
#pragma once
#include "gemm.h"
#include "gemm_consume.cuh"
#include "gemm_shared.cuh"
#include "gemm_tokens.cuh"
#include "gemm_traits.cuh"
#include "gemm_weights.cuh"
#include "params.h"
#include "sm90.cuh"

namespace expertd {

template <class G>
__global__ void __launch_bounds__(G::kThreads, G::F::kCtasPerSm)
    grouped_gemm_kernel(const __grid_constant__ CUtensorMap map_w, const __grid_constant__ CUtensorMap map_x,
                        const __grid_constant__ CUtensorMap map_x_part, const __grid_constant__ GemmParams p) {
  extern __shared__ uint8_t smem[];
  const Shared<G> shared(smem);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < G::F::kWeightStages; ++s) {
      sm90::mbarrier_init(shared.weights.full(s), 1);
      sm90::mbarrier_init(shared.weights.empty(s), G::kCluster * 4);  // the warps of one warpgroup
    }
    for (int s = 0; s < G::F::kTokenStages; ++s) {
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
  // One thread deals out the tiles. Product 2 looks up its first one while the barriers are being set up.
  const bool deals = threadIdx.x == G::kConsumers && shared.rank == 0;
  TileQueue<G> queue(p, shared);
  typename TileQueue<G>::Found first;
  if (!G::kGather && deals) first = queue.load();
  if constexpr (G::kPair) {  // nobody reaches into a CTA whose barriers are not set up
    sm90::cluster_arrive();
    sm90::cluster_wait();
  } else {
    __syncthreads();
  }
  if constexpr (G::kGather) {
    if (p.likely_token_tiles > 0 && threadIdx.x == G::kConsumers) prefetch_likely_weights<G>(p, &map_w);
    // The first look comes before routing is done: it brings instructions and translations of addresses into the
    // caches.
    const int near = queue.near_index();
#pragma unroll 1
    for (int look = 0; look < 2; ++look) {
      if (deals) first = queue.load(near);
      if (look == 0) {
        sm90::griddepcontrol_wait();
        sm90::griddepcontrol_launch_dependents();
      }
    }
  }
  constexpr int kFirstProducer = 4 * G::kWarpgroups;
  if (warp >= kFirstProducer) {
    if constexpr (G::kMoveRegs) sm90::setmaxnreg_dec<G::kProducerRegs>();
    if (warp == kFirstProducer) {
      if (lane == 0) produce_weights<G>(p, shared, &map_w, queue, first);
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
