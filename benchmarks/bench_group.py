"""What a group costs the worker: time to route, split and combine, and bytes sent against broadcasting everything.

Each case is measured twice: with numpy alone, and with the kernels that numba compiles (`pip install expertd[fast]`),
where that is installed. Needs no server: the answers are made up. `message` is the one copy of the split rows, into the
bytes that gRPC takes. `floor` is what combining takes at least in numpy on this machine in the same run: every partial
sum to float32, one addition of each, one rounding, in memory that is warm, and nothing else. Requests of more than 1 MB
of float32 sums are combined by two threads, all else is of one. Medians of many runs. Pass --json PATH to keep them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
from _common import header, write_json

from expertd import _fast
from expertd._combine import combine
from expertd._split import Part, owners, split
from expertd._wire import Encoded, encode_forward_request
from expertd.routing import route
from expertd.tensors import to_wire
from expertd.types import Activation, LayerInfo, LayerState, RoutingMethod
from expertd.v1 import expertd_pb2 as pb

BUDGET_US = 400.0
BYTES_LIMIT = 1.05
BUDGET_CASE = ("qwen3-30b-a3b", 4, 128)
WARM_UP_TIMEOUT_S = 120


def layer(name: str, method: RoutingMethod, num_experts: int, hidden_size: int, **fields: Any) -> LayerInfo:
    """A layer of eight experts a token."""
    values: dict[str, Any] = {
        "n_group": 0,
        "topk_group": 0,
        "routed_scaling_factor": None,
        "routing_bias": None,
        **fields,
    }
    return LayerInfo(
        name=name,
        hidden_size=hidden_size,
        intermediate_size=1,
        num_experts=num_experts,
        local_expert_offset=0,
        local_num_experts=num_experts,
        top_k=8,
        routing_method=method,
        activation=Activation.SWIGLU,
        norm_topk_prob=True,
        use_routing_scales_on_input=False,
        hidden_states_scale=None,
        weights_version=1,
        weights_versions=(1,),
        weights_bytes=0,
        state=LayerState.READY,
        **values,
    )


QWEN3 = layer("qwen3-30b-a3b", RoutingMethod.RENORMALIZE_NAIVE, 128, 2048)
DEEPSEEK = layer(
    "deepseek-v3",
    RoutingMethod.DEEPSEEK_V3,
    256,
    7168,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    routing_bias=np.zeros(256, np.float32),
)
CASES = [(QWEN3, shards, tokens) for tokens in (1, 16, 128, 1024) for shards in (2, 4, 8)]
CASES += [(DEEPSEEK, shards, tokens) for tokens in (16, 128, 1024) for shards in (8,)]


def floor(num_tokens: int, hidden_size: int, outputs: list[Any]) -> Callable[[], Any]:
    """The passes over memory that a sum of the parts' outputs cannot do without."""
    total, addend = np.zeros((2, num_tokens, hidden_size), np.float32)
    out = np.empty((num_tokens, hidden_size), ml_dtypes.bfloat16)

    def work() -> None:
        for _, output in outputs:
            target, values = total[: len(output)], addend[: len(output)]
            np.copyto(values, output, casting="unsafe")
            np.add(target, values, out=target)
        np.copyto(out, total, casting="unsafe")
        total.fill(0)

    return work


