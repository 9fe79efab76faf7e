// What 32 lanes do together: sums that all of them get.
#pragma once

namespace expertd {

constexpr unsigned kAllLanes = 0xffffffffu;

// NOTE: xor shuffles add in one fixed order, so that a token's weights do not depend on where it runs.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v = __fadd_rn(v, __shfl_xor_sync(kAllLanes, v, mask));
  return v;
}

}  // namespace expertd
