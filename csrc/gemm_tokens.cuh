// The producers of tokens: product 2 copies rows that lie side by side, product 1 gathers them.
#pragma once
#include "gemm_shared.cuh"
#include "gemm_tiles.cuh"
#include "params.h"
#include "sm90.cuh"

namespace expertd {

// Product 2, tokens: the rows of a tile lie side by side. In one thread of another warp: one thread alone cannot issue
// both operands' copies as fast as memory delivers them.
// NOTE: waits for the rows of its own tile, not for the whole of product 1. That cannot deadlock: this kernel's CTAs
// get a place only once all of product 1's have one.
template <class G>
__device__ __forceinline__ void produce_tokens(const GemmParams& p, const Shared<G>& shared, const CUtensorMap* map,
                                               const CUtensorMap* map_part) {
  using F = typename G::F;
  const uint64_t policy = sm90::createpolicy_evict_last();
  const int steps = num_blocks<G>(p) * G::kParts;
  sm90::griddepcontrol_launch_dependents();
  uint32_t step = 0;
  int ready_tile = -1;
  if (p.ready_count == 0) {
    sm90::griddepcontrol_wait();
    sm90::fence_proxy_async_global();
  }
  for (uint32_t n = 0;; ++n) {
    const Tile t = {shared.tile(n)};
    if (t.is_end()) break;
    shared.release_tile(n);
    if (p.ready_count > 0 && t.token_tile() != ready_tile) {
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
      sm90::mbarrier_arrive_expect_tx(full, F::kTokenBoxes * width * kBoxK);
#pragma unroll
      for (int box = 0; box < F::kTokenBoxes; ++box) {
        const uint32_t dst = shared.tokens.stage(step) + box * G::kTokenBox;
        const int k = ks * G::kTokenK + box * kBoxK;
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
  const int steps = num_blocks<G>(p) * G::kParts;
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
      for (int box = 0; box < F::kTokenBoxes; ++box) {
        // Past the end of K both operands must be true zeros: the other one may hold anything, and 0 * NaN is NaN.
        const int k = ks * G::kTokenK + box * kBoxK;
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

}  // namespace expertd
