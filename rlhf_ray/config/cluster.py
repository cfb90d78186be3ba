"""Where the processes run, and how long to wait for them."""

from typing import Literal

from rlhf_ray.config.section import Section, changeable


class ClusterConfig(Section):
    """Ray, deadlines and threads."""

    mode: Literal["auto", "inline", "local", "ray"] = changeable(
        "auto",
        description="inline: one process without Ray; local: a Ray cluster on this machine; ray: "
        "the cluster that this process belongs to; auto: ray inside a Ray job, else local.",
    )
    threads_per_actor: int = changeable(
        1, ge=1, description="CPU threads of each role's process (local mode)."
    )
    start_timeout_s: float = changeable(
        300.0, gt=0, description="Deadline for a role's process to be ready, seconds."
    )
    call_timeout_s: float = changeable(
        600.0, gt=0, description="Deadline for any one call to a role, seconds."
    )
    gpu_hour_price: float | None = changeable(
        None,
        gt=0,
        description="Price of one GPU for an hour, in any currency: then the metric "
        "cost/per_1000_samples is in it.",
    )
    dashboard: bool = changeable(True, description="Start Ray's dashboard (on 127.0.0.1).")
    object_store_mb: int = changeable(
        512, ge=80, description="Size of the local object store, MB (local mode)."
    )
    env: dict[str, str] = changeable(
        {}, description="Environment variables of every role's process."
    )
