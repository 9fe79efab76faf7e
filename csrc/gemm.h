// The tile families of the grouped matrix products. All give the same bits; they differ in speed.
#pragma once
#include <array>

#include "check.h"
#include "params.h"

namespace expertd {

// What a product makes of its sums: product 1 one of the published activations and fp8, product 2 bfloat16.
enum Output : int { kGelu = 0, kSwiglu = 3, kGeglu = 4, kRelu2 = 6, kIdentity = 7, kBFloat16 = 100 };

struct GemmMaps {
  CUtensorMap weights, tokens, tokens_part;
};

// kTileM weight rows by up to kTileN tokens in steps of kTileQuantum. A stage of weights holds the rows of one
// warpgroup and kWeightBoxes * 128 bytes of K, a stage of tokens kTokenBoxes * 128. kCluster: CTAs that work on as many
// token tiles of one expert side by side; each loads its share of the weight rows, for all of them.
template <int kM, int kN, int kQuantum, int kCtas, int kWeightBoxes_, int kWeightStages_, int kTokenBoxes_,
          int kTokenStages_, int kCluster_ = 1>
struct Family {
  static constexpr int kTileM = kM, kTileN = kN, kTileQuantum = kQuantum, kCtasPerSm = kCtas, kCluster = kCluster_;
  static constexpr int kWeightBoxes = kWeightBoxes_, kWeightStages = kWeightStages_;
  static constexpr int kTokenBoxes = kTokenBoxes_, kTokenStages = kTokenStages_;
  static constexpr int kWarpgroups = kM == 64 ? 1 : 2;  // that consume
  // NOTE: a place in the ring of weights belongs to one warpgroup. Where they shared it, one would wait for a round
  // after the other's, and a barrier tells apart two rounds only.
  static_assert(kWeightStages % kWarpgroups == 0, "a warpgroup keeps its places in the ring of weights");
};

// NOTE: memory gives more when what is asked for together lies together, and when much is on its way. So a stage of
// weights is 256 or 512 consecutive bytes of each row, and few CTAs per SM have as many bytes on their way as fit.
using FamilyS16W = Family<64, 16, 8, 2, 2, 5, 2, 5>;        // one row per expert, short sums
using FamilyS16X = Family<64, 16, 8, 1, 4, 5, 4, 5>;        // up to 4, long sums
using FamilyD64W = Family<128, 64, 16, 1, 2, 8, 2, 4>;      // up to 9
using FamilyM128 = Family<128, 128, 32, 1, 2, 6, 1, 6>;     // up to 24, with short sums 40
using FamilyP160 = Family<256, 160, 16, 1, 2, 4, 1, 4>;     // up to 200: memory still sets the pace
using FamilyC160 = Family<256, 160, 16, 1, 2, 4, 1, 4, 2>;  // prefill

struct FamilyInfo {
  const char* name;
  int tile_m, tile_n, tile_quantum, warpgroups, ctas_per_sm, cluster;
  void (*launch)(Output, const GemmMaps&, const GemmParams&, int grid, const LaunchConfig&);
};

template <class F>
void launch_family(Output output, const GemmMaps& maps, const GemmParams& p, int grid, const LaunchConfig& launch);

extern template void launch_family<FamilyS16W>(Output, const GemmMaps&, const GemmParams&, int, const LaunchConfig&);
extern template void launch_family<FamilyS16X>(Output, const GemmMaps&, const GemmParams&, int, const LaunchConfig&);
extern template void launch_family<FamilyD64W>(Output, const GemmMaps&, const GemmParams&, int, const LaunchConfig&);
extern template void launch_family<FamilyM128>(Output, const GemmMaps&, const GemmParams&, int, const LaunchConfig&);
extern template void launch_family<FamilyP160>(Output, const GemmMaps&, const GemmParams&, int, const LaunchConfig&);
extern template void launch_family<FamilyC160>(Output, const GemmMaps&, const GemmParams&, int, const LaunchConfig&);

template <class F>
constexpr FamilyInfo family_info(const char* name) {
  return {name, F::kTileM, F::kTileN, F::kTileQuantum, F::kWarpgroups, F::kCtasPerSm, F::kCluster, &launch_family<F>};
}

inline const auto& families() {
  static const std::array table = {
      family_info<FamilyS16W>("s16w"), family_info<FamilyS16X>("s16x"), family_info<FamilyD64W>("d64w"),
      family_info<FamilyM128>("m128"), family_info<FamilyP160>("p160"), family_info<FamilyC160>("c160"),
  };
  return table;
}

}  // namespace expertd
