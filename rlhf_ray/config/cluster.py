"""Sections of the Ray cluster: where processes run, which GPUs roles get, how long to wait."""

import os
from itertools import chain
from typing import Literal, get_args

from pydantic import field_validator

from rlhf_ray.config.section import Section, changeable, duplicates, has_user_info, refuse_secrets

Role = Literal["policy", "critic", "reference", "reward", "generator"]

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that set a process's CPU threads."""
ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""Variables that set PyTorch's allocator of GPU memory; the second is the older name."""

_LABELS = "Ray labels of its nodes; if no node has such a label, nodes without it."


def _plain_variables(key: str, env: dict[str, str]) -> dict[str, str]:
    if wrong := [name for name in env if not name or "=" in name]:
        raise ValueError(f"{wrong[0]!r} is no name of an environment variable")
    remedy = (
        "export it where you start the command, or on a cluster where Ray starts on each node: "
        "the roles' processes inherit it"
    )
    logins = {f"{name} password": url for name, url in env.items() if has_user_info(url)}
    refuse_secrets(key, env | logins, remedy)
    return env


class ProcessConfig(Section):
    """One role's processes."""

    threads: int | None = changeable(
        None, unit="threads", ge=1, description="CPU threads of each; none: threads_per_actor."
    )
    env: dict[str, str] = changeable({}, description="Environment variables besides cluster.env.")

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        return _plain_variables("cluster.roles.*.env", env)


class ProcessesConfig(Section):
    """Processes of single roles, where they differ from the others."""

    policy: ProcessConfig = changeable(ProcessConfig(), description="Policy ranks.")
    critic: ProcessConfig = changeable(ProcessConfig(), description="Critic ranks.")
    reference: ProcessConfig = changeable(ProcessConfig(), description="Reference workers.")
    reward: ProcessConfig = changeable(ProcessConfig(), description="Scorers.")
    generator: ProcessConfig = changeable(ProcessConfig(), description="Generators.")


class ClusterConfig(Section):
    """Ray, deadlines, threads and environment of the roles' processes."""

    mode: Literal["auto", "inline", "local", "ray"] = changeable(
        "auto",
        description="inline: one process without Ray; local: a new Ray cluster on this machine; "
        "ray: the cluster that this process belongs to; auto: ray inside a Ray job, else local.",
    )
    threads_per_actor: int = changeable(
        1, unit="threads", ge=1, description="CPU threads of each role's process."
    )
    start_timeout_s: float = changeable(
        300.0,
        unit="seconds",
        gt=0,
        description="Longest time without progress until a role's process is ready: a new phase, "
        "work, or weights that arrive renew it, up to ten times as long.",
    )
    call_timeout_s: float = changeable(
        600.0,
        unit="seconds",
        gt=0,
        description="Longest time without progress of a call to a role: units of work that its "
        "process reports (tokens, rows, micro-batches) renew it, up to ten times as long. With "
        "cluster.mode inline it is of what a call awaits, such as a judge.",
    )
    max_role_restarts: int = changeable(
        10,
        unit="restarts",
        ge=0,
        description="Restarts of failed scorers, references and other roles without a state, in "
        "all of a stage; after that it continues with those that are left, if any. The loss of a "
        "node counts once.",
    )
    max_group_restarts: int = changeable(
        8,
        unit="restarts",
        ge=0,
        description="Restarts of learner groups (policy, critic) in all of a stage, each from the "
        "last state that the driver has of the group, or of a supervised stage's processes, each "
        "from its last checkpoint; after that the run ends, and can be resumed.",
    )
    gpu_hour_price: float | None = changeable(
        None,
        unit="price",
        gt=0,
        description="Price of one GPU for an hour, in any currency; if set, the metric "
        "cost/per_1000_samples is in that currency.",
    )
    dashboard: bool = changeable(True, description="Start Ray's dashboard (on 127.0.0.1).")
    object_store_mb: int = changeable(
        512, unit="MB", ge=80, description="Size of the object store (local mode)."
    )
    interface: str | None = changeable(
        None,
        min_length=1,
        description="Network interface between nodes, such as eth1, which Gloo and NCCL bind to; "
        "with mode ray, a node is refused if the interface does not have the address that Ray "
        "uses. none: Gloo and NCCL choose. On one machine it is always loopback.",
    )
    env: dict[str, str] = changeable(
        {}, description="Environment variables of every role's process; secrets are refused."
    )
    roles: ProcessesConfig = changeable(
        ProcessesConfig(), description="Threads and environment of single roles' processes."
    )

    @property
    def runs_on_ray(self) -> bool:
        """Whether roles are Ray actors."""
        return self.mode != "inline"

    @property
    def joins_cluster(self) -> bool:
        """Whether the run joins the Ray cluster that this process belongs to."""
        if self.mode == "auto":
            return bool(os.environ.get("RAY_JOB_ID") or os.environ.get("RAY_ADDRESS"))
        return self.mode == "ray"

    @property
    def source_timeout_s(self) -> float:
        """Longest time without progress of a reward source; after it there is time to say so."""
        return 0.9 * self.call_timeout_s

    @property
    def function_timeout_s(self) -> float:
        """Longest time in which a reward function scores nothing; then scores are missing."""
        return 0.8 * self.call_timeout_s

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        return _plain_variables("cluster.env", env)

    def environment_of(self, role: str, *, on_gpu: bool) -> dict[str, str]:
        """Return a role's own environment variables, besides those of all roles."""
        own = getattr(self.roles, role, ProcessConfig())
        threads = {} if own.threads is None else dict.fromkeys(THREADS, str(own.threads))
        learns = role in ("policy", "critic") and on_gpu
        # Learners' micro-batches differ in size, and other memory of the GPU may be the engine's.
        # vLLM's processes keep PyTorch's default, which its sleep requires.
        # This process's variables reach roles on its own machine only.
        inherited = () if self.joins_cluster else os.environ
        has_own = ALLOCATOR & {*self.env, *own.env, *inherited}
        grows = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if learns and not has_own else {}
        return grows | threads | own.env


