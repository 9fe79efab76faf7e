"""The kernels. Pointers are addresses (0: none), dtypes 0 float32, 1 bfloat16, 2 float16, the stream a handle."""

TENSOR_MAP_BYTES: int
SCHEDULE_BYTES: int
TOKEN_TILE_BYTES: int
ROUTE_BLOCK_TOKENS: int
OUTPUT_BFLOAT16: int

def families() -> list[tuple[str, int, int, int, int]]: ...
def encode_weight_rows(map: int, data: int, experts: int, rows: int, k: int, box_rows: int) -> None: ...
def encode_gate_up(map: int, data: int, experts: int, inter: int, k: int, box_rows: int) -> None: ...
def encode_rows(map: int, data: int, rows: int, k: int, box_rows: int) -> None: ...
def route(
    *,
    logits: int,
    logits_dtype: int,
    bias: int,
    bias_dtype: int,
    in_ids: int,
    in_weights: int,
    in_weights_dtype: int,
    num_valid: int,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    local_offset: int,
    num_local: int,
    method: int,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
    norm_topk_prob: bool,
    tile_n: int,
    tile_quantum: int,
    tiles_per_block: int,
    topk_ids: int,
    topk_weights: int,
    replay: int,
    bitmaps: int,
    counts: int,
    expanded_to_row: int,
    row_token: int,
    row_weight: int,
    schedule: int,
    tiles: int,
    tile_ready: int,
    stream: int,
    pdl: bool,
) -> None: ...
def grouped_gemm(
    *,
    family: int,
    output: int,
    maps: int,
    x: int,
    row_token: int,
    row_weight: int,
    scale_gate: int,
    scale: int,
    out: int,
    out_columns: int,
    k: int,
    weight_rows: int,
    max_token_tiles: int,
    schedule: int,
    tiles: int,
    tile_ready: int,
    ready_count: int,
    grid: int,
    stream: int,
    pdl: bool,
) -> None: ...
def finalize(
    *,
    rows: int,
    expanded_to_row: int,
    weights: int,
    num_valid: int,
    out: int,
    out_dtype: int,
    num_tokens: int,
    hidden_size: int,
    top_k: int,
    stream: int,
    pdl: bool,
) -> None: ...
def quantize(
    *,
    x: int,
    dtype: int,
    scale: float,
    num_valid: int,
    out: int,
    num_tokens: int,
    hidden_size: int,
    stream: int,
    pdl: bool,
) -> None: ...
