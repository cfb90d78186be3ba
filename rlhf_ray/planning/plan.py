"""The command plan: the resolved config, what it needs of a cluster, and whether it fits."""

import dataclasses

from rlhf_ray.config import Config
from rlhf_ray.errors import PlacementError
from rlhf_ray.placement.hardware import live_cluster, parse_cluster, this_machine
from rlhf_ray.placement.layout import Node
from rlhf_ray.planning.prediction import Plan, prediction
from rlhf_ray.planning.rehearsal import calibrated, load
from rlhf_ray.planning.suggestions import Change, Layout, fitting_changes, layouts

LIVE = "live"
"""Value of --cluster for the running Ray cluster."""


def plan_for(config: Config, cluster: str | None) -> tuple[Plan, list[Change], list[Layout]]:
    """Return the plan, the changes that would make it fit, and other layouts if it fits.

    Args:
        config: the whole config.
        cluster: as `parse_cluster` reads it, or ``live``; None: the Ray cluster that the run
            joins, else this machine.

    Raises:
        ConfigError: ``cluster`` is malformed.
        PlacementError: ``cluster`` is ``live``, and no cluster can be reached.
        DataError: a model is neither a folder here nor described by a shape.
    """
    nodes, note = _nodes(config, cluster)
    plan = prediction(config, nodes)
    # From the prediction, before calibration: other configs have not been rehearsed.
    changes, side_by_side = [] if plan.fits else fitting_changes(plan), layouts(plan)
    # A rehearsal says nothing about a cluster that is only named.
    rehearsal = load(config, nodes) if cluster in (None, LIVE) else None
    if rehearsal is not None:
        plan = calibrated(plan, rehearsal)
        note = (*note, f"seconds are from the rehearsal of {rehearsal.when}")
    late = (plan.late_calls,) if plan.late_calls else ()
    noted = dataclasses.replace(plan, assumptions=(*note, *late, *plan.assumptions))
    return noted, changes, side_by_side if noted.fits else []


def prediction_for(config: Config) -> Plan:
    """Return the predicted plan, without measurements from a rehearsal."""
    return prediction(config, nodes_of(config))


def nodes_of(config: Config) -> tuple[Node, ...]:
    """Return the nodes that the run would use if started here."""
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
