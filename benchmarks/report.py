"""Rows of the report: a figure with its target, printed as a table line or kept as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

__all__ = ["Row", "Target", "at_least", "at_most"]


@dataclass(frozen=True)
class Target:
    """The value that a figure must reach, or must not pass."""

    limit: float
    is_floor: bool

    def __str__(self) -> str:
        return f"{'>=' if self.is_floor else '<='} {self.limit:g}"

    def is_met_by(self, value: float) -> bool:
        """Whether *value* is on the right side."""
        return value >= self.limit if self.is_floor else value <= self.limit


def at_least(limit: float) -> Target:
    """Return the target of a figure that should be high."""
    return Target(limit, is_floor=True)


def at_most(limit: float) -> Target:
    """Return the target of a figure that should be low."""
    return Target(limit, is_floor=False)


@dataclass(frozen=True)
class Row:
    """
    One figure of the report; the median of its samples is what counts.

    Attributes:
        section: Which section measured it.
        name: What it is.
        unit: What it is counted in, as printed behind the number.
        samples: One value for each round.
        target: What the median is held against.
        detail: What it is made of, in words; one line or more.
        warnings: Why not to trust it.
        errors: Failed requests; with any, the row fails.
        raw: All that was measured, for the JSON file.
    """

    section: str
    name: str
    unit: str
    samples: Sequence[float]
    target: Target
    detail: str = ""
    warnings: Sequence[str] = ()
    errors: int = 0
    raw: Mapping[str, object] = field(default_factory=dict)

    @property
    def has_passed(self) -> bool:
        """Whether the median reaches the target, without errors."""
        return self.errors == 0 and self.target.is_met_by(median(self.samples))

    @property
    def verdict(self) -> str:
        """The marker in the table."""
        return "PASS" if self.has_passed else "FAIL"

    def as_text(self) -> str:
        """Return the row's line of the table, and a line for each thing to know about it."""
        low, high = min(self.samples), max(self.samples)
        value = f"{_number(median(self.samples))} {self.unit}"
        spread = f"({_number(low)} .. {_number(high)})"
        head = f"  {self.verdict}  {self.name:<32}{value:>10}  {spread:<16} {self.target!s:<8}"
        notes = self.detail.splitlines()
        notes += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join([head.rstrip(), *(f"        {note}" for note in notes)])

    def as_json(self) -> dict[str, object]:
        """Return the row as an object that JSON can carry."""
        return {
            "section": self.section,
            "name": self.name,
            "unit": self.unit,
            "samples": [_finite(sample) for sample in self.samples],
            "median": _finite(median(self.samples)),
            "target": str(self.target),
            "passed": self.has_passed,
            "errors": self.errors,
            "warnings": list(self.warnings),
            "raw": dict(self.raw),
        }


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 20 and math.isfinite(value) else f"{value:.2f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
