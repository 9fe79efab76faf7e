"""Garbage is looked for now and then, and among what came after the start alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from expertd_server import cli
from expertd_server.config import Config

PROGRAM = """
import gc, json
from expertd_server.garbage import look_rarely

before, looks = gc.get_freeze_count(), []
gc.callbacks.append(lambda phase, info: looks.append(info["generation"]))
look_rarely()
some = [[n] for n in range(4000)]
few = len(looks)
more = [[n] for n in range(40000)]
print(json.dumps({"frozen": gc.get_freeze_count() - before, "few": few, "all": len(looks), "is_on": gc.isenabled()}))
"""


def test_thousands_of_objects_are_no_reason_to_look_and_many_more_are() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    said = json.loads(done.stdout)
    assert said["is_on"]
    assert said["frozen"] > 1000
    assert said["few"] == 0
    assert 1 <= said["all"] <= 8


def test_a_server_does_so_when_it_is_imported_and_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class ReachedError(Exception):
        pass

    def reached() -> None:
        assert "expertd_server.server" in sys.modules
        raise ReachedError

    monkeypatch.setattr(cli, "look_rarely", reached)
    with pytest.raises(ReachedError):
        cli._serve_in_this_process(Config(port=0))
