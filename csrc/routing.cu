// Routing: logits (or ready ids) -> ids, weights, and the permutation that groups (token, expert) pairs by local
// expert.
//
// A block owns up to 64 tokens (128 where there are many), a warp one token at a time, or four of many. Each block
// keeps a word of bits per local expert: bit t is set where its token t chose the expert. A token's place among the
// rows of an expert is then a prefix of counts plus a popcount: no sort, no order of arrival, the same rows in every
// run.
//
// Few tokens: one launch, the blocks are a cluster and send each other their counts. Many: the blocks leave their
// counts in memory, a second launch adds them up.
#include <algorithm>

#include "check.h"
#include "params.h"
#include "permute.cuh"
#include "permute_many.cuh"
#include "route_few.cuh"
#include "route_four.cuh"
#include "route_near.cuh"
#include "route_token.cuh"
#include "sm90.cuh"
#include "warp.cuh"

namespace expertd {
namespace {

constexpr int kMinWarps = 8;
constexpr int kMaxClusterBlocks = 8;

// How blocks learn of each other's tokens: they are a cluster; through memory and a second launch.
enum Way { kCluster, kMany };

// Up to how many tokens one launch is faster: more experts are more to compute, and a cluster has eight SMs only.
constexpr int cluster_tokens(int num_experts) { return num_experts <= 256 ? 256 : 128; }

// Up to how many tokens one block is faster than a cluster.
constexpr int one_block_tokens(int num_experts) { return num_experts <= 128 ? 16 : num_experts <= 256 ? 8 : 0; }

// Warps of a block, at most: 32 where the registers allow it.
template <int kPer>
constexpr int kMaxWarps = kPer <= 8 ? 32 : 16;

// Whether there are registers to hold the bias from the start.
template <int kPer>
constexpr bool kBiasEarly = kPer <= 16;

// Shared memory, by way.
template <Way kWay>
struct WaySmem {
  alignas(16) uint32_t bitmaps[kMaxExperts][kRouteBlockTokens / 32];  // as RouteSmem
};
template <>
struct WaySmem<kCluster> : RouteSmem {
  alignas(16) uint8_t sent[kMaxClusterBlocks][kMaxExperts];  // counts of each block of the cluster
  alignas(8) uint64_t all_sent;
};

// ---- kernels

// What is said of slot k of the block's token t: its expert, and its weight.
__device__ __forceinline__ void write_slot(const RouteParams& p, const Share& share, int t, int k, int id,
                                           float weight) {
  const size_t slot = static_cast<size_t>(share.first_token + t) * p.top_k + k;
  p.topk_ids[slot] = id;
  reinterpret_cast<__nv_bfloat16*>(p.topk_weights)[slot] = __float2bfloat16_rn(weight);
  if (p.replay != nullptr) p.replay[slot] = static_cast<int16_t>(id);
}

// A token whose slots are known, and not yet written.
struct Unwritten {
  int t;  // of the block; -1: none
  Slot slot;
};

template <Score kScore>
__device__ __forceinline__ void write_slots(const RouteParams& p, const Share& share, const Unwritten& token,
                                            int lane) {
  if (token.t < 0) return;
  const float weight = slot_weight<kScore, 32>(p, token.slot.value, lane < p.top_k);
  if (lane < p.top_k) write_slot(p, share, token.t, lane, token.slot.id, weight);
}

// The tokens of a warp. values, bias: its first token's logits, and of a cluster the bias if `kBiasEarly`, already
// asked for. Returns a token whose slots the caller has to write: of a cluster the last one, so that other blocks hear
// of its experts before.
template <Score kScore, int kPer, Way kWay>
__device__ __forceinline__ Unwritten route_tokens(const RouteParams& p, WaySmem<kWay>& smem, ListSmem* list,
                                                  const Share& share, float (&values)[kPer], float (&bias)[kPer],
                                                  uint32_t* memory) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  constexpr bool kAhead = kWay == kMany && kPer <= 8;  // a token's logits come while the one before is routed
  Unwritten last = {-1, {}};
#pragma unroll 1
  for (int t = warp; t < share.num_tokens; t += warps) {
    const int token = share.first_token + t;
    const auto tell = [&](int k, int id) {
      if (k < 0) return;
      if constexpr (kWay == kCluster) {
        const int local = id - p.local_offset;
        smem.ids[t * p.top_k + k] = static_cast<unsigned>(local) < static_cast<unsigned>(p.num_local) ? local : -1;
      }
      mark_expert(p, smem.bitmaps, t, id);
    };
    if (p.logits == nullptr) {
      if (lane >= p.top_k) continue;
      const size_t slot = static_cast<size_t>(token) * p.top_k + lane;
      const int id = p.in_ids[slot];
      tell(lane, id);
      write_slot(p, share, t, lane, id, load_float(p.in_weights, p.in_weights_dtype, slot));
      continue;
    }
    if constexpr (kAhead) {
      float next[kPer];
      load_logits<kPer>(p, share.first_token + min(t + warps, share.num_tokens - 1), lane, next);
      load_bias<kScore, kPer>(p, lane, bias);
      last = {t, route_logits<kScore, kPer, true>(p, token, values, bias, memory, list, lane, tell)};
#pragma unroll
      for (int i = 0; i < kPer; ++i) values[i] = next[i];
    } else {
      if (t != warp) {
        if constexpr (kWay == kCluster) write_slots<kScore>(p, share, last, lane);
        load_logits<kPer>(p, token, lane, values);
      }
      if constexpr (kWay == kMany || !kBiasEarly<kPer>) load_bias<kScore, kPer>(p, lane, bias);
      last = {t, route_logits<kScore, kPer>(p, token, values, bias, memory, list, lane, tell)};
    }
    if constexpr (kWay == kMany) write_slots<kScore>(p, share, last, lane);
  }
  return last;
}

// How many rows of each expert the block has, to every other block of the cluster. Each warp sends what it has counted.
__device__ __forceinline__ void send_counts(const RouteParams& p, WaySmem<kCluster>& smem, const Share& share) {
  const int lane = threadIdx.x % 32, peer = lane / 2, chunk = lane % 2 * 16;
  uint8_t* own = smem.sent[share.block];
  __syncthreads();
  if (share.num_blocks > 1) sm90::cluster_wait();  // the others' barriers are set up
  for (int first = threadIdx.x - lane; first < p.num_local; first += blockDim.x) {
    if (first + lane < p.num_local) own[first + lane] = smem.count(first + lane);
    __syncwarp();
    if (peer < share.num_blocks && peer != share.block && first + chunk < p.num_local) {
      uint8_t* counts = own + first + chunk;
      sm90::st_async_v4(sm90::smem_address(counts), *reinterpret_cast<const int4*>(counts),
                        sm90::smem_address(&smem.all_sent), peer);
    }
  }
  if (p.num_local > static_cast<int>(blockDim.x)) __syncthreads();  // else who has counted an expert reads it again
}

// Rows of an expert in earlier blocks, and in all, from what every block of the cluster has sent.
__device__ __forceinline__ ExpertRows rows_of_cluster(const WaySmem<kCluster>& smem, const Share& share, int e) {
  ExpertRows rows = {0, 0};
#pragma unroll
  for (int b = 0; b < kMaxClusterBlocks; ++b) {
    const int count = b < share.num_blocks ? smem.sent[b][e] : 0;
    rows.before += b < share.block ? count : 0;
    rows.total += count;
  }
  return rows;
}

template <Score kScore, int kPer, Way kWay>
__global__ void __launch_bounds__(kMaxWarps<kPer> * 32, 1) route_kernel(const __grid_constant__ RouteParams p) {
  __shared__ WaySmem<kWay> smem;
  __shared__ ListSmem lists[kMayList<kPer> ? kMaxWarps<kPer> : 1];
  extern __shared__ uint32_t memory[];  // [warps, num_experts + n_group], for odd groups
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if constexpr (kWay == kCluster) {
    if (gridDim.x > 1) {
      if (threadIdx.x == 0) {
        const uint32_t all_sent = sm90::smem_address(&smem.all_sent);
        sm90::mbarrier_init(all_sent, 1);
        sm90::mbarrier_arrive_expect_tx(all_sent, (gridDim.x - 1) * ((p.num_local + 15) & ~15));
        sm90::fence_mbarrier_init();
      }
      __syncwarp();
      sm90::cluster_arrive();
    }
  }
  sm90::griddepcontrol_wait();
  sm90::griddepcontrol_launch_dependents();
  const Share share = share_of(p);
  float values[kPer], bias[kPer];
  if (p.logits != nullptr && warp < share.num_tokens) {
    load_logits<kPer>(p, share.first_token + warp, lane, values);
    if (kWay == kCluster && kBiasEarly<kPer>) load_bias<kScore, kPer>(p, lane, bias);
  }
  clear_bitmaps(smem.bitmaps, p.num_local);
  __syncthreads();
  const Unwritten last = route_tokens<kScore, kPer, kWay>(p, smem, kMayList<kPer> ? &lists[warp] : nullptr, share,
                                                          values, bias, memory + warp * (p.num_experts + p.n_group));
  if constexpr (kWay == kCluster) {
    send_counts(p, smem, share);
    write_slots<kScore>(p, share, last, lane);
    if (share.num_blocks > 1) sm90::mbarrier_wait(sm90::smem_address(&smem.all_sent), 0);
    write_permutation(p, smem, share, [&](int e) { return rows_of_cluster(smem, share, e); });
  } else {
    __syncthreads();
    leave_counts(p, smem.bitmaps, share.block);
  }
}

// From so many tokens of 129 experts or more on so many bytes of logits are on their way at a time, and come in the
// order of the warps: all at once, all warps would have theirs at the end.
constexpr int kAheadTokens = 8192, kAheadBytes = 40 << 10;

// Whether scores are first computed nearly.
template <Score kScore, int kPer>
constexpr bool kNear = kScore == kBySigmoid && kPer == kNearPer;

// Shared memory of a block that routes four tokens in each warp.
template <int kPer>
struct FourBlockSmem {
  uint32_t bitmaps[32 * kPer][kRouteBlockTokens / 32];  // as RouteSmem
  alignas(16) float bias[32 * kPer];                    // -infinity past the last expert
  FourSmem warps[kRouteBlockTokens / kFour];
  unsigned greatest_bias;  // the magnitude's bits
};

// Many tokens whose layer allows it: the first launch.
template <Score kScore, int kPer, bool kGroups>
__global__ void __launch_bounds__(kRouteBlockTokens / kFour * 32, 1)
    route_four_kernel(const __grid_constant__ RouteParams p) {
  __shared__ FourBlockSmem<kPer> smem;
  extern __shared__ uint4 logits[];  // [warps, four, num_experts], and NearSmem [warps] where scores are near ones
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  FourSmem& own = smem.warps[warp];
  const int bytes = kFour * bytes_of_row(p);
  const auto logits_of = [&](int w) { return reinterpret_cast<char*>(logits) + w * bytes; };
  if (lane == 0) {
    sm90::mbarrier_init(sm90::smem_address(&own.logits_here), 1);
    sm90::fence_mbarrier_init();
  }
  if (kNear<kScore, kPer> && threadIdx.x == 0) smem.greatest_bias = 0;
  __syncthreads();  // the copies of logits arrive there, and they are none of the threads
  sm90::griddepcontrol_wait();
  sm90::griddepcontrol_launch_dependents();
  const Share share = share_of(p);
  const int first = warp * kFour, count = min(kFour, share.num_tokens - first);
  const auto fetch = [&](int w) {
    const int tokens = min(kFour, share.num_tokens - w * kFour);
    if (tokens > 0) fetch_logits(p, share.first_token + w * kFour, tokens, logits_of(w), smem.warps[w]);
  };
  // The bias is asked for before the logits, or it would come behind them.
  float bias = -INFINITY;
  if (kScore == kBySigmoid && threadIdx.x < p.num_experts) {
    bias = p.bias == nullptr ? 0.0f : load_float(p.bias, p.bias_dtype, threadIdx.x);
  }
  if (lane == 0 && warp < p.warps_ahead) fetch(warp);
  clear_bitmaps(smem.bitmaps, p.num_local);
  if (kScore == kBySigmoid && threadIdx.x < 32 * kPer) {
    smem.bias[threadIdx.x] = bias;
    if constexpr (kNear<kScore, kPer>) {
      const unsigned magnitude = threadIdx.x < p.num_experts ? __float_as_uint(fabsf(bias)) : 0;
      const unsigned greatest = __reduce_max_sync(kAllLanes, magnitude);
      if (lane == 0) atomicMax(&smem.greatest_bias, greatest);
    }
  }
  __syncthreads();
  if (count > 0) {
    sm90::mbarrier_wait(sm90::smem_address(&own.logits_here), 0);
    if (kPer == 8 && lane == 0 && warp + p.warps_ahead < 32) fetch(warp + p.warps_ahead);
    const char* own_logits = logits_of(warp);
    int id;
    float weight;
    unsigned other_way;
    if constexpr (kNear<kScore, kPer>) {
      const float off = near_off(__uint_as_float(smem.greatest_bias));
      NearSmem& near = reinterpret_cast<NearSmem*>(logits_of(blockDim.x / 32))[warp];
      other_way = route_near<kGroups>(p, count, own_logits, smem.bias, off, own, near, lane, id, weight);
    } else {
      other_way = route_four<kScore, kPer>(p, count, own_logits, smem.bias, own, lane, id, weight);
    }
    const int token = lane / kTokenLanes, k = lane % kTokenLanes;
    if (token < count && k < p.top_k && (other_way >> lane & 1) == 0) {
      mark_expert(p, smem.bitmaps, first + token, id);
      write_slot(p, share, first + token, k, id, weight);
    }
#pragma unroll 1
    for (int t = 0; t < count && other_way != 0; ++t) {
      if ((other_way >> t * kTokenLanes & 1) == 0) continue;
      float values[kPer], biases[kPer];
      load_shared<kPer>(own_logits + t * bytes_of_row(p), p.logits_dtype, p.num_experts, lane, values);
      if (kScore == kBySigmoid) load_shared<kPer>(smem.bias, DType::kFloat32, 32 * kPer, lane, biases);
      __syncwarp();  // the list lies where candidates were
      const auto tell = [&](int slot, int expert) {
        if (slot >= 0) mark_expert(p, smem.bitmaps, first + t, expert);
      };
      const Slot slot = route_logits<kScore, kPer>(p, share.first_token + first + t, values, biases, nullptr,
                                                   reinterpret_cast<ListSmem*>(own.candidates), lane, tell);
      write_slots<kScore>(p, share, {first + t, slot}, lane);
    }
  }
  __syncthreads();
  leave_counts(p, smem.bitmaps, share.block);
}

// ---- launch

void launch_one(void (*kernel)(RouteParams), const RouteParams& p, int blocks, int warps, int memory,
                const LaunchConfig& launch) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory),
             "raising the shared memory limit of the routing kernel");
  check_cuda(launch_kernel(kernel, blocks, warps * 32, memory, launch, p), "launching the routing kernel");
}

