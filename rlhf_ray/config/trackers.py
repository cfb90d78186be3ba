"""Who else is told the metrics, besides the JSON lines in the run's folder."""

from typing import Any, Literal

from pydantic import field_validator, model_validator

from rlhf_ray.config.section import Section, changeable, has_user_info

Samples = Literal["none", "local", "all"]
"""Trackers that are told texts."""


class WandbConfig(Section):
    """Weights & Biases; it takes its key from `wandb login` or from WANDB_API_KEY."""

    project: str = changeable("rlhf-ray", min_length=1, description="Project of the run.")
    entity: str | None = changeable(None, description="User or team; none: wandb's default.")
    group: str | None = changeable(None, description="Group of runs that are shown together.")
    tags: list[str] = changeable([], description="Tags of the run.")
    mode: Literal["online", "offline", "disabled"] | None = changeable(
        None,
        description="offline: kept in run.dir until `wandb sync`; none: WANDB_MODE, else online.",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, values: Any) -> Any:
        given = isinstance(values, dict) and {"api_key", "key", "token"} & set(values)
        if given:
            raise ValueError(
                f"{given.pop()} may not stand here, because the config is written to run.dir; run "
                "`wandb login` or export WANDB_API_KEY"
            )
        return values


class TrackioConfig(Section):
    """Trackio: a local SQLite file, or a Space that shows the run."""

    project: str = changeable("rlhf-ray", min_length=1, description="Project of the run.")
    group: str | None = changeable(None, description="Group of runs that are shown together.")
    space_id: str | None = changeable(
        None, description="Hugging Face Space to send to; none: this machine (TRACKIO_DIR)."
    )


class MlflowConfig(Section):
    """MLflow; a server's login stands in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""

    experiment: str = changeable("rlhf-ray", min_length=1, description="Experiment of the run.")
    tracking_uri: str | None = changeable(
        None,
        description="Server or store, such as http://host:5000 or sqlite:///mlflow.db; none: "
        "MLFLOW_TRACKING_URI, else MLflow's default.",
    )

    @field_validator("tracking_uri")
    @classmethod
    def _no_secrets(cls, uri: str | None) -> str | None:
        if uri is not None and has_user_info(uri):
            raise ValueError(
                "holds a login, and the config is written to run.dir; export "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or for a database the "
                "whole MLFLOW_TRACKING_URI, instead"
            )
        return uri


class TrackersConfig(Section):
    """Each is on where its key is set, with `{}` for its defaults; metrics.jsonl is always there.

    Whatever happens to a tracker, the run goes on.
    """

    tensorboard: bool = changeable(True, description="TensorBoard event files in run.dir.")
    wandb: WandbConfig | None = changeable(None, description="Weights & Biases; none: off.")
    trackio: TrackioConfig | None = changeable(None, description="Trackio; none: off.")
    mlflow: MlflowConfig | None = changeable(None, description="MLflow; none: off.")
    samples: Samples = changeable(
        "local",
        description="Trackers that are told prompts and responses; local: those that keep them on "
        "this machine (wandb offline, Trackio without a Space, an MLflow store of files).",
    )
    completions_every: int = changeable(
        10,
        unit="iterations",
        ge=1,
        description="PPO iterations between two tables of sample completions.",
    )
