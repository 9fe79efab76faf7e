// Finalize: out[t] = sum over k of weight[t, k] * rows[row of slot (t, k)], in float32, k ascending, rounded once.
// Reading the rows is the whole cost, so a lane keeps eight 16-byte loads in flight: of eight rows where there are few
// tokens, of two rows and four times the columns where there are many.
//
// Of many tokens a slice of the experts leaves many without a local one. The first blocks write their zeros: they need
// not wait for product 2, so they run where its last wave leaves SMs idle.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "check.h"
#include "params.h"
#include "sm90.cuh"

namespace expertd {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kMostTokensPerWarp = 4, kFewestBlocks = 768;  // of the form for many tokens; three waves of blocks
constexpr unsigned kAll = 0xffffffffu;

// kStreaming: leaves its place in L2 to the rows that are still to be read.
template <bool kStreaming>
__device__ __forceinline__ void store16(void* out, const uint4& v) {
  if constexpr (kStreaming) {
    __stcs(static_cast<uint4*>(out), v);
  } else {
    *static_cast<uint4*>(out) = v;
  }
}

template <class Out, bool kStreaming>
__device__ __forceinline__ void store8(void* out, size_t i, const float (&v)[8]) {
  if constexpr (sizeof(Out) == 4) {
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      store16<kStreaming>(static_cast<float*>(out) + i + j,
                          make_uint4(__float_as_uint(v[j]), __float_as_uint(v[j + 1]), __float_as_uint(v[j + 2]),
                                     __float_as_uint(v[j + 3])));
    }
  } else {
    alignas(16) Out rounded[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) rounded[j] = static_cast<Out>(v[j]);
    store16<kStreaming>(static_cast<Out*>(out) + i, *reinterpret_cast<const uint4*>(rounded));
  }
}

// NOTE: volatile, and with the condition inside: otherwise the compiler waits for each load before it issues the next.
__device__ __forceinline__ uint4 load_if(const uint16_t* data, bool condition) {
  uint4 v = make_uint4(0, 0, 0, 0);
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
      "@p ld.global.cs.v4.b32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(data), "r"(static_cast<int>(condition)));
  return v;
}

// A warp's lanes look up the slots of tokens_per_warp tokens, slot after slot.
struct Slots {
  int row = -1;  // of product 2; negative: not a local expert's
  float weight = 1.0f;
  unsigned local;  // a bit for each lane whose slot has a row

  __device__ __forceinline__ Slots(const FinalizeParams& p, int first_token, int per_warp, int lane) {
    const size_t slot = static_cast<size_t>(first_token) * p.top_k + lane;
    if (lane < per_warp * p.top_k && slot < static_cast<size_t>(p.num_tokens) * p.top_k) {
      row = __ldcg(p.expanded_to_row + slot);
      if (p.weights != nullptr) {
        weight = __bfloat162float(__ldcg(reinterpret_cast<const __nv_bfloat16*>(p.weights) + slot));
      }
    }
    local = __ballot_sync(kAll, row >= 0);
  }
  // Those of the warp's token number i, lowest first.
  __device__ __forceinline__ unsigned of_token(const FinalizeParams& p, int i) const {
    return local & (kAll >> (32 - p.top_k)) << i * p.top_k;
  }
};

// The zeros of a warp's tokens without a local expert.
__device__ __forceinline__ void write_zeros(const FinalizeParams& p, const Slots& slots, int first_token, int tokens,
                                            int row_bytes, int lane) {
  for (int i = 0; i < p.tokens_per_warp && first_token + i < tokens; ++i) {
    if (slots.of_token(p, i) != 0) continue;
    uint8_t* const row = static_cast<uint8_t*>(p.out) + static_cast<size_t>(first_token + i) * row_bytes;
#pragma unroll 4
    for (int at = lane * 16; at < row_bytes; at += 32 * 16) store16<true>(row + at, uint4{});
  }
}

