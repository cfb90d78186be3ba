"""One learning step of PPO again, alone, in this process, from the commit before it."""

import asyncio
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from actors.critic_learner import CriticLearner
from actors.policy_learner import PolicyLearner
from rlhf_ray.cluster.learner_groups import CriticClient, LearnerGroupClient, PolicyClient
from rlhf_ray.cluster.workers import InlineWorker, fetch
from rlhf_ray.config import Config, load
from rlhf_ray.disk import DAMAGE
from rlhf_ray.driver import kept_batches
from rlhf_ray.driver.batches import learn_from, whitens
from rlhf_ray.driver.checkpoint import STATE
from rlhf_ray.driver.kept_batches import CONFIG, FOLDER, KeptBatch
from rlhf_ray.driver.metrics import learning_metrics
from rlhf_ray.errors import DataError
from rlhf_ray.placement.hardware import hide_gpus, restored_gpus
from rlhf_ray.runs.folder import RunFolder

CLOSE = 1e-5
"""Largest difference after DeepSpeed or several ranks, whose sums are added in another order."""


@dataclass(frozen=True)
class Row:
    """A number of the step, as the run recorded it and as the replay gives it."""

    name: str
    recorded: float | str
    replayed: float | str

    @property
    def difference(self) -> float:
        """Relative to numbers above 1, absolute below; infinite where only one is a number."""
        if self.recorded == self.replayed:
            return 0.0
        if isinstance(self.recorded, str) or isinstance(self.replayed, str):
            return math.inf
        if math.isnan(self.recorded) and math.isnan(self.replayed):
            return 0.0
        both = (self.recorded, self.replayed)
        if not all(map(math.isfinite, both)):
            return math.inf
        return abs(self.recorded - self.replayed) / max(1.0, *map(abs, both))


@dataclass(frozen=True)
class Replay:
    """The outcome of a replay."""

    iteration: int
    version: int
    """Adapter version that the step starts from."""
    num_samples: int
    num_tokens: int
    """Number of response tokens."""
    engine: str
    """What the run learnt with: torch or deepspeed."""
    rows: Sequence[Row]

    @property
    def tolerance(self) -> float:
        """Largest difference at which the step counts as reproduced: 0, or `CLOSE`."""
        return 0.0 if self.engine == "torch" else CLOSE

    @property
    def furthest(self) -> Row:
        """The row that differs most."""
        return max(self.rows, key=lambda row: row.difference)

    @property
    def is_reproduced(self) -> bool:
        """Whether all rows are within the tolerance."""
        return self.furthest.difference <= self.tolerance


@restored_gpus()
def run(config: Config, iteration: int | None, overrides: Sequence[str] = ()) -> Replay:
    """Repeat the learning step of an iteration, and compare it with the run's metrics.

    Args:
        config: names the run's folder; the step has the config that it was run with.
        iteration: whose step; None: the last that is kept.
        overrides: keys to change, to see what the step would have been.

    Raises:
        DataError: the run keeps no batch of that iteration, or a damaged one.
    """
    stage = RunFolder(config).path / "ppo"
    iteration = _chosen(stage, iteration, config.run.keep_batches)
    kept = kept_batches.read(stage, iteration)
    config = _as_it_was(config, stage / FOLDER / str(iteration) / CONFIG, overrides)
    hide_gpus(config)
    if kept.values["engine"] == "torch":  # the order of sums, and so their last bits
        torch.set_num_threads(kept.values["threads"])
    metrics, states, num_tokens = asyncio.run(_learn(config, kept))
    recorded = kept.values["metrics"]
    rows = [Row(name, recorded.get(name, math.nan), value) for name, value in metrics.items()]
    if kept.values["engine"] == "torch":
        rows += _weights(RunFolder(config).path / "checkpoints", kept, states)
    return Replay(
        iteration=iteration,
        version=kept.values["version"],
        num_samples=len(kept.batch.scores),
        num_tokens=num_tokens,
        engine=kept.values["engine"],
        rows=rows,
    )


def _chosen(stage: Path, iteration: int | None, keep_batches: str) -> int:
    """Return the iteration to replay, which must be kept."""
    known = kept_batches.iterations(stage / FOLDER)
    if not known:
        raise DataError(
            f"{stage / FOLDER} holds no batch, so no iteration can be replayed. PPO keeps them as "
            f"run.keep_batches says, which is {keep_batches}"
        )
    if iteration is None:
        return known[-1]
    if iteration not in known:
        raise DataError(
            f"Iteration {iteration} cannot be replayed: its batch is not kept. Those that can: "
            f"{', '.join(map(str, known))}. run.keep_batches, which is {keep_batches}, says what a "
            "run keeps; with all it is every iteration"
        )
    return iteration


