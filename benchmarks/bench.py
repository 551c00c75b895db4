"""What every measurement is given, and what a section of the report is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from generator import Generator
from report import Row
from servers import BareServer, Server, TaskdServer

__all__ = ["QUIET_SHARE", "Bench", "Section"]

QUIET_SHARE = 0.05
"""What others may use of all cores before the figures are no longer to be trusted."""


@dataclass(frozen=True)
class Bench:
    """
    What every measurement needs.

    Attributes:
        directory: Where servers run and log.
        generator: The load generator.
        rounds: How often each measurement is repeated.
        is_calibration: Whether a second bare server stands in for each daemon, to
            show what ratios the noise of the machine alone produces.
    """

    directory: Path
    generator: Generator
    rounds: int
    is_calibration: bool = False

    def taskd(self, procs: int) -> Server:
        """Return a daemon that is not started yet, or its stand-in."""
        if self.is_calibration:
            return BareServer(self.directory)
        return TaskdServer(self.directory, procs)


@dataclass(frozen=True)
class Section:
    """
    One part of the report.

    Attributes:
        title: What is measured, for the reader of the table.
        measure: Measures it.
        has_reference: Whether it compares with the bare server, and so can be calibrated.
    """

    title: str
    measure: Callable[[Bench], Iterator[Row]]
    has_reference: bool = True
