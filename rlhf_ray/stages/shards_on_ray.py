"""Parts and buckets of prepare's dumps, spread over the nodes of Ray by Ray Data."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from rlhf_ray.cluster.session import ray_session
from rlhf_ray.data.prepare.shards import Shards
from rlhf_ray.data.stack_exchange.parts import Dump, Part
from rlhf_ray.disk import unwritable_is_an_error
from rlhf_ray.errors import ActorFailure, ConfigError, DataError, RlhfError

if TYPE_CHECKING:
    from ray.data import Dataset

Task = dict[str, Any]
"""What one process does at a time: a row of a Ray Data set."""


@contextmanager
def uses_ray(shards: Shards) -> Iterator[bool]:
    """Tell whether there is enough to do for several processes; if so, the block has Ray."""
    if shards.num_buckets == 1 or not shards.config.cluster.runs_on_ray:
        yield False
        return
    import ray

    with nullcontext() if ray.is_initialized() else ray_session(shards.config):
        yield True


def group_on_ray(shards: Shards) -> Iterator[str]:
    """Group the posts of all parts; yields the parts' names as they are done.

    Raises:
        DataError: a dump is broken.
    """
    plain, streamed = [], []
    for dump in shards.dumps:
        if dump.is_streamed:
            streamed.append(dump)
            continue
        for part in dump.parts():
            if shards.is_grouped(part):
                yield part.name
            else:
                plain.append(asdict(part))

    def group(task: Task) -> str:
        values = dict(task)
        xml = values.pop("xml", None)
        part = Part(**values)
        if shards.is_grouped(part):
            return part.name
        return shards.group(part, part.xml() if xml is None else (xml,))

    def cut(task: Task) -> Iterator[Task]:
        for part, xml in Dump(**task).pieces():
            yield {**asdict(part), "xml": b"" if shards.is_grouped(part) else b"".join(xml)}

    yield from _done(shards, plain, group)
    yield from _done(shards, [asdict(dump) for dump in streamed], group, cut)


def convert_on_ray(
    shards: Shards, convert: Callable[[int], int], buckets: Sequence[int]
) -> Iterator[int]:
    """Write buckets into the sets; yields them as they are done."""
    tasks = [{"bucket": bucket} for bucket in buckets]
    yield from _done(shards, tasks, lambda task: convert(task["bucket"]))


def _done(
    shards: Shards,
    tasks: Sequence[Task],
    do: Callable[[Task], Any],
    cut: Callable[[Task], Iterator[Task]] | None = None,
) -> Iterator[Any]:
    """Yield what each task returns, in the order in which they end.

    Args:
        shards: of the run.
        tasks: what is to be done.
        do: does one of them.
        cut: makes several of each of ``tasks`` beforehand, in a process that hands them over.

    Raises:
        DataError: of the first one that fails so.
        ConfigError: a file cannot be written.
        ActorFailure: processes die again and again, or nothing has moved for
            cluster.call_timeout_s.
    """
    if not tasks:
        return
    import ray
    import ray.data
    from ray.data import TaskPoolStrategy
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    def attempt(task: Task) -> Task:
        try:
            with unwritable_is_an_error(shards.rows):
                return {"done": do(task), "error": "", "is_data": False}
        except RlhfError as error:
            return {"done": None, "error": str(error), "is_data": isinstance(error, DataError)}

    # Our own bar shows the progress, and one dump at a time is unpacked by one process.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = shards.config.cluster.call_timeout_s
    joined = shards.config.cluster.joins_cluster
    cpus = ray.cluster_resources().get("CPU", 1) if joined else os.cpu_count() or 1
    processes = TaskPoolStrategy(size=shards.config.prepare.num_workers or int(cpus))
    data: Dataset = ray.data.from_items(list(tasks), override_num_blocks=len(tasks))
    if cut is not None:
        # Half a CPU: Ray Data runs steps that ask for the same one after the other.
        context.target_max_block_size = shards.dumps[0].step
        data = data.flat_map(cast(Any, cut), num_cpus=0.5, compute=processes)
    try:
        for row in data.map(attempt, num_cpus=1, compute=processes).iter_rows():
            if row["error"]:
                raise (DataError if row["is_data"] else ConfigError)(row["error"])
            yield row["done"]
    except (RayError, ExecutionTimeoutError) as error:
        raise ActorFailure(
            f"prepare: Ray Data has failed ({str(error).strip().splitlines()[-1]}). What is done "
            "is kept: run or submit it again"
        ) from error