def time_us(work: Callable[[], Any], runs: int) -> dict[str, float]:
    """Of one call: the median and the least time, which are far apart where others use the cores too, and the median of
    the processor time, of both threads where there are two, which others change less.
    """
    for _ in range(max(3, runs // 10)):
        work()
    times, cpu_times = [], []
    for _ in range(runs):
        started, cpu_started = time.perf_counter(), time.process_time()
        work()
        cpu_times.append(time.process_time() - cpu_started)
        times.append(time.perf_counter() - started)
    return {
        "median_us": statistics.median(times) * 1e6,
        "least_us": min(times) * 1e6,
        "cpu_us": statistics.median(cpu_times) * 1e6,
    }


def measure(kernels: ModuleType | None, info: LayerInfo, num_shards: int, num_tokens: int, runs: int) -> dict[str, Any]:
    """One row of the table; kernels: None to use numpy alone."""
    with mock.patch.object(_fast._loader, "kernels", kernels):
        return {
            "arithmetic": "numpy" if kernels is None else "compiled",
            **_measure(info, num_shards, num_tokens, runs),
        }


def _measure(info: LayerInfo, num_shards: int, num_tokens: int, runs: int) -> dict[str, Any]:
    random = np.random.default_rng(num_tokens)
    logits = random.standard_normal((num_tokens, info.num_experts), np.float32)
    hidden_states, _ = to_wire(
        "hidden_states",
        random.standard_normal((num_tokens, info.hidden_size), np.float32).astype(ml_dtypes.float8_e4m3fn),
    )
    size = info.num_experts // num_shards
    shards = [range(start, start + size) for start in range(0, info.num_experts, size)]
    limits = [8192] * num_shards
    ids, weights = route(info, logits)

    def split_parts(broadcast: bool = False) -> Any:
        slot_owners = owners(ids, info.num_experts, shards)
        return split(hidden_states, ids, weights, slot_owners, limits, broadcast=broadcast)

    parts = split_parts()
    outputs = [
        (part.runs, random.standard_normal((part.num_tokens, info.hidden_size), np.float32).astype(ml_dtypes.bfloat16))
        for part in parts
    ]
    bfloat16 = ml_dtypes.bfloat16
    needed_rows = sum(part.num_tokens for part in parts)
    row_bytes = info.hidden_size + 6 * info.top_k
    sent, everything = (sum(message(info, part).nbytes for part in split_parts(b)) for b in (False, True))
    return {
        "layer": info.name,
        "shards": num_shards,
        "tokens": num_tokens,
        "route": time_us(lambda: route(info, logits), runs),
        "split": time_us(split_parts, runs),
        "message": time_us(lambda: [message(info, part).to_bytes() for part in parts], runs),
        "floor": time_us(floor(num_tokens, info.hidden_size, outputs), runs),
        "combine": time_us(lambda: combine(num_tokens, info.hidden_size, outputs, bfloat16), runs),
        "shards_per_token": needed_rows / num_tokens,
        "sent_bytes": sent,
        "sent_over_needed": sent / (needed_rows * row_bytes),
        "broadcast_bytes": everything,
    }


def message(info: LayerInfo, part: Part) -> Encoded:
    """The request that one part becomes."""
    return encode_forward_request(
        info.name,
        part.hidden_states,
        topk_ids=part.topk_ids,
        topk_weights=part.topk_weights,
        output_dtype=pb.DATA_TYPE_BFLOAT16,
        weights_version=1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="PATH", help="write the results here as well")
    parser.add_argument("--runs", type=int, default=300, help="runs of each measurement (default: 300)")
    arguments = parser.parse_args()
    ways = [None, *([_fast.kernels()] if _fast.warm_up(WARM_UP_TIMEOUT_S) else [])]
    rows = [measure(kernels, *case, arguments.runs) for case in CASES for kernels in ways]
    print(
        "median µs      shards tokens    by    |   route    split  combine      all    (CPU)  (least) |   floor message"
    )
    for row in rows:
        steps = [row["route"], row["split"], row["combine"]]
        row["all"] = {name: sum(step[name] for step in steps) for name in ("median_us", "least_us", "cpu_us")}
        print(
            f"{row['layer']:14s} {row['shards']:6d} {row['tokens']:6d} {row['arithmetic']:8s}|"
            + "".join(f"{step['median_us']:8.0f} " for step in [*steps, row["all"]])
            + f"{row['all']['cpu_us']:8.0f} {row['all']['least_us']:8.0f} |"
            + f"{row['floor']['median_us']:8.0f}{row['message']['median_us']:8.0f}"
        )
    print("\nbytes sent, against sending every token to every shard")
    for row in rows:
        if row["tokens"] == BUDGET_CASE[2] and row["arithmetic"] == "numpy":
            share = row["sent_bytes"] / row["broadcast_bytes"]
            print(f"{row['layer']} over {row['shards']} shards: {share:.1%}, {1 - share:.1%} saved")
    most = max(row["sent_over_needed"] for row in rows)
    verdict = "met" if most <= BYTES_LIMIT else "MISSED"
    print(f"bytes at most {BYTES_LIMIT} x (tokens x shards needed x row): at most {most:.3f}, {verdict}")
    name, shards, tokens = BUDGET_CASE
    print(f"{tokens} tokens of {name} over {shards} shards in at most {BUDGET_US:.0f} µs:")
    for row in rows:
        if (row["layer"], row["shards"], row["tokens"]) != BUDGET_CASE:
            continue
        total = row["all"]
        verdict = "met" if total["median_us"] <= BUDGET_US else "MISSED"
        print(
            f"  {row['arithmetic']}: {total['median_us']:.0f} median, {total['cpu_us']:.0f} of processor time, "
            f"{total['least_us']:.0f} least, {verdict}; of the least combine {row['combine']['least_us']:.0f}, numpy's "
            f"passes over memory alone {row['floor']['least_us']:.0f}"
        )
    if arguments.json:
        write_json(arguments.json, {**header(), "rows": rows})


if __name__ == "__main__":
    main()
