// The Python module expertd_server._cuda: integers only. Pointers are addresses, dtypes the ids of DType, the stream a
// handle; ownership, shapes and checks stay in Python. Launches on the current device; never allocates or synchronises.
// What a batch needs besides kernels is in slot.cpp, what callers' memory needs in pinning.cpp, which may wait.
#include <pybind11/pybind11.h>

#include <cstring>

#include "address.h"
#include "gemm.h"
#include "params.h"
#include "pinning.h"
#include "slot.h"
#include "tensor_map.h"

namespace py = pybind11;
using namespace expertd;

namespace {

LaunchConfig launch_config(Address stream, bool pdl) { return {pointer<CUstream_st>(stream), pdl}; }

void check_aligned(Address address, const char* name) {
  require(address % 16 == 0,
          std::string(name) + " is not 16-byte aligned; pass a contiguous tensor that owns its storage");
}

py::list list_families() {
  py::list result;
  for (const FamilyInfo& f : families()) {
    result.append(py::make_tuple(f.name, f.tile_m, f.tile_n, f.tile_quantum, f.warpgroups, f.ctas_per_sm, f.cluster));
  }
  return result;
}

void route(Address logits, int logits_dtype, Address bias, int bias_dtype, Address in_ids, Address in_weights,
           int in_weights_dtype, Address num_valid, int num_tokens, int num_experts, int top_k, int local_offset,
           int num_local, int method, int n_group, int topk_group, float routed_scaling_factor, bool norm_topk_prob,
           int tile_n, int tile_quantum, int tiles_per_block, int cluster, Address topk_ids, Address topk_weights,
           Address replay, Address counts, Address expanded_to_row, Address row_token, Address row_weight,
           Address schedule, Address tiles, Address tile_ready, Address weights, size_t expert_bytes, int early_blocks,
           int early_bytes, Address stream, bool pdl) {
  RouteParams p = {};
  p.logits = pointer<void>(logits);
  p.logits_dtype = static_cast<DType>(logits_dtype);
  p.bias = pointer<void>(bias);
  p.bias_dtype = static_cast<DType>(bias_dtype);
  p.in_ids = pointer<int>(in_ids);
  p.in_weights = pointer<void>(in_weights);
  p.in_weights_dtype = static_cast<DType>(in_weights_dtype);
  p.num_valid = pointer<int>(num_valid);
  p.num_tokens = num_tokens;
  p.num_experts = num_experts;
  p.top_k = top_k;
  p.local_offset = local_offset;
  p.num_local = num_local;
  p.method = method;
  p.n_group = n_group;
  p.topk_group = topk_group;
  p.routed_scaling_factor = routed_scaling_factor;
  p.norm_topk_prob = norm_topk_prob;
  p.tile_n = tile_n;
  p.tile_quantum = tile_quantum;
  p.tiles_per_block = tiles_per_block;
  p.cluster = cluster;
  p.topk_ids = pointer<int>(topk_ids);
  p.topk_weights = pointer<uint16_t>(topk_weights);
  p.replay = pointer<int16_t>(replay);
  p.counts = pointer<uint8_t>(counts);
  p.expanded_to_row = pointer<int>(expanded_to_row);
  p.row_token = pointer<int>(row_token);
  p.row_weight = pointer<float>(row_weight);
  p.schedule = pointer<Schedule>(schedule);
  p.tiles = pointer<TokenTile>(tiles);
  p.tile_ready = pointer<int>(tile_ready);
  p.weights = pointer<uint8_t>(weights);
  p.expert_bytes = expert_bytes;
  p.early_blocks = early_blocks;
  p.early_bytes = early_bytes;
  launch_route(p, launch_config(stream, pdl));
}

// What both products take.
GemmParams gemm_params(Address scale, Address out, int out_columns, int k, int weight_rows, int max_token_tiles,
                       Address schedule, Address tiles, Address tile_ready, int ready_count) {
  check_aligned(out, "the output of a grouped GEMM");
  GemmParams p = {};
  p.scale = pointer<float>(scale);
  p.out = pointer<void>(out);
  p.out_columns = out_columns;
  p.k = k;
  p.weight_rows = weight_rows;
  p.max_token_tiles = max_token_tiles;
  p.schedule = pointer<Schedule>(schedule);
  p.tiles = pointer<TokenTile>(tiles);
  p.tile_ready = pointer<int>(tile_ready);
  p.ready_count = ready_count;
  return p;
}

void launch_gemm(int family, int output, Address maps, const GemmParams& p, int grid, Address stream, bool pdl) {
  require(family >= 0 && family < static_cast<int>(families().size()), "family is not an index of families()");
  GemmMaps gemm_maps;
  std::memcpy(&gemm_maps, pointer<void>(maps), sizeof(gemm_maps));
  families()[family].launch(static_cast<Output>(output), gemm_maps, p, grid, launch_config(stream, pdl));
}

void gemm1(int family, int activation, Address maps, Address x, Address row_token, Address row_weight,
           Address scale_gate, Address scale, Address out, int out_columns, int k, int weight_rows, int max_token_tiles,
           int likely_token_tiles, int num_experts, Address schedule, Address tiles, Address tile_ready,
           int ready_count, int grid, Address stream, bool pdl) {
  check_aligned(x, "hidden_states");
  require(activation != kBFloat16, "activation is not one of the layer's");
  GemmParams p =
      gemm_params(scale, out, out_columns, k, weight_rows, max_token_tiles, schedule, tiles, tile_ready, ready_count);
  p.x = pointer<uint8_t>(x);
  p.row_token = pointer<int>(row_token);
  p.row_weight = pointer<float>(row_weight);
  p.scale_gate = pointer<float>(scale_gate);
  p.likely_token_tiles = likely_token_tiles;
  p.num_experts = num_experts;
  launch_gemm(family, activation, maps, p, grid, stream, pdl);
}

void gemm2(int family, Address maps, Address scale, Address rows, int hidden_size, int k, int max_token_tiles,
           Address schedule, Address tiles, Address tile_ready, int ready_count, int grid, Address stream, bool pdl) {
  const GemmParams p =
      gemm_params(scale, rows, hidden_size, k, hidden_size, max_token_tiles, schedule, tiles, tile_ready, ready_count);
  launch_gemm(family, kBFloat16, maps, p, grid, stream, pdl);
}

void finalize(Address rows, Address expanded_to_row, Address weights, Address num_valid, Address out, int out_dtype,
              int num_tokens, int hidden_size, int top_k, bool is_slice, Address stream, bool pdl) {
  check_aligned(rows, "rows");
  check_aligned(out, "out");
  const FinalizeParams p = {pointer<uint16_t>(rows),
                            pointer<int>(expanded_to_row),
                            pointer<uint16_t>(weights),
                            pointer<int>(num_valid),
                            pointer<void>(out),
                            static_cast<DType>(out_dtype),
                            num_tokens,
                            hidden_size,
                            top_k,
                            is_slice};
  launch_finalize(p, launch_config(stream, pdl));
}

void quantize(Address x, int dtype, float scale, Address num_valid, Address out, int num_tokens, int hidden_size,
              Address stream, bool pdl) {
  check_aligned(x, "hidden_states");
  const QuantizeParams p = {
      pointer<void>(x), static_cast<DType>(dtype), scale, pointer<int>(num_valid), pointer<uint8_t>(out), num_tokens,
      hidden_size};
  launch_quantize(p, launch_config(stream, pdl));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "FP8 mixture-of-experts kernels for Hopper (sm_90a). See docs/kernels.md.";
  using release = py::call_guard<py::gil_scoped_release>;
  m.attr("TENSOR_MAP_BYTES") = sizeof(CUtensorMap);
  m.attr("SCHEDULE_BYTES") = sizeof(Schedule);
  m.attr("TOKEN_TILE_BYTES") = sizeof(TokenTile);
  m.def("families", &list_families,
        "(name, tile_m, tile_n, tile_quantum, warpgroups, ctas_per_sm, cluster) of each tile family");
  m.def("max_route_blocks", &max_route_blocks, py::arg("num_tokens"),
        "routing blocks of a call of up to num_tokens tokens: bytes of `counts` for each local expert");
  m.def(
      "encode_weight_rows",
      [](Address map, Address data, uint64_t experts, uint64_t rows, uint64_t k, uint32_t box_rows) {
        encode_weight_rows(pointer<CUtensorMap>(map), pointer<void>(data), experts, rows, k, box_rows);
      },
      py::arg("map"), py::arg("data"), py::arg("experts"), py::arg("rows"), py::arg("k"), py::arg("box_rows"),
      release());
  m.def(
      "encode_gate_up",
      [](Address map, Address data, uint64_t experts, uint64_t inter, uint64_t k, uint32_t box_rows) {
        encode_gate_up(pointer<CUtensorMap>(map), pointer<void>(data), experts, inter, k, box_rows);
      },
      py::arg("map"), py::arg("data"), py::arg("experts"), py::arg("inter"), py::arg("k"), py::arg("box_rows"),
      release());
  m.def(
      "encode_rows",
      [](Address map, Address data, uint64_t rows, uint64_t k, uint32_t box_rows) {
        encode_rows(pointer<CUtensorMap>(map), pointer<void>(data), rows, k, box_rows);
      },
      py::arg("map"), py::arg("data"), py::arg("rows"), py::arg("k"), py::arg("box_rows"), release());
  m.def("route", &route, py::kw_only(), py::arg("logits"), py::arg("logits_dtype"), py::arg("bias"),
        py::arg("bias_dtype"), py::arg("in_ids"), py::arg("in_weights"), py::arg("in_weights_dtype"),
        py::arg("num_valid"), py::arg("num_tokens"), py::arg("num_experts"), py::arg("top_k"), py::arg("local_offset"),
        py::arg("num_local"), py::arg("method"), py::arg("n_group"), py::arg("topk_group"),
        py::arg("routed_scaling_factor"), py::arg("norm_topk_prob"), py::arg("tile_n"), py::arg("tile_quantum"),
        py::arg("tiles_per_block"), py::arg("cluster"), py::arg("topk_ids"), py::arg("topk_weights"), py::arg("replay"),
        py::arg("counts"), py::arg("expanded_to_row"), py::arg("row_token"), py::arg("row_weight"), py::arg("schedule"),
        py::arg("tiles"), py::arg("tile_ready"), py::arg("weights"), py::arg("expert_bytes"), py::arg("early_blocks"),
        py::arg("early_bytes"), py::arg("stream"), py::arg("pdl"), release());
  m.def("gemm1", &gemm1, py::kw_only(), py::arg("family"), py::arg("activation"), py::arg("maps"), py::arg("x"),
        py::arg("row_token"), py::arg("row_weight"), py::arg("scale_gate"), py::arg("scale"), py::arg("out"),
        py::arg("out_columns"), py::arg("k"), py::arg("weight_rows"), py::arg("max_token_tiles"),
        py::arg("likely_token_tiles"), py::arg("num_experts"), py::arg("schedule"), py::arg("tiles"),
        py::arg("tile_ready"), py::arg("ready_count"), py::arg("grid"), py::arg("stream"), py::arg("pdl"), release());
  m.def("gemm2", &gemm2, py::kw_only(), py::arg("family"), py::arg("maps"), py::arg("scale"), py::arg("rows"),
        py::arg("hidden_size"), py::arg("k"), py::arg("max_token_tiles"), py::arg("schedule"), py::arg("tiles"),
        py::arg("tile_ready"), py::arg("ready_count"), py::arg("grid"), py::arg("stream"), py::arg("pdl"), release());
  m.def("finalize", &finalize, py::kw_only(), py::arg("rows"), py::arg("expanded_to_row"), py::arg("weights"),
        py::arg("num_valid"), py::arg("out"), py::arg("out_dtype"), py::arg("num_tokens"), py::arg("hidden_size"),
        py::arg("top_k"), py::arg("is_slice"), py::arg("stream"), py::arg("pdl"), release());
  m.def("quantize", &quantize, py::kw_only(), py::arg("x"), py::arg("dtype"), py::arg("scale"), py::arg("num_valid"),
        py::arg("out"), py::arg("num_tokens"), py::arg("hidden_size"), py::arg("stream"), py::arg("pdl"), release());
  bind_slot(m);
  bind_pinning(m);
}
