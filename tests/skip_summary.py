"""A run of the tests ends with what it left out: where Docker or Ray is missing it must not look as if all had passed.

A part of conftest.py without torch, so that its own tests take no longer than they need.
"""

from __future__ import annotations

from collections import Counter

import pytest

__all__ = ["pytest_terminal_summary"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not run, by reason, most first; a whole file where not even its tests are known."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    groups: dict[str, Counter[str]] = {}
    for report in skipped:
        _path, _line, reason = report.longrepr
        kind = "files" if isinstance(report, pytest.CollectReport) else "tests"
        groups.setdefault(reason.removeprefix("Skipped: "), Counter())[kind] += 1
    terminalreporter.section(f"NOT RUN HERE: {len(skipped)} skipped", sep="!", red=True, bold=True)
    for reason, counts in sorted(groups.items(), key=lambda group: -group[1].total()):
        terminalreporter.line(f"{' and '.join(f'{n} {kind}' for kind, n in counts.items()):>10}: {reason}")
