"""Every example as its own first lines say, against servers of this process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from serving import LAYER, OTHER_LAYER, running
from test_remote_experts import MODELS, PROMPT, calibrate, served
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT_S = 100  # of a process that imports torch and transformers on a machine with much else to do


def output_of(example: str, *arguments: str) -> str:
    """What an example prints; fails with what it said when it fails."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example), *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with running() as server:
        yield f"127.0.0.1:{server.server.port}"


def test_every_example_is_run_here() -> None:
    named = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'output_of("{path.name}"' not in named] == []


def test_forward(target: str) -> None:
    lines = output_of("forward.py", target).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [LAYER, OTHER_LAYER]
    assert all(": (16, 256) bfloat16, " in line and line.endswith("in a batch of 16") for line in lines), lines


def test_async_stream(target: str) -> None:
    assert f"{LAYER}: 100 answers, from batches of " in output_of("async_stream.py", target)


def test_expert_group(target: str) -> None:
    lines = output_of("expert_group.py", target).splitlines()
    assert [line.partition(": ")[0] for line in lines if not line.startswith(" ")] == [LAYER, OTHER_LAYER]
    assert lines.count(f"  experts 0-7: 16 tokens to {target}") == 2, lines


def test_transformers_generate(tmp_path: Path) -> None:
    """A small model with random weights, its experts on two servers, and a tokenizer whose tokens are bytes."""
    torch.manual_seed(1)
    calibrate(MODELS["qwen3_moe"]().float().eval(), tmp_path, PROMPT)
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    with contextlib.ExitStack() as stack:
        targets = [stack.enter_context(served(tmp_path, experts)) for experts in ("0-3", "4-7")]
        text = output_of("transformers_generate.py", str(tmp_path), *targets)
    assert "2 layers are remote: model.layers.0 to model.layers.1\n" in text
    assert "The answer to the ultimate question is" in text
    sent = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("expertd_client_sent_bytes")]
    assert sent, text
    assert min(sent) > 0, text
