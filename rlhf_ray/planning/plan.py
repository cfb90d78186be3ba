"""The command plan: what a config resolves to, what it takes of a cluster, whether it fits."""

import dataclasses

from rlhf_ray.config import Config
from rlhf_ray.errors import PlacementError
from rlhf_ray.placement.hardware import live_cluster, parse_cluster, this_machine
from rlhf_ray.placement.layout import Node
from rlhf_ray.planning.changes import Change
from rlhf_ray.planning.layouts import Layout, layouts
from rlhf_ray.planning.prediction import Plan, prediction
from rlhf_ray.planning.rehearsal import calibrated, load
from rlhf_ray.planning.suggestions import remedies
from rlhf_ray.planning.tables import as_json, as_text

LIVE = "live"
"""What stands for the Ray cluster that is there."""


def plan_for(config: Config, cluster: str | None) -> tuple[Plan, list[Change], list[Layout]]:
    """The plan; with which changes it would fit, where it does not; its layouts, where it does.

    Args:
        config: the whole config.
        cluster: as `parse_cluster` takes it, or ``live``; None: the Ray cluster that the run
            would join, else this machine.

    Raises:
        ConfigError: ``cluster`` is not written as it should be.
        PlacementError: it is ``live``, and no cluster can be reached.
        DataError: a model is neither here nor described.
    """
    nodes, note = _nodes(config, cluster)
    plan = prediction(config, nodes)
    # Changes and layouts are predicted as well, so they have no answer to what was measured.
    changes, side_by_side = [] if plan.fits else remedies(plan), layouts(plan)
    # A cluster that is only named is not the one that the run was rehearsed on.
    rehearsal = load(config, nodes) if cluster in (None, LIVE) else None
    if rehearsal is not None:
        plan = calibrated(plan, rehearsal)
        note = (*note, f"seconds are from the rehearsal of {rehearsal.when}")
    late = (plan.late_calls,) if plan.late_calls else ()
    noted = dataclasses.replace(plan, assumptions=(*note, *late, *plan.assumptions))
    return noted, changes, side_by_side if noted.fits else []


def prediction_for(config: Config) -> Plan:
    """The plan as it is worked out, without what was measured."""
    return prediction(config, nodes_of(config))


def nodes_of(config: Config) -> tuple[Node, ...]:
    """Where the run would be, from here."""
    return _nodes(config, None)[0]


def _nodes(config: Config, cluster: str | None) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    if cluster is not None and cluster != LIVE:
        return parse_cluster(cluster), ()
    if cluster is None and not config.cluster.joins_cluster:
        return (this_machine(),), ()
    try:
        return live_cluster(), ()
    except PlacementError as error:
        if cluster == LIVE:
            raise
        return (this_machine(),), (f"compared with this machine. {error}",)


__all__ = [
    "Plan",
    "as_json",
    "as_text",
    "layouts",
    "nodes_of",
    "plan_for",
    "prediction",
    "prediction_for",
    "remedies",
]
