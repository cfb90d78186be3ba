"""From places to what Ray reserves together: bundles, by placement group. Without Ray."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlhf_ray.placement.layout import Place


@dataclass(frozen=True)
class Bundle:
    """What is reserved in one piece: whole GPUs of one node, and who is on them."""

    node: int
    gpus: tuple[int, ...]
    workers: tuple[str, ...]
    """``<role>-<rank>``."""

    @property
    def resources(self) -> dict[str, float]:
        """As Ray counts them; each worker has a CPU."""
        gpus = {"GPU": float(len(self.gpus))} if self.gpus else {}
        return {"CPU": float(len(self.workers)), **gpus}


def placement_groups(places: Sequence[Place]) -> list[list[Bundle]]:
    """Bundles of each placement group, in the order of nodes and GPUs.

    A learner group has one, each generator has one, so that it comes and goes alone, and the other
    roles have one together; those that meet on a GPU are one. A GPU is always reserved whole:
    parts of several bundles would be put on GPUs by Ray, two ranks of a group perhaps on one.
    """
    parts: dict[str, list[Place]] = defaultdict(list)
    for place in places:
        parts[_owner(place)].append(place)
    groups: list[list[Place]] = []
    for part in parts.values():
        meeting = [group for group in groups if _gpus(group) & _gpus(part)]
        groups = [group for group in groups if not _gpus(group) & _gpus(part)]
        groups.append([*(place for group in meeting for place in group), *part])
    return sorted((_bundles(group) for group in groups), key=lambda group: _order(group[0]))


def worker_name(place: Place) -> str:
    """Name of the worker that sits there."""
    return f"{place.role}-{place.rank}"


def _owner(place: Place) -> str:
    if place.role == "generator":
        return worker_name(place)
    return place.role if place.role in ("policy", "critic") else "others"


def _gpus(places: Iterable[Place]) -> set[tuple[int, int]]:
    return {(place.node, gpu) for place in places for gpu in place.gpus}


def _bundles(places: Sequence[Place]) -> list[Bundle]:
    """One for the workers of a GPU, or for one of several GPUs, or for one without any."""
    workers: dict[tuple[int, tuple[int, ...], str], list[str]] = defaultdict(list)
    for place in places:
        name = worker_name(place)
        workers[place.node, place.gpus, "" if place.gpus else name].append(name)
    found = [Bundle(node, gpus, tuple(names)) for (node, gpus, _), names in workers.items()]
    return sorted(found, key=_order)


def _order(bundle: Bundle) -> tuple[int, tuple[int, ...]]:
    return bundle.node, bundle.gpus
