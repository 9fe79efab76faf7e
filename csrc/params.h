// One plain struct per kernel. T tokens, H hidden size, I intermediate size, E experts, L local experts, K top_k,
// R rows = expanded (token, local expert) pairs, grouped by local expert in ascending id, by token inside an expert.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace expertd {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Most tokens that one routing block handles, where there are many: one bit each in the words of an expert.
constexpr int kRouteBlockTokens = 128;
// Of many tokens: as many blocks as SMs, about, but a token for each warp at least; fewer blocks are sooner added up.
constexpr int kManyBlocks = 128, kMinBlockTokens = 16;
constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;

// What routing tells the matrix products. A token tile is up to tile_n consecutive rows of one expert.
struct Schedule {
  int num_token_tiles;
  int num_rows;
  int next_tile[2];  // dynamic tile counters of the two products, zeroed by routing
};

// Token tile: {expert | tiles_in_block << 16, first row, rows, first tile of the block}.
// Blocks group the token tiles of one expert that share a pass over its weights.
using TokenTile = int4;

struct RouteParams {
  const void* logits;  // [T, E] float32 or bfloat16; null: pre-routed
  DType logits_dtype;
  const void* bias;  // [E] or null
  DType bias_dtype;
  const int* in_ids;       // [T, K] pre-routed global ids, -1 = empty; null: from logits
  const void* in_weights;  // [T, K] float32 or bfloat16
  DType in_weights_dtype;
  const int* num_valid;  // device scalar or null: tokens at or past it are left alone
  int num_tokens, num_experts, top_k, local_offset, num_local;
  // The launcher sets these. The inverses: ceil(2^32 / divisor), 0 for 1, because a division takes ten times as long as
  // a product; exact where the dividend times the divisor is below 2^32.
  int block_tokens;       // tokens of a block
  int warps_ahead;        // of many tokens, four in a warp: so many warps' logits are on their way at a time
  uint32_t early_stride;  // of an expert's weights, from what one block asks for to the next one's
  uint32_t top_k_inverse, tile_n_inverse, tile_quantum_inverse, tiles_per_block_inverse, num_tokens_inverse;
  int method, n_group, topk_group;
  float routed_scaling_factor;
  bool norm_topk_prob;
  // The token tiles: at most tile_n rows each, cut in multiples of tile_quantum, tiles_per_block of them side by side,
  // a multiple of cluster of them for each expert; the last ones may be empty.
  int tile_n, tile_quantum, tiles_per_block, cluster;
  int* topk_ids;           // [T, K]
  uint16_t* topk_weights;  // [T, K] bfloat16
  int16_t* replay;         // [T, K] or null
  uint8_t* counts;         // [max_route_blocks(T) / 16, L, 16] how many tokens of each block chose an expert
  int* expanded_to_row;    // [T * K]
  int* row_token;          // [R]
  float* row_weight;       // [R] or null: routing weight per row
  Schedule* schedule;
  TokenTile* tiles;
  int* tile_ready;  // zeroed for each tile
  // Up to early_blocks blocks beside the one that routes a handful of tokens each bring early_bytes of product 1's
  // weights into L2, of experts that will be chosen. 0: none.
  const uint8_t* weights;  // [L, expert_bytes]
  size_t expert_bytes;
  int early_blocks, early_bytes;
};

struct FinalizeParams {
  const uint16_t* rows;        // [R, H] bfloat16
  const int* expanded_to_row;  // [T * K]
  const uint16_t* weights;     // [T, K] bfloat16; null: weight 1
  const int* num_valid;        // device scalar or null
  void* out;                   // [T, H]
  DType out_dtype;
  int num_tokens, hidden_size, top_k;
  bool is_slice;  // not all experts are local, so many tokens may have none
  // The launcher sets these.
  int tokens_per_warp, zero_blocks;
};

struct GemmParams {
  const uint8_t* x;         // gather: [T, H] fp8; otherwise unused (read through the tensor map)
  const int* row_token;     // gather: [R]
  const float* row_weight;  // [R] or null: multiplies the accumulators (routing scales on input)
  const float* scale_gate;  // [L] product 1 only
  const float* scale;   // [L] product 1: scale of the up half, or of the activation where not gated; product 2: of g
  void* out;            // product 1: [R, I] fp8; product 2: [R, H] bfloat16
  int out_columns;      // I or H
  int k;                // length of the sums: H or I
  int weight_rows;      // rows of one expert's weights: M or H
  int max_token_tiles;  // room in tiles
  int* tile_ready;      // product 1 adds to a token tile's count as it finishes; product 2 waits for ready_count
  int ready_count;      // 0: no counting, product 2 waits for the whole of product 1
  Schedule* schedule;
  const TokenTile* tiles;
  // Product 1: token tiles of each expert if all are equally chosen, 0: too few tokens for a guess. What the guess says
  // is brought into L2 while routing still runs.
  int likely_token_tiles;
  int num_experts;  // L
};

struct QuantizeParams {
  const void* x;  // [T, H]
  DType dtype;
  float scale;
  const int* num_valid;
  uint8_t* out;  // [T, H] fp8
  int num_tokens, hidden_size;
};

struct LaunchConfig {
  cudaStream_t stream;
  bool pdl;
  int cluster = 1;
  bool shared_memory_next = false;  // the next kernel needs most of the shared memory, and starts beside this one
};

int max_route_blocks(int num_tokens);  // of calls of up to num_tokens tokens
void launch_route(RouteParams p, const LaunchConfig& launch);
void launch_finalize(const FinalizeParams& p, const LaunchConfig& launch);
void launch_quantize(const QuantizeParams& p, const LaunchConfig& launch);

// Launches one kernel: in clusters of launch.cluster blocks, and with the attribute for programmatic dependent launch
// where asked.
// NOTE: how much of an SM's memory is shared memory changes only while nothing runs there. So a kernel that is on all
// SMs would keep out the next one, if that needs more.
template <class Kernel, class... Args>
cudaError_t launch_kernel(Kernel kernel, int grid, int block, int smem, const LaunchConfig& launch,
                          const Args&... args) {
  cudaLaunchAttribute attributes[3] = {};
  int count = 0;
  if (launch.pdl) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (launch.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = launch.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (launch.shared_memory_next) {
    attributes[count].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attributes[count++].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = smem;
  config.stream = launch.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace expertd
