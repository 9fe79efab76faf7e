"""The SDK and the real server: what the operator answers, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fake_service import BFLOAT16
from sdk_cases import FLAVOURS, Driver
from serving import HIDDEN_SIZE, LAYER, NUM_EXPERTS, OTHER_LAYER, Running, running

import expertd
from expertd_server.backend import MoEOutput


@pytest.fixture(scope="module")
def real() -> Iterator[Running]:
    with running(max_batch_tokens=16) as server:
        yield server


@pytest.mark.parametrize(("flavour", "transport"), FLAVOURS)
@pytest.mark.parametrize("count", [0, 1, 16, 50])
def test_real_server_answers_like_its_operator(real: Running, flavour: str, transport: Any, count: int) -> None:
    rng = np.random.default_rng(count)
    hidden = rng.standard_normal((count, HIDDEN_SIZE), dtype=np.float32).astype(BFLOAT16)
    logits = rng.standard_normal((count, NUM_EXPERTS), dtype=np.float32)
    layer = real.server.store.get(LAYER)
    inputs = torch.from_numpy(hidden.view(np.int16)).view(torch.bfloat16), torch.from_numpy(logits)

    def operator(**options: Any) -> MoEOutput:
        return layer.backend.forward(layer.prepared, inputs[0], routing_logits=inputs[1], **options)

    driver = Driver(flavour, expertd.ClientConfig(f"localhost:{real.server.port}", transport=transport))
    try:
        driver.wait_ready(timeout_s=20)
        driver.wait_ready(LAYER, timeout_s=20)
        assert [info.name for info in driver.layers()] == [LAYER, OTHER_LAYER]
        whole = driver.forward(LAYER, inputs[0], routing_logits=inputs[1], return_routing=True)
        want = operator()
        assert want.output is not None
        assert torch.equal(whole.output, want.output), f"{count} tokens"
        assert torch.equal(whole.topk_ids, want.topk_ids), f"{count} tokens"
        assert torch.equal(whole.expert_weights, want.expert_weights), f"{count} tokens"
        assert whole.timing.batch_tokens <= 16
        separate = driver.forward(
            LAYER, hidden, topk_ids=want.topk_ids, topk_weights=want.expert_weights, do_finalize=False
        )
        index = separate.expanded_idx_to_permuted_idx
        rows = operator(do_finalize=False)
        assert rows.gemm2_output is not None
        assert rows.expanded_idx_to_permuted_idx is not None
        expected = rows.gemm2_output[rows.expanded_idx_to_permuted_idx.long()].view(torch.int16).numpy()
        assert np.array_equal(separate.gemm2_output[index].view(np.int16), expected), f"{count} tokens"
        with pytest.raises(expertd.LayerNotFoundError):
            driver.forward("nowhere", hidden, routing_logits=logits)
        with pytest.raises(expertd.VersionNotHeldError):
            driver.forward(LAYER, hidden, routing_logits=logits, weights_version=99)
        if count:
            logits[0, 0] = np.nan
            with pytest.raises(expertd.InvalidRequestError, match="routing_logits") as raised:
                driver.forward(LAYER, hidden, routing_logits=logits)
            assert raised.value.violations
    finally:
        driver.shut()
