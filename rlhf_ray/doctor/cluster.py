"""Run `doctor --cluster`: check every node of a live cluster and the links between them."""

import logging
from collections.abc import Iterator

import ray

from rlhf_ray.cluster.connection import require_cluster
from rlhf_ray.cluster.nodes import alive_nodes, on_nodes
from rlhf_ray.config import Config
from rlhf_ray.doctor.bandwidth import measure
from rlhf_ray.doctor.inputs import files_of_roles
from rlhf_ray.doctor.node_readings import read_node
from rlhf_ray.doctor.node_verdicts import check_links, check_versions, checks_of
from rlhf_ray.doctor.preflight import FAIL, Check
from rlhf_ray.doctor.shared_files import require_same_files
from rlhf_ray.errors import PlacementError
from rlhf_ray.interruption import handlers_kept
from rlhf_ray.runs.folder import RunFolder

TIMEOUT_S = 120.0
Section = tuple[str, list[Check]]


def run(config: Config | None, min_gbit_s: float) -> tuple[list[Section], bool]:
    """Check the cluster that this machine belongs to, or that RAY_ADDRESS names.

    Raises:
        PlacementError: no cluster can be reached.
    """
    require_cluster()
    try:
        with handlers_kept():
            ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PlacementError(
            f"Cannot reach a Ray cluster: {error}. Run this on one of its nodes, or set RAY_ADDRESS"
        ) from error
    try:
        sections = list(_sections(config, min_gbit_s))
    finally:
        ray.shutdown()
    return sections, not any(check.verdict == FAIL for _, part in sections for check in part)


def _sections(config: Config | None, min_gbit_s: float) -> Iterator[Section]:
    nodes = alive_nodes()
    answers = on_nodes(nodes, read_node, [(node.address,) for node in nodes], TIMEOUT_S)
    interface = config.cluster.interface if config else None
    for answer in answers:
        if answer.value is None:
            remedy = "repair the node, or take it out of the cluster"
            yield answer.node.name, [Check("node", answer.problem, FAIL, remedy)]
        else:
            yield answer.node.name, checks_of(answer.value, interface)
    read = {answer.node: answer.value for answer in answers if answer.value is not None}
    together = check_versions({node.name: reading for node, reading in read.items()})
    together += check_links(measure(list(read)), min_gbit_s)
    if config is not None:
        together.append(_check_paths(config))
    if together:
        yield f"All {len(nodes)} nodes", together


def _check_paths(config: Config) -> Check:
    folder = RunFolder(config)
    folder.make()
    try:
        require_same_files(folder.path, files_of_roles(folder), config.cluster.interface)
    except PlacementError as error:
        _, *problems, remedy = str(error).splitlines()
        return Check("paths", " ".join(problems), FAIL, remedy)
    return Check("paths", f"run.dir {folder.path} and the same models on all nodes")
