"""What becomes of prompts whose responses all score the same."""

from rlhf_ray.config.algorithms import ESTIMATORS
from rlhf_ray.config.section import Section, adjustable


class FilterGroupsConfig(Section):
    """Replaces prompts whose responses all score the same: compared in a group, they teach nothing.

    The next prompts take their place (DAPO's dynamic sampling).
    """

    max_refills: int = adjustable(
        0,
        unit="refills",
        ge=0,
        description="Times that such prompts of a batch are replaced, each time as many as there "
        "are; what is left then is learnt as it is, with a warning. 0: none is replaced. Needs "
        "rloo, grpo, dr_grpo, or a function of yours that takes group_size; and shards of one "
        "prompt: ppo.samples_per_prompt must be a multiple of rollout.shard_size.",
    )

    def require_groups(self, advantage: str, samples_per_prompt: int) -> None:
        """Refuse a filter where no responses to the same prompt are compared.

        Raises:
            ValueError: naming the keys.
        """
        if not self.max_refills:
            return
        estimator = ESTIMATORS.get(advantage)
        if estimator is not None and not estimator.needs_groups:
            raise self.without_groups(advantage)
        if samples_per_prompt < 2:
            raise ValueError(
                f"ppo.filter_groups.max_refills {self.max_refills} compares responses to the same "
                f"prompt, but ppo.samples_per_prompt is {samples_per_prompt}; set it to 2 or more"
            )

    def without_groups(self, advantage: str) -> ValueError:
        """Return the error of an advantage function that takes no groups."""
        return ValueError(
            f"ppo.filter_groups.max_refills {self.max_refills} replaces prompts whose responses "
            f"all score the same, but with ppo.advantage {advantage} those are learnt from, too; "
            "set it to 0, or ppo.advantage to rloo, grpo or dr_grpo"
        )

    def require_whole_groups(self, samples_per_prompt: int, shard_size: int) -> None:
        """Refuse shards of several prompts, which could not be replaced one by one.

        Raises:
            ValueError: naming the keys.
        """
        if self.max_refills and samples_per_prompt % shard_size:
            raise ValueError(
                f"ppo.filter_groups.max_refills {self.max_refills} replaces single prompts, but a "
                f"shard of rollout.shard_size {shard_size} holds responses to several; set "
                f"rollout.shard_size={samples_per_prompt}, which is ppo.samples_per_prompt"
            )