def _as_it_was(config: Config, path: Path, overrides: Sequence[str]) -> Config:
    """Return the config that a step was run with, in the folder where the run is now."""
    then = load(path, list(overrides))
    return then.model_copy(update={"run": then.run.model_copy(update={"dir": config.run.dir})})


async def _learn(
    config: Config, kept: KeptBatch
) -> tuple[dict[str, float], dict[str, Mapping[str, bytes]], int]:
    """Load the learners in this process, and take the step.

    Returns:
        The step's metrics, each group's state after it, and its number of response tokens.
    """
    folder = RunFolder(config)
    learners: dict[str, LearnerGroupClient] = {
        "policy": PolicyClient(
            [_worker(PolicyLearner("policy-0", config, folder.sft_model(), "torch"))], 0
        )
    }
    if "critic" in kept.groups:
        critic = CriticLearner("critic-0", config, folder.critic_model(), "torch")
        learners["critic"] = CriticClient([_worker(critic)], 0)
    for name, learner in learners.items():
        try:
            await learner.load(kept.groups[name])
        except SafetensorError as error:
            raise DataError(
                f"The {name}'s state before iteration {kept.values['iteration']} is damaged "
                f"({error}); name another iteration"
            ) from error
    kl_coef = kept.values["kl_coef"]
    stats, reports = await learn_from(
        [kept.batch],
        learners,
        kl_coef,
        config.ppo,
        kept.values["iteration"],
        whitened=whitens(config.ppo),
    )
    metrics = learning_metrics([kept.batch], stats, [*reports.values()], kl_coef)
    states = {name: await fetch(await learner.state()) for name, learner in learners.items()}
    return metrics, states, stats.num_tokens


def _worker(learner: PolicyLearner | CriticLearner) -> InlineWorker:
    learner.start()
    return InlineWorker(repr(learner), learner, lambda *_: None)


def _weights(
    checkpoints: Path, kept: KeptBatch, states: Mapping[str, Mapping[str, bytes]]
) -> list[Row]:
    """Compare the learners' states by their digests, where the run saved those after the step."""
    try:
        path = checkpoints / str(kept.values["version"] + 1) / STATE
        after = json.loads(path.read_text(encoding="utf-8"))
        if after["progress"]["rollbacks_in_a_row"]:
            return []  # those of the commit before the step
        return [
            Row(
                f"{group}/{name}",
                after["sha256"][f"{group}/{name}"][:12],
                hashlib.sha256(content).hexdigest()[:12],
            )
            for group, files in states.items()
            for name, content in files.items()
            if name.endswith(".safetensors")
        ]
    except (*DAMAGE, OSError):
        return []


def as_mapping(replay: Replay) -> dict[str, object]:
    """Return it as plain values; what is not finite is null."""

    def plain(value: float | str) -> float | str | None:
        return value if isinstance(value, str) or math.isfinite(value) else None

    return {
        "iteration": replay.iteration,
        "version": replay.version,
        "reproduced": replay.is_reproduced,
        "tolerance": replay.tolerance,
        "largest_difference": plain(replay.furthest.difference),
        "numbers": {
            row.name: {"recorded": plain(row.recorded), "replayed": plain(row.replayed)}
            for row in replay.rows
        },
    }


def as_text(replay: Replay, overrides: Sequence[str] = ()) -> str:
    """Return a table of the numbers, and the verdict."""
    width = max(len(row.name) for row in replay.rows)
    lines = [
        f"Iteration {replay.iteration}, from version {replay.version}: {replay.num_samples} "
        f"samples, {replay.num_tokens} response tokens",
        f"{'':{width}}  {'recorded':>13}  {'replayed':>13}  difference",
        *(
            f"{row.name:{width}}  {_number(row.recorded)}  {_number(row.replayed)}  "
            f"{row.difference:10.2g}"
            for row in replay.rows
        ),
    ]
    return "\n".join([*lines, _verdict(replay, overrides)])


def _number(value: float | str) -> str:
    return f"{value:>13}" if isinstance(value, str) else f"{value:13.7g}"


def _verdict(replay: Replay, overrides: Sequence[str]) -> str:
    furthest = replay.furthest
    largest = f"the largest difference is {furthest.difference:.2g} ({furthest.name})"
    if overrides:
        return f"With {' '.join(overrides)}: {largest}"
    if not furthest.difference:
        return "Reproduced bit for bit"
    wanted = "bit for bit" if not replay.tolerance else f"within {replay.tolerance:g}"
    return f"{'R' if replay.is_reproduced else 'Not r'}eproduced {wanted}: {largest}"
