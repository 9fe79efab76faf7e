"""The launcher starts itself over once, with malloc settings, and only where they are of use."""

from __future__ import annotations

import os
import sys

import pytest

from expertd_server import malloc


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], dict[str, str]]]:
    """What would have been executed: program, arguments, malloc settings in its environment."""
    seen: list[tuple[str, list[str], dict[str, str]]] = []

    def execv(program: str, arguments: list[str]) -> None:
        seen.append((program, arguments, {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")}))

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")})
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "expertd_server", "serve"])
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.39" if name == "CS_GNU_LIBC_VERSION" else None)
    return seen


def test_starts_over_with_the_same_arguments(starts: list[tuple[str, list[str], dict[str, str]]]) -> None:
    malloc.reexec_with_settings()
    arguments = [sys.executable, "-X", "dev", "-m", "expertd_server", "serve"]
    assert starts == [(sys.executable, arguments, dict(malloc.SETTINGS))]


def test_starts_over_once(starts: list[tuple[str, list[str], dict[str, str]]]) -> None:
    malloc.reexec_with_settings()
    malloc.reexec_with_settings()
    assert len(starts) == 1


def test_settings_of_the_user_stay(starts: list[tuple[str, list[str], dict[str, str]]]) -> None:
    os.environ["MALLOC_TRIM_THRESHOLD_"] = "1000000"
    malloc.reexec_with_settings()
    assert starts == []


@pytest.mark.parametrize("answer", [None, "musl", ValueError("unrecognized configuration name")])
def test_other_c_libraries_are_left_alone(
    starts: list[tuple[str, list[str], dict[str, str]]], monkeypatch: pytest.MonkeyPatch, answer: str | Exception | None
) -> None:
    def confstr(_name: str) -> str | None:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(os, "confstr", confstr)
    malloc.reexec_with_settings()
    assert starts == []