// The first launch of many tokens, if they can be routed four in a warp.
template <Score kScore, int kPer>
bool launch_four(RouteParams p, int blocks, const LaunchConfig& launch) {
  if constexpr (kPer == 4 || (kPer == 8 && kScore != kBySoftmax)) {
    if (!routes_four<kScore, kPer>(p)) return false;
    const bool groups = kScore == kBySigmoid && p.n_group > 1;
    // In groups a token alone in a warp is faster where each warp has one.
    if (groups && p.block_tokens <= kMinBlockTokens) return false;
    const int warps = std::max(kPer, (p.block_tokens + kFour - 1) / kFour);  // a thread for each expert at least
    const int bytes = kFour * bytes_of_row(p);
    p.warps_ahead = p.num_tokens >= kAheadTokens && kPer == 8 ? std::max(1, kAheadBytes / bytes) : 32;
    auto kernel = route_four_kernel<kScore, kPer, false>;
    if constexpr (kNear<kScore, kPer>) {
      if (groups) kernel = route_four_kernel<kScore, kPer, true>;
    }
    const int near = kNear<kScore, kPer> ? sizeof(NearSmem) : 0;
    launch_one(kernel, p, blocks, warps, warps * (bytes + near), launch);
    return true;
  }
  return false;
}

uint32_t inverse_of(int divisor) {
  return divisor == 1 ? 0 : static_cast<uint32_t>(((1ull << 32) + divisor - 1) / divisor);
}

