"""The store: names, versions, the memory budget."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from typing import Any

import pytest
import torch

from expertd_server.backend import PreparedLayer
from expertd_server.errors import (
    ConfigError,
    InsufficientMemoryError,
    LayerNotFoundError,
    UnavailableError,
    VersionConflictError,
    VersionNotHeldError,
)
from expertd_server.layer import MoELayer
from expertd_server.store import LayerStore
from expertd_server.types import LayerSpec
from expertd_server.weights import ExpertWeights

SPEC = LayerSpec(hidden_size=4, intermediate_size=2, num_experts=2, top_k=1)


def layer(name: str, version: int = 1, nbytes: int = 100, spec: LayerSpec = SPEC) -> MoELayer:
    fp8 = torch.float8_e4m3fn
    ones = torch.ones(2)
    weights = ExpertWeights(
        gemm1_weights=torch.zeros(2, 4, 4, dtype=fp8),
        output1_scales_scalar=ones,
        output1_scales_gate_scalar=ones,
        gemm2_weights=torch.zeros(2, 4, 2, dtype=fp8),
        output2_scales_scalar=ones,
    )
    backend: Any = None
    return MoELayer(name, PreparedLayer(spec, weights, nbytes), backend, version)


def store_of(*layers: MoELayer, budget_bytes: int | None = None) -> LayerStore:
    store = LayerStore(budget_bytes)
    for one in layers:
        store.add(one)
    store.finish_loading()
    return store


def test_layers_by_name() -> None:
    a, b = layer("a"), layer("b", nbytes=50)
    store = store_of(b, a)
    assert store.get("a") is a
    assert store.get("b", 1) is b
    assert store.layers() == [a, b], "sorted by name"
    assert store.nbytes == 150


def test_one_version_is_current_and_the_others_are_for_those_who_ask() -> None:
    store = store_of(layer("a", 2), layer("a", 10), layer("a", 3))
    assert store.get("a").weights_version == 2, "the first one, until told otherwise"
    assert store.set_current("a", 10) == 2
    assert store.get("a").weights_version == 10
    assert store.get("a", 3).weights_version == 3
    assert store.versions("a") == [2, 3, 10]
    assert [one.weights_version for one in store.layers()] == [10]
    assert [(held.current.weights_version, held.weights_versions) for held in store.all_held()] == [(10, [2, 3, 10])]
    assert store.set_current("a", 3) == 10, "an older one too: that is how a bad version is taken back"
    assert store.nbytes == 300


def test_the_current_version_is_not_removed_alone() -> None:
    store = store_of(layer("a", 1), layer("a", 2))
    with pytest.raises(VersionConflictError, match=r"weights_version 1 of layer 'a' is the current one; .*held: 2\)"):
        store.remove("a", 1)
    store.set_current("a", 2)
    store.remove("a", 1)
    assert store.versions("a") == [2]
    with pytest.raises(VersionConflictError, match=r"held: none"):
        store.remove("a", 2)


def test_removing_a_layer_removes_all_its_versions() -> None:
    store = store_of(layer("a", 1), layer("a", 2))
    assert store.remove("a").nbytes == 200
    with pytest.raises(LayerNotFoundError, match="'a' is not held here; no layer is"):
        store.get("a")
    store.add(layer("a", 7))
    assert store.get("a").weights_version == 7, "the first one of a new life"


def test_a_removed_version_is_freed_when_its_last_user_lets_go() -> None:
    store = store_of(layer("a", 1), budget_bytes=250)
    store.add(layer("a", 2))
    store.set_current("a", 2)
    users = [store.get("a", 1), store.get("a", 1)]
    weights = weakref.ref(users[0].prepared.weights)
    removed = store.remove("a", 1)
    for _ in range(2):
        assert not removed.wait(0)
        assert store.nbytes == 200, "in use, so it still takes its memory"
        with pytest.raises(InsufficientMemoryError):
            store.check_room("a", 100)
        users.pop()
    assert removed.wait(0)
    assert weights() is None, "the store or its answer keeps the weights alive"
    assert store.nbytes == 100
    store.check_room("a", 150)


def test_a_layer_without_users_is_freed_at_once() -> None:
    store = store_of(layer("a", 1), layer("a", 2))
    assert store.remove("a").wait(0)
    assert store.nbytes == 0


def test_what_is_not_held_is_answered_with_what_is() -> None:
    store = store_of(*(layer(f"layers.{n}") for n in range(10)))
    with pytest.raises(LayerNotFoundError, match=r"held: layers\.0, .*layers\.7 and 2 more$"):
        store.get("layers.10")
    with pytest.raises(VersionNotHeldError, match="weights_version 2; held: 1; leave it unset for the current one"):
        store.get("layers.0", 2)
    # Orders that leave it unset are refused, or unload all versions.
    with pytest.raises(VersionNotHeldError, match=r"weights_version 2; held: 1$"):
        store.set_current("layers.0", 2)
    with pytest.raises(VersionNotHeldError, match=r"weights_version 2; held: 1$"):
        store.remove("layers.0", 2)
    with pytest.raises(LayerNotFoundError):
        store.versions("nowhere")


def test_while_loading_an_unknown_name_may_still_come() -> None:
    store = LayerStore()
    store.add(layer("a"))
    with pytest.raises(UnavailableError, match="'b' is not loaded yet"):
        store.get("b")
    with pytest.raises(UnavailableError, match="'b' is not loaded yet"):
        store.held("b")
    store.finish_loading()
    with pytest.raises(LayerNotFoundError):
        store.get("b")


def test_while_loading_a_layer_is_described_and_does_not_answer() -> None:
    store = LayerStore()
    store.add(layer("a"))
    assert store.held("a").current.name == "a"
    for version in (None, 1):
        with pytest.raises(UnavailableError, match="'a' is not loaded yet"):
            store.get("a", version)
    store.finish_loading()
    assert store.get("a").name == "a"


def test_a_version_is_held_once() -> None:
    store = store_of(layer("a"))
    with pytest.raises(VersionConflictError, match="'a' version 1 is held already"):
        store.add(layer("a"))


def test_versions_of_one_layer_have_one_shape() -> None:
    store = store_of(layer("a"))
    with pytest.raises(ConfigError, match="top_k=2"):
        store.add(layer("a", 2, spec=dataclasses.replace(SPEC, top_k=2)))
    assert store.versions("a") == [1]


def test_the_budget_holds() -> None:
    store = store_of(layer("a", nbytes=60), budget_bytes=100)
    with pytest.raises(ConfigError, match="takes 41 bytes, which makes 101, but memory_budget_bytes is 100") as caught:
        store.add(layer("b", nbytes=41))
    assert caught.value.metadata == {"needed_bytes": "41", "free_bytes": "40"}
    store.add(layer("b", nbytes=40))
    assert store.nbytes == 100


@pytest.mark.parametrize(("name", "version", "says"), [("", 1, "name is empty"), ("a", 0, "weights_version is 0")])
def test_a_layer_has_a_name_and_a_version(name: str, version: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        layer(name, version)


def test_versions_come_and_go_under_readers() -> None:
    """A layer that is replaced version by version is there at every moment."""
    store = store_of(layer("a", 1))
    failures: list[Exception] = []
    is_over = threading.Event()

    def reader() -> None:
        last = 0
        try:
            while not is_over.is_set():
                version = store.get("a").weights_version
                assert version >= last
                last = version
                store.layers()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=reader) for _ in range(4)]
    for thread in threads:
        thread.start()
    for version in range(2, 300):
        store.add(layer("a", version))
        store.set_current("a", version)
        store.remove("a", version - 1)
    is_over.set()
    for thread in threads:
        thread.join(30)
    assert failures == []
