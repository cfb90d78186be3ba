"""Which GPUs the roles get; how many workers a role has stands in its own section."""

from itertools import chain
from typing import Literal, get_args

from pydantic import field_validator

from rlhf_ray.config.section import Section, changeable

Role = Literal["policy", "critic", "reference", "reward", "generator"]

_LABELS = "Ray labels of its nodes; where no node carries one, nodes without that label."


class RolePlacement(Section):
    """Where one role's workers sit."""

    gpus: float | None = changeable(
        None,
        unit="GPUs",
        gt=0,
        le=1,
        description="GPUs of one worker; a part: it shares one; none: placement.gpus. A generator "
        "has generators.tensor_parallel_size whole ones, if that is not 1.",
    )
    labels: dict[str, str] = changeable({"role": "train"}, description=_LABELS)


class GeneratorPlacement(RolePlacement):
    """Where generators sit."""

    labels: dict[str, str] = changeable({"role": "rollout"}, description=_LABELS)


class PlacementConfig(Section):
    """Which GPUs of which nodes the roles of PPO get."""

    gpus: float = changeable(
        1.0,
        unit="GPUs",
        ge=0,
        le=1,
        description="GPUs of each role's worker; a part: several share one, and "
        "rollout.engine_args.gpu_memory_utilization says what a generator takes of it; 0: CPUs "
        "alone, for every role and every stage. A cluster that a run joins is waited for to have "
        "them; a machine of its own without any is taken as it is.",
    )
    policy: RolePlacement = changeable(RolePlacement(), description="Of policy ranks.")
    critic: RolePlacement = changeable(RolePlacement(), description="Of critic ranks.")
    reference: RolePlacement = changeable(RolePlacement(), description="Of references.")
    reward: RolePlacement = changeable(
        RolePlacement(), description="Of scorers; they get GPUs if a source runs a model there."
    )
    generator: GeneratorPlacement = changeable(GeneratorPlacement(), description="Of generators.")
    share: list[list[Role]] = changeable(
        [],
        description="Sets of roles, such as [[critic, reference]]: a GPU is shared within a set "
        "alone, or among roles of none. Ranks of one group never share one.",
    )
    turns: bool = changeable(
        False,
        description="Generators and learners (policy, critic) take turns on GPUs that they share: "
        "the others' weights wait in main memory.",
    )
    timeout_s: float = changeable(
        300.0,
        unit="seconds",
        gt=0,
        description="Deadline for the cluster to have room for all of them, seconds.",
    )

    @field_validator("share")
    @classmethod
    def _in_one_set(cls, share: list[list[Role]]) -> list[list[Role]]:
        named = list(chain.from_iterable(share))
        twice = sorted({role for role in named if named.count(role) > 1})
        if twice:
            raise ValueError(f"a role may be named once, and {', '.join(twice)} is named twice")
        return share

    def of(self, role: Role) -> RolePlacement:
        """A role's part."""
        return getattr(self, role)

    def gpus_of(self, role: Role) -> float:
        """GPUs of one of its workers (a generator's, where it takes one)."""
        gpus = self.of(role).gpus
        return self.gpus if gpus is None or not self.gpus else gpus

    def sharers(self, role: Role) -> frozenset[str]:
        """Roles that may be on the same GPU, itself among them."""
        for members in self.share:
            if role in members:
                return frozenset(members)
        return frozenset(get_args(Role)) - set(chain.from_iterable(self.share))
