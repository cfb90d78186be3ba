"""The section evaluate: which models are compared, and how."""

import re
from typing import Literal

from pydantic import field_validator, model_validator

from rlhf_ray.config.rewards import PairJudgeConfig
from rlhf_ray.config.section import Section, changeable, duplicates

JudgedBy = Literal["gold", "reward", "rouge", "judge", "people"]


class EvaluateConfig(Section):
    """Compares the SFT model with the policies trained from it, on held-out prompts."""

    models: list[str] | None = changeable(
        None,
        min_length=1,
        description="Models to compare: `sft` (always included), `dpo`, `ppo` (newest commit), "
        "`ppo@12`, `ppo@best`, or the folder of an adapter on the run's SFT model, such as "
        "another run's policy; none: sft, and dpo and ppo if the run has them.",
    )
    num_prompts: int = changeable(200, unit="prompts", ge=1, description="Held-out prompts.")
    temperature: float | None = changeable(
        None,
        unit="–",
        gt=0,
        description="Sampling temperature of the compared models; none: rollout.temperature. Near "
        "0 (0.01) is what others publish as greedy.",
    )
    judged_by: list[JudgedBy] | None = changeable(
        None,
        min_length=1,
        description="Judges of which of two answers is better; the first one gives `win_rate`. "
        "gold: the synthetic site's gold score; reward: the weighted sum of the sources in "
        "rewards; rouge: ROUGE-L against the row's `reference`, `completion` or `chosen`; judge: "
        "the language model in evaluate.judge; people: verdicts of `rlhf-ray rank` on this run's "
        "answers. none: gold on the synthetic site, else reward.",
    )
    judge: PairJudgeConfig | None = changeable(
        None, description="Language model that compares answers, for judged_by judge."
    )
    bootstrap: int = changeable(
        2000, unit="resamples", ge=100, le=1_000_000, description="Resamples of the 95% intervals."
    )
    instructions: str | None = changeable(
        None,
        description="Instructions that answers are checked against: `builtin`, or a JSON Lines "
        "file of `{prompt, check, args}`; none: not measured.",
    )

    @property
    def asked(self) -> dict[str, object]:
        """The measurements as plain values; a saved evaluation of anything else is not reused."""
        asked = self.model_dump(mode="json", include={"models", "judged_by", "instructions"})
        return asked if self.temperature is None else {**asked, "temperature": self.temperature}

    @field_validator("models", "judged_by")
    @classmethod
    def _each_once(cls, names: list[str] | None) -> list[str] | None:
        if repeated := duplicates(names):
            raise ValueError(f"names {repeated} more than once; name each once")
        return names

    @field_validator("models")
    @classmethod
    def _are_names(cls, models: list[str] | None) -> list[str] | None:
        for name in models or ():
            if name.startswith("ppo@") and not re.fullmatch(r"ppo@(best|\d+)", name):
                raise ValueError(
                    f"{name!r} is not a version; write ppo@best or a number, such as ppo@12"
                )
            if name == "prompt":  # the prompt's column in evaluate/samples.jsonl
                raise ValueError(
                    "'prompt' is a reserved name; write a folder of that name as ./prompt"
                )
        return models

    @model_validator(mode="after")
    def _judge_is_used(self) -> "EvaluateConfig":
        is_used = "judge" in (self.judged_by or ())
        if is_used and self.judge is None:
            raise ValueError(
                "evaluate.judged_by names judge, but evaluate.judge is not set; set it to the url "
                "and model of an OpenAI-compatible endpoint"
            )
        if self.judge is not None and not is_used:
            raise ValueError(
                "evaluate.judge is set, but evaluate.judged_by does not name judge; add it, for "
                "example evaluate.judged_by=[judge]"
            )
        return self
