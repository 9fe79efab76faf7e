from google.protobuf import any_pb2 as _any_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_FLOAT8_E4M3FN: _ClassVar[DataType]
    DATA_TYPE_INT32: _ClassVar[DataType]

class RoutingMethod(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUTING_METHOD_UNSPECIFIED: _ClassVar[RoutingMethod]
    ROUTING_METHOD_DEFAULT: _ClassVar[RoutingMethod]
    ROUTING_METHOD_RENORMALIZE: _ClassVar[RoutingMethod]
    ROUTING_METHOD_DEEPSEEK_V3: _ClassVar[RoutingMethod]
    ROUTING_METHOD_LLAMA4: _ClassVar[RoutingMethod]
    ROUTING_METHOD_RENORMALIZE_NAIVE: _ClassVar[RoutingMethod]
    ROUTING_METHOD_TOPK: _ClassVar[RoutingMethod]
    ROUTING_METHOD_SIGMOID_RENORM: _ClassVar[RoutingMethod]
    ROUTING_METHOD_MINIMAX2: _ClassVar[RoutingMethod]
    ROUTING_METHOD_SIGMOID: _ClassVar[RoutingMethod]

class Activation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTIVATION_UNSPECIFIED: _ClassVar[Activation]
    ACTIVATION_GELU: _ClassVar[Activation]
    ACTIVATION_SWIGLU: _ClassVar[Activation]
    ACTIVATION_GEGLU: _ClassVar[Activation]
    ACTIVATION_RELU2: _ClassVar[Activation]
    ACTIVATION_IDENTITY: _ClassVar[Activation]

class LayerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYER_STATE_UNSPECIFIED: _ClassVar[LayerState]
    LAYER_STATE_LOADING: _ClassVar[LayerState]
    LAYER_STATE_READY: _ClassVar[LayerState]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_BFLOAT16: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_FLOAT8_E4M3FN: DataType
DATA_TYPE_INT32: DataType
ROUTING_METHOD_UNSPECIFIED: RoutingMethod
ROUTING_METHOD_DEFAULT: RoutingMethod
ROUTING_METHOD_RENORMALIZE: RoutingMethod
ROUTING_METHOD_DEEPSEEK_V3: RoutingMethod
ROUTING_METHOD_LLAMA4: RoutingMethod
ROUTING_METHOD_RENORMALIZE_NAIVE: RoutingMethod
ROUTING_METHOD_TOPK: RoutingMethod
ROUTING_METHOD_SIGMOID_RENORM: RoutingMethod
ROUTING_METHOD_MINIMAX2: RoutingMethod
ROUTING_METHOD_SIGMOID: RoutingMethod
ACTIVATION_UNSPECIFIED: Activation
ACTIVATION_GELU: Activation
ACTIVATION_SWIGLU: Activation
ACTIVATION_GEGLU: Activation
ACTIVATION_RELU2: Activation
ACTIVATION_IDENTITY: Activation
LAYER_STATE_UNSPECIFIED: LayerState
LAYER_STATE_LOADING: LayerState
LAYER_STATE_READY: LayerState

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data", "slice")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    slice: RegionSlice
    def __init__(self, dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., slice: _Optional[_Union[RegionSlice, _Mapping]] = ...) -> None: ...

class RegionSlice(_message.Message):
    __slots__ = ("region", "offset", "nbytes")
    REGION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    region: int
    offset: int
    nbytes: int
    def __init__(self, region: _Optional[int] = ..., offset: _Optional[int] = ..., nbytes: _Optional[int] = ...) -> None: ...

class ForwardOptions(_message.Message):
    __slots__ = ("output_dtype", "do_finalize", "return_routing")
    OUTPUT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    DO_FINALIZE_FIELD_NUMBER: _ClassVar[int]
    RETURN_ROUTING_FIELD_NUMBER: _ClassVar[int]
    output_dtype: DataType
    do_finalize: bool
    return_routing: bool
    def __init__(self, output_dtype: _Optional[_Union[DataType, str]] = ..., do_finalize: bool = ..., return_routing: bool = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("layer", "hidden_states", "routing_logits", "topk_ids", "topk_weights", "options", "weights_version", "answer_slice")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    ROUTING_LOGITS_FIELD_NUMBER: _ClassVar[int]
    TOPK_IDS_FIELD_NUMBER: _ClassVar[int]
    TOPK_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    ANSWER_SLICE_FIELD_NUMBER: _ClassVar[int]
    layer: str
    hidden_states: Tensor
    routing_logits: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    options: ForwardOptions
    weights_version: int
    answer_slice: RegionSlice
    def __init__(self, layer: _Optional[str] = ..., hidden_states: _Optional[_Union[Tensor, _Mapping]] = ..., routing_logits: _Optional[_Union[Tensor, _Mapping]] = ..., topk_ids: _Optional[_Union[Tensor, _Mapping]] = ..., topk_weights: _Optional[_Union[Tensor, _Mapping]] = ..., options: _Optional[_Union[ForwardOptions, _Mapping]] = ..., weights_version: _Optional[int] = ..., answer_slice: _Optional[_Union[RegionSlice, _Mapping]] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_us", "copy_in_us", "compute_us", "copy_out_us", "batch_tokens", "batch_requests", "queue_depth_tokens")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COPY_IN_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    COPY_OUT_US_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BATCH_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DEPTH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    copy_in_us: int
    compute_us: int
    copy_out_us: int
    batch_tokens: int
    batch_requests: int
    queue_depth_tokens: int
    def __init__(self, queue_us: _Optional[int] = ..., copy_in_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., copy_out_us: _Optional[int] = ..., batch_tokens: _Optional[int] = ..., batch_requests: _Optional[int] = ..., queue_depth_tokens: _Optional[int] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("output", "gemm2_output", "expert_weights", "topk_ids", "expanded_idx_to_permuted_idx", "timing", "weights_version")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    GEMM2_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    EXPERT_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    TOPK_IDS_FIELD_NUMBER: _ClassVar[int]
    EXPANDED_IDX_TO_PERMUTED_IDX_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    output: Tensor
    gemm2_output: Tensor
    expert_weights: Tensor
    topk_ids: Tensor
    expanded_idx_to_permuted_idx: Tensor
    timing: Timing
    weights_version: int
    def __init__(self, output: _Optional[_Union[Tensor, _Mapping]] = ..., gemm2_output: _Optional[_Union[Tensor, _Mapping]] = ..., expert_weights: _Optional[_Union[Tensor, _Mapping]] = ..., topk_ids: _Optional[_Union[Tensor, _Mapping]] = ..., expanded_idx_to_permuted_idx: _Optional[_Union[Tensor, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., weights_version: _Optional[int] = ...) -> None: ...

class ForwardStreamRequest(_message.Message):
    __slots__ = ("id", "request", "timeout_ms", "register_region", "unregister_region")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    REGISTER_REGION_FIELD_NUMBER: _ClassVar[int]
    UNREGISTER_REGION_FIELD_NUMBER: _ClassVar[int]
    id: int
    request: ForwardRequest
    timeout_ms: int
    register_region: RegisterRegion
    unregister_region: UnregisterRegion
    def __init__(self, id: _Optional[int] = ..., request: _Optional[_Union[ForwardRequest, _Mapping]] = ..., timeout_ms: _Optional[int] = ..., register_region: _Optional[_Union[RegisterRegion, _Mapping]] = ..., unregister_region: _Optional[_Union[UnregisterRegion, _Mapping]] = ...) -> None: ...

class RegisterRegion(_message.Message):
    __slots__ = ("region", "nbytes", "rings")
    REGION_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    RINGS_FIELD_NUMBER: _ClassVar[int]
    region: int
    nbytes: int
    rings: MessageRings
    def __init__(self, region: _Optional[int] = ..., nbytes: _Optional[int] = ..., rings: _Optional[_Union[MessageRings, _Mapping]] = ...) -> None: ...

class MessageRings(_message.Message):
    __slots__ = ("offset", "num_slots", "slot_nbytes")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_NBYTES_FIELD_NUMBER: _ClassVar[int]
    offset: int
    num_slots: int
    slot_nbytes: int
    def __init__(self, offset: _Optional[int] = ..., num_slots: _Optional[int] = ..., slot_nbytes: _Optional[int] = ...) -> None: ...

class RegionTicket(_message.Message):
    __slots__ = ("socket", "ticket")
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    socket: str
    ticket: bytes
    def __init__(self, socket: _Optional[str] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class UnregisterRegion(_message.Message):
    __slots__ = ("region",)
    REGION_FIELD_NUMBER: _ClassVar[int]
    region: int
    def __init__(self, region: _Optional[int] = ...) -> None: ...

class RegionUnregistered(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StreamError(_message.Message):
    __slots__ = ("code", "message", "details")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    details: _containers.RepeatedCompositeFieldContainer[_any_pb2.Any]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., details: _Optional[_Iterable[_Union[_any_pb2.Any, _Mapping]]] = ...) -> None: ...

class ForwardStreamResponse(_message.Message):
    __slots__ = ("id", "response", "error", "region_ticket", "region_unregistered")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REGION_TICKET_FIELD_NUMBER: _ClassVar[int]
    REGION_UNREGISTERED_FIELD_NUMBER: _ClassVar[int]
    id: int
    response: ForwardResponse
    error: StreamError
    region_ticket: RegionTicket
    region_unregistered: RegionUnregistered
    def __init__(self, id: _Optional[int] = ..., response: _Optional[_Union[ForwardResponse, _Mapping]] = ..., error: _Optional[_Union[StreamError, _Mapping]] = ..., region_ticket: _Optional[_Union[RegionTicket, _Mapping]] = ..., region_unregistered: _Optional[_Union[RegionUnregistered, _Mapping]] = ...) -> None: ...

class LayerInfo(_message.Message):
    __slots__ = ("name", "hidden_size", "intermediate_size", "num_experts", "local_expert_offset", "local_num_experts", "top_k", "routing_method", "activation", "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "use_routing_scales_on_input", "hidden_states_scale", "routing_bias", "weights_version", "weights_bytes", "state", "weights_versions", "weights_fingerprint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    INTERMEDIATE_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_EXPERT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    LOCAL_NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    ROUTING_METHOD_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    N_GROUP_FIELD_NUMBER: _ClassVar[int]
    TOPK_GROUP_FIELD_NUMBER: _ClassVar[int]
    ROUTED_SCALING_FACTOR_FIELD_NUMBER: _ClassVar[int]
    NORM_TOPK_PROB_FIELD_NUMBER: _ClassVar[int]
    USE_ROUTING_SCALES_ON_INPUT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_SCALE_FIELD_NUMBER: _ClassVar[int]
    ROUTING_BIAS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    local_expert_offset: int
    local_num_experts: int
    top_k: int
    routing_method: RoutingMethod
    activation: Activation
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    use_routing_scales_on_input: bool
    hidden_states_scale: float
    routing_bias: Tensor
    weights_version: int
    weights_bytes: int
    state: LayerState
    weights_versions: _containers.RepeatedScalarFieldContainer[int]
    weights_fingerprint: int
    def __init__(self, name: _Optional[str] = ..., hidden_size: _Optional[int] = ..., intermediate_size: _Optional[int] = ..., num_experts: _Optional[int] = ..., local_expert_offset: _Optional[int] = ..., local_num_experts: _Optional[int] = ..., top_k: _Optional[int] = ..., routing_method: _Optional[_Union[RoutingMethod, str]] = ..., activation: _Optional[_Union[Activation, str]] = ..., n_group: _Optional[int] = ..., topk_group: _Optional[int] = ..., routed_scaling_factor: _Optional[float] = ..., norm_topk_prob: bool = ..., use_routing_scales_on_input: bool = ..., hidden_states_scale: _Optional[float] = ..., routing_bias: _Optional[_Union[Tensor, _Mapping]] = ..., weights_version: _Optional[int] = ..., weights_bytes: _Optional[int] = ..., state: _Optional[_Union[LayerState, str]] = ..., weights_versions: _Optional[_Iterable[int]] = ..., weights_fingerprint: _Optional[int] = ...) -> None: ...

class ListLayersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListLayersResponse(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerInfo]
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerInfo, _Mapping]]] = ...) -> None: ...

class GetLayerRequest(_message.Message):
    __slots__ = ("layer",)
    LAYER_FIELD_NUMBER: _ClassVar[int]
    layer: str
    def __init__(self, layer: _Optional[str] = ...) -> None: ...

class GetLayerResponse(_message.Message):
    __slots__ = ("layer",)
    LAYER_FIELD_NUMBER: _ClassVar[int]
    layer: LayerInfo
    def __init__(self, layer: _Optional[_Union[LayerInfo, _Mapping]] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("server_version", "backend", "device", "max_batch_tokens", "max_message_bytes", "max_queue_tokens", "draining", "instance_id", "max_region_bytes")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_REGION_BYTES_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    backend: str
    device: str
    max_batch_tokens: int
    max_message_bytes: int
    max_queue_tokens: int
    draining: bool
    instance_id: str
    max_region_bytes: int
    def __init__(self, server_version: _Optional[str] = ..., backend: _Optional[str] = ..., device: _Optional[str] = ..., max_batch_tokens: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_queue_tokens: _Optional[int] = ..., draining: bool = ..., instance_id: _Optional[str] = ..., max_region_bytes: _Optional[int] = ...) -> None: ...

class CheckpointSource(_message.Message):
    __slots__ = ("path", "calibration_path")
    PATH_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_PATH_FIELD_NUMBER: _ClassVar[int]
    path: str
    calibration_path: str
    def __init__(self, path: _Optional[str] = ..., calibration_path: _Optional[str] = ...) -> None: ...

class SyntheticSource(_message.Message):
    __slots__ = ("preset", "seed", "layer_index")
    PRESET_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LAYER_INDEX_FIELD_NUMBER: _ClassVar[int]
    preset: str
    seed: int
    layer_index: int
    def __init__(self, preset: _Optional[str] = ..., seed: _Optional[int] = ..., layer_index: _Optional[int] = ...) -> None: ...

class LoadLayerRequest(_message.Message):
    __slots__ = ("layer", "weights_version", "checkpoint", "synthetic")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    SYNTHETIC_FIELD_NUMBER: _ClassVar[int]
    layer: str
    weights_version: int
    checkpoint: CheckpointSource
    synthetic: SyntheticSource
    def __init__(self, layer: _Optional[str] = ..., weights_version: _Optional[int] = ..., checkpoint: _Optional[_Union[CheckpointSource, _Mapping]] = ..., synthetic: _Optional[_Union[SyntheticSource, _Mapping]] = ...) -> None: ...

class LoadLayerResponse(_message.Message):
    __slots__ = ("layer", "weights_bytes", "load_time_ms")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    layer: LayerInfo
    weights_bytes: int
    load_time_ms: int
    def __init__(self, layer: _Optional[_Union[LayerInfo, _Mapping]] = ..., weights_bytes: _Optional[int] = ..., load_time_ms: _Optional[int] = ...) -> None: ...

class SwapWeightsRequest(_message.Message):
    __slots__ = ("layer", "weights_version")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    layer: str
    weights_version: int
    def __init__(self, layer: _Optional[str] = ..., weights_version: _Optional[int] = ...) -> None: ...

class SwapWeightsResponse(_message.Message):
    __slots__ = ("layer", "previous_weights_version")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    layer: LayerInfo
    previous_weights_version: int
    def __init__(self, layer: _Optional[_Union[LayerInfo, _Mapping]] = ..., previous_weights_version: _Optional[int] = ...) -> None: ...

class UnloadLayerRequest(_message.Message):
    __slots__ = ("layer", "weights_version", "timeout_ms")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    layer: str
    weights_version: int
    timeout_ms: int
    def __init__(self, layer: _Optional[str] = ..., weights_version: _Optional[int] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class UnloadLayerResponse(_message.Message):
    __slots__ = ("weights_bytes", "freed")
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREED_FIELD_NUMBER: _ClassVar[int]
    weights_bytes: int
    freed: bool
    def __init__(self, weights_bytes: _Optional[int] = ..., freed: bool = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_ms",)
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    timeout_ms: int
    def __init__(self, timeout_ms: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("idle",)
    IDLE_FIELD_NUMBER: _ClassVar[int]
    idle: bool
    def __init__(self, idle: bool = ...) -> None: ...