// A handful of tokens. Of a slice nothing is fetched early: a token's best local expert is often not chosen.
template <Score kScore, int kPer>
void launch_few(RouteParams p, int memory, LaunchConfig launch) {
  int early_blocks = 0;
  if (p.early_blocks > 0 && p.num_local == p.num_experts) {
    const int most = (p.early_blocks + p.num_tokens - 1) / p.num_tokens;
    const int parts = static_cast<int>(std::min<size_t>(most, p.expert_bytes / p.early_bytes));  // of an expert
    early_blocks = std::min(p.early_blocks, parts * p.num_tokens);
    p.early_stride = static_cast<uint32_t>(p.expert_bytes / std::max(parts, 1)) & -128u;
    p.num_tokens_inverse = inverse_of(p.num_tokens);
  }
  launch.shared_memory_next = early_blocks > 0;
  const auto kernel = early_blocks > 0 ? route_few_kernel<kScore, kPer, true> : route_few_kernel<kScore, kPer, false>;
  launch_one(kernel, p, 1 + early_blocks, 2 * p.num_tokens, memory, launch);
}

template <Score kScore, int kPer>
void launch_size(const RouteParams& p, int blocks, const LaunchConfig& launch) {
  const bool odd_groups = p.logits != nullptr && p.n_group > 1 && lanes_per_group<kPer>(p) == 0;
  const auto memory = [&](int warps) { return odd_groups ? warps * (p.num_experts + p.n_group) * 4 : 0; };
  const int warps = std::clamp(p.block_tokens, kMinWarps, kMaxWarps<kPer>);
  if (p.num_tokens <= kFewTokens && p.cluster == 1) {
    return launch_few<kScore, kPer>(p, memory(p.num_tokens), launch);
  }
  if (p.num_tokens <= cluster_tokens(p.num_experts)) {
    return launch_one(route_kernel<kScore, kPer, kCluster>, p, blocks, warps, memory(warps),
                      {launch.stream, launch.pdl, blocks});
  }
  if (!launch_four<kScore, kPer>(p, blocks, launch)) {
    launch_one(route_kernel<kScore, kPer, kMany>, p, blocks, warps, memory(warps), launch);
  }
  // Its launch always overlaps, because both are ours.
  const int lanes = sum_lanes(p.num_local);
  const auto permute = lanes == 8   ? permute_kernel<8>
                       : lanes == 4 ? permute_kernel<4>
                       : lanes == 2 ? permute_kernel<2>
                                    : permute_kernel<1>;
  check_cuda(launch_kernel(permute, blocks, kMaxThreads, 0, {launch.stream, true}, p),
             "launching the permutation kernel");
}

