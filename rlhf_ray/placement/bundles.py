"""Group the slots of a layout into the bundles and placement groups that Ray reserves.

This module itself needs no Ray.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlhf_ray.placement.layout import Slot


@dataclass(frozen=True)
class Bundle:
    """Whole GPUs of one node that are reserved in one piece, with the workers on them."""

    node: int
    gpus: tuple[int, ...]
    workers: tuple[str, ...]
    """``<role>-<rank>``."""

    @property
    def resources(self) -> dict[str, float]:
        """The bundle as Ray counts resources; each worker takes one CPU."""
        gpus = {"GPU": float(len(self.gpus))} if self.gpus else {}
        return {"CPU": float(len(self.workers)), **gpus}


def placement_groups(slots: Sequence[Slot]) -> list[list[Bundle]]:
    """Return the bundles of each placement group, in the order of nodes and GPUs.

    A learner group has its own placement group; so has each generator, so that it can come and go
    alone; the other roles have one together. Groups that share a GPU are merged. A GPU is always
    reserved whole: Ray would choose the GPUs for fractions by itself, and might put two ranks of a
    learner group on one.
    """
    by_owner: dict[str, list[Slot]] = defaultdict(list)
    for slot in slots:
        by_owner[_owner(slot)].append(slot)
    groups: list[list[Slot]] = []
    for owned in by_owner.values():
        sharing = [group for group in groups if _gpus(group) & _gpus(owned)]
        groups = [group for group in groups if not _gpus(group) & _gpus(owned)]
        groups.append([*(slot for group in sharing for slot in group), *owned])
    return sorted((_bundles(group) for group in groups), key=lambda group: _order(group[0]))


def worker_name(slot: Slot) -> str:
    """Return the name of the slot's worker."""
    return f"{slot.role}-{slot.rank}"


def role_of(worker: str) -> str:
    """Return the role of a worker, by its name."""
    return worker.rpartition("-")[0]


def _owner(slot: Slot) -> str:
    if slot.role == "generator":
        return worker_name(slot)
    return slot.role if slot.role in ("policy", "critic") else "others"


def _gpus(slots: Iterable[Slot]) -> set[tuple[int, int]]:
    return {(slot.node, gpu) for slot in slots for gpu in slot.gpus}


def _bundles(slots: Sequence[Slot]) -> list[Bundle]:
    """Make one bundle for the workers that share a GPU, for a worker of several GPUs or of none."""
    workers: dict[tuple[int, tuple[int, ...], str], list[str]] = defaultdict(list)
    for slot in slots:
        name = worker_name(slot)
        workers[slot.node, slot.gpus, "" if slot.gpus else name].append(name)
    bundles = [Bundle(node, gpus, tuple(names)) for (node, gpus, _), names in workers.items()]
    return sorted(bundles, key=_order)


def _order(bundle: Bundle) -> tuple[int, tuple[int, ...]]:
    return bundle.node, bundle.gpus
