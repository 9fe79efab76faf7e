// From float32 accumulators to the rows of a product's output.
//
// Accumulators of one m64nN atom, in a warp w of a warpgroup and a lane l:
//   acc[4j + {0, 1}] weight row 16 w + l / 4,      token 8 j + 2 (l % 4) + {0, 1}
//   acc[4j + {2, 3}] weight row 16 w + l / 4 + 8,  the same tokens
// The 5-D map puts up rows in the first line and the gate rows of the same features in the second.
//
// NOTE: every family runs these same expressions, with the roundings spelled out, so that all give the same bits.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "gemm.h"
#include "sm90.cuh"

namespace expertd {

// x / (1 + exp(-x)) by the two approximations of the hardware, each good to 2^-22. -inf gives NaN, as in the formula.
__device__ __forceinline__ float silu(float x) {
  const float e = sm90::ex2_approx(__fmul_rn(x, -1.4426950408889634f));
  return __fmul_rn(x, sm90::rcp_approx(__fadd_rn(1.0f, e)));
}

// x * Phi(x); erfc keeps the relative accuracy where Phi is small.
__device__ __forceinline__ float gelu(float x) {
  return __fmul_rn(__fmul_rn(0.5f, x), erfcf(__fmul_rn(x, -0.70710678118654752f)));
}

template <Output kOut>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kOut == kSwiglu) return silu(x);
  if constexpr (kOut == kGeglu || kOut == kGelu) return gelu(x);
  if constexpr (kOut == kRelu2) return x <= 0.0f ? 0.0f : __fmul_rn(x, x);  // NaN passes
  return x;
}

__device__ __forceinline__ uint32_t pack_fp8(float a, float b) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}

// The lanes that share l % 4 hold one feature each (l / 4) of 8 tokens: bytes s = 0..3 in x0 and 4..7 in x1, token
// 8 (s / 2) + 2 (l % 4) + s % 2. An 8 x 8 byte transpose over them leaves lane l with 8 features of one token,
// 8 (l / 8) + 2 (l % 4) + (l / 4) % 2, in {lo, hi}.
__device__ __forceinline__ void transpose_bytes(int lane, uint32_t x0, uint32_t x1, uint32_t& lo, uint32_t& hi) {
  const bool b2 = lane & 16, b1 = lane & 8, b0 = lane & 4;
  const uint32_t r1 = __shfl_xor_sync(0xffffffffu, b2 ? x0 : x1, 16);
  const uint32_t a = b2 ? r1 : x0, b = b2 ? x1 : r1;
  const uint32_t send = b1 ? ((a & 0xffffu) | (b << 16)) : ((a >> 16) | (b & 0xffff0000u));
  const uint32_t keep_a = b1 ? a >> 16 : a & 0xffffu, keep_b = b1 ? b >> 16 : b & 0xffffu;
  const uint32_t r2 = __shfl_xor_sync(0xffffffffu, send, 8);
  const uint32_t c = b1 ? ((r2 & 0xffffu) | (keep_a << 16)) : (keep_a | (r2 << 16));
  const uint32_t d = b1 ? ((r2 >> 16) | (keep_b << 16)) : (keep_b | (r2 & 0xffff0000u));
  const uint32_t even = __byte_perm(c, d, 0x6420), odd = __byte_perm(c, d, 0x7531), keep = b0 ? odd : even;
  const uint32_t r3 = __shfl_xor_sync(0xffffffffu, b0 ? even : odd, 4);
  const uint32_t e4 = b0 ? r3 : keep, o4 = b0 ? keep : r3;
  lo = __byte_perm(e4, o4, 0x5140);
  hi = __byte_perm(e4, o4, 0x7362);
}
__device__ __forceinline__ int transposed_token(int lane) {
  return 8 * (lane >> 3) + 2 * (lane & 3) + ((lane >> 2) & 1);
}

// What an epilogue has to know about its tile. `wg` values are those of one consumer warpgroup.
struct EpilogueTile {
  int first_row;     // row of the output of the tile's first token
  int num_rows;      // tokens of the tile
  int first_column;  // output column of the warpgroup's first atom
  int warp, lane;    // inside the warpgroup
  int barrier;       // named barrier of the warpgroup
  uint32_t staging;  // shared memory of the warpgroup
  float scale, scale_gate;
  const float* row_weight;
};

// Product 1: activation and requantisation. Atoms: 64 weight rows = 32 features where gated, 64 where not.
// NOTE: all columns of a pass are computed, also those without a token: branches between them would make each wait for
// the latency of the one before.
template <Output kOut, int kAtoms, int kTileN, int kPassTokens, int kPitch, int kBuffers, bool kWeighted>
__device__ __forceinline__ void store_activated(const float* acc, const EpilogueTile& t, uint8_t* out, int columns) {
  constexpr bool kGated = kOut == kSwiglu || kOut == kGeglu;
  constexpr int kFeatures = kGated ? 32 : 64, kChunks = kFeatures * kAtoms / 16, kGroups = kPassTokens / 8;
  const int thread = t.warp * 32 + t.lane;
#pragma unroll
  for (int pass = 0; pass < kTileN / kPassTokens; ++pass) {
    const int token0 = pass * kPassTokens;
    if (token0 >= t.num_rows || t.first_column >= columns) continue;
    const uint32_t staging = t.staging + pass % kBuffers * (kPassTokens * kPitch);
    if (kBuffers == 1) sm90::bar_sync(t.barrier, 128);  // the last pass has been read
    float weights[kGroups][2];
    if constexpr (kWeighted) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int token = token0 + g * 8 + 2 * (t.lane & 3);
        const float* w = t.row_weight + t.first_row;
        weights[g][0] = t.row_weight == nullptr ? 1.0f : __ldg(w + min(token, t.num_rows - 1));
        weights[g][1] = t.row_weight == nullptr ? 1.0f : __ldg(w + min(token + 1, t.num_rows - 1));
      }
    }
