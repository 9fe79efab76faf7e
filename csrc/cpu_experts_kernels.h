// What cpu_experts.cpp, which plans and shares out the work, asks of the other files, which are compiled for CPUs with
// AVX-512 BF16: they instantiate nothing of the standard library, which the linker could otherwise take from there for
// code that runs on every CPU.
//
// A product's activations and weights lie in tiles: [16][32] bfloat16 of a token's row each, and [16][16][2] of the
// pairs along K that 16 weight rows have. K is cut into steps of 32, its end filled up with zeros. Every element of a
// product is summed step by step in ascending order, the same whichever rows and columns are multiplied beside it.
#pragma once
#include <cstdint>

namespace expertd::cpu_experts {

using bfloat16 = uint16_t;

constexpr int kTileRows = 16;
constexpr int kStep = 32;                         // of K
constexpr int kTileElements = kTileRows * kStep;  // of a bfloat16 tile
constexpr int kBlockRows = 32;                    // weight rows that are multiplied together: two tiles
constexpr int kStepBytes = kBlockRows * kStep;    // of a block's packed FP8 weights, for one step
constexpr int kGatedColumns = kTileRows;          // of inter, from one block of a gated layer: a tile of each half
constexpr int kChunkSteps = 8;                    // whose weights, 16 KiB as bfloat16, stay in the first cache
constexpr int kMaxRowTiles = 16;                  // of one piece
constexpr int kGroupBytes = 64;                   // of packed weights that become two rows of a tile
constexpr int kTileGroups = kTileElements / kGroupBytes;

constexpr int64_t steps_of(int64_t size) { return (size + kStep - 1) / kStep; }

// What multiplies.
enum class Unit : int { kAmx, kAvx512 };

enum class Activation : int { kGelu = 0, kSwiglu = 3, kGeglu = 4, kRelu2 = 6, kIdentity = 7 };

constexpr bool is_gated(Activation activation) {
  return activation == Activation::kSwiglu || activation == Activation::kGeglu;
}

enum class OutputType : int { kBfloat16, kFloat16, kFloat32 };

// Of one thread, between products.
struct alignas(64) Scratch {
  bfloat16 weights[kChunkSteps][2][kTileElements];
  float sums[kMaxRowTiles][2][kTileRows * kTileRows];
};

// Rows of one expert.
struct Rows {
  const bfloat16* tiles;  // [num_tiles][num_steps] tiles
  int num_tiles;
  int num_rows;  // the last tile's others hold anything: nothing that is read depends on them
  int64_t num_steps;
};

struct Gemm1 {
  Unit unit;
  Rows x;
  const uint8_t* weights;   // [blocks][num_steps] packed
  const float* row_scales;  // [num_tiles * 16], of the sums
  float up_scale, gate_scale;
  Activation activation;
  int64_t intermediate_size;
  bfloat16* inter;  // [num_tiles][steps_of(intermediate_size)] tiles, the rows of gemm2
};

struct Gemm2 {
  Unit unit;
  Rows inter;
  const uint8_t* weights;
  float scale;
  int64_t hidden_size;
  bfloat16* g;  // [num_rows, hidden_size]
};

struct Finalize {
  const bfloat16* g;           // [rows, hidden_size]
  const int32_t* row_of_slot;  // [tokens, top_k], -1: none
  const bfloat16* weights;     // [tokens, top_k]; nullptr: 1
  int64_t hidden_size, top_k;
  OutputType type;
  void* out;  // [tokens, hidden_size]
};

// The calling thread's tiles, where the unit has some, and rounding mode, for as long as this exists.
class UnitUse {
 public:
  explicit UnitUse(Unit unit);
  ~UnitUse();
  UnitUse(const UnitUse&) = delete;
  UnitUse& operator=(const UnitUse&) = delete;

 private:
  Unit unit_;
  unsigned int floating_point_mode_;
};

// Tiles of the given tokens' rows of hidden_states [T, hidden_size] fp8.
void gather_rows(const uint8_t* hidden_states, int64_t hidden_size, const int32_t* tokens, int num_rows,
                 bfloat16* tiles);

// scratch.sums of all rows times one block, whose weights are packed.
void multiply_block_with_amx(const Rows& rows, const uint8_t* packed, Scratch& scratch);
void multiply_block_with_avx512(const Rows& rows, const uint8_t* packed, Scratch& scratch);

// The calling thread's tiles, without which AMX cannot multiply.
void configure_tiles();
void release_tiles();

// Blocks [first, last) of a product, with what follows it.
void run_gemm1(const Gemm1& p, int64_t first, int64_t last, Scratch& scratch);
void run_gemm2(const Gemm2& p, int64_t first, int64_t last, Scratch& scratch);

// Tokens [first, last): the sum over ascending k of weight * row of g, each product and each sum rounded to float32.
void finalize(const Finalize& p, int64_t first, int64_t last);

}  // namespace expertd::cpu_experts
