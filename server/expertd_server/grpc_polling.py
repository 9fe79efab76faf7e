"""Which threads read gRPC's sockets, for processes that serve.

gRPC of late (its "event engine") has threads of its own read them and then wake the thread that waits for messages.
With a listener that does without, as all of them did before, that thread reads for itself: one hand-over less for each
message that comes and each answer that goes, which is a fifth of what a server takes of the processor.
"""

from __future__ import annotations

import os
from typing import Final

__all__ = ["read_where_messages_are_awaited"]

# Read once, when gRPC is imported; for gRPC's own list of such names see its rollouts.yaml.
_VARIABLE: Final = "GRPC_EXPERIMENTS"
_WITHOUT_EVENT_ENGINE: Final = "-event_engine_listener"


def read_where_messages_are_awaited() -> None:
    """To be called before gRPC is imported; children inherit it. What the user tells gRPC to try stays."""
    os.environ.setdefault(_VARIABLE, _WITHOUT_EVENT_ENGINE)
