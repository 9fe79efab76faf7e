"""The kernels. Pointers are addresses (0: none), dtypes 0 float32, 1 bfloat16, 2 float16, the stream a handle."""

TENSOR_MAP_BYTES: int
SCHEDULE_BYTES: int
TOKEN_TILE_BYTES: int

def max_route_blocks(num_tokens: int) -> int: ...
def families() -> list[tuple[str, int, int, int, int, int, int]]: ...
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
    cluster: int,
    topk_ids: int,
    topk_weights: int,
    replay: int,
    counts: int,
    expanded_to_row: int,
    row_token: int,
    row_weight: int,
    schedule: int,
    tiles: int,
    tile_ready: int,
    weights: int,
    expert_bytes: int,
    early_blocks: int,
    early_bytes: int,
    stream: int,
    pdl: bool,
) -> None: ...
def gemm1(
    *,
    family: int,
    activation: int,
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
    likely_token_tiles: int,
    num_experts: int,
    schedule: int,
    tiles: int,
    tile_ready: int,
    ready_count: int,
    grid: int,
    stream: int,
    pdl: bool,
) -> None: ...
def gemm2(
    *,
    family: int,
    maps: int,
    scale: int,
    rows: int,
    hidden_size: int,
    k: int,
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
    is_slice: bool,
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
def pin(device: int, address: int, num_bytes: int) -> None:
    """Have host memory stay where it is, known to the device; raises RuntimeError where that fails."""

def unpin(device: int, address: int) -> None:
    """The end of what `pin` began at this address."""

class Graph:
    """A captured graph (a cudaGraph_t) made executable; raises RuntimeError where that fails."""

    def __init__(self, captured: int) -> None: ...
    def launch(self, stream: int) -> None: ...

class SlotWork:
    """What happens to one batch after the other, in the order of these methods; wait and is_done_within alone wait."""

    def __init__(self, copy_in: int, compute: int, copy_out: int) -> None: ...
    def place(self, host_in: int, device_in: int, device_out: int, host_out: int) -> None: ...
    def send(self, spans: list[tuple[int, int, int]] | bytes) -> None: ...
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def fetch(self, spans: list[tuple[int, int, int]] | bytes) -> None: ...
    def start(
        self,
        sent: list[tuple[int, int, int]] | bytes,
        graph: Graph,
        fetched: list[tuple[int, int, int]] | bytes,
    ) -> None:
        """Have a thread send, launch the graph and fetch, after all that was started so before. `send` waits for that
        thread; what goes wrong in it is raised by wait, is_done_within and times."""
    def wait(self) -> None: ...
    def is_done_within(self, seconds: float) -> bool: ...
    def is_computed(self) -> bool: ...
    def ring_when_done(self, eventfd: int) -> None:
        """Write to it when the batch is computed and when it is over, without the interpreter; after `fetch` or
        `start`."""
    def times(self) -> tuple[float, float, float, float]:
        """Seconds of copy in, wait, compute and copy out."""

def begin_submitting() -> None:
    """Keep graphs from being launched, until the same thread says `end_submitting`."""

def end_submitting() -> None: ...
