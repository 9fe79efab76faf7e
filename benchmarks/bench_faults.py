"""What a fault in a tier costs its callers: two shards, two replicas each, a worker that keeps them busy.

One at a time: kill -9 of a replica, a replica that freezes without a word, a rolling restart of all four, and new
weights for every layer, there and back. Prints what became of the requests, and a timeline of answers per 100 ms around
the fault. What counts are the requests that were sent from the fault until the tier is whole again, however late they
end. Exits with 1 when one failed or an answer had other bits than all before of its version of the weights.
Times are measured and judged, not enforced.

The servers are processes of this machine, or, with --compose, the containers of the running stack (make up with
WORKER_TRACE_FILE=/tmp/trace EXPERTD_ADMIN=true). Pass --json PATH to keep the results.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from _common import header, write_json
from _faults import (
    Request,
    begun_between,
    between,
    longest_gap_s,
    outcomes,
    parse,
    percentile,
    rate,
    recovery_s,
    timeline,
)
from _tier import LAYERS, NUM_LAYERS, PRESET, ROOT, SERVERS, ComposeTier, ProcessTier, Tier, gauge, wait_until_used

COMPOSE = ("docker", "compose", "-f", str(ROOT / "deploy" / "docker-compose.yml"))
WARM_UP_S = 5.0
POLL_S = 0.1
REQUEST_TIMEOUT_S = 20.0  # of deploy/worker.py
SETTLED_S = 3.0  # after which what is left of the tier is taken to run evenly
RECOVERY_SHARE = 0.95
RECOVERY_LIMIT_S = 2.0
SHOWN_BEFORE_S, SHOWN_AFTER_S = 1.0, 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compose", action="store_true", help="use the Compose stack that runs")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="which (default: all)")
    parser.add_argument("--seconds", type=float, default=10.0, help="before and during each fault (default: 10)")
    parser.add_argument("--concurrency", type=int, default=4, help="threads of the worker (default: 4; not --compose)")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second, 0: as many as come back (default)")
    parser.add_argument("--json", metavar="PATH", help="write the results here as well")
    options = parser.parse_args()
    if options.compose:
        results = measure(ComposeTier(COMPOSE), options.faults, options.seconds)
    else:
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessTier(Path(folder), options.concurrency, options.rate) as tier,
        ):
            results = measure(tier, options.faults, options.seconds)
    if options.json:
        settings = {"compose": options.compose, "concurrency": options.concurrency, "rate": options.rate}
        write_json(options.json, {**header(), **settings, "faults": results})
    if any(set(result["outcomes"]) != {"ok"} for result in results):
        sys.exit(1)


def measure(tier: Tier, faults: list[str], seconds: float) -> list[dict[str, Any]]:
    """Those faults, one after the other."""
    wait_until_used(tier)
    return [FAULTS[name](tier, seconds) for name in faults]


def killed(tier: Tier, seconds: float) -> dict[str, Any]:
    """kill -9 of one replica: throughput is back to what the others can do."""
    normal, normal_rate = baseline(tier, seconds)
    fault_s = time.time()
    tier.kill("shard-0-a")
    time.sleep(max(seconds, 2 * SETTLED_S))
    healed_s = time.time()
    tier.start("shard-0-a")
    wait_until_used(tier)
    stop_s = time.time()
    requests = requests_until(tier, stop_s)
    result = report("kill -9 of one replica", requests, normal, fault_s, stop_s)
    return result | recovery(requests, normal_rate, fault_s, healed_s)


def paused(tier: Tier, seconds: float) -> dict[str, Any]:
    """One replica freezes, its connections stay: the others answer after the hedge delay, then at once.

    In a tier that is busy all the time (--rate 0) they have twice the work, and what counts is the rate they reach.
    """
    normal, normal_rate = baseline(tier, seconds)
    delays_s = gauge(tier, "expertd_client_hedge_delay_seconds")
    fault_s = time.time()
    tier.pause("shard-1-b")
    try:
        time.sleep(max(seconds, 2 * SETTLED_S))
        healed_s = time.time()
    finally:
        tier.unpause("shard-1-b")
    wait_until_used(tier)
    stop_s = time.time()
    requests = requests_until(tier, stop_s)
    during = begun_between(requests, fault_s, healed_s)
    limit_s = max(delays_s.values()) + 2 * percentile(normal, 0.99)
    result = report("freeze of one replica", requests, normal, fault_s, stop_s)
    result |= recovery(requests, normal_rate, fault_s, healed_s)
    result |= {
        "hedge_delays_s": delays_s,
        "p99_limit_s": limit_s,
        "is_p99_met": percentile(during, 0.99) <= limit_s,
    }
    print(f"  p99 at most hedge delay + 2 x normal p99 = {limit_s * 1e3:.1f} ms: {verdict(result['is_p99_met'])}")
    return result


def rolled(tier: Tier, seconds: float) -> dict[str, Any]:
    """Every server is asked to drain, ends, and comes back, one after the other."""
    normal, _ = baseline(tier, seconds)
    fault_s = time.time()
    for server in SERVERS:
        tier.stop(server)
        tier.start(server)
        wait_until_used(tier)
    stop_s = time.time()
    return report("rolling restart of all four", requests_until(tier, stop_s), normal, fault_s, stop_s)


def swapped(tier: Tier, seconds: float) -> dict[str, Any]:
    """Other weights for every layer, loaded beside the first ones, made current and back, under load.

    Before and after, only one version is held: the worker then knows the bits of its pure answers.
    """
    normal, _ = baseline(tier, seconds)
    fault_s = time.time()
    for version, before in ((2, 1), (1, 2)):
        for layer in range(NUM_LAYERS):
            source = ("--synthetic", PRESET, "--layer-index", str(layer), "--seed", str(version - 1))
            _order(tier, "load", f"synthetic.{PRESET}.{layer}", "--version", str(version), *source)
        _order(tier, "swap", *LAYERS, "--version", str(version))
        _order(tier, "unload", *LAYERS, "--version", str(before))
        time.sleep(SETTLED_S)
    stop_s = time.time()
    requests = requests_until(tier, stop_s)
    result = report("new weights, there and back", requests, normal, fault_s, stop_s)
    answers = Counter(request.version for request in begun_between(requests, fault_s, stop_s))
    result["answers_by_version"] = dict(sorted(answers.items()))
    print(f"  answers by version of the weights: {result['answers_by_version']}")
    if set(answers) != {1, 2}:
        raise RuntimeError(f"expected answers in the versions 1 and 2, there are {dict(answers)}")
    return result


def _order(tier: Tier, *order: str) -> None:
    for server in SERVERS:
        tier.admin(server, *order)


def requests_until(tier: Tier, stop_s: float) -> list[Request]:
    """All requests, read when all that were sent before stop_s have ended, those too that hung."""
    while min(gauge(tier, "worker_answered_until_timestamp_seconds").values(), default=0.0) < stop_s:
        if time.time() > stop_s + REQUEST_TIMEOUT_S + WARM_UP_S:
            raise TimeoutError(f"the worker has a request that has not ended {REQUEST_TIMEOUT_S + WARM_UP_S} s later")
        time.sleep(POLL_S)
    return parse(tier.trace())


def baseline(tier: Tier, seconds: float) -> tuple[list[Request], float]:
    """The requests of a while without faults, and good answers a second. First, what was started warms up."""
    time.sleep(WARM_UP_S)
    start_s = time.time()
    time.sleep(seconds)
    stop_s = time.time()
    requests = parse(tier.trace())
    return between(requests, start_s, stop_s), rate(requests, start_s, stop_s)


def report(name: str, requests: list[Request], normal: list[Request], fault_s: float, stop_s: float) -> dict[str, Any]:
    """What is of interest about every fault, printed."""
    during = begun_between(requests, fault_s, stop_s)
    ended = outcomes(during)
    shown = timeline(requests, fault_s - SHOWN_BEFORE_S, fault_s + SHOWN_AFTER_S)
    result: dict[str, Any] = {
        "fault": name,
        "seconds": stop_s - fault_s,
        "outcomes": ended,
        "failed": len(during) - ended.get("ok", 0),
        "normal_p50_s": percentile(normal, 0.5),
        "normal_p99_s": percentile(normal, 0.99),
        "p50_s": percentile(during, 0.5),
        "p99_s": percentile(during, 0.99),
        "max_s": percentile(during, 1.0),
        "longest_gap_s": longest_gap_s(requests, fault_s, stop_s),
        "answers_per_100_ms": {"from_s": -SHOWN_BEFORE_S, "counts": shown},
    }
    print(f"{name}, {result['seconds']:.1f} s: {len(during)} requests, {result['failed']} failed")
    print("  ms            p50     p99     max")
    print(f"  before   {percentile(normal, 0.5) * 1e3:8.1f}{percentile(normal, 0.99) * 1e3:8.1f}")
    print(f"  during   {result['p50_s'] * 1e3:8.1f}{result['p99_s'] * 1e3:8.1f}{result['max_s'] * 1e3:8.1f}")
    print(f"  longest time without an answer: {result['longest_gap_s'] * 1e3:.0f} ms")
    before = round(SHOWN_BEFORE_S * 10)
    print(f"  per 100 ms: {' '.join(map(str, shown[:before]))} | {' '.join(map(str, shown[before:]))}")
    return result


def recovery(requests: list[Request], normal_rate: float, fault_s: float, stop_s: float) -> dict[str, Any]:
    """How soon the servers that are left answer as many requests as they can, printed."""
    surviving_rate = rate(requests, fault_s + SETTLED_S, stop_s)
    back_after_s = recovery_s(requests, fault_s, stop_s, RECOVERY_SHARE * surviving_rate)
    is_met = back_after_s is not None and back_after_s <= RECOVERY_LIMIT_S
    back = "never" if back_after_s is None else f"{back_after_s} s"
    print(
        f"  answers/s: {normal_rate:.1f} before, {surviving_rate:.1f} surviving; {RECOVERY_SHARE} of that after {back}"
    )
    print(f"  within {RECOVERY_LIMIT_S:.0f} s: {verdict(is_met)}")
    return {
        "normal_per_s": normal_rate,
        "surviving_per_s": surviving_rate,
        "recovery_s": back_after_s,
        "is_recovery_met": is_met,
    }


def verdict(is_met: bool) -> str:
    """For people."""
    return "met" if is_met else "MISSED"


FAULTS = {"kill": killed, "freeze": paused, "restart": rolled, "weights": swapped}


if __name__ == "__main__":
    main()
