"""Writing an FP8 checkpoint. How much the compensated rounding gains is in integration/test_huggingface.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, E, H, K, draft

from expertd_server.calibration import Calibration
from expertd_server.checkpoint import open_checkpoint
from expertd_server.compensation import compensation_factor, round_compensated
from expertd_server.errors import CheckpointError
from expertd_server.export import export_fp8
from expertd_server.fp8 import to_fp8


def samples(layer_names: list[str], num_tokens: int = 64) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    # The last expert gets no tokens.
    return {
        name: (
            torch.randn(num_tokens, H, generator=generator),
            torch.randint(0, E - 1, (num_tokens, K), generator=generator),
        )
        for name in layer_names
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_with_its_own_scales(family: str, tmp_path: Path) -> None:
    made = draft(family, fp8=False)
    source = open_checkpoint(made.write(tmp_path / "bfloat16", shards=2))
    (tmp_path / "bfloat16" / "tokenizer.json").write_text("{}")
    given = samples(source.layer_names)
    scales = export_fp8(source, tmp_path / "fp8", given)
    written = open_checkpoint(tmp_path / "fp8")
    assert written.layer_names == source.layer_names
    assert (tmp_path / "fp8" / "tokenizer.json").exists()
    for name in source.layer_names:
        at_load = source.load(name, calibration=Calibration(layers=scales, tokens=given))[1]
        account = written.account(name)
        account.raise_problems()
        spec, weights = written.load(name)
        assert account.num_fp8_weights == spec.num_experts * (3 if spec.activation.is_gated else 2)
        assert weights.hidden_states_scale == pytest.approx(1 / scales[name].gemm1, rel=1e-6)
        for tensor in ("gemm1_weights", "gemm2_weights"):
            bits, bits_at_load = (getattr(w, tensor).view(torch.uint8) for w in (weights, at_load))
            assert torch.equal(bits, bits_at_load), f"{family}, {name}: {tensor} of the file and as rounded at load"
        router, bias = source.router(name)
        copied, copied_bias = written.router(name)
        assert torch.equal(copied, router)
        assert (bias is None) == (copied_bias is None)
        for expert in range(E):
            for projection in written.architecture.dialect.projections.values():
                real = source.projection(name, expert, projection)
                error = (written.projection(name, expert, projection) - real).norm() / real.norm()
                assert error < 0.06, f"{family}, {name}, {expert}, {projection}"


def test_without_inputs_weights_are_rounded_to_the_nearest_value() -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(1)) * 50
    rounded = round_compensated(weight, compensation_factor(torch.zeros(70, 70)))
    assert torch.equal(rounded.float(), to_fp8(weight).float())
    independent = round_compensated(weight, compensation_factor(torch.eye(70)))
    assert torch.equal(independent.float(), rounded.float()), "inputs that are independent leave nothing to make up for"


def test_values_that_are_fp8_already_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = to_fp8(torch.randn(5, 70, generator=generator) * 50)
    inputs = torch.randn(30, 70, generator=generator) + 1
    rounded = round_compensated(weight.float(), compensation_factor(inputs.T @ inputs / 30))
    assert torch.equal(rounded.float(), weight.float())


def test_correlated_inputs_see_less_of_the_rounding() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(32, 150, generator=generator) * 50
    directions = torch.randn(10, 150, generator=generator)

    def inputs(count: int) -> torch.Tensor:
        noise = torch.randn(count, 150, generator=generator)
        return torch.randn(count, 10, generator=generator) @ directions + 0.3 * noise

    seen, unseen = inputs(2000), inputs(500)
    rounded = round_compensated(weight, compensation_factor(seen.T @ seen / len(seen))).float()
    expected = unseen @ weight.T
    compensated = (unseen @ rounded.T - expected).norm() / expected.norm()
    nearest = (unseen @ to_fp8(weight).float().T - expected).norm() / expected.norm()
    assert compensated < 0.5 * nearest, f"seed 1: {compensated} against {nearest}"


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    wide = open_checkpoint(draft(fp8=False).write(tmp_path / "bfloat16"))
    given = samples(wide.layer_names)
    with pytest.raises(CheckpointError, match=r"samples has no tokens for model\.layers\.1; it has model\.layers\.0"):
        export_fp8(wide, tmp_path / "fp8", {"model.layers.0": given["model.layers.0"]})
    assert not (tmp_path / "fp8").exists()
    with pytest.raises(CheckpointError, match="bfloat16 exists, expected the name of a new directory"):
        export_fp8(wide, tmp_path / "bfloat16", given)
    with pytest.raises(CheckpointError, match="is in FP8 already"):
        export_fp8(open_checkpoint(draft().write(tmp_path / "other")), tmp_path / "fp8", given)
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text()).get("quantization_config") is None
