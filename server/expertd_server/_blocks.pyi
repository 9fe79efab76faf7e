"""csrc/blocks.cpp, bundle.cpp and ring.cpp, compiled where there is a C++ compiler; only `compiled` imports them."""

from collections.abc import Sequence
from typing import Any

from expertd_server.bundle import BlockPlace
from expertd_server.native import Copies
from expertd_server.region_handover import Where
from expertd_server.spans import Span
from expertd_server.wire_check import CheckedRequest

class Ring:
    def __init__(self, memory: memoryview, eventfd: int, /) -> None: ...
    @property
    def eventfd(self) -> int: ...
    def put(self, kind: int, request_id: int, offset: int = 0, nbytes: int = 0, /) -> None: ...
    def wake(self) -> None: ...
    def announce(self) -> None: ...
    def publish(self, kind: int, request_id: int, offset: int = 0, nbytes: int = 0, /) -> None: ...
    def take(self) -> list[tuple[int, int, int, int]]: ...
    def look(self) -> list[tuple[int, int, int, int]]: ...
    def take_within(self, seconds: float, /) -> list[tuple[int, int, int, int]]: ...
    def close(self) -> None: ...

class Block:
    @property
    def view(self) -> memoryview: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class Arena:
    def __init__(self, memory: memoryview, /) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def allocate(self, nbytes: int, /) -> Block | None: ...
    def free_bytes(self) -> int: ...

class Bundle:
    @property
    def kind(self) -> tuple[int, int, bool, int]: ...
    @property
    def is_spent(self) -> bool: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_requests(self) -> int: ...
    def absorb(self, bundle: Bundle, most_tokens: int, most_requests: int, /) -> None: ...
    def cancel(self, source: object, number: int | None = None, /) -> list[BlockPlace]: ...
    def begin(self, now_s: float, /) -> tuple[list[BlockPlace], list[float]]: ...
    def gather(
        self,
        part: int,
        destination: object,
        start: int,
        row_bytes: int,
        least_direct: int,
        spans: list[Span],
        copies: Copies,
        /,
    ) -> int: ...
    def scatter(self, start: int, row_bytes: int, least_direct: int, spans: list[Span], /) -> tuple[int, bool]: ...
    def gather_all(
        self,
        destination: object,
        first_bytes: int,
        parts: tuple[tuple[int, int, int], ...],
        least_direct: int,
        copies: Copies,
        /,
    ) -> bytes: ...
    def scatter_all(self, first_bytes: int, start: int, row_bytes: int, least_direct: int, /) -> tuple[bytes, bool]: ...
    def answer(
        self,
        copies: Copies,
        address: int,
        hidden_size: int,
        wait_us: int,
        copy_in_us: int,
        compute_us: int,
        copy_out_us: int,
        batch_tokens: int,
        batch_requests: int,
        weights_version: int,
        queue_tokens: int,
        /,
    ) -> None: ...
    def places(self) -> list[BlockPlace]: ...
    def sources(self) -> list[Any]: ...
    def tell(self, kind: int, /) -> None: ...

def bundles_of(
    descriptors: Sequence[tuple[int, int, int, int]],
    kind: int,
    source: object,
    ring: object,
    memory: memoryview,
    regions: dict[int, memoryview],
    most_tokens: int,
    now_s: float,
    /,
) -> tuple[list[Bundle], list[tuple[int, int, int, int]]]: ...
def block_bytes(
    request: CheckedRequest,
    hidden_size: int,
    top_k: int,
    hidden_states: Where | None = None,
    place: Where | None = None,
    /,
) -> int: ...
def write_call(
    block: memoryview,
    request: CheckedRequest,
    layer_id: int,
    deadline_s: float | None,
    hidden_states: Where | None = None,
    place: Where | None = None,
    /,
) -> bool: ...
def read_call(
    block: memoryview, regions: dict[int, memoryview], /
) -> tuple[int, float | None, CheckedRequest, memoryview | None]: ...
def write_matrix_head(
    block: memoryview,
    dtype: int,
    num_tokens: int,
    hidden_size: int,
    queue_us: int,
    copy_in_us: int,
    compute_us: int,
    copy_out_us: int,
    batch_tokens: int,
    batch_requests: int,
    weights_version: int,
    queue_tokens: int,
    is_placed: bool,
    /,
) -> int: ...
def encode_answer(
    block: memoryview,
    is_stream: bool,
    request_id: int,
    queue_depth_tokens: int,
    place: tuple[int, int] | None = None,
    /,
) -> bytes: ...
