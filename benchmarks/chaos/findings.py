"""What a lane of the campaign hands back: figures, raw cases, and each failure with the command that repeats it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DETECTION_KEYS = ("corruptions", "detected", "payloads_executed")


@dataclass
class Findings:
    """Results of one lane."""

    lane: str
    """Name on the command line."""
    seed: int
    """Seed of the campaign."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Figures by name."""
    baseline: dict[str, Any] = field(default_factory=dict)
    """The same faults, fewer cases, on megatron-core's own saving."""
    cases: list[dict[str, Any]] = field(default_factory=list)
    """Every case, for the raw results."""
    failures: list[str] = field(default_factory=list)
    """What is not as promised, with the command that repeats it."""

    def fail(self, case: object, what: str) -> None:
        """Record a failure, and print it with its command."""
        command = f"python -m benchmarks.chaos --seed {self.seed} --only {self.lane}:{case}"
        self.failures.append(f"{self.lane} {case}: {what}; repeat with: {command}")
        print(f"FAILED {self.failures[-1]}", flush=True)

    def count(self, name: str, number: int = 1) -> None:
        """Add to a figure."""
        self.figures[name] = self.figures.get(name, 0) + number