#pragma unroll
    for (int atom = 0; atom < kAtoms; ++atom) {
      uint32_t packed[2][2] = {};  // [rows 0-7 or 8-15 of the warp][token bytes]; only the first where gated
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float* a = acc + atom * (kTileN / 2) + 4 * (token0 / 8 + g);
        float v[4] = {a[0], a[1], a[2], a[3]};
        if constexpr (kWeighted) {
#pragma unroll
          for (int i = 0; i < 4; ++i) v[i] = __fmul_rn(v[i], weights[g][i & 1]);
        }
        if constexpr (kGated) {
          const float g0 = activate<kOut>(__fmul_rn(v[2], t.scale_gate));
          const float g1 = activate<kOut>(__fmul_rn(v[3], t.scale_gate));
          const uint32_t two =
              pack_fp8(__fmul_rn(g0, __fmul_rn(v[0], t.scale)), __fmul_rn(g1, __fmul_rn(v[1], t.scale)));
          packed[0][g >> 1] |= two << (16 * (g & 1));
        } else {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float g0 = activate<kOut>(__fmul_rn(v[2 * h], t.scale_gate));
            const float g1 = activate<kOut>(__fmul_rn(v[2 * h + 1], t.scale_gate));
            packed[h][g >> 1] |= pack_fp8(__fmul_rn(g0, t.scale), __fmul_rn(g1, t.scale)) << (16 * (g & 1));
          }
        }
      }
      const uint32_t line = staging + transposed_token(t.lane) * kPitch + atom * kFeatures + t.warp * (kGated ? 8 : 16);
      const bool inside = kPassTokens >= 32 || transposed_token(t.lane) < kPassTokens;
#pragma unroll
      for (int h = 0; h < (kGated ? 1 : 2); ++h) {
        uint32_t lo, hi;
        transpose_bytes(t.lane, packed[h][0], packed[h][1], lo, hi);
        if (inside) sm90::st_shared_v2(line + 8 * h, lo, hi);
      }
    }
    sm90::bar_sync(t.barrier, 128);  // with two buffers the only one of a pass: the other buffer is read meanwhile
#pragma unroll
    for (int i = thread; i < kPassTokens * kChunks; i += 128) {
      const int token = i / kChunks, chunk = i % kChunks, column = t.first_column + chunk * 16;
      if (token0 + token < t.num_rows && column < columns) {
        *reinterpret_cast<int4*>(out + static_cast<size_t>(t.first_row + token0 + token) * columns + column) =
            sm90::ld_shared_v4(staging + token * kPitch + chunk * 16);
      }
    }
  }
}

// Product 2: scale and round to bfloat16. kKeep: many rows, of which as many as fit are to stay in L2 for finalize.
template <int kAtoms, int kTileN, int kPassTokens, bool kKeep>
__device__ __forceinline__ void store_bfloat16(const float* acc, const EpilogueTile& t, __nv_bfloat16* out,
                                               int columns) {
  constexpr int kPitch = 144;  // 64 columns and 16 bytes, so that the lines of 8 tokens fall into different banks
  const int thread = t.warp * 32 + t.lane;
  [[maybe_unused]] const uint64_t policy = sm90::createpolicy_evict_last();
#pragma unroll
  for (int atom = 0; atom < kAtoms; ++atom) {
    const int column0 = t.first_column + atom * 64;
#pragma unroll
    for (int pass = 0; pass < kTileN / kPassTokens; ++pass) {
      if (pass * kPassTokens >= t.num_rows || column0 >= columns) continue;
      sm90::bar_sync(t.barrier, 128);
#pragma unroll
      for (int j = 0; j < kPassTokens / 8; ++j) {
        const float* a = acc + atom * (kTileN / 2) + 4 * (pass * (kPassTokens / 8) + j);
        const __nv_bfloat162 low = __floats2bfloat162_rn(__fmul_rn(a[0], t.scale), __fmul_rn(a[1], t.scale));
        const __nv_bfloat162 high = __floats2bfloat162_rn(__fmul_rn(a[2], t.scale), __fmul_rn(a[3], t.scale));
        // Lanes 0-7 address the lines of rows 0-7, lanes 8-15 those of rows 8-15: one 16-byte line per token.
        sm90::stmatrix_x2_trans(t.staging + (8 * j + (t.lane & 7)) * kPitch + t.warp * 32 + ((t.lane >> 3) & 1) * 16,
                                reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high));
      }
      sm90::bar_sync(t.barrier, 128);
      const int chunk = thread & 7, column = column0 + chunk * 8;
#pragma unroll
      for (int token = thread >> 3; token < kPassTokens; token += 16) {
        if (pass * kPassTokens + token < t.num_rows && column < columns) {
          const int row = t.first_row + pass * kPassTokens + token;
          __nv_bfloat16* const to = out + static_cast<size_t>(row) * columns + column;
          const int4 v = sm90::ld_shared_v4(t.staging + token * kPitch + chunk * 16);
          if constexpr (kKeep) {
            sm90::st_global_v4(to, v, policy);
          } else {
            *reinterpret_cast<int4*>(to) = v;
          }
        }
      }
    }
  }
}

}  // namespace expertd
