// Which tiles there are, and who gets which: a list from routing, a counter, and a queue of two slots in each CTA.
#pragma once
#include "gemm_shared.cuh"
#include "params.h"
#include "sm90.cuh"

namespace expertd {

// In the first word of a tile: no other cluster works on its expert in this pass, so its weights are read once.
constexpr int kReadOnce = 1 << 30;

// A tile of the product, as it travels through shared memory: {row tile | expert << 16 | kReadOnce or 0, token tile,
// first row, rows}.
struct Tile {
  int4 v;
  __device__ __forceinline__ bool is_end() const { return v.x < 0; }
  __device__ __forceinline__ int m_tile() const { return v.x & 0xffff; }
  __device__ __forceinline__ int expert() const { return (v.x & ~kReadOnce) >> 16; }
  __device__ __forceinline__ bool read_once() const { return (v.x & kReadOnce) != 0; }
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
// near_index: q / m_tiles * kCluster, the index of some token tile of the same block.
// NOTE: product 1's first look comes while anything may lie where the list will be, so no index is believed.
template <int kCluster>
__device__ __forceinline__ Tiles<kCluster> find_tiles(const GemmParams& p, int q, int near_index, int m_tiles) {
  Tiles<kCluster> found;
  const TokenTile near = __ldcg(p.tiles + min(near_index, p.max_token_tiles - 1));
  if (near_index >= __ldcg(&p.schedule->num_token_tiles)) {
#pragma unroll
    for (int i = 0; i < kCluster; ++i) found.of[i] = {kEndTile};
    return found;
  }
  const int in_block = max((near.x >> 16) / kCluster, 1), local = q - near.w / kCluster * m_tiles;
  if (kCluster == 1 && in_block == 1) {
    found.of[0] = {{local | near.x << 16 | kReadOnce, near.w, near.y, near.z}};
    return found;
  }
  const int once = in_block == 1 ? kReadOnce : 0;
  const int index = min(max(near.w + local % in_block * kCluster, 0), p.max_token_tiles - kCluster);
#pragma unroll
  for (int i = 0; i < kCluster; ++i) {
    const TokenTile own = __ldcg(p.tiles + index + i);
    found.of[i] = {{local / in_block | own.x << 16 | once, index + i, own.y, own.z}};
  }
  return found;
}

// One thread of a cluster picks the tiles and hands them to everybody through two slots in each CTA.
template <class G>
struct TileQueue {
  using Found = Tiles<G::kCluster>;
  const GemmParams& p;
  const Shared<G>& shared;
  int next = blockIdx.x / G::kCluster;

  __device__ __forceinline__ TileQueue(const GemmParams& p, const Shared<G>& shared) : p(p), shared(shared) {}
  __device__ __forceinline__ int near_index() const { return next / num_m_tiles<G>(p) * G::kCluster; }
  __device__ __forceinline__ Found load(int near) const {
    return find_tiles<G::kCluster>(p, next, near, num_m_tiles<G>(p));
  }
  __device__ __forceinline__ Found load() const { return load(near_index()); }
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

}  // namespace expertd
