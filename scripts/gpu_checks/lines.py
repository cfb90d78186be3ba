"""A line of the check: its verdict and its numbers, as JSON in a file and as text."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

PASS, FAIL, WOULD = "PASS", "FAIL", "WOULD"
Number = float | int | str | bool | None


@dataclass(frozen=True)
class Line:
    """One result of a case."""

    verdict: str
    """PASS, FAIL, or WOULD where a GPU is needed and there is none."""
    what: str
    """The claim that was checked."""
    numbers: dict[str, Number] = field(default_factory=dict)
    """What was measured, with the unit in the name, and the goal where there is one."""
    step: str = ""
    case: str = ""

    def __str__(self) -> str:
        numbers = ", ".join(
            f"{name} {_text(value)}"
            for name, value in self.numbers.items()
            if value not in (None, "")
        )
        head = f"{self.verdict:<5} {self.step:>2} {self.case:<22} {self.what}"
        return f"{head}: {numbers}" if numbers else head


def checked(what: str, holds: bool, **numbers: Number) -> Line:
    """Return a PASS or FAIL line."""
    return Line(PASS if holds else FAIL, what, numbers)


def would(what: str) -> Line:
    """Return what a GPU would be needed for."""
    return Line(WOULD, what)


def goal(place: "Place", what: str, holds: bool, **numbers: Number) -> Line:
    """Return a line about a goal for GPUs; without one the numbers are only shown."""
    return checked(what, holds, **numbers) if place.has_gpu else Line(WOULD, what, numbers)


def append(path: Path, line: Line) -> None:
    """Write a line to a file of results; each is whole, so that a cut-off file can be read."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(line)) + "\n")


def read(path: Path) -> Iterator[Line]:
    """Yield the lines of a file of results, which may be missing."""
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            yield Line(**json.loads(text))


def _text(value: Number) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Place:
    """Where a case runs."""

    folder: Path
    """For its models and runs, shared by all cases."""

    @property
    def has_gpu(self) -> bool:
        """True if there is a GPU."""
        import torch  # takes seconds, which the process that runs the cases need not wait

        return torch.cuda.is_available()

    def gpu_gb_in_use(self) -> float:
        """Return the GB of the first GPU that all processes hold; 0 without one."""
        if not self.has_gpu:
            return 0.0
        import torch

        free, total = torch.cuda.mem_get_info(0)
        return (total - free) / 1e9
