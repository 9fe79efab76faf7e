// Tensor maps of the operands. All are fp8 read as bytes, in boxes of 128 bytes of K with the 128-byte swizzle.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "check.h"

namespace expertd {

// The driver's encoder, looked up through the runtime: the module then needs no libcuda to be imported.
inline auto tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
               "looking up cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
      throw std::runtime_error(
          "the NVIDIA driver has no cuTensorMapEncodeTiled: update it to one for CUDA 12 or newer");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  return encoder;
}

// How much of a line and its neighbours L2 fetches when some of it is asked for. Whole neighbours gain up to 0.6 % on
// an H100 and cost an H200, whose memory is half again as fast, 9 %: weights come at 4.05 in place of 4.45 TB/s there.
inline CUtensorMapL2promotion promotion_for(const void* data) {
  cudaPointerAttributes where{};
  int clock_khz = 0, bus_bits = 0;
  check_cuda(cudaPointerGetAttributes(&where, data), "asking where a tensor-map operand lies");
  check_cuda(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrMemoryClockRate, where.device), "asking for a memory clock");
  check_cuda(cudaDeviceGetAttribute(&bus_bits, cudaDevAttrGlobalMemoryBusWidth, where.device),
             "asking for a bus width");
  constexpr double kFastGbs = 4000;  // 3350 of an H100 80GB, 4800 of an H200
  const double gbs = 2.0 * clock_khz * 1e3 * bus_bits / 8 / 1e9;
  return gbs > kFastGbs ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
}

inline void encode(CUtensorMap* map, void* data, int rank, const cuuint64_t* dims, const cuuint64_t* strides,
                   const cuuint32_t* box) {
  require(reinterpret_cast<uintptr_t>(data) % 16 == 0, "a tensor-map operand must start on a 16-byte boundary");
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const CUresult status =
      tensor_map_encoder()(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, rank, data, dims, strides, box, element_strides,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, promotion_for(data),
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with CUresult " + std::to_string(status));
  }
}

// [experts, rows, k]: a box is box_rows rows of one expert; rows past the expert's last are filled with zeros.
inline void encode_weight_rows(CUtensorMap* map, void* data, uint64_t experts, uint64_t rows, uint64_t k,
                               uint32_t box_rows) {
  const cuuint64_t dims[3] = {k, rows, experts}, strides[2] = {k, k * rows};
  const cuuint32_t box[3] = {128, box_rows, 1};
  encode(map, data, 3, dims, strides, box);
}

// [experts, 2 * inter, k], up rows before gate rows, read as {k, 8, half, inter / 8, experts}: a box lands in shared
// memory as 8 up rows, 8 gate rows, 8 up rows ..., so that one thread's accumulators hold both halves of a feature.
inline void encode_gate_up(CUtensorMap* map, void* data, uint64_t experts, uint64_t inter, uint64_t k,
                           uint32_t box_rows) {
  const cuuint64_t dims[5] = {k, 8, 2, inter / 8, experts};
  const cuuint64_t strides[4] = {k, inter * k, 8 * k, 2 * inter * k};  // NOTE: not monotonic, which is legal
  const cuuint32_t box[5] = {128, 8, 2, box_rows / 16, 1};
  encode(map, data, 5, dims, strides, box);
}

// [rows, k]: a box is box_rows consecutive rows.
inline void encode_rows(CUtensorMap* map, void* data, uint64_t rows, uint64_t k, uint32_t box_rows) {
  const cuuint64_t dims[2] = {k, rows}, strides[1] = {k};
  const cuuint32_t box[2] = {128, box_rows};
  encode(map, data, 2, dims, strides, box);
}

}  // namespace expertd
