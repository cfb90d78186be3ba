"""Curves of a run's metrics, read as the file grows, with a bounded number of points."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup, escape

from rlhf_ray.observability.sinks import record_of
from rlhf_ray.web.text import figure

SHOWN = {
    "objective/scores": "Reward",
    "objective/kl": "KL, nats a response",
    "response_length/mean": "Response length, tokens",
    "eval/score": "Held-out score",
}
MOST_POINTS = 400
"""Points of a curve that are held; beyond, every other one is dropped."""
_WIDTH, _HEIGHT, _PAD = 320, 96, 6


@dataclass
class Curve:
    """One metric over iterations."""

    points: list[tuple[float, float]] = field(default_factory=list)
    """Iteration and mean over the iterations up to the next point."""
    stride: int = 1
    """Iterations that a point stands for."""
    _sum: float = 0.0
    _num: int = 0

    def add(self, iteration: float, value: float) -> None:
        """Add the value of an iteration."""
        self._sum, self._num = self._sum + value, self._num + 1
        if self._num < self.stride:
            return
        self.points.append((iteration, self._sum / self._num))
        self._sum, self._num = 0.0, 0
        if len(self.points) >= MOST_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(b[0], (a[1] + b[1]) / 2) for a, b in pairs]
            self.stride *= 2

    def svg(self) -> Markup:
        """Draw it, with its first and last iteration and its bounds."""
        xs, ys = zip(*self.points, strict=True)
        low, high = min(ys), max(ys)
        x_scale = (_WIDTH - 2 * _PAD) / ((xs[-1] - xs[0]) or 1)
        y_scale = (_HEIGHT - 2 * _PAD) / ((high - low) or 1)
        line = " ".join(
            f"{_PAD + (x - xs[0]) * x_scale:.1f},{_HEIGHT - _PAD - (y - low) * y_scale:.1f}"
            for x, y in self.points
        )
        return Markup(
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" preserveAspectRatio="none" '
            f'aria-label="from {figure(ys[0])} to {figure(ys[-1])}">'
            f'<polyline points="{escape(line)}"/></svg>'
        )


class Curves:
    """The curves of a run; reads what was appended since the last look."""

    def __init__(self, stage: Path) -> None:
        self._files = [stage / "metrics.jsonl", stage / "eval.jsonl"]
        self._begin()

    def look(self) -> list[dict[str, object]]:
        """Return title, drawing, first, last, least and largest value of each curve."""
        for path in self._files:
            self._read(path)
        return [
            {
                "title": title,
                "svg": curve.svg(),
                "last": curve.points[-1][1],
                "low": min(value for _, value in curve.points),
                "high": max(value for _, value in curve.points),
                "to": curve.points[-1][0],
            }
            for name, title in SHOWN.items()
            if (curve := self._curves[name]).points
        ]

    def _begin(self) -> None:
        self._curves = {name: Curve() for name in SHOWN}
        self._offsets = dict.fromkeys(self._files, 0)
        self._inodes: dict[Path, int] = {}

    def _read(self, path: Path) -> None:
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return
        # A resumed run cuts its records back: the file is another one, or shorter.
        replaced = self._inodes.setdefault(path, found.st_ino) != found.st_ino
        if replaced or found.st_size < self._offsets[path]:
            self._begin()
            self.look()
            return
        with path.open("rb") as file:
            file.seek(self._offsets[path])
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offsets[path] += len(line)
                self._take(record_of(line.decode(errors="replace")) or {})

    def _take(self, record: dict[str, object]) -> None:
        iteration = record.get("iteration")
        for name, curve in self._curves.items():
            value = record.get(name)
            if isinstance(iteration, (int, float)) and isinstance(value, (int, float)):
                curve.add(float(iteration), float(value))