template <Score kScore>
void launch_score(const RouteParams& p, int blocks, const LaunchConfig& launch) {
  if (p.num_experts <= 32) return launch_size<kScore, 1>(p, blocks, launch);
  if (p.num_experts <= 128) return launch_size<kScore, 4>(p, blocks, launch);
  if (p.num_experts <= 256) return launch_size<kScore, 8>(p, blocks, launch);
  if (p.num_experts <= 512) return launch_size<kScore, 16>(p, blocks, launch);
  return launch_size<kScore, 32>(p, blocks, launch);
}

}  // namespace

int max_route_blocks(int num_tokens) {
  const int blocks = std::max(kManyBlocks, (num_tokens + kRouteBlockTokens - 1) / kRouteBlockTokens);
  return (blocks + kCountBlocks - 1) / kCountBlocks * kCountBlocks;
}

void launch_route(RouteParams p, const LaunchConfig& launch) {
  require(p.num_experts >= 1 && p.num_experts <= kMaxExperts, "num_experts must be 1 to 1024");
  require(p.top_k >= 1 && p.top_k <= std::min(kMaxTopK, p.num_experts), "top_k must be 1 to min(num_experts, 32)");
  require(p.cluster >= 1 && p.cluster <= kMaxTileCluster && (p.cluster & (p.cluster - 1)) == 0 &&
              p.tiles_per_block % p.cluster == 0,
          "cluster must be 1, 2 or 4, and tiles_per_block a multiple of it");
  require(p.local_offset >= 0 && p.num_local >= 1 && p.local_offset + p.num_local <= p.num_experts,
          "the local experts must lie inside 0 ... num_experts - 1");
  int blocks = 1;
  if (p.num_tokens <= cluster_tokens(p.num_experts)) {
    const bool one = p.num_tokens <= one_block_tokens(p.num_experts);
    while (!one && blocks < kMaxClusterBlocks && blocks * kMinWarps < p.num_tokens) blocks *= 2;
    p.block_tokens = std::max(1, (p.num_tokens + blocks - 1) / blocks);
  } else {
    p.block_tokens = std::clamp((p.num_tokens + kManyBlocks - 1) / kManyBlocks, kMinBlockTokens, kRouteBlockTokens);
    blocks = (p.num_tokens + p.block_tokens - 1) / p.block_tokens;
  }
  p.top_k_inverse = inverse_of(p.top_k);
  p.tile_n_inverse = inverse_of(p.tile_n);
  p.tile_quantum_inverse = inverse_of(p.tile_quantum);
  p.tiles_per_block_inverse = inverse_of(p.tiles_per_block);
  switch (p.method) {
    case kRenormalize:
    case kLlama4:
    case kTopK:
      return launch_score<kByLogit>(p, blocks, launch);
    case kDefault:
    case kRenormalizeNaive:
      return launch_score<kBySoftmax>(p, blocks, launch);
    default:
      return launch_score<kBySigmoid>(p, blocks, launch);
  }
}

}  // namespace expertd
