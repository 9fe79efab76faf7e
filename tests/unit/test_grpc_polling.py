"""The launcher says how gRPC reads its sockets, in time and unless the user has said something else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from expertd_server.grpc_polling import read_where_messages_are_awaited


def test_the_listener_is_the_one_that_reads_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPC_EXPERIMENTS", raising=False)
    read_where_messages_are_awaited()
    assert os.environ["GRPC_EXPERIMENTS"] == "-event_engine_listener"


@pytest.mark.parametrize("theirs", ["", "tcp_frame_size_tuning"])
def test_what_the_user_says_stays(monkeypatch: pytest.MonkeyPatch, theirs: str) -> None:
    monkeypatch.setenv("GRPC_EXPERIMENTS", theirs)
    read_where_messages_are_awaited()
    assert os.environ["GRPC_EXPERIMENTS"] == theirs


def test_grpc_is_not_imported_before() -> None:
    code = "import sys, expertd_server.cli, expertd_server.child; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
