"""The section rank: people rank pairs of the SFT model's answers within a run."""

import math

from rlhf_ray.config.data import DataConfig
from rlhf_ray.config.section import Section, adjustable, changeable, fixed
from rlhf_ray.config.supervised import DpoConfig, RewardConfig


class RankConfig(Section):
    """Asks people which of two answers is better; reward and dpo learn from what they say."""

    answers: int = changeable(
        100,
        unit="verdicts",
        ge=2,
        description="Verdicts of people, skips left out, before the next stage begins.",
    )
    pairs: int | None = fixed(
        None,
        unit="pairs",
        ge=2,
        description="Most pairs that are sampled, each on a prompt of its own; none: a quarter "
        "more than rank.answers, so that some may be skipped.",
    )
    weight: float = adjustable(
        1.0,
        unit="–",
        gt=0,
        description="Weight of people's pairs in what reward and dpo learn from, relative to the "
        "weights in data.preferences; prepare's pairs, or a single data set without one, have 1.",
    )
    wait: bool = changeable(
        True,
        description="Wait for the verdicts; false: end the run where some are missing, to be "
        "resumed when there are enough.",
    )

    @property
    def num_pairs(self) -> int:
        """Most pairs that are sampled."""
        return self.pairs or math.ceil(1.25 * self.answers)

    def require_mixable(self, reward: RewardConfig, dpo: DpoConfig, data: DataConfig) -> None:
        """Raise a ValueError where people's pairs cannot be mixed into what is learnt from."""
        if reward.loss != "pairwise":
            raise ValueError(
                f"reward.loss {reward.loss} learns from single answers, and the stage rank gathers "
                "pairs; set reward.loss=pairwise, or leave rank out of run.stages"
            )
        for name, judge in (("reward", reward.judge), ("dpo", dpo.judge)):
            if judge is not None:
                raise ValueError(
                    f"{name}.judge labels pairs of its own, which are not mixed with those of the "
                    f"stage rank; leave {name}.judge out, or rank out of run.stages"
                )
        if (sources := data.preferences) and len(sources) > 1 and sources[0].weight is None:
            raise ValueError(
                "data.preferences mixes several data sets with the verdicts of the stage rank; "
                "give each of them a weight, to which rank.weight is relative"
            )
