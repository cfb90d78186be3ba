"""What becomes of long responses, and of those that are cut off at their limit."""

from typing import Literal

from rlhf_ray.config.rollout import RolloutConfig
from rlhf_ray.config.section import Section, adjustable


class OverlongConfig(Section):
    """Shapes the score and the loss of long responses."""

    buffer: int | None = adjustable(
        None,
        unit="tokens",
        ge=1,
        description="Last tokens before rollout.max_tokens in which a response's score falls by up "
        "to ppo.overlong.penalty, linearly; none: it doesn't.",
    )
    penalty: float = adjustable(
        1.0,
        unit="score",
        gt=0,
        description="Subtracted from the score of a response that fills the buffer.",
    )
    per_token: float = adjustable(
        0.0,
        unit="score per token",
        ge=0,
        description="Subtracted from a response's score for each of its tokens.",
    )
    truncated: Literal["score", "mask", "bootstrap"] = adjustable(
        "score",
        description="Responses that did not end by themselves. score: they count as they are "
        "scored; mask: they take no part in the policy's loss; bootstrap: the critic's value after "
        "the last token replaces the score.",
    )

    def require_endings(self, rollout: RolloutConfig, missing_eos_penalty: float) -> None:
        """Refuse a buffer beyond the limit, and what would apply to every response.

        Raises:
            ValueError: naming the keys.
        """
        if self.buffer is not None and self.buffer >= rollout.max_tokens:
            raise ValueError(
                f"ppo.overlong.buffer {self.buffer} must be below rollout.max_tokens "
                f"{rollout.max_tokens}: responses of any length would be punished; lower the first"
            )
        if not rollout.ignore_eos or rollout.stop:
            return
        of_all = "" if self.truncated == "score" else f"ppo.overlong.truncated {self.truncated}"
        if missing_eos_penalty:
            of_all = f"ppo.missing_eos_penalty {missing_eos_penalty:g}"
        if of_all:
            raise ValueError(
                f"{of_all} would apply to every response, because with rollout.ignore_eos none "
                "ends by itself; set only one of them, or add stop strings in rollout.stop"
            )
