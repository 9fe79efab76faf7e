"""Threads for the CPU backend, in each of which torch uses one thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["run_all"]

_START_TIMEOUT_S = 60.0

_Item = TypeVar("_Item")


def run_all(function: Callable[[_Item], None], items: Sequence[_Item], *, by_workers: bool) -> None:
    """function(item) for every item: by the workers, where torch uses one thread, or here, where it uses all of them.

    A single item too goes to a worker if by_workers: the number of threads may change bits.
    """
    num_threads = torch.get_num_threads()
    if not by_workers or num_threads == 1:
        for item in items:
            function(item)
        return
    is_inference = torch.is_inference_mode_enabled()  # a property of the thread, which the workers have to share

    def call(item: _Item) -> None:
        with torch.inference_mode(is_inference), torch.no_grad():
            function(item)

    for _ in _workers(num_threads).map(call, items):
        pass


@functools.cache
def _workers(num_threads: int) -> ThreadPoolExecutor:
    """As many threads, in each of which torch uses one thread.

    Experts side by side wait for one another once in a call, threads inside an operation at each of its ends: on a
    machine with other work to do that is the difference between slower and several times slower.
    """
    all_started = threading.Barrier(num_threads + 1)

    def start() -> None:
        torch.get_num_threads()  # torch sets a thread's number when first asked, and would undo the next line
        torch.set_num_threads(1)
        all_started.wait(_START_TIMEOUT_S)

    workers = ThreadPoolExecutor(num_threads, thread_name_prefix="expertd-cpu")
    started = [workers.submit(start) for _ in range(num_threads)]
    all_started.wait(_START_TIMEOUT_S)
    for future in started:
        future.result(_START_TIMEOUT_S)
    # NOTE: set_num_threads is this thread's number and the default of threads to come; put the latter back.
    torch.set_num_threads(num_threads)
    return workers
