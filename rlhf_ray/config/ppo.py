"""PPO: the algorithm."""

import re
from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.algorithms import ESTIMATORS, POLICY_LOSSES
from rlhf_ray.config.filter_groups import FilterGroupsConfig
from rlhf_ray.config.importance_mask import ImportanceMaskConfig
from rlhf_ray.config.overlong import OverlongConfig
from rlhf_ray.config.section import (
    Section,
    adjustable,
    changeable,
    fixed,
)


class PpoConfig(Section):
    """The algorithm."""

    iterations: int = changeable(
        100, unit="iterations", ge=1, description="PPO iterations of the whole run."
    )
    batch_size: int = fixed(64, unit="rollouts", ge=1, description="Rollouts of an iteration.")
    samples_per_prompt: int = fixed(
        1, unit="rollouts", ge=1, description="Rollouts of each prompt."
    )
    epochs: int = adjustable(
        4, unit="passes", ge=1, description="Passes over an iteration's rollouts."
    )
    mini_batch_size: int = adjustable(
        64, unit="rollouts", ge=1, description="Rollouts of an optimizer step, over all ranks."
    )
    max_tokens_per_micro_batch: int = changeable(
        8192,
        unit="tokens",
        ge=1,
        description="Most tokens (padding included) in one forward or backward pass.",
    )
    learning_rate: float = adjustable(
        1.4e-5, unit="–", gt=0, description="The policy's learning rate; the peak of ppo.scheduler."
    )
    scheduler: Literal["constant", "linear", "cosine"] = adjustable(
        "constant",
        description="Decay of both learners' learning rates to the end of ppo.iterations, which "
        "also counts if it changes on resume.",
    )
    warmup_iterations: int = adjustable(
        0, unit="iterations", ge=0, description="Linear warm-up of both learners' learning rates."
    )
    critic_warmup: int = adjustable(
        0,
        unit="iterations",
        ge=0,
        description="First iterations in which only the critic learns; the policy's schedule "
        "begins after them.",
    )
    stop_kl: float | None = adjustable(
        None,
        unit="nats",
        gt=0,
        description="Mean policy/approxkl_avg of an epoch above which the policy takes no further "
        "epochs over the iteration's rollouts; none: no bound.",
    )
    redraw_mini_batches: bool = adjustable(
        False,
        description="Shuffle rollouts into new mini-batches in each epoch after the first.",
    )
    adam_epsilon: float = adjustable(
        1e-5, unit="–", gt=0, description="Adam's epsilon; 1e-5 damps the first updates of PPO."
    )
    max_grad_norm: float = adjustable(
        1.0, unit="–", gt=0, description="Largest gradient norm; larger ones are clipped."
    )
    gamma: float = fixed(1.0, unit="–", ge=0, le=1, description="Discount factor.")
    gae_lambda: float = adjustable(0.95, unit="–", ge=0, le=1, description="GAE's lambda.")
    advantage: str = fixed(
        "gae",
        description="Advantage estimator: "
        + "; ".join(f"{name} {entry.does}" for name, entry in ESTIMATORS.items())
        + "; or module:name of a function of yours.",
    )
    whiten_advantages: bool | None = fixed(
        None,
        description="Scale advantages to mean 0 and deviation 1 over the batch; none: yes, except "
        "with rloo, grpo and dr_grpo.",
    )
    policy_loss: str = fixed(
        "clip",
        description="clip (each token's ratio); gspo (one ratio for a response; needs a clip range "
        "of about 3e-4); cispo (clipped ratios as constant weights); or module:name of a function "
        "with the signature of losses.policy_loss.",
    )
    loss_aggregation: Literal["token_mean", "sequence_mean", "dr_grpo"] = fixed(
        "token_mean",
        description="The policy's loss of a mini-batch. token_mean: mean over all tokens; "
        "sequence_mean: mean over responses of their tokens' mean; dr_grpo: sum over tokens, "
        "divided by the number of responses times rollout.max_tokens.",
    )
    clip_range: float = adjustable(
        0.2,
        unit="–",
        gt=0,
        description="Clip range of the policy ratio; the lower one if clip_range_high is set.",
    )
    clip_range_high: float | None = adjustable(
        None, unit="–", gt=0, description="Upper clip range of the ratio; none: clip_range."
    )
    dual_clip: float | None = adjustable(
        None,
        unit="–",
        gt=1,
        description="Bound on the ratio of tokens with negative advantage (dual clip); none: no "
        "bound.",
    )
    importance_cap: float | None = adjustable(
        None,
        unit="–",
        gt=0,
        description="Largest importance weight of a token: the learner's over the engine's "
        "probability; none: no weights.",
    )
    importance_level: Literal["token", "sequence"] = adjustable(
        "token",
        description="What has an importance weight: each token, or with sequence each response, "
        "the product of its tokens' ratios.",
    )
    importance_mask: ImportanceMaskConfig | None = adjustable(
        None,
        description="Leaves out of the policy's loss, and of its mean, tokens or responses whose "
        "importance ratio is outside of bounds; none: all are kept.",
    )
    entropy_coef: float = adjustable(
        0.0, unit="1/nat", ge=0, description="Weight of the entropy bonus."
    )
    value_clip_range: float = adjustable(0.2, unit="–", gt=0, description="Clip range of values.")
    kl_coef: float = adjustable(
        0.2,
        unit="1/nat",
        ge=0,
        description="Weight of the KL penalty; its initial value if adaptive. A value changed on "
        "resume replaces the adapted one.",
    )
    kl_target: float | None = adjustable(
        6.0,
        unit="nats",
        gt=0,
        description="Target KL of a response for the adaptive controller; none: kl_coef is fixed, "
        "or follows kl_target_per_token.",
    )
    kl_target_per_token: float | None = adjustable(
        None, unit="nats", gt=0, description="Target KL of a token; needs kl_target none."
    )
    kl_horizon: int = adjustable(
        10_000, unit="rollouts", ge=1, description="Horizon of the adaptive controller."
    )
    kl_estimator: Literal["k1", "k2", "k3"] = fixed(
        "k1",
        description="Estimator of the penalised KL; the logged KL, which also steers kl_coef, is "
        "k1.",
    )
    kl_in: Literal["reward", "loss"] = fixed(
        "reward",
        description="reward: subtracted from each token's reward; loss: added to the policy's "
        "loss (with k2 or k3, because k1's gradient there is zero on average).",
    )
    score_position: Literal["last_token", "first_pad"] = fixed(
        "last_token",
        description="Token that gets the score; first_pad: the one after the last, unless the "
        "response has rollout.max_tokens.",
    )
    missing_eos_penalty: float = adjustable(
        0.0,
        unit="score",
        ge=0,
        description="Subtracted from the score of a response that did not end by itself, after "
        "the sources' baseline, scaling and clip.",
    )
    overlong: OverlongConfig = fixed(
        OverlongConfig(), description="Long responses, and those that are cut off at their limit."
    )
    filter_groups: FilterGroupsConfig = fixed(
        FilterGroupsConfig(), description="Prompts whose responses all score the same."
    )
    max_staleness: int = changeable(
        0,
        unit="versions",
        ge=0,
        le=8,
        description="Most versions by which a rollout may be older than the policy that learns "
        "from it. 0: on-policy, generation and learning take turns; k: k batches are generated "
        "while another is learnt, which needs importance_cap or importance_mask.",
    )
    allow_uncorrected: bool = adjustable(
        False,
        description="Allow max_staleness above 0 without importance weights or a mask: older "
        "samples then bias the update.",
    )
    save_every: int = changeable(
        1,
        unit="iterations",
        ge=1,
        description="Iterations between commits to run.dir, each written beside the next "
        "iteration; fewer are written where the disk is slower than that.",
    )
    eval_every: int = changeable(
        20, unit="iterations", ge=1, description="Iterations between held-out evaluations."
    )
    eval_prompts: int = changeable(
        64, unit="prompts", ge=8, description="Held-out prompts of an evaluation."
    )
    keep_checkpoints: int = changeable(
        3,
        unit="commits",
        ge=1,
        description="Newest commits to keep, besides the best one. 1 counts as 2: where the last "
        "one is damaged, a run resumes from the one before it.",
    )
    keep_adapters: Annotated[int, Field(ge=1)] | Literal["all"] | None = changeable(
        None,
        unit="versions",
        description="Commits that leave their adapter, for chat or bisect, when they are dropped: "
        "all, or of every n versions the first that was saved (ppo.save_every); none: none does.",
    )

    @property
    def adapters_every(self) -> int:
        """Versions of which one keeps its adapter when its commit is dropped; 0: none does."""
        return 1 if self.keep_adapters == "all" else self.keep_adapters or 0

    @property
    def is_corrected(self) -> bool:
        """Whether samples are weighted or masked by the mismatch of engine and learner."""
        return self.importance_cap is not None or self.importance_mask is not None

    @property
    def is_scheduled(self) -> bool:
        """Whether learning rates change over the run."""
        return self.scheduler != "constant" or self.warmup_iterations > 0

    @field_validator("advantage")
    @classmethod
    def _known_estimator(cls, name: str) -> str:
        return _require_known("an estimator", name, ESTIMATORS)

    @field_validator("policy_loss")
    @classmethod
    def _known_loss(cls, name: str) -> str:
        return _require_known("a loss", name, POLICY_LOSSES)

    @model_validator(mode="after")
    def _combinations(self) -> "PpoConfig":
        estimator = ESTIMATORS.get(self.advantage)
        if estimator and estimator.needs_groups and self.samples_per_prompt < 2:
            raise ValueError(
                f"ppo.advantage {self.advantage} compares responses to the same prompt, but "
                f"ppo.samples_per_prompt is {self.samples_per_prompt}; set it to 2 or more"
            )
        if self.kl_target is not None and self.kl_target_per_token is not None:
            raise ValueError(
                f"ppo.kl_target {self.kl_target:g} and ppo.kl_target_per_token "
                f"{self.kl_target_per_token:g} both control ppo.kl_coef; set one of them to null"
            )
        is_adaptive = (self.kl_target or self.kl_target_per_token) and self.kl_coef
        if is_adaptive and self.batch_size >= 5 * self.kl_horizon:
            raise ValueError(
                f"ppo.batch_size {self.batch_size} is at least 5 times ppo.kl_horizon "
                f"{self.kl_horizon}: a KL below its target lowers ppo.kl_coef by a fifth a "
                "horizon, so one batch would make it zero or negative; set ppo.kl_horizon above "
                f"{self.batch_size // 5}, or ppo.kl_target to null"
            )
        self._schedule()
        self._bootstrap()
        self.filter_groups.require_groups(self.advantage, self.samples_per_prompt)
        if self.importance_level != "token" and self.importance_cap is None:
            raise ValueError(
                f"ppo.importance_level {self.importance_level} has no effect without weights; set "
                "ppo.importance_cap (usually 2), or leave it out"
            )
        if self.max_staleness and not (self.is_corrected or self.allow_uncorrected):
            raise ValueError(
                f"ppo.max_staleness {self.max_staleness} learns from samples of older policies, "
                "which bias the update unless they are weighted; set ppo.importance_cap (usually "
                "2) or ppo.importance_mask, or ppo.allow_uncorrected=true to go without"
            )
        if self.policy_loss == "cispo" and self.dual_clip is not None:
            raise ValueError(
                f"ppo.dual_clip {self.dual_clip:g} has no effect with ppo.policy_loss cispo, which "
                "bounds the ratio of every token; set one of them to null or clip"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "ppo.kl_in loss with ppo.kl_estimator k1 has no effect, because the gradient of "
                "k1 is zero on average; set ppo.kl_estimator to k2 or k3"
            )
        return self

    def _schedule(self) -> None:
        estimator = ESTIMATORS.get(self.advantage)
        if estimator is not None and not estimator.needs_critic:
            self.refuse_keys_of_a_critic()
        if self.critic_warmup + self.warmup_iterations >= self.iterations:
            raise ValueError(
                f"ppo.critic_warmup {self.critic_warmup} and ppo.warmup_iterations "
                f"{self.warmup_iterations} leave nothing of ppo.iterations {self.iterations}; "
                "lower one of the first two or raise the third"
            )

    def refuse_keys_of_a_critic(self) -> None:
        """Refuse what needs a critic, where the advantage function asks for no values.

        Raises:
            ValueError: such a key is set.
        """
        set_keys = {
            "critic_warmup": self.critic_warmup or None,
            "overlong.truncated": "bootstrap" if self.overlong.truncated == "bootstrap" else None,
        }
        for name, value in set_keys.items():
            if value is not None:
                raise ValueError(
                    f"ppo.{name} {value} needs a critic, which a run with ppo.advantage "
                    f"{self.advantage} has not; leave it out, or set ppo.advantage=gae"
                )

    def _bootstrap(self) -> None:
        if self.overlong.truncated != "bootstrap":
            return
        if self.missing_eos_penalty:
            raise ValueError(
                f"ppo.missing_eos_penalty {self.missing_eos_penalty:g} has no effect with "
                "ppo.overlong.truncated bootstrap, which replaces the score that it is subtracted "
                "from; set only one of them"
            )
        if self.score_position != "last_token":
            raise ValueError(
                "ppo.overlong.truncated bootstrap needs ppo.score_position last_token: behind it "
                "stands the value that replaces the score"
            )


def _require_known(what: str, name: str, known: Collection[str]) -> str:
    if name not in known and not re.fullmatch(r".+:\w+", name):
        raise ValueError(
            f"{name!r} is not {what}: it must be {', '.join(known)} or module:name of a function"
        )
    return name
