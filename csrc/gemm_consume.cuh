// The consumers: the chain of wgmma over K, then the epilogue, and word to product 2 that a token tile is ready.
#pragma once
#include "epilogue.cuh"
#include "gemm_shared.cuh"
#include "gemm_tiles.cuh"
#include "params.h"
#include "sm90.cuh"
#include "wgmma.cuh"

namespace expertd {

// All of K for one tile of N tokens. block counts the blocks of K of all tiles. done: the counter of the tile before,
// where that is still to be told.
//
// A stage is let go as soon as its products are done, not once the next ones are under way: where memory sets the pace,
// the place would lie idle until the next stage arrives. Where the tensor cores do, one warpgroup computes while the
// other turns over.
template <class G, int N>
__device__ __forceinline__ void multiply(float* acc, uint32_t& block, int blocks, const Shared<G>& shared, int group,
                                         int lane, int* done) {
  for (int i = 0; i < blocks; ++i, ++block) {
    const uint32_t weight_step = block * G::kWarpgroups + group, token_step = block * G::kParts;
    shared.weights.wait_full(weight_step);
    const uint64_t w = sm90::matrix_descriptor(shared.weights.stage(weight_step));
#pragma unroll
    for (int part = 0; part < G::kParts; ++part) {
      shared.tokens.wait_full(token_step + part);
      if constexpr (G::kGather) sm90::fence_proxy_async_shared();  // cp.async wrote through the generic proxy
      const uint64_t x = sm90::matrix_descriptor(shared.tokens.stage(token_step + part));
      sm90::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4 * G::F::kTokenBoxes; ++kk) {
        const uint64_t w_box = w + (part * G::F::kTokenBoxes + kk / 4) * (G::kWeightBox / 16) + kk % 4 * 2;
        const uint64_t x_box = x + kk / 4 * (G::kTokenBox / 16) + kk % 4 * 2;
#pragma unroll
        for (int atom = 0; atom < G::kAtoms; ++atom) {
          sm90::Wgmma<N>::mma(acc + atom * (G::F::kTileN / 2), w_box + atom * 512, x_box, (i | part | kk) != 0);
        }
      }
      sm90::wgmma_commit_group();
    }
    if constexpr (G::kLateRelease) {
      if (i == 0 && done != nullptr && (threadIdx.x & 127) == 0) sm90::red_release_add(done, 1);
    }
    if constexpr (G::kParts == 2) {
      sm90::wgmma_wait_group<1>();
      shared.release_tokens(token_step, lane);
    }
    sm90::wgmma_wait_group<0>();
    shared.release_tokens(token_step + G::kParts - 1, lane);
    shared.release_weights(weight_step, lane);
  }
}

template <class G, int kUnits = 1>
__device__ __forceinline__ void multiply_width(int units, float* acc, uint32_t& block, int blocks,
                                               const Shared<G>& shared, int group, int lane, int* done) {
  constexpr int kWidth = kUnits * G::F::kTileQuantum;
  if constexpr (kWidth >= G::F::kTileN) {
    multiply<G, kWidth>(acc, block, blocks, shared, group, lane, done);
  } else {
    if (units == kUnits) {
      multiply<G, kWidth>(acc, block, blocks, shared, group, lane, done);
    } else {
      multiply_width<G, kUnits + 1>(units, acc, block, blocks, shared, group, lane, done);
    }
  }
}

template <class G>
__device__ __forceinline__ void consume(const GemmParams& p, const Shared<G>& shared, int warp, int lane) {
  using F = typename G::F;
  const int group = warp >> 2, blocks = num_blocks<G>(p);
  uint32_t block = 0;
  Tile t = {shared.tile_for_warp(0, lane)};
  int* done = nullptr;
  // NOTE: nothing may follow this loop, and nothing may leave it by break: ptxas 13.0 would then drop the register
  // budget that setmaxnreg raised, and spill.
  for (uint32_t n = 0; !t.is_end();) {
    EpilogueTile e;
    e.scale = __ldg(p.scale + t.expert());  // before the products: behind them somebody would wait for it
    e.scale_gate = G::kGather ? __ldg(p.scale_gate + t.expert()) : 0.0f;
    float acc[G::kAccumulators];
    multiply_width<G>(t.width<F>() / F::kTileQuantum, acc, block, blocks, shared, group, lane, done);
#pragma unroll
    for (int i = 0; i < G::kAccumulators; ++i) asm volatile("" : "+f"(acc[i])::"memory");
    __syncwarp();
    if (lane == 0) shared.release_tile(n);
    e.first_row = t.first_row();
    e.num_rows = t.rows();
    e.first_column = (t.m_tile() * F::kTileM + group * 64 * G::kAtoms) / (G::kGated ? 2 : 1);
    e.warp = warp & 3;
    e.lane = lane;
    e.barrier = 1 + group;
    e.staging = shared.staging + group * G::kStagingBytes;
    e.row_weight = p.row_weight;
    if constexpr (G::kOut == kBFloat16) {
      store_bfloat16<G::kAtoms, F::kTileN, G::kPassTokens, G::kPair>(acc, e, static_cast<__nv_bfloat16*>(p.out),
                                                                     p.out_columns);
    } else {
      constexpr bool kLong = G::kOut == kGelu || G::kOut == kGeglu;  // not worth having twice
      if (kLong || p.row_weight != nullptr) {
        store_activated<G::kOut, G::kAtoms, F::kTileN, G::kPassTokens, G::kPitch, G::kStagingBuffers, true>(
            acc, e, static_cast<uint8_t*>(p.out), p.out_columns);
      } else {
        store_activated<G::kOut, G::kAtoms, F::kTileN, G::kPassTokens, G::kPitch, G::kStagingBuffers, false>(
            acc, e, static_cast<uint8_t*>(p.out), p.out_columns);
      }
      if (p.ready_count > 0) {
        sm90::fence_proxy_async_global();  // product 2 reads these rows through the async proxy
        done = p.tile_ready + t.token_tile();
      }
      sm90::bar_sync(e.barrier, 128);
      if (!G::kLateRelease && p.ready_count > 0 && (threadIdx.x & 127) == 0) sm90::red_release_add(done, 1);
    }
    ++n;
    t = {shared.tile_for_warp(n, lane)};
    if constexpr (G::kLateRelease) {
      if (t.is_end() && done != nullptr && (threadIdx.x & 127) == 0) sm90::red_release_add(done, 1);
    }
  }
}

}  // namespace expertd