class RolePlacement(Section):
    """Placement of one role's workers."""

    gpus: float | None = changeable(
        None,
        unit="GPUs",
        gt=0,
        le=1,
        description="GPUs of one worker; below 1 it shares a GPU; none: placement.gpus. A "
        "generator with generators.tensor_parallel_size above 1 has that many whole GPUs.",
    )
    labels: dict[str, str] = changeable({"role": "train"}, description=_LABELS)


class GeneratorPlacement(RolePlacement):
    """Placement of the generators."""

    labels: dict[str, str] = changeable({"role": "rollout"}, description=_LABELS)


class PlacementConfig(Section):
    """GPUs and nodes of the roles of PPO.

    How many workers a role has is set in its own section.
    """

    gpus: float | None = changeable(
        None,
        unit="GPUs",
        ge=0,
        le=1,
        description="GPUs of each role's worker. Below 1 several workers share a GPU; a generator "
        "of vLLM then takes what the others leave of its memory, unless rollout.engine_args sets "
        "gpu_memory_utilization or kv_cache_memory_bytes. none: 1; in local mode on a machine with "
        "fewer GPUs than workers, the largest part that fits. 0: every role and stage runs on CPUs "
        "and sees no GPU. A run waits for the GPUs of a cluster that it joins; on its own machine "
        "without GPUs it uses CPUs.",
    )
    policy: RolePlacement = changeable(RolePlacement(), description="Placement of policy ranks.")
    critic: RolePlacement = changeable(RolePlacement(), description="Placement of critic ranks.")
    reference: RolePlacement = changeable(
        RolePlacement(), description="Placement of reference workers."
    )
    reward: RolePlacement = changeable(
        RolePlacement(),
        description="Placement of scorers; they get GPUs only if a reward source runs a model.",
    )
    generator: GeneratorPlacement = changeable(
        GeneratorPlacement(), description="Placement of generators."
    )
    share: list[list[Role]] = changeable(
        [],
        description="Sets of roles that may share a GPU, such as [[critic, reference]]; roles in "
        "no set may share with each other. Ranks of one learner group never share a GPU.",
    )
    turns: bool = changeable(
        False,
        description="Colocate generators and learners (policy, critic): on GPUs that they share "
        "one side sleeps, its weights in main memory, while the other works.",
    )
    timeout_s: float = changeable(
        300.0,
        unit="seconds",
        gt=0,
        description="Deadline for the cluster to have the capacity for all roles, at the start and "
        "after the loss of a node.",
    )

    @field_validator("share")
    @classmethod
    def _in_one_set(cls, share: list[list[Role]]) -> list[list[Role]]:
        if repeated := duplicates(list(chain.from_iterable(share))):
            raise ValueError(f"names {repeated} more than once; a role belongs to one set at most")
        return share

    def of(self, role: Role) -> RolePlacement:
        """Return a role's placement."""
        return getattr(self, role)

    def gpus_of(self, role: Role) -> float:
        """Return the GPUs of one of a role's workers, a generator's without tensor parallelism."""
        if self.gpus == 0:
            return 0.0
        gpus = self.gpus if (own := self.of(role).gpus) is None else own
        return 1.0 if gpus is None else gpus

    def sharers(self, role: Role) -> frozenset[str]:
        """Return the roles that may share a GPU with a role, itself included."""
        for members in self.share:
            if role in members:
                return frozenset(members)
        return frozenset(get_args(Role)) - set(chain.from_iterable(self.share))
