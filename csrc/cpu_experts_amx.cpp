// Rows times weights by AMX: 16 rows times 16 weight rows times 32 of K by one instruction.
#include <immintrin.h>

#include "cpu_experts_fp8.h"
#include "cpu_experts_kernels.h"

namespace expertd::cpu_experts {
namespace {

// One step of a block: two tiles.
inline void expand_step(const Expander& expander, const uint8_t* packed, bfloat16* tiles) {
#pragma GCC unroll 4
  for (int group = 0; group < kStepBytes / kGroupBytes; ++group) {
    __m512i first, last;
    expander.expand_ahead(packed + group * kGroupBytes, first, last);
    _mm512_store_si512(tiles + group * kGroupBytes, first);
    _mm512_store_si512(tiles + group * kGroupBytes + kStep, last);
  }
}

// ---- Tiles: 0 to 3 hold sums, 4 and 5 activations, 6 and 7 weights ----

// NOTE: not the compiler's own intrinsics: some do not say that they read memory, and stores were moved behind them.
#define TILE_LOAD(tile, base) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(base), "r"(int64_t{kGroupBytes}) : "memory")
#define TILE_STORE(tile, base) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(base), "r"(int64_t{kGroupBytes}) : "memory")
#define TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile::: "memory")
#define TILE_MULTIPLY(sums, rows, weights) \
  asm volatile("tdpbf16ps %%tmm" #weights ", %%tmm" #rows ", %%tmm" #sums::: "memory")

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// One or two tiles of rows times the two of a block, over the steps of a chunk. Where kExpand, the chunk's weights are
// turned into bfloat16 on the way, a step ahead of the product, so that the vector and the matrix unit work together.
template <bool kTwo, bool kExpand>
void multiply_chunk(const bfloat16* rows, int64_t row_tile_stride, const uint8_t* packed,
                    bfloat16 (*weights)[2][kTileElements], int steps, float (*sums)[2][kTileRows * kTileRows],
                    bool is_first) {
  if (is_first) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  } else {
    TILE_LOAD(0, sums[0][0]);
    TILE_LOAD(1, sums[0][1]);
    if (kTwo) {
      TILE_LOAD(2, sums[1][0]);
      TILE_LOAD(3, sums[1][1]);
    }
  }
  const Expander expander;
  if (kExpand) expand_step(expander, packed, weights[0][0]);
  for (int step = 0; step < steps; ++step) {
    if (kExpand && step + 1 < steps) expand_step(expander, packed + (step + 1) * kStepBytes, weights[step + 1][0]);
    const bfloat16* row_tile = rows + step * kTileElements;
    TILE_LOAD(4, row_tile);
    TILE_LOAD(6, weights[step][0]);
    TILE_MULTIPLY(0, 4, 6);
    TILE_LOAD(7, weights[step][1]);
    TILE_MULTIPLY(1, 4, 7);
    if (kTwo) {
      TILE_LOAD(5, row_tile + row_tile_stride);
      TILE_MULTIPLY(2, 5, 6);
      TILE_MULTIPLY(3, 5, 7);
    }
  }
  TILE_STORE(0, sums[0][0]);
  TILE_STORE(1, sums[0][1]);
  if (kTwo) {
    TILE_STORE(2, sums[1][0]);
    TILE_STORE(3, sums[1][1]);
  }
}

}  // namespace

void multiply_block_with_amx(const Rows& rows, const uint8_t* packed, Scratch& scratch) {
  constexpr decltype(&multiply_chunk<true, true>) kMultiply[2][2] = {
      {multiply_chunk<false, false>, multiply_chunk<false, true>},
      {multiply_chunk<true, false>, multiply_chunk<true, true>},
  };
  const int64_t row_tile_stride = rows.num_steps * kTileElements;
  for (int64_t first = 0; first < rows.num_steps; first += kChunkSteps) {
    const int64_t left = rows.num_steps - first;
    const int steps = left < kChunkSteps ? static_cast<int>(left) : kChunkSteps;
    for (int tile = 0; tile < rows.num_tiles; tile += 2) {
      const auto multiply = kMultiply[tile + 1 < rows.num_tiles][tile == 0];
      multiply(rows.tiles + tile * row_tile_stride + first * kTileElements, row_tile_stride,
               packed + first * kStepBytes, scratch.weights, steps, scratch.sums + tile, first == 0);
    }
  }
}

void configure_tiles() {
  const TileConfig config;
  asm volatile("ldtilecfg %0" ::"m"(config));
}

void release_tiles() { asm volatile("tilerelease" ::: "memory"); }

}  // namespace expertd::cpu_experts
