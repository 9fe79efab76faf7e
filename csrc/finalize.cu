// Finalize: out[t] = sum over k of weight[t, k] * rows[row of slot (t, k)], in float32, k ascending, rounded once.
// Reading the rows is the whole cost, so a lane keeps eight 16-byte loads in flight: of eight rows where there are few
// tokens, of two rows and four times the columns where there are many.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "check.h"
#include "params.h"
#include "sm90.cuh"

namespace expertd {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr unsigned kAll = 0xffffffffu;

template <class Out>
__device__ __forceinline__ void store8(void* out, size_t i, const float (&v)[8]) {
  if constexpr (sizeof(Out) == 4) {
    float4* o = reinterpret_cast<float4*>(static_cast<float*>(out) + i);
    o[0] = make_float4(v[0], v[1], v[2], v[3]);
    o[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    alignas(16) Out rounded[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) rounded[j] = static_cast<Out>(v[j]);
    *reinterpret_cast<uint4*>(static_cast<Out*>(out) + i) = *reinterpret_cast<const uint4*>(rounded);
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

// A warp sums kChunks * 256 columns of one token, kSlots rows at a time.
template <class Out, int kChunks, int kSlots>
__global__ void __launch_bounds__(kWarpsPerBlock * 32, 2) finalize_kernel(const __grid_constant__ FinalizeParams p) {
  constexpr int kColumns = kChunks * 256;
  const int lane = threadIdx.x % 32;
  const int parts = (p.hidden_size + kColumns - 1) / kColumns;
  const int unit = blockIdx.x * kWarpsPerBlock + threadIdx.x / 32;
  const int token = unit / parts, column = unit % parts * kColumns + lane * 8;
  // NOTE: what routing wrote is older than product 2, as for its tile list, so it is looked up while that still runs.
  const int tokens = p.num_valid == nullptr ? p.num_tokens : min(p.num_tokens, max(0, __ldcg(p.num_valid)));
  int my_row = -1;
  float my_weight = 1.0f;
  if (token < p.num_tokens && lane < p.top_k) {
    const size_t slot = static_cast<size_t>(token) * p.top_k + lane;
    my_row = __ldcg(p.expanded_to_row + slot);
    if (p.weights != nullptr) {
      my_weight = __bfloat162float(__ldcg(reinterpret_cast<const __nv_bfloat16*>(p.weights) + slot));
    }
  }
  unsigned slots = __ballot_sync(kAll, my_row >= 0);  // of local experts, lowest first
  int count, rows[kSlots];
  float weights[kSlots];
  const auto pick = [&] {
    count = __popc(slots);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int slot = slots == 0 ? 0 : __ffs(slots) - 1;
      slots &= slots - 1;
      rows[i] = __shfl_sync(kAll, my_row, slot);
      weights[i] = __shfl_sync(kAll, my_weight, slot);
    }
  };
  pick();
  sm90::griddepcontrol_wait();
  sm90::griddepcontrol_launch_dependents();
  if (token >= tokens) return;
  float sum[kChunks][8] = {};
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
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (column + c * 256 < p.hidden_size) {
      store8<Out>(p.out, static_cast<size_t>(token) * p.hidden_size + column + c * 256, sum[c]);
    }
  }
}

template <class Out, int kChunks, int kSlots>
void launch(const FinalizeParams& p, const LaunchConfig& launch) {
  const long long parts = (p.hidden_size + kChunks * 256 - 1) / (kChunks * 256);
  const int grid = static_cast<int>((p.num_tokens * parts + kWarpsPerBlock - 1) / kWarpsPerBlock);
  check_cuda(launch_kernel(finalize_kernel<Out, kChunks, kSlots>, grid, kWarpsPerBlock * 32, 0, launch, p),
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
