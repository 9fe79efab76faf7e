// Finalize: out[t] = sum over k of weight[t, k] * rows[row of slot (t, k)], in float32, k ascending, rounded once.
// A warp sums 256 columns of one token, 16 bytes a lane, up to eight rows in flight: reading the rows is the whole cost.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "check.h"
#include "params.h"
#include "sm90.cuh"

namespace expertd {
namespace {

constexpr int kWarpsPerBlock = 8, kColumns = 256, kInFlight = 8;
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

template <class Out>
__global__ void __launch_bounds__(kWarpsPerBlock * 32) finalize_kernel(const __grid_constant__ FinalizeParams p) {
  const int lane = threadIdx.x % 32;
  const int chunks = (p.hidden_size + kColumns - 1) / kColumns;
  const int unit = blockIdx.x * kWarpsPerBlock + threadIdx.x / 32;
  const int token = unit / chunks, column = unit % chunks * kColumns + lane * 8;
  sm90::griddepcontrol_wait();
  sm90::griddepcontrol_launch_dependents();
  const int tokens = p.num_valid == nullptr ? p.num_tokens : min(p.num_tokens, *p.num_valid);
  if (token >= tokens) return;
  int my_row = -1;
  float my_weight = 1.0f;
  if (lane < p.top_k) {
    const size_t slot = static_cast<size_t>(token) * p.top_k + lane;
    my_row = __ldcg(p.expanded_to_row + slot);
    if (p.weights != nullptr) my_weight = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(p.weights)[slot]);
  }
  const bool inside = column < p.hidden_size;
  float sum[8] = {};
  for (int k0 = 0; k0 < p.top_k; k0 += kInFlight) {
    uint4 values[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int row = __shfl_sync(kAll, my_row, (k0 + i) & 31);
      if (k0 + i < p.top_k && row >= 0 && inside) {
        values[i] = __ldcs(reinterpret_cast<const uint4*>(p.rows + static_cast<size_t>(row) * p.hidden_size + column));
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int row = __shfl_sync(kAll, my_row, (k0 + i) & 31);
      const float weight = __shfl_sync(kAll, my_weight, (k0 + i) & 31);
      if (k0 + i < p.top_k && row >= 0 && inside) {
        const uint32_t words[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // a bfloat16 is the upper half of a float
          sum[2 * j] = fmaf(weight, __uint_as_float(words[j] << 16), sum[2 * j]);
          sum[2 * j + 1] = fmaf(weight, __uint_as_float(words[j] & 0xffff0000u), sum[2 * j + 1]);
        }
      }
    }
  }
  if (inside) store8<Out>(p.out, static_cast<size_t>(token) * p.hidden_size + column, sum);
}

}  // namespace

void launch_finalize(const FinalizeParams& p, const LaunchConfig& launch) {
  require(p.hidden_size % 8 == 0, "hidden_size must be a multiple of 8 in finalize");
  const long long units = static_cast<long long>(p.num_tokens) * ((p.hidden_size + kColumns - 1) / kColumns);
  const int grid = static_cast<int>((units + kWarpsPerBlock - 1) / kWarpsPerBlock);
  const auto kernel = p.out_dtype == DType::kFloat32    ? finalize_kernel<float>
                      : p.out_dtype == DType::kBFloat16 ? finalize_kernel<__nv_bfloat16>
                                                        : finalize_kernel<__half>;
  check_cuda(launch_kernel(kernel, grid, kWarpsPerBlock * 32, 0, launch, p), "launching the finalize kernel");
}

}  // namespace expertd
