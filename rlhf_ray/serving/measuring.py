"""A metric that a run did not log, measured on answers of the versions that it keeps."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import numpy as np

from rlhf_ray.config import Config
from rlhf_ray.driver.checkpoint import kept_versions
from rlhf_ray.errors import DataError
from rlhf_ray.rewards.functions import trl_arguments
from rlhf_ray.rewards.user_function import UserFunction
from rlhf_ray.runs.datasets import held_out_prompts
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.runs.models import find_model
from rlhf_ray.serving.text_generation import Generators
from rlhf_ray.types import Prompt, Rollout

MEASURED: Mapping[str, Callable[[Rollout], float]] = {
    "response/repeating_share": lambda rollout: float(rollout.repeats_a_token),
    "response/distinct_bigrams": lambda rollout: rollout.distinct_bigrams,
    "response_length/mean": lambda rollout: float(len(rollout.response_ids)),
}
"""Metrics that can be measured on answers; functions of the user's own are the others."""

Measure = Callable[[Sequence[Rollout]], float]


def measure_of(name: str) -> Measure | None:
    """Return what measures a metric on answers; None if nothing does.

    Args:
        name: one of `MEASURED`, or ``module:name`` or ``file.py:name`` of a function with TRL's
            signature, whose mean over the answers counts.

    Raises:
        ConfigError: the function cannot be loaded.
    """
    if name in MEASURED:
        return lambda rollouts: fmean(map(MEASURED[name], rollouts))
    if ":" not in name:
        return None
    function = UserFunction("bisect", name, "trl")

    def mean(rollouts: Sequence[Rollout]) -> float:
        scores = asyncio.run(_scores(function, rollouts))
        known = [score for score in scores if score is not None]
        if not known:
            raise DataError(f"{name} gave none of {len(rollouts)} answers a number")
        return fmean(known)

    return mean


async def _scores(function: UserFunction, rollouts: Sequence[Rollout]) -> list[float | None]:
    result = await asyncio.to_thread(function.call, (), trl_arguments(rollouts))
    return function.scores(await function.awaited(result), len(rollouts))


def measured(
    config: Config, measure: Measure, holds: Callable[[float], bool], num_prompts: int
) -> dict[int, float]:
    """Measure as few kept versions as it takes to find the first for which a condition holds.

    Args:
        config: the run's.
        measure: of answers.
        holds: the condition.
        num_prompts: held-out prompts to answer; each has the same seed for every version.

    Returns:
        Version -> its value, in order of the versions.

    Raises:
        DataError: no version is kept.
    """
    run = RunFolder(config)
    kept = kept_versions(run.path / "checkpoints")
    if not kept:
        raise DataError(f"{run.path / 'checkpoints'} keeps no version that could be measured")
    generators = Generators(config)
    tokenizer = generators.of(find_model(config, f"ppo@{kept[0]}")).tokenizer
    prompts = held_out_prompts(config, run, tokenizer, num_prompts)
    values: dict[int, float] = {}

    def holds_for(version: int) -> bool:
        if version not in values:
            generator = generators.of(find_model(config, f"ppo@{version}"))
            answers = [
                generator.sample(prompt.token_ids, config.run.seed + index)
                for index, prompt in enumerate(prompts)
            ]
            values[version] = measure(_rollouts(prompts, answers, version))
        return holds(values[version])

    search(kept, holds_for)
    return dict(sorted(values.items()))


def search(versions: Sequence[int], holds: Callable[[int], bool]) -> None:
    """Ask for versions until the first for which it holds, and the one before it, are known.

    It is taken to hold from some version on. Where it holds for the first, or not for the last, no
    other is asked.
    """
    low, high = 0, len(versions) - 1
    if holds(versions[low]) or not holds(versions[high]):
        return
    while high - low > 1:  # it holds for high, and not for low
        middle = (low + high) // 2
        low, high = (low, middle) if holds(versions[middle]) else (middle, high)


def _rollouts(
    prompts: Sequence[Prompt], answers: Sequence[tuple[list[int], str]], version: int
) -> list[Rollout]:
    return [
        Rollout(
            position=position,
            prompt=prompt,
            response_ids=np.array(ids, dtype=np.int64),
            rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
            finish_reason="stop",
            version=version,
            text=text,
        )
        for position, (prompt, (ids, text)) in enumerate(zip(prompts, answers, strict=True))
    ]
