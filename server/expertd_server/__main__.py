"""`python -m expertd_server` is `expertd-server`."""

from __future__ import annotations

import sys

from expertd_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
