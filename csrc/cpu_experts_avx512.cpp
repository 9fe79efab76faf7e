// Rows times weights by AVX-512 BF16: a pair along K of one row times those of 16 weight rows by one instruction.
#include <immintrin.h>

#include <cstring>

#include "cpu_experts_fp8.h"
#include "cpu_experts_kernels.h"

namespace expertd::cpu_experts {
namespace {

constexpr int kMostRows = 8;    // multiplied in one go: their sums, twice 8 registers, outlast an instruction's latency
constexpr int kGroupPairs = 2;  // along K, of a group of packed weights

// Where the bfloat16 weights of a chunk come from: the packed ones, which may be kept for the rows that follow.
enum class Weights { kExpanded, kExpandedAndKept, kKept };

inline __m512 multiply_add(__m512 sum, __m512i weights, __m512i row) {
  return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)row);
}

// kRows rows of a tile times the two tiles of a block, over some steps. Each sum takes in its pairs one by one, so that
// neither kRows nor where the steps are cut changes its bits.
template <int kRows, Weights kWeights>
void multiply_rows(const bfloat16* rows, const uint8_t* packed, bfloat16 (*kept)[2][kTileElements], int64_t steps,
                   float* sums, bool is_first) {
  __m512 totals[kRows][2];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    for (int tile = 0; tile < 2; ++tile) {
      const float* from = sums + (tile * kTileRows + row) * kTileRows;
      totals[row][tile] = is_first ? _mm512_setzero_ps() : _mm512_load_ps(from);
    }
  }
  const Expander expander;
  for (int64_t step = 0; step < steps; ++step) {
    const bfloat16* pairs = rows + step * kTileElements;
    for (int group = 0; group < kTileGroups; ++group, pairs += 2 * kGroupPairs) {
      __m512i weights[kGroupPairs][2];
#pragma GCC unroll 2
      for (int tile = 0; tile < 2; ++tile) {
        const int place = group * kGroupBytes + tile * kTileElements;
        if (kWeights == Weights::kKept) {
          weights[0][tile] = _mm512_load_si512(kept[step][0] + place);
          weights[1][tile] = _mm512_load_si512(kept[step][0] + place + kStep);
        } else {
          expander.expand_ahead(packed + step * kStepBytes + place, weights[0][tile], weights[1][tile]);
        }
        if (kWeights == Weights::kExpandedAndKept) {
          _mm512_store_si512(kept[step][0] + place, weights[0][tile]);
          _mm512_store_si512(kept[step][0] + place + kStep, weights[1][tile]);
        }
      }
#pragma GCC unroll 2
      for (int pair = 0; pair < kGroupPairs; ++pair) {
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
          int32_t both;
          std::memcpy(&both, pairs + row * kStep + 2 * pair, sizeof both);
          const __m512i row_pair = _mm512_set1_epi32(both);
          totals[row][0] = multiply_add(totals[row][0], weights[pair][0], row_pair);
          totals[row][1] = multiply_add(totals[row][1], weights[pair][1], row_pair);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    for (int tile = 0; tile < 2; ++tile)
      _mm512_store_ps(sums + (tile * kTileRows + row) * kTileRows, totals[row][tile]);
  }
}

using MultiplyRows = decltype(&multiply_rows<1, Weights::kKept>);

template <Weights kWeights>
MultiplyRows multiply_of(int num_rows) {
  static_assert(kMostRows == 8);
  constexpr MultiplyRows kMultiply[kMostRows] = {
      multiply_rows<1, kWeights>, multiply_rows<2, kWeights>, multiply_rows<3, kWeights>, multiply_rows<4, kWeights>,
      multiply_rows<5, kWeights>, multiply_rows<6, kWeights>, multiply_rows<7, kWeights>, multiply_rows<8, kWeights>};
  return kMultiply[num_rows - 1];
}

}  // namespace

void multiply_block_with_avx512(const Rows& rows, const uint8_t* packed, Scratch& scratch) {
  if (rows.num_rows <= kMostRows) {
    const auto multiply = multiply_of<Weights::kExpanded>(rows.num_rows);
    return multiply(rows.tiles, packed, nullptr, rows.num_steps, scratch.sums[0][0], true);
  }
  for (int64_t first = 0; first < rows.num_steps; first += kChunkSteps) {
    const int64_t left = rows.num_steps - first;
    const int64_t steps = left < kChunkSteps ? left : kChunkSteps;
    for (int row = 0; row < rows.num_rows;) {
      // What a tile has beyond kMostRows is shared out evenly: few rows at a time would wait for their sums.
      const int tile = row / kTileRows, at = row % kTileRows;
      const int in_tile = rows.num_rows - tile * kTileRows < kTileRows ? rows.num_rows - tile * kTileRows : kTileRows;
      const int num_rows = at == 0 && in_tile > kMostRows ? (in_tile + 1) / 2 : in_tile - at;
      const auto multiply =
          row == 0 ? multiply_of<Weights::kExpandedAndKept>(num_rows) : multiply_of<Weights::kKept>(num_rows);
      multiply(rows.tiles + (tile * rows.num_steps + first) * kTileElements + at * kStep, packed + first * kStepBytes,
               scratch.weights, steps, scratch.sums[tile][0] + at * kTileRows, first == 0);
      row += num_rows;
    }
  }
}

}  // namespace expertd::cpu_experts
