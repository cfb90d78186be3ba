"""Rows of the driver alone: its microseconds a sample, and its memory over many iterations."""

import asyncio
import gc
from pathlib import Path
from statistics import median

import psutil

from bench.figures import ROUNDS, Figure
from bench.idle_roles import IdleRun, Ticks
from bench.running import Place

GENERATORS, QUICK_GENERATORS = (1, 16, 64, 256), (1, 256)
LEAST, MIDDLE, MOST = 64, 1024, 16_384
"""Samples of an iteration."""
WARM = 2
"""Iterations before those that count."""
FIRST, LAST = 200, 1200
"""Iterations between which memory must not grow; the caches of libraries fill before."""
MIB = 2**20


def per_sample(place: Place) -> list[Figure]:
    """Return the driver's microseconds a sample, the worst, and their growth with the samples."""
    generators = QUICK_GENERATORS if place.quick else GENERATORS
    place.begin(3 * len(generators))
    worst, growths, details = Figure(0.0), list[float](), {}
    for num in generators:
        seconds = {}
        for samples in (LEAST, MIDDLE, MOST):
            folder = place.folder / f"{num}-{samples}"
            run = IdleRun(folder, WARM + ROUNDS + 1, samples, num)
            asyncio.run(run.run())
            seconds[samples] = run.bar.seconds(WARM)
            place.step()
        fixed_s = median(seconds[LEAST])
        us = {
            samples: [1e6 * (each - fixed_s) / (samples - LEAST) for each in seconds[samples]]
            for samples in (MIDDLE, MOST)
        }
        growths.append(median(us[MOST]) / median(us[MIDDLE]))
        details[f"{num} generators"] = {
            f"ms of an iteration of {LEAST}": 1e3 * fixed_s,
            **{f"us at {samples}": median(each) for samples, each in us.items()},
        }
        for each in us.values():
            if median(each) > worst.value:
                worst = Figure(median(each), min(each), max(each), details)
    return [worst, Figure(max(growths), min(growths), max(growths))]


class Memory(Ticks):
    """Notes the process's resident memory at two iterations."""

    def __init__(self, iterations: int, place: Place, every: int) -> None:
        super().__init__(iterations)
        self._place, self._every = place, every
        self.mib: list[float] = []

    def advance(self, num_units: int = 1, **values: float) -> None:
        super().advance(num_units, **values)
        if len(self.at_s) % self._every == 0:
            gc.collect()
            self.mib.append(psutil.Process().memory_info().rss / MIB)
            self._place.step()


def memory(place: Place) -> list[Figure]:
    """Return the MiB by which the driver grows over 1,000 iterations."""
    every = FIRST
    place.begin(LAST // every)
    run = IdleRun(Path(place.folder / "run"), LAST, 64, 4)
    run.bar = Memory(LAST, place, every)
    asyncio.run(run.run())
    mib = run.bar.mib
    return [Figure(mib[-1] - mib[0], details={f"MiB every {every} iterations": mib})]
