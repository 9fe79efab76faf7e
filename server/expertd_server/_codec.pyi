"""csrc/codec.cpp, which is compiled where there is a C++ compiler; see `compiled`, which alone imports it."""

from typing import Any

_Part = tuple[int, bytes | memoryview] | None
"""A pb.DataType, and a tensor's elements."""

_Slice = tuple[int, int, int] | None
"""Region, offset, nbytes."""

class Request:
    """A request, read and not checked."""

    @property
    def data(self) -> bytes: ...
    @property
    def is_stream(self) -> bool: ...
    @property
    def id(self) -> int: ...
    @property
    def timeout_ms(self) -> int: ...
    @property
    def layer(self) -> str: ...
    @property
    def weights_version(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def slices(self) -> tuple[_Slice, _Slice, _Slice, _Slice, _Slice] | None: ...
    def bind(self, number: int, data: bytes | memoryview, /) -> None: ...
    def bound(self, number: int, /) -> bytes | memoryview | None: ...
    def check(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        takes_wide: bool,
        max_tokens: int,
        max_answer_bytes: int,
        /,
    ) -> tuple[int, tuple[int, bytes | memoryview], _Part, _Part, _Part, int, bool, bool] | None: ...

class Copies:
    """Copies of host memory that are done together; for one thread at a time."""

    def add(self, destination: Any, offset: int, source: Any, /) -> None: ...
    def add_memory(self, destination: Any, offset: int, address: int, num_bytes: int, /) -> None: ...
    def run(self) -> None: ...

class Answer:
    """A buffer: the elements of an answer that is still to come, within its message."""

    def __buffer__(self, flags: int, /) -> memoryview: ...
    def finish(
        self,
        queue_us: int,
        copy_in_us: int,
        compute_us: int,
        copy_out_us: int,
        batch_tokens: int,
        batch_requests: int,
        queue_depth_tokens: int,
        weights_version: int,
        /,
    ) -> bytes: ...

def parse_request(data: bytes, /) -> Request | None: ...
def parse_stream_request(data: bytes, /) -> Request | None: ...
def encode_response(
    is_stream: bool,
    request_id: int,
    dtype: int,
    num_tokens: int,
    hidden_size: int,
    address: int,
    queue_us: int,
    copy_in_us: int,
    compute_us: int,
    copy_out_us: int,
    batch_tokens: int,
    batch_requests: int,
    queue_depth_tokens: int,
    weights_version: int,
    copies: Copies | None,
    place: tuple[memoryview, int, int, int] | None = None,
    /,
) -> bytes: ...
def make_answer(
    is_stream: bool, request_id: int, dtype: int, num_tokens: int, hidden_size: int, /
) -> Answer | None: ...
def use_message_memory(memory: memoryview, /) -> None: ...
def free_message_bytes() -> int: ...
def count_ids(ids: Any, first: int, counts: Any, /) -> None: ...
def count_ids_at(address: int, number: int, item_size: int, first: int, counts: Any, /) -> None: ...
def copy(destination: Any, offset: int, source: Any, /) -> None: ...
def address_of(memory: Any, /) -> int: ...
def set_copy_helpers(count: int, /) -> None: ...
