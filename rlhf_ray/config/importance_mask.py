"""Where samples are left out because learner and engine disagree about them."""

from typing import Literal

from pydantic import model_validator

from rlhf_ray.config.section import Section, adjustable


class ImportanceMaskConfig(Section):
    """Leaves out of the policy's loss where learner and engine are too far apart."""

    level: Literal["token", "sequence", "geometric"] = adjustable(
        "token",
        description="What is left out. token: a token, by its own ratio; sequence: a response, by "
        "the product of its tokens' ratios; geometric: a response, by their geometric mean.",
    )
    low: float = adjustable(
        0.0, unit="–", ge=0, le=1, description="Smallest ratio that is kept; 0: no bound."
    )
    high: float = adjustable(..., unit="–", ge=1, description="Largest ratio that is kept.")

    @model_validator(mode="after")
    def _keeps_something(self) -> "ImportanceMaskConfig":
        if self.low == self.high:
            raise ValueError(
                "ppo.importance_mask.low 1 and high 1 leave out whatever is not exactly 1; lower "
                "the first or raise the second"
            )
        return self
