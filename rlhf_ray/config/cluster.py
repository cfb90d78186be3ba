"""Where the processes run, and how long to wait for them."""

import os
from typing import Literal

from pydantic import field_validator

from rlhf_ray.config.credentials import has_user_info, refuse_secrets
from rlhf_ray.config.section import Section, changeable


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
