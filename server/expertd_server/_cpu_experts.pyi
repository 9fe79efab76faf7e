"""csrc/cpu_experts.cpp, compiled where the compiler knows AVX-512 BF16 and AMX; `cpu_experts` alone imports it.

Pointers are addresses (`Tensor.data_ptr()`) of contiguous tensors. T num_tokens, K top_k, L num_local, H hidden_size,
I intermediate_size.
"""

def why_not(unit: int, /) -> str | None: ...
def packed_sizes(hidden_size: int, intermediate_size: int, activation: int, /) -> tuple[int, int]: ...
def pack(
    hidden_size: int,
    intermediate_size: int,
    activation: int,
    gemm1_weights: int,  # [M, H] fp8
    gemm2_weights: int,  # [H, I] fp8
    packed1: int,  # packed_sizes bytes, written
    packed2: int,
    /,
) -> None: ...
def use_huge_pages(address: int, num_bytes: int, /) -> None: ...
def run(
    unit: int,  # 0 AMX, 1 AVX-512
    hidden_size: int,
    intermediate_size: int,
    activation: int,
    num_tokens: int,
    top_k: int,
    local_expert_offset: int,
    num_local: int,
    use_routing_scales_on_input: bool,
    hidden_states: int,  # [T, H] fp8
    topk_ids: int,  # [T, K] int32, global; those of no local expert are skipped
    expert_weights: int,  # [T, K] bfloat16
    packed1: int,  # [L, packed_sizes bytes], aligned to 64 bytes
    packed2: int,
    output1_scales_scalar: int,  # [L] float32
    output1_scales_gate_scalar: int,  # [L] float32
    output2_scales_scalar: int,  # [L] float32
    g: int,  # [T * K, H] bfloat16, written as far as there are rows; 0: not asked for
    row_of_slot: int,  # [T, K] int32, written
    out: int,  # [T, H] of output_type, written; 0: not asked for
    output_type: int,  # 0 bfloat16, 1 float16, 2 float32
    num_threads: int,
    /,
) -> int: ...
