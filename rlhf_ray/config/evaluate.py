"""What the stage evaluate compares, and how."""

import re
from typing import Any, Literal

from pydantic import field_validator, model_validator

from rlhf_ray.config.rewards import PairJudgeConfig
from rlhf_ray.config.section import Section, changeable

JudgedBy = Literal["gold", "reward", "rouge", "judge"]


class EvaluateConfig(Section):
    """Comparison of the SFT model with what was made of it, on held-out prompts."""

    models: list[str] | None = changeable(
        None,
        min_length=1,
        description="Models to compare: `sft` (always among them), `dpo`, `ppo` (newest commit), "
        "`ppo@12`, `ppo@best`, or the folder of an adapter on the run's SFT model, such as another "
        "run's policy; none: sft, and dpo and ppo as far as the run has them.",
    )
    num_prompts: int = changeable(200, unit="prompts", ge=1, description="Held-out prompts.")
    judged_by: list[JudgedBy] | None = changeable(
        None,
        min_length=1,
        description="What decides which of two answers is better; the first one gives `win_rate`. "
        "gold: the synthetic site's gold score; reward: the weighted sum of the sources in "
        "rewards; rouge: ROUGE-L against the row's `reference`, `completion` or `chosen`; judge: "
        "the language model in evaluate.judge. none: gold on the synthetic site, else reward.",
    )
    judge: PairJudgeConfig | None = changeable(
        None, description="A language model that compares answers, for judged_by judge."
    )
    bootstrap: int = changeable(
        2000, unit="resamples", ge=100, description="Resamples of the 95% intervals."
    )
    instructions: str | None = changeable(
        None,
        description="Instructions whose following is checked: `builtin`, or a JSON Lines file of "
        "`{prompt, check, args}`; none: not measured.",
    )

    @property
    def asked(self) -> dict[str, Any]:
        """What is measured, as plain values: an evaluation of something else is not this one."""
        return self.model_dump(mode="json", include={"models", "judged_by", "instructions"})

    @field_validator("models", "judged_by")
    @classmethod
    def _each_once(cls, names: list[str] | None) -> list[str] | None:
        twice = sorted({name for name in names or () if (names or []).count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} stands there twice; name each once")
        return names

    @field_validator("models")
    @classmethod
    def _are_names(cls, models: list[str] | None) -> list[str] | None:
        for name in models or ():
            if name.startswith("ppo@") and not re.fullmatch(r"ppo@(best|\d+)", name):
                raise ValueError(f"{name!r} is no version: it must be ppo@best, or such as ppo@12")
            if name == "prompt":  # what evaluate/samples.jsonl calls the prompt
                raise ValueError("'prompt' names no model; write a folder as ./prompt")
        return models

    @model_validator(mode="after")
    def _the_judge_is_asked(self) -> "EvaluateConfig":
        asked = "judge" in (self.judged_by or ())
        if asked and self.judge is None:
            raise ValueError(
                "evaluate.judged_by names judge, and evaluate.judge, who that is, is not set; give "
                "url and model of an OpenAI-compatible endpoint there"
            )
        if self.judge is not None and not asked:
            raise ValueError(
                "evaluate.judge is set and evaluate.judged_by does not name it; add judge there, "
                "for example evaluate.judged_by=[judge]"
            )
        return self
