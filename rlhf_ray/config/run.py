"""The run itself: its name, its folder, its seed, its stages."""

from typing import Any, Literal

from pydantic import model_validator

from rlhf_ray.config.section import Section, changeable, fixed
from rlhf_ray.config.stages import DEFAULT_STAGES, StageName


class RunConfig(Section):
    """Identity and extent of a run."""

    name: str = changeable("run", min_length=1, description="Name of the run.")
    dir: str = changeable("", description="Folder of the run; default runs/<run.name>.")
    seed: int = fixed(0, unit="–", ge=0, description="Every random state derives from it.")
    stages: list[StageName] = changeable(
        list(DEFAULT_STAGES),
        min_length=1,
        description="Stages to run, in pipeline order; default all but dpo.",
    )
    resume: Literal["auto", "never", "must"] = changeable(
        "auto",
        description="auto: go on where the folder's run stopped; never: move an old run aside and "
        "start anew; must: fail when there is nothing to go on from.",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_dir(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("dir"):
            return {**values, "dir": f"runs/{values.get('name', 'run')}"}
        return values

    @model_validator(mode="after")
    def _stages_once(self) -> "RunConfig":
        twice = sorted({stage for stage in self.stages if self.stages.count(stage) > 1})
        if twice:
            raise ValueError(f"run.stages names {', '.join(twice)} more than once")
        return self
