"""The second part, for several nodes: run on a node of a cluster with RAY_ADDRESS set.

Without a cluster, roles run on this machine where they can, and the rest says what it would do.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import rlhf_ray
from gpu_checks.lines import Line, Place, checked, would
from gpu_checks.models import large, prompts, reward_model, small
from gpu_checks.runs import compared, config_of, ran, results
from rlhf_ray.cluster.nodes import ClusterNode, alive_nodes
from rlhf_ray.config import Config, load
from rlhf_ray.doctor import cluster as cluster_doctor
from rlhf_ray.doctor.preflight import FAIL
from rlhf_ray.errors import RlhfError
from rlhf_ray.placement.hardware import NETWORK_GB_PER_S, live_cluster, parse_cluster
from rlhf_ray.planning.prediction import prediction, smallest_kind
from rlhf_ray.stages import rehearse

FLAGSHIP = Path(__file__).parents[2] / "configs" / "stackllama" / "ppo_3x8_a100.yaml"
SAME_NORM = 0.05
"""Allowed relative difference of gradient norms between numbers of ranks, in bf16."""
REDUCED_BYTES, REDUCTIONS = 2**28, 5
CALL_S = 120.0


def doctor(place: Place) -> Iterator[Line]:
    """Check every node, as the command doctor --cluster does."""
    if not _joins():
        yield would("check every node of the cluster: rlhf-ray doctor --cluster")
        return
    sections, healthy = cluster_doctor.run(None, min_gbit_s=1.0)
    failed = [
        f"{title}: {c.name} {c.reading}"
        for title, part in sections
        for c in part
        if c.verdict == FAIL
    ]
    yield checked(
        "every node passes doctor", healthy, nodes=len(sections), failed="; ".join(failed)
    )


class Rank:
    """One process of a group that adds up tensors."""

    def free_port(self) -> tuple[str, int]:
        """Return an address and a free port of this process's node."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def reduce(self, rank: int, size: int, address: str, port: int) -> float:
        """Return GB/s of the bus: what each rank sends and receives for an all-reduce."""
        cuda = torch.cuda.is_available()
        torch.distributed.init_process_group(
            "nccl" if cuda else "gloo", f"tcp://{address}:{port}", rank=rank, world_size=size
        )
        tensor = torch.ones(REDUCED_BYTES // 4, device="cuda" if cuda else "cpu")
        torch.distributed.all_reduce(tensor)  # connects
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(REDUCTIONS):
            torch.distributed.all_reduce(tensor)
        if cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / REDUCTIONS
        torch.distributed.destroy_process_group()
        return 2 * (size - 1) / size * REDUCED_BYTES / 1e9 / seconds


def bandwidth(place: Place) -> Iterator[Line]:
    """Measure all-reduces within each node, and across nodes."""
    ray.init(
        None if not _joins() else "auto", num_cpus=None if _joins() else 2, log_to_driver=False
    )
    nodes = alive_nodes()
    gpus = {node: int(node.entry["Resources"].get("GPU", 0)) for node in nodes}
    with_gpus = [node for node in nodes if gpus[node] > 1]
    kind = smallest_kind(live_cluster()) if with_gpus else None
    for node in with_gpus or nodes[:1]:
        found = _reduced([node] * (gpus[node] or 2), needs_gpu=bool(with_gpus))
        goal = kind.link_gb_per_s / 2 if kind else None
        what = f"all-reduce within {node.name}, at least half of what the plan assumes"
        yield checked(
            what, goal is None or found >= goal, ranks=gpus[node] or 2, gb_s=found, goal_gb_s=goal
        )
    if len(with_gpus) < 2:
        yield would("measure all-reduces across nodes, one rank on each and all GPUs of all")
        return
    everywhere = [node for node in with_gpus for _ in range(gpus[node])]
    for group in (with_gpus, everywhere):
        found, goal = _reduced(group, needs_gpu=True), NETWORK_GB_PER_S / 2
        what = f"all-reduce across {len(with_gpus)} nodes, at least half of what the plan assumes"
        yield checked(what, found >= goal, ranks=len(group), gb_s=found, goal_gb_s=goal)


def _reduced(nodes: Sequence[ClusterNode], needs_gpu: bool) -> float:
    """Return the GB/s of a group with a rank on each of the nodes."""
    ranks: list[Any] = [
        ray.remote(Rank)
        .options(
            num_cpus=0,
            num_gpus=1 if needs_gpu else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
        )
        .remote()
        for node in nodes
    ]
    try:
        address, port = ray.get(ranks[0].free_port.remote(), timeout=CALL_S)
        calls = [r.reduce.remote(i, len(ranks), address, port) for i, r in enumerate(ranks)]
        return min(ray.get(calls, timeout=CALL_S))
    finally:
        for rank in ranks:
            ray.kill(rank)


def tensor_parallel(place: Place, size: int) -> Iterator[Line]:
    """Run PPO with an engine of several GPUs, which proves itself at the start."""
    if not _joins() or max((node.gpus for node in live_cluster()), default=0) < size:
        yield would(f"run PPO with a generator of {size} GPUs of one node")
        return
    more = {"generators": {"tensor_parallel_size": size}}
    yield ran(_config(place, f"tp-{size}", more), f"a generator of {size} GPUs serves the policy")


def ranks(place: Place) -> Iterator[Line]:
    """Learn the same batches with one rank, with eight on a node, and on two nodes."""
    sizes = (1, 8, 16) if _joins() else (1, 2)
    norms: dict[int, dict[str, float]] = {}
    for size in sizes:
        groups = {"policy": {"num_ranks": size}, "critic": {"num_ranks": size}}
        config = _config(place, f"ranks-{size}", groups, {"ppo": {"mini_batch_size": 16}})
        yield ran(config, f"{size} ranks of policy and critic learn")
        _, records = results(config)
        norms[size] = {name: records[0][name] for name in ("policy/grad_norm", "val/grad_norm")}
        differences = [abs(norms[size][name] / norms[1][name] - 1) for name in norms[size]]
        yield checked(
            f"{size} ranks learn what one rank learns",
            max(differences) < SAME_NORM,
            largest_difference=max(differences),
            **norms[size],
        )


def flagship(place: Place) -> Iterator[Line]:
    """Rehearse the flagship's config with random weights."""
    if not _joins():
        plan = prediction(load(FLAGSHIP), parse_cluster("3x8xA100-80GB"))
        best, worst = plan.time.iteration if plan.time else (None, None)
        yield Line(
            "WOULD",
            "rehearse stackllama/ppo_3x8_a100 with random weights, a generator killed on the way",
            {"fits": plan.fits, "planned_best_s": best, "planned_worst_s": worst},
        )
        return
    base = large(place, really=True)
    config = load(
        FLAGSHIP,
        [
            f"run.dir={place.folder}/runs/flagship",
            f"model.path={base}",
            f"sft.path={base}",
            f"reward.path={reward_model(place, base)}",
            f"data.prompts.path={prompts(place)}",
        ],
    )
    yield from compared(place, config, rehearse.run(config))


def killed(place: Place) -> Iterator[Line]:
    """Kill a generator, then a learner: the run continues, or resumes from its last commit."""
    more = {"ppo": {"iterations": 4, "save_every": 1}, "generators": {"num": 2}}
    config = _config(place, "generator-killed", more)
    with_killer = threading.Thread(target=_kill, args=("generator-0", config), daemon=True)
    with_killer.start()
    yield ran(config, "a run continues when a generator is killed")
    summary, _ = results(config)
    restarts = summary["generator_restarts"]
    yield checked("the killed generator came back", restarts == 1, generator_restarts=restarts)
    config = _config(place, "learner-killed", {"ppo": {"iterations": 4, "save_every": 1}})
    threading.Thread(target=_kill, args=("policy-0", config), daemon=True).start()
    said = ""
    try:
        rlhf_ray.run(config)
    except RlhfError as error:
        said = str(error)
    yield checked("a run whose learner is killed says so", "policy" in said, error=said[:200])
    resuming = _config(
        place,
        "learner-killed",
        {"ppo": {"iterations": 4, "save_every": 1}},
        {"run": {"resume": "must"}},
    )
    yield ran(resuming, "the run resumes from its last commit")


def _kill(name: str, config: Config) -> None:
    """Kill an actor once the first iteration is recorded."""
    metrics = Path(config.run.dir) / "ppo" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n")):
        time.sleep(0.05)
    with suppress(ValueError):  # the run has ended already
        ray.kill(ray.get_actor(name))


def _config(place: Place, name: str, *more: Any) -> Config:
    """Make a config whose roles have GPUs of their own, in the cluster or on this machine."""
    cluster = {"cluster": {"mode": "ray"}, "placement": {"gpus": 1.0}} if _joins() else {}
    return config_of(place, name, small(place), cluster, *more)


def _joins() -> bool:
    """Return whether there is a cluster to join."""
    return bool(os.environ.get("RAY_ADDRESS"))
