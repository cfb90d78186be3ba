"""What prepare takes for dumps of a size: hours, memory of a process, and disk."""

import os
from collections.abc import Callable
from pathlib import Path, PurePath

from rlhf_ray.config import Config
from rlhf_ray.config.data import EXPANSION, PACKED, part_bytes
from rlhf_ray.planning.role_times import ASSUMPTIONS, Range, as_range
from rlhf_ray.planning.stages.disk import Disk

PREPARED = "prepare, MB of a dump's XML a second on one core"
CORES = "prepare, cores of a node for each of its GPUs"
BESIDE = "prepare, share of its speed that a core keeps beside others"
UNPACKED = "prepare, MB of XML a second out of one archive"
STORED = "GB/s to run.dir"
KEPT = "prepare, bytes of the sets for one of the dump's XML"
GROUPED = "prepare, bytes of the grouped posts for one of the dump's XML"
ASSUMED = (PREPARED, CORES, BESIDE, UNPACKED, STORED, KEPT, GROUPED)
"""Names of the assumptions that its estimate depends on."""

SYNTHETIC_QUESTION = 1354.0
"""Bytes of XML of a question and its answers on the synthetic site (measured, 20,000 questions)."""
PROCESS, OF_PART = 0.17e9, 5.0
"""Bytes of a process, and those for each byte of a part (measured on parts of 32 and 100 MB)."""


def xml_bytes(config: Config) -> float | None:
    """Return the bytes of the XML that prepare reads; None: a dump is not here."""
    settings = config.prepare
    if settings.posts_gb is not None:
        return settings.posts_gb * 1e9
    if not settings.dumps:
        return settings.num_questions * SYNTHETIC_QUESTION
    try:
        sizes = [Path(path).stat().st_size for path in settings.dumps]
    except OSError:
        return None
    pairs = zip(sizes, settings.dumps, strict=True)
    return float(sum(size * EXPANSION if _is_packed(path) else size for size, path in pairs))


def _is_packed(path: str) -> bool:
    return PurePath(path).suffix.lower() in PACKED


def work_of(config: Config, num_bytes: float, num_gpus: int) -> str:
    """Return what prepare reads and with how many processes, as a note on its estimate."""
    settings = config.prepare
    if settings.posts_gb is None and not settings.dumps:
        return (
            f"a synthetic site of {settings.num_questions:,} questions, as prepare.posts is not "
            "set; for a dump that is not here set prepare.posts_gb"
        )
    most, fewest = num_workers(config, num_bytes, num_gpus)
    processes = f"{fewest:g} to {most:g}" if most > fewest else f"{most:g}"
    return f"{num_bytes / 1e9:,.3g} GB of XML; processes (prepare.num_workers): {processes}"


def num_workers(config: Config, num_bytes: float, num_gpus: int) -> Range:
    """Return the most and the fewest processes of prepare."""
    if num_bytes <= part_bytes(num_bytes):
        return (1, 1)
    if config.prepare.num_workers is not None:
        return (config.prepare.num_workers, config.prepare.num_workers)
    if num_gpus:
        return as_range(num_gpus * cores for cores in ASSUMPTIONS[CORES])
    cores = os.cpu_count() or 1
    return (cores, cores)


def prepare_seconds(config: Config, num_bytes: float, num_gpus: int) -> Range:
    """Return the seconds of prepare for so many bytes of XML.

    Its processes share the work, and the storage on which they read the XML, write the posts by
    question, read those and write the sets. One process unpacks an archive.
    """
    workers = num_workers(config, num_bytes, num_gpus)
    dumps = config.prepare.dumps
    packed = num_bytes * sum(map(_is_packed, dumps)) / max(1, len(dumps))

    def of(end: int) -> float:
        speed = 1e6 * ASSUMPTIONS[PREPARED][end]
        speed *= 1 + (workers[end] - 1) * ASSUMPTIONS[BESIDE][end]
        moved = num_bytes * (1 + 2 * ASSUMPTIONS[GROUPED][end] + ASSUMPTIONS[KEPT][end])
        unpacking = packed / 1e6 / ASSUMPTIONS[UNPACKED][end]
        return max(num_bytes / speed, moved / 1e9 / ASSUMPTIONS[STORED][end]) + unpacking

    return _of_ends(of)


def prepare_memory(num_bytes: float) -> float:
    """Return the bytes of one of its processes."""
    return PROCESS + OF_PART * min(num_bytes, part_bytes(num_bytes))


def prepare_disk(config: Config, num_bytes: float) -> Disk:
    """Return the bytes in run.dir: the sets, and the grouped posts while it runs.

    A synthetic dump stays too.
    """
    synthetic = not config.prepare.dumps and config.prepare.posts_gb is None
    kept = _of_ends(lambda end: num_bytes * (ASSUMPTIONS[KEPT][end] + synthetic))
    elsewhere = config.prepare.scratch is not None or config.run.scratch is not None
    grouped = 0 if elsewhere else num_bytes
    return Disk(kept, _of_ends(lambda end: kept[end] + grouped * ASSUMPTIONS[GROUPED][end]))


def _of_ends(value: Callable[[int], float]) -> Range:
    return as_range(value(end) for end in (0, 1))
