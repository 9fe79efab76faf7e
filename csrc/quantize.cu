// Quantise hidden states: fp8(x * scale), round to nearest even, saturating; 8 values a thread.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "check.h"
#include "params.h"
#include "sm90.cuh"

namespace expertd {
namespace {

constexpr int kThreads = 256;

template <class In>
__device__ __forceinline__ void load8(const void* x, size_t i, float (&v)[8]) {
  if constexpr (sizeof(In) == 4) {
    const float4* data = reinterpret_cast<const float4*>(static_cast<const float*>(x) + i);
    const float4 a = __ldcs(data), b = __ldcs(data + 1);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  } else {
    alignas(16) In raw[8];
    *reinterpret_cast<uint4*>(raw) = __ldcs(reinterpret_cast<const uint4*>(static_cast<const In*>(x) + i));
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = static_cast<float>(raw[j]);
  }
}

template <class In>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const __grid_constant__ QuantizeParams p) {
  sm90::griddepcontrol_wait();
  sm90::griddepcontrol_launch_dependents();
  const int tokens = p.num_valid == nullptr ? p.num_tokens : min(p.num_tokens, max(0, *p.num_valid));
  const size_t i = (static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (i >= static_cast<size_t>(tokens) * p.hidden_size) return;
  float v[8];
  load8<In>(p.x, i, v);
  uint32_t words[2] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 two = make_float2(__fmul_rn(v[2 * j], p.scale), __fmul_rn(v[2 * j + 1], p.scale));
    words[j / 2] |= static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(two, __NV_SATFINITE, __NV_E4M3)) << (16 * (j % 2));
  }
  *reinterpret_cast<uint2*>(p.out + i) = make_uint2(words[0], words[1]);
}

}  // namespace

void launch_quantize(const QuantizeParams& p, const LaunchConfig& launch) {
  require(p.hidden_size % 8 == 0, "hidden_size must be a multiple of 8 in quantize");
  const size_t values = static_cast<size_t>(p.num_tokens) * p.hidden_size;
  const int grid = static_cast<int>((values / 8 + kThreads - 1) / kThreads);
  const auto kernel = p.dtype == DType::kFloat32    ? quantize_kernel<float>
                      : p.dtype == DType::kBFloat16 ? quantize_kernel<__nv_bfloat16>
                                                    : quantize_kernel<__half>;
  check_cuda(launch_kernel(kernel, grid, kThreads, 0, launch, p), "launching the quantise kernel");
}

}  // namespace expertd
