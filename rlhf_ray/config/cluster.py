"""Where the processes run, and how long to wait for them."""

import os
from itertools import chain
from typing import Literal, get_args

from pydantic import field_validator

from rlhf_ray.config.section import Section, changeable, has_user_info, refuse_secrets

Role = Literal["policy", "critic", "reference", "reward", "generator"]

_LABELS = "Ray labels of its nodes; where no node carries one, nodes without that label."


class ClusterConfig(Section):
    """Ray, deadlines and threads."""

    mode: Literal["auto", "inline", "local", "ray"] = changeable(
        "auto",
        description="inline: one process without Ray; local: a Ray cluster on this machine; ray: "
        "the cluster that this process belongs to; auto: ray inside a Ray job, else local.",
    )
    threads_per_actor: int = changeable(
        1, unit="threads", ge=1, description="CPU threads of each role's process (local mode)."
    )
    start_timeout_s: float = changeable(
        300.0,
        unit="seconds",
        gt=0,
        description="Deadline for a role's process to be ready, seconds.",
    )
    call_timeout_s: float = changeable(
        600.0,
        unit="seconds",
        gt=0,
        description="Deadline for any one call to a role, seconds; an iteration's "
        "updates are one call.",
    )
    gpu_hour_price: float | None = changeable(
        None,
        unit="price",
        gt=0,
        description="Price of one GPU for an hour, in any currency: then the metric "
        "cost/per_1000_samples is in it.",
    )
    dashboard: bool = changeable(True, description="Start Ray's dashboard (on 127.0.0.1).")
    object_store_mb: int = changeable(
        512, unit="MB", ge=80, description="Size of the local object store, MB (local mode)."
    )
    interface: str | None = changeable(
        None,
        min_length=1,
        description="Network interface that nodes talk to each other by, such as eth1: Gloo and "
        "NCCL are bound to it, and a node on which it does not carry Ray's address is refused "
        "(mode ray); none: theirs to choose. On one machine it is always loopback.",
    )
    env: dict[str, str] = changeable(
        {}, description="Environment variables of every role's process; no secrets."
    )

    @property
    def runs_on_ray(self) -> bool:
        """Whether roles are Ray actors."""
        return self.mode != "inline"

    @property
    def joins_cluster(self) -> bool:
        """Whether the run joins the Ray cluster that this process belongs to."""
        if self.mode == "auto":
            return "RAY_JOB_ID" in os.environ or "RAY_ADDRESS" in os.environ
        return self.mode == "ray"

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        remedy = (
            "export it where the command is started, or on a cluster where Ray is started on each "
            "node: processes of roles inherit it"
        )
        logins = {f"{name} password": url for name, url in env.items() if has_user_info(url)}
        refuse_secrets("cluster.env", env | logins, remedy)
        return env


class RolePlacement(Section):
    """Where one role's workers sit."""

    gpus: float | None = changeable(
        None,
        unit="GPUs",
        gt=0,
        le=1,
        description="GPUs of one worker; a part: it shares one; none: placement.gpus. A generator "
        "has generators.tensor_parallel_size whole ones, if that is not 1.",
    )
    labels: dict[str, str] = changeable({"role": "train"}, description=_LABELS)


class GeneratorPlacement(RolePlacement):
    """Where generators sit."""

    labels: dict[str, str] = changeable({"role": "rollout"}, description=_LABELS)


class PlacementConfig(Section):
    """Which GPUs of which nodes the roles of PPO get."""

    gpus: float = changeable(
        1.0,
        unit="GPUs",
        ge=0,
        le=1,
        description="GPUs of each role's worker; a part: several share one, and "
        "rollout.engine_args.gpu_memory_utilization says what a generator takes of it; 0: CPUs "
        "alone, for every role and every stage. A cluster that a run joins is waited for to have "
        "them; a machine of its own without any is taken as it is.",
    )
    policy: RolePlacement = changeable(RolePlacement(), description="Of policy ranks.")
    critic: RolePlacement = changeable(RolePlacement(), description="Of critic ranks.")
    reference: RolePlacement = changeable(RolePlacement(), description="Of references.")
    reward: RolePlacement = changeable(
        RolePlacement(), description="Of scorers; they get GPUs if a source runs a model there."
    )
    generator: GeneratorPlacement = changeable(GeneratorPlacement(), description="Of generators.")
    share: list[list[Role]] = changeable(
        [],
        description="Sets of roles, such as [[critic, reference]]: a GPU is shared within a set "
        "alone, or among roles of none. Ranks of one group never share one.",
    )
    turns: bool = changeable(
        False,
        description="Generators and learners (policy, critic) take turns on GPUs that they share: "
        "the others' weights wait in main memory.",
    )
    timeout_s: float = changeable(
        300.0,
        unit="seconds",
        gt=0,
        description="Deadline for the cluster to have room for all of them, seconds.",
    )

    @field_validator("share")
    @classmethod
    def _in_one_set(cls, share: list[list[Role]]) -> list[list[Role]]:
        named = list(chain.from_iterable(share))
        twice = sorted({role for role in named if named.count(role) > 1})
        if twice:
            raise ValueError(f"a role may be named once, and {', '.join(twice)} is named twice")
        return share

    def of(self, role: Role) -> RolePlacement:
        """A role's part."""
        return getattr(self, role)

    def gpus_of(self, role: Role) -> float:
        """GPUs of one of its workers (a generator's, where it takes one)."""
        gpus = self.of(role).gpus
        return self.gpus if gpus is None or not self.gpus else gpus

    def sharers(self, role: Role) -> frozenset[str]:
        """Roles that may be on the same GPU, itself among them."""
        for members in self.share:
            if role in members:
                return frozenset(members)
        return frozenset(get_args(Role)) - set(chain.from_iterable(self.share))
