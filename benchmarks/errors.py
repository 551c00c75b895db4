"""What can go wrong in a benchmark, other than a slow answer."""

from __future__ import annotations

__all__ = ["BenchmarkError"]


class BenchmarkError(Exception):
    """Something could not be measured; the message says what and why."""
