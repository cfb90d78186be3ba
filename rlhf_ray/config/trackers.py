"""Section of the trackers that get metrics besides the JSON lines in the run's folder."""

from typing import Literal

from pydantic import field_validator, model_validator

from rlhf_ray.config.section import (
    Section,
    changeable,
    has_user_info,
    is_mapping,
    require_host,
    secret_keys,
)
from rlhf_ray.secrecy import holds_secret

Samples = Literal["none", "local", "all"]
"""Which trackers get prompts and responses."""


class WandbConfig(Section):
    """Weights & Biases; its key comes from `wandb login` or WANDB_API_KEY."""

    project: str = changeable("rlhf-ray", min_length=1, description="Project of the run.")
    entity: str | None = changeable(None, description="User or team; none: wandb's default.")
    group: str | None = changeable(None, description="Group of runs shown together.")
    tags: list[str] = changeable([], description="Tags of the run.")
    mode: Literal["online", "offline", "disabled"] | None = changeable(
        None,
        description="offline: keep it in run.dir until `wandb sync`; none: WANDB_MODE, else "
        "online.",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, values: object) -> object:
        if is_mapping(values) and (secrets := [keys[-1] for keys in secret_keys(values)]):
            raise ValueError(
                f"may not contain {secrets[0]!r}, because the config is written to run.dir; "
                "run `wandb login` or export WANDB_API_KEY"
            )
        return values


class TrackioConfig(Section):
    """Trackio: a local SQLite file, or a Space."""

    project: str = changeable("rlhf-ray", min_length=1, description="Project of the run.")
    group: str | None = changeable(None, description="Group of runs shown together.")
    space_id: str | None = changeable(
        None, description="Hugging Face Space to send to; none: this machine (TRACKIO_DIR)."
    )


class MlflowConfig(Section):
    """MLflow; a server's login comes from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""

    experiment: str = changeable("rlhf-ray", min_length=1, description="Experiment of the run.")
    tracking_uri: str | None = changeable(
        None,
        description="Server or store, such as http://host:5000 or sqlite:///mlflow.db; none: "
        "MLFLOW_TRACKING_URI, else MLflow's default.",
    )

    @field_validator("tracking_uri")
    @classmethod
    def _no_secrets(cls, uri: str | None) -> str | None:
        if uri is not None and (has_user_info(uri) or holds_secret(uri)):
            raise ValueError(
                "holds a login, and the config is written to run.dir; export "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead, or for a database "
                "the whole MLFLOW_TRACKING_URI"
            )
        return require_host(uri) if uri and uri.startswith(("http:", "https:")) else uri


class TrackersConfig(Section):
    """A tracker is on if its key is set; `{}` takes its defaults. metrics.jsonl is always written.

    A tracker that fails never stops the run.
    """

    tensorboard: bool = changeable(True, description="TensorBoard event files in run.dir.")
    wandb: WandbConfig | None = changeable(None, description="Weights & Biases; none: off.")
    trackio: TrackioConfig | None = changeable(None, description="Trackio; none: off.")
    mlflow: MlflowConfig | None = changeable(None, description="MLflow; none: off.")
    samples: Samples = changeable(
        "local",
        description="Trackers that get prompts and responses; local: those that keep them on this "
        "machine (wandb offline, Trackio without a Space, a file store of MLflow).",
    )
    completions_every: int = changeable(
        10,
        unit="iterations",
        ge=1,
        description="PPO iterations between two tables of sample completions.",
    )
