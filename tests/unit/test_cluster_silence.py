"""When a server that does not answer is given up."""

from __future__ import annotations

from expertd_server.cluster_server import Silence


def test_silence_is_counted_from_the_first_failed_probe() -> None:
    silence = Silence()
    assert silence.after(True, 0.0) == 0
    assert silence.after(False, 100.0) == 0, "one slow probe after a gap in polling is no long silence"
    assert silence.after(False, 131.0) == 31
    assert silence.after(True, 132.0) == 0
    assert silence.after(False, 140.0) == 0, "an answer starts it over"