// A warp sums kChunks * 256 columns of one token after the other, kSlots rows at a time.
template <class Out, int kChunks, int kSlots>
__global__ void __launch_bounds__(kWarpsPerBlock * 32, 2) finalize_kernel(const __grid_constant__ FinalizeParams p) {
  constexpr int kColumns = kChunks * 256;
  constexpr bool kMany = kChunks > 1;
  const int per_warp = kMany ? p.tokens_per_warp : 1, zero_blocks = kMany ? p.zero_blocks : 0;
  const int lane = threadIdx.x % 32, block = static_cast<int>(blockIdx.x) - zero_blocks;
  const bool zeros = kMany && block < 0;
  const int parts = zeros ? 1 : (p.hidden_size + kColumns - 1) / kColumns;
  const int unit = (zeros ? static_cast<int>(blockIdx.x) : block) * kWarpsPerBlock + threadIdx.x / 32;
  const int first_token = unit / parts * per_warp, column = unit % parts * kColumns + lane * 8;
  // NOTE: what routing wrote is older than product 2, as for its tile list, so it is looked up while that still runs.
  const int tokens = p.num_valid == nullptr ? p.num_tokens : min(p.num_tokens, max(0, __ldcg(p.num_valid)));
  const Slots found(p, first_token, per_warp, lane);
  if (zeros) {
    // NOTE: without waiting for product 2, which does not touch `out`; what else may have was over before routing. The
    // other blocks wait, and with them the end of this kernel.
    write_zeros(p, found, first_token, tokens, p.hidden_size * static_cast<int>(sizeof(Out)), lane);
    return;
  }
  unsigned slots = found.of_token(p, 0);
  int count, rows[kSlots];
  float weights[kSlots];
  const auto pick = [&] {
    count = __popc(slots);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int slot = slots == 0 ? 0 : __ffs(slots) - 1;
      slots &= slots - 1;
      rows[i] = __shfl_sync(kAll, found.row, slot);
      weights[i] = __shfl_sync(kAll, found.weight, slot);
    }
  };
  pick();
  sm90::griddepcontrol_wait();
  sm90::griddepcontrol_launch_dependents();
#pragma unroll 1
  for (int n = 0;;) {
    const int token = first_token + n;
    if (token >= tokens) return;
    float sum[kChunks][8] = {};
    const bool written = count == 0 && zero_blocks > 0;
    while (count > 0) {
      uint4 values[kSlots][kChunks];
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const uint16_t* data = p.rows + static_cast<size_t>(rows[i]) * p.hidden_size + column;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          values[i][c] = load_if(data + c * 256, i < count && column + c * 256 < p.hidden_size);
        }
      }
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if (i >= count) break;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const uint32_t words[4] = {values[i][c].x, values[i][c].y, values[i][c].z, values[i][c].w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {  // a bfloat16 is the upper half of a float
            sum[c][2 * j] = fmaf(weights[i], __uint_as_float(words[j] << 16), sum[c][2 * j]);
            sum[c][2 * j + 1] = fmaf(weights[i], __uint_as_float(words[j] & 0xffff0000u), sum[c][2 * j + 1]);
          }
        }
      }
      if (slots == 0) break;
      pick();
    }
    if (!written) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (column + c * 256 < p.hidden_size) {
          store8<Out, kMany>(p.out, static_cast<size_t>(token) * p.hidden_size + column + c * 256, sum[c]);
        }
      }
    }
    if (++n == per_warp) return;
    slots = found.of_token(p, n);
    pick();
  }
}

long long divide_up(long long a, long long b) { return (a + b - 1) / b; }

template <class Out, int kChunks, int kSlots>
void launch(FinalizeParams p, const LaunchConfig& launch) {
  const long long parts = divide_up(p.hidden_size, kChunks * 256);
  const auto blocks = [&p](long long parts_of_row) {
    return static_cast<int>(divide_up(divide_up(p.num_tokens, p.tokens_per_warp) * parts_of_row, kWarpsPerBlock));
  };
  p.tokens_per_warp = 1;
  p.zero_blocks = 0;
  if (kChunks > 1) {
    // Then starting a warp, and a token without rows, cost next to nothing.
    while (p.tokens_per_warp < kMostTokensPerWarp && 2 * p.tokens_per_warp * p.top_k <= 32 &&
           blocks(parts) >= 2 * kFewestBlocks) {
      p.tokens_per_warp *= 2;
    }
    if (p.is_slice) p.zero_blocks = blocks(1);
  }
  check_cuda(launch_kernel(finalize_kernel<Out, kChunks, kSlots>, p.zero_blocks + blocks(parts), kWarpsPerBlock * 32, 0,
                           launch, p),
             "launching the finalize kernel");
}

template <class Out>
void launch_by_size(const FinalizeParams& p, const LaunchConfig& config) {
  // Both forms add the same numbers in the same order.
  const bool few = static_cast<long long>(p.num_tokens) * p.hidden_size < 512 * 4096;
  if (few) {
    launch<Out, 1, 8>(p, config);
  } else {
    launch<Out, 4, 2>(p, config);
  }
}

}  // namespace

void launch_finalize(const FinalizeParams& p, const LaunchConfig& launch) {
  require(p.hidden_size % 8 == 0, "hidden_size must be a multiple of 8 in finalize");
  switch (p.out_dtype) {
    case DType::kFloat32:
      return launch_by_size<float>(p, launch);
    case DType::kBFloat16:
      return launch_by_size<__nv_bfloat16>(p, launch);
    case DType::kFloat16:
      return launch_by_size<__half>(p, launch);
  }
}

}  // namespace expertd
