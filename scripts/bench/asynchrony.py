"""Rows of batches that are generated ahead: the loop over roles that work for set times."""

import asyncio
from collections.abc import Mapping
from statistics import fmean, median

import numpy as np

from bench.figures import Figure
from bench.idle_roles import IdleRun, Times
from bench.running import Place

SAMPLES, SHARD_SIZE, GENERATORS, MAX_IN_FLIGHT = 64, 4, 4, 2
"""Samples of a batch, of a shard; generators, and shards in flight at each: two waves a batch."""
LONGEST_S = 0.15
"""Seconds of the longest response."""
WARM, COUNTED, TURNS = 3, 4, 2
"""Iterations of a run before those that count, those, and runs of each kind."""

Lengths = Mapping[int, float]
"""Position -> seconds of its response."""


def equal() -> Lengths:
    return dict.fromkeys(range(SAMPLES), LONGEST_S)


def skewed(seed: int) -> Lengths:
    """Return geometric lengths: mean 32, at most 256."""
    lengths = np.random.default_rng(seed).geometric(1 / 32, SAMPLES).clip(max=256)
    return {i: LONGEST_S * float(length / lengths.max()) for i, length in enumerate(lengths)}


def overlap(place: Place) -> list[Figure]:
    """Return the seconds of an iteration with k = 1 over those of its longest resource."""
    place.begin(1 + TURNS)
    lengths = skewed(place.seed)
    alone_s = _alone_s(place, lengths)
    ratios: list[float] = []
    for _ in range(TURNS):
        times = Times(lengths, alone_s)
        seconds = _iterations(place, times, max_staleness=1)
        shards_s = fmean(times.generating_s) * SAMPLES / SHARD_SIZE
        longest_s = max(alone_s, shards_s / (GENERATORS * MAX_IN_FLIGHT))
        ratios += [each / longest_s for each in seconds]
        place.step()
    return [Figure(median(ratios), min(ratios), max(ratios))]


def staleness(place: Place) -> list[Figure]:
    """Return how many times as many samples a second k = 1 learns as k = 0."""
    place.begin(2 * (1 + 2 * TURNS))
    figures: list[Figure] = []
    for lengths in (equal(), skewed(place.seed)):
        alone_s, seconds = _alone_s(place, lengths), dict[int, list[float]]({0: [], 1: []})
        for _ in range(TURNS):
            for max_staleness, measured in seconds.items():
                measured += _iterations(place, Times(lengths, alone_s), max_staleness)
                place.step()
        ratios = [turns / ahead for turns, ahead in zip(seconds[0], seconds[1], strict=True)]
        value = median(seconds[0]) / median(seconds[1])
        figures.append(Figure(value, min(ratios), max(ratios), {"seconds": seconds}))
    return figures


def _alone_s(place: Place, lengths: Lengths) -> float:
    """Return the seconds in which a batch is generated alone."""
    seconds = _iterations(place, Times(lengths), max_staleness=0)
    place.step()
    return median(seconds)


def _iterations(place: Place, times: Times, max_staleness: int) -> list[float]:
    run = IdleRun(
        place.folder / f"run-{len([*place.folder.glob('run-*')])}",
        WARM + COUNTED + 1,
        SAMPLES,
        GENERATORS,
        max_staleness=max_staleness,
        times=times,
        shard_size=SHARD_SIZE,
        max_in_flight=MAX_IN_FLIGHT,
    )
    asyncio.run(run.run())
    return run.bar.seconds(WARM + 1)
